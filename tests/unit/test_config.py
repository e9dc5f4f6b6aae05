"""Every field refuses what cannot run; the loader's errors name the key and the way out."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from modeling.language import LanguageModel
from modeling.tensor_parallel import TensorParallel
from pretrain import train
from pretrain.config import LanguageRunConfig
from pretrain.config_io import config_from_dict, config_to_yaml, load_config
from pretrain.config_sections import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))

BAD_VALUES = [
    ("model.n_layers", 0), ("model.d_model", 0), ("model.headdim", 7), ("model.widths", [8, 4]),
    ("model.d_state", 0), ("model.expand", 0), ("model.d_conv", 0), ("model.chunk_size", 0),
    ("model.norm_eps", 0.0), ("model.vocab_size", 1),
    ("data.path", ""), ("data.path", "s3://bucket/tokens"), ("data.seq_len", 0), ("data.seq_len", 48),
    ("data.tokens_per_step", 100), ("data.micro_batch", 0), ("data.n_workers", -1),
    ("optim.lr", 0.0), ("optim.steps", 0), ("optim.steps", 10**8), ("optim.warmup_steps", 50), ("optim.warmup_steps", -1),
    ("optim.schedule", "linear"), ("optim.decay_steps", 5), ("optim.decay_steps", 99),
    ("optim.min_lr_ratio", 1.5), ("optim.betas", [0.9, 1.0]), ("optim.betas", [0.9]),
    ("optim.eps", 0.0), ("optim.weight_decay", -0.1), ("optim.clip_norm", -1.0), ("optim.ema_decay", 1.0),
    ("nesting.rule", "some"), ("nesting.draw", "mixed"), ("nesting.loss_weights", [1.0]),
    ("nesting.loss_weights", [1.0, -1.0]), ("nesting.distill_weight", -1.0), ("nesting.distill_temperature", 0.0),
    ("nesting.rule", "sandwich"),
    ("parallel.tensor", 0), ("parallel.tensor", 3), ("parallel.zero_stage", 0), ("parallel.zero_stage", 3), ("parallel.activation_checkpointing", "some"),
    ("checkpoint.every_steps", -1), ("checkpoint.keep_last", 0),
    ("logging.every_steps", 0), ("logging.eval_every_steps", -1), ("logging.eval_sequences", -1),
    ("logging.wandb", "maybe"), ("logging.peak_tflops", -1.0),
    ("precision", "fp16"), ("run_dir", ""), ("seed", -1), ("seed", 2**32),
    *((key, value) for value in (float("inf"), float("nan"), ".inf", "inf") for key in (
        "optim.lr", "optim.eps", "optim.weight_decay", "optim.clip_norm", "nesting.distill_weight",
        "nesting.distill_temperature", "stability.spike_factor", "checkpoint.stop_margin_s", "logging.peak_tflops",
    )),
    ("nesting.loss_weights", [1.0, float("inf")]),
]  # fmt: skip


def base() -> dict[str, Any]:
    return {
        "run_dir": "runs/test",
        "model": {"n_layers": 2, "d_model": 32, "headdim": 4, "widths": [16, 8], "vocab_size": 64},
        "data": {"path": "shards", "seq_len": 32, "tokens_per_step": 256},
        "optim": {"lr": 1e-3, "steps": 50, "warmup_steps": 5},
    }


def changed(key: str, value: Any) -> dict[str, Any]:
    raw = base()
    *sections, name = key.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = value
    return raw


def test_base_is_valid() -> None:
    config_from_dict(base())


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=str)
def test_bad_value_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key.rpartition(".")[-1]):
        config_from_dict(changed(key, value))


def test_distillation_needs_shared_draws_and_a_student() -> None:
    raw = changed("nesting", {"distill_weight": 1.0, "draw": "separate"})
    with pytest.raises(ConfigError, match=r"nesting\.draw=shared"):
        config_from_dict(raw)
    raw = changed("nesting.distill_weight", 1.0)
    raw["model"]["widths"] = [16]
    with pytest.raises(ConfigError, match="narrower width"):
        config_from_dict(raw)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lrr", 1.0, r"optim\.lrr: did you mean optim\.lr"),
        ("data.micro_bacth", 1, r"did you mean data\.micro_batch"),
        ("optimizer", {}, "did you mean optim"),
        ("data.zzz", 1, "known keys: path"),
        ("optim.steps", "many", r"optim\.steps='many': must be int"),
        ("optim.steps", 1.5, r"optim\.steps=1\.5"),
        ("optim.steps", True, r"optim\.steps=True"),
        ("optim.lr", "fast", r"optim\.lr='fast': must be a number"),
        ("model.widths", 16, r"model\.widths=16: must be a list"),
        ("model.widths", [16, "x"], r"model\.widths\[1\]"),
        ("data", "shards", "data: must be a mapping"),
        ("task", ["language"], r"task=\['language'\]: must be one of language, vision"),
        ("deterministic", 1, "deterministic=1: must be bool"),
    ],
)
def test_loader_names_key_and_way_out(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(changed(key, value))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "model",
            {"d_model": 40, "headdim": 4, "n_heads": 20, "widths": [20, 8]},
            r"model\.d_model=40 is not a multiple of 16",
        ),
        ("model", {"widths": [16, 2]}, r"2 heads of 4 are 8 channels on each of parallel\.tensor=1 ranks"),
        ("parallel", {"tensor": 4}, r"8 heads of 4 are 8 channels on each of parallel\.tensor=4 ranks"),
    ],
)
def test_float8_asks_for_multiples_of_16(section: str, values: dict[str, Any], message: str) -> None:
    raw = base()
    raw["precision"] = "fp8"
    assert config_from_dict(raw).precision == "fp8"
    raw[section] = raw.get(section, {}) | values
    with pytest.raises(ConfigError, match=message):
        config_from_dict(raw)
    raw["precision"] = "bf16"
    config_from_dict(raw)


def test_float8_takes_the_channels_of_a_gathered_width_whole() -> None:
    raw = base() | {"precision": "fp8", "parallel": {"tensor": 4, "sequence": True, "gathered_width": 0.5}}
    raw["data"]["micro_batch"] = 4
    assert config_from_dict(raw).gathered_heads == 8
    raw["parallel"]["gathered_width"] = 0.0
    with pytest.raises(ConfigError, match="8 heads of 4 are 8 channels on each"):
        config_from_dict(raw)


def test_float8_is_refused_where_the_kernels_do_not_run() -> None:
    cfg = config_from_dict(base() | {"precision": "fp8"})
    with pytest.raises(ConfigError, match=r"precision=fp8 needs the fused kernels, .* \(no GPU\): use bf16"):
        train._mixer_path(cfg, torch.device("cpu"), torch.bfloat16)


def test_tensor_parallelism_must_divide_the_embedding_too() -> None:
    raw = changed("model", {"n_layers": 2, "d_model": 32, "headdim": 4, "n_heads": 24, "widths": [24, 12, 6]})
    raw["model"]["vocab_size"], raw["parallel"] = 2000, {"tensor": 3}
    # 2,000 is rounded up to 2,048 rows; 2,304 is the next multiple of 128 and 3.
    with pytest.raises(
        ConfigError, match=r"3 does not divide the embedding's 2048 rows .* one of \[1, 2\], or"
    ) as caught:
        config_from_dict(raw)
    assert str(caught.value).endswith("model.vocab_size=2304")
    raw["parallel"]["tensor"] = 4
    with pytest.raises(ConfigError, match=r"every width of \[24, 12, 6\] heads: use one of \[1, 2\] or drop a width"):
        config_from_dict(raw)
    raw["model"]["vocab_size"], raw["parallel"]["tensor"] = 2304, 3
    cfg = config_from_dict(raw)
    assert isinstance(cfg, LanguageRunConfig)
    model = LanguageModel(cfg.model, tp=TensorParallel(size=cfg.parallel.tensor))
    assert model.embedding.shape[0] == 768


def test_missing_keys_are_all_named() -> None:
    raw = base()
    del raw["optim"]["lr"], raw["optim"]["steps"]
    with pytest.raises(ConfigError, match=r"optim\.lr, optim\.steps: required"):
        config_from_dict(raw)


def test_numbers_as_people_write_them() -> None:
    assert config_from_dict(changed("optim.lr", "6e-4")).optim.lr == 6e-4  # YAML 1.1 reads 6e-4 as a string
    assert config_from_dict(changed("optim.lr", 1)).optim.lr == 1.0
    assert config_from_dict(changed("optim.steps", 100.0)).optim.steps == 100


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(base()))
    cfg = load_config(path, ["optim.lr=3e-4", "model.widths=[16,4]", "parallel.tensor=2", "data.tokenizer="])
    assert (cfg.optim.lr, cfg.model.widths, cfg.parallel.tensor, cfg.data.tokenizer) == (3e-4, (16, 4), 2, "")
    for bad in ("optim.lr", "=3", "optim.lr.x=3", "model.widths=[16"):
        with pytest.raises(ConfigError, match="override"):
            load_config(path, [bad])


@pytest.mark.parametrize("text", ["- a\n", "a: [", "", "\x00"])
def test_unreadable_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lr: 1.0\ndata: {}\noptim:\n  steps: 5\n", "line 4: optim is given twice, first in line 1"),
        ("optim:\n  lr: 1.0\n  steps: 5\n  lr: 2.0\n", "line 4: lr is given twice, first in line 2"),
        ("model: {widths: [16],\n widths: [8]}\n", "line 2: widths is given twice, first in line 1"),
    ],
    ids=["section", "key", "in braces"],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"run\.yaml cannot be read: {message}"):
        load_config(path)
    path.write_text(yaml.safe_dump(base()))
    with pytest.raises(ConfigError, match=r"override .*: line 1: lr is given twice"):
        load_config(path, ["optim={lr: 1.0, steps: 5, lr: 2.0}"])


def test_a_value_that_no_date_or_float_can_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(base()))
    with pytest.raises(ConfigError, match=r"override 'run_dir=2026-02-30': the value is not YAML: day is out of range"):
        load_config(path, ["run_dir=2026-02-30"])
    with pytest.raises(ConfigError, match=r"optim\.lr: has 401 digits"):
        load_config(path, ["optim.lr=1" + 400 * "0"])
    path.write_text(path.read_text() + "wandb_project: 2026-02-30\n")
    with pytest.raises(ConfigError, match=r"run\.yaml cannot be read: day is out of range"):
        load_config(path)


def test_a_key_may_replace_one_that_it_merges_in(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(base()) + "stability: {<<: {max_skips: 3, spike_window: 9}, max_skips: 4}\n")
    stability = load_config(path).stability
    assert (stability.max_skips, stability.spike_window) == (4, 9)


def test_the_largest_seed_draws_weights() -> None:
    cfg = config_from_dict(changed("seed", 2**32 - 1))
    assert isinstance(cfg, LanguageRunConfig)
    LanguageModel(cfg.model).init_weights(cfg.seed)


def test_written_config_reads_back_equal(tmp_path: Path) -> None:
    cfg = config_from_dict(changed("nesting.loss_weights", [0.75, 0.25]))
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(cfg))
    assert load_config(path) == cfg


def test_accumulation_follows_from_tokens_and_ranks() -> None:
    cfg = config_from_dict(changed("parallel.tensor", 2))
    assert cfg.grad_accum_steps(4) == 4  # 256 / 32 = 8 sequences over 2 replicas
    with pytest.raises(ConfigError, match="not a multiple"):
        cfg.grad_accum_steps(3)
    with pytest.raises(ConfigError, match="not a multiple"):
        cfg.grad_accum_steps(6)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_config_loads_and_divides(path: Path) -> None:
    cfg = load_config(path)
    assert len(cfg.model.widths) == 4
    assert cfg.grad_accum_steps(2) >= 1


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "tensor", "message"),
    [
        (4, 4, 1, r"data\.micro_batch=4: use data\.micro_batch=2$"),  # 8 sequences over 4 replicas
        (1, 12, 1, r"data\.micro_batch=12: use data\.micro_batch=8$"),
        (1, 3, 1, r"data\.micro_batch=3: use data\.micro_batch=2$"),
        (3, 1, 1, r"data\.micro_batch=1: 3 replicas cannot share the step evenly: change it or the number of ranks$"),
        (3, 1, 2, r"3 ranks are not a multiple of parallel\.tensor=2: change one of them$"),
    ],
)
def test_a_step_that_does_not_come_out_says_what_would(ranks: int, micro_batch: int, tensor: int, message: str) -> None:
    raw = base()
    raw["data"]["micro_batch"] = micro_batch
    raw["parallel"] = {"tensor": tensor}
    with pytest.raises(ConfigError, match=message):
        config_from_dict(raw).grad_accum_steps(ranks)
