"""Models of mamba-ssm, transformers and the public MatMamba come in as they are, go out bit for bit, and start runs."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep import train_tokenizer
from modeling import import_model
from modeling.config import LanguageConfig
from modeling.convert import to_mamba_ssm
from modeling.export import export
from modeling.head_order import head_importance, importance_order, reorder_heads
from modeling.import_model import ImportModelError, main, read_model
from modeling.language import LanguageModel
from modeling.model_folder import ModelFolderError, load_model, tokenizer_beside
from tests.parity.oracles import mamba_ssm_ref_logits
from tests.parity.test_generate_cli import write_tokenizer

CFG = LanguageConfig(n_layers=3, d_model=64, headdim=16, widths=(8, 4, 2, 1), d_state=16, chunk_size=16, vocab_size=128)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    model = LanguageModel(CFG)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    # Norms and D start at one: a mistake in their order would not show.
    return {
        name: p.detach() + (0.1 * torch.randn(p.shape, generator=generator) if p.dim() == 1 else 0)
        for name, p in model.named_parameters()
    }


@torch.no_grad()
def logits(state: dict[str, Tensor], cfg: LanguageConfig, tokens_bt: Tensor, n_heads: int) -> Tensor:
    model = LanguageModel(cfg)
    model.load_state_dict(state)
    return model.logits(model(tokens_bt, cfg.layer_widths(n_heads)))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def tokens() -> Tensor:
    return torch.randint(0, 100, (2, 37), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["mamba_ssm", "hf"])
def test_out_in_and_out_again_is_the_same_bytes(
    state: dict[str, Tensor], target: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    export(state, CFG, CFG.layer_widths(8), target, tmp_path / "first", dtype=dtype)
    assert main([str(tmp_path / "first"), "-o", str(tmp_path / "ours"), "--widths", "1,1/2,1/4,1/8"]) == 0
    imported = load_model(tmp_path / "ours")
    assert imported.cfg == CFG
    name = "pytorch_model.bin" if target == "mamba_ssm" else "model.safetensors"
    back, cfg = read_model(tmp_path / "first")
    export(back, cfg, cfg.layer_widths(8), target, tmp_path / "second", dtype=dtype)

    def read(folder: Path) -> dict[str, Tensor]:
        return load_file(folder / name) if target == "hf" else torch.load(folder / name, weights_only=True)

    first, second = read(tmp_path / "first"), read(tmp_path / "second")
    assert list(first) == list(second)
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), second[key].view(torch.uint8)), key
    if dtype == torch.float32:
        assert all(torch.equal(p, state[key]) for key, p in imported.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_remote_code_folder_comes_back_with_all_its_widths(
    state: dict[str, Tensor], dtype: torch.dtype, tmp_path: Path
) -> None:
    cfg = replace(CFG, vocab_size=100)  # 28 rows of the embedding are padding, which is not exported
    export(state, cfg, cfg.layer_widths(8), "remote_code", tmp_path / "first", dtype=dtype)
    assert main([str(tmp_path / "first"), "-o", str(tmp_path / "ours")]) == 0
    imported = load_model(tmp_path / "ours")
    assert imported.cfg == cfg
    for name, parameter in imported.named_parameters():
        expected = state[name].to(dtype).float() if state[name].dim() > 1 else state[name]
        assert torch.equal(
            parameter[:100] if name == "embedding" else parameter,
            expected[: len(parameter)][:100] if name == "embedding" else expected,
        ), name
    back, _ = read_model(tmp_path / "first")
    export(back, cfg, cfg.layer_widths(8), "remote_code", tmp_path / "second", dtype=dtype)
    files = ("model.safetensors", "config.json")
    assert all((tmp_path / "first" / f).read_bytes() == (tmp_path / "second" / f).read_bytes() for f in files)


def test_a_remote_code_folder_of_a_mix_or_of_other_sizes_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    export(state, CFG, (8, 2, 4), "remote_code", tmp_path / "mix")
    with pytest.raises(ImportModelError, match="a mix that was cut out"):
        read_model(tmp_path / "mix")
    export(state, CFG, CFG.layer_widths(8), "remote_code", tmp_path / "whole")
    config = tmp_path / "whole" / "config.json"
    about = json.loads(config.read_text())
    for changed, said in (
        ({"d_state": 32}, "conv_bc[a-z_.]* is"),
        ({"d_model": "many"}, "whole number"),
        ({"n_layers": 2, "layer_heads": [8, 8]}, "absent"),
        ({"widths": [3, 8]}, "widest first"),
    ):
        config.write_text(json.dumps(about | changed))
        with pytest.raises(ImportModelError, match=said):
            read_model(tmp_path / "whole")
    config.write_text(json.dumps(about))
    with pytest.raises(ImportModelError, match="vocab_size=128, leave --vocab-size 100 out"):
        read_model(tmp_path / "whole", vocab_size=100)


@pytest.mark.parametrize(("heads", "widths"), [(4, (4, 2, 1)), (3, (3, 2, 1)), (1, (1,))])
def test_a_width_that_was_cut_out_comes_back_with_those_inside_it(
    state: dict[str, Tensor], heads: int, widths: tuple[int, ...], tmp_path: Path
) -> None:
    export(state, CFG, CFG.layer_widths(heads), "remote_code", tmp_path / "cut")
    back, cfg = read_model(tmp_path / "cut")
    assert cfg == replace(CFG, n_heads=heads, widths=widths)
    for width in widths:
        assert relative(logits(back, cfg, tokens(), width), logits(state, CFG, tokens(), width)) < TOLERANCE


def test_heads_of_a_nested_model_keep_their_order(
    state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(state, CFG, CFG.layer_widths(8), "remote_code", tmp_path / "nested")
    # Also where it is to become a model of one width: its narrow models were trained, whatever they will be used for.
    assert main([str(tmp_path / "nested"), "-o", str(tmp_path / "ours"), "--reorder-heads", "--widths", "1"]) == 2
    assert "the first heads are the narrow models" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_model_that_transformers_wrote(tmp_path: Path) -> None:
    """Its own initial weights, its own files, in several pieces."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    about = Mamba2Config(
        num_heads=8, head_dim=16, vocab_size=100, hidden_size=64, state_size=16, num_hidden_layers=3, n_groups=1,
        chunk_size=16, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Mamba2ForCausalLM(about).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB", safe_serialization=False)
    assert len(list((tmp_path / "hf").glob("*.bin"))) > 1
    imported, cfg = read_model(tmp_path / "hf")
    with torch.no_grad():
        expected = theirs(tokens()).logits
    assert cfg.vocab_size == 100
    assert relative(logits(imported, cfg, tokens(), 8)[..., :100], expected) < TOLERANCE

    # transformers 5 has another word for infinity.
    path = tmp_path / "hf" / "config.json"
    said = json.loads(path.read_text())
    assert said["time_step_limit"] == [0, math.inf]
    path.write_text(json.dumps({**said, "time_step_limit": [0.0, {"__float__": "Infinity"}]}))
    assert read_model(tmp_path / "hf")[1] == cfg
    path.write_text(json.dumps({**said, "time_step_limit": [{"__float__": "-Infinity"}, {"__float__": "NaN"}]}))
    with pytest.raises(ImportModelError, match=r"time_step_limit=.-inf, .*NaN.*not importable"):
        read_model(tmp_path / "hf")


def test_a_state_dict_alone_as_training_scripts_leave_it(state: dict[str, Tensor], tmp_path: Path) -> None:
    """The public MatMamba's names under the prefixes of DistributedDataParallel and torch.compile, an unpadded embedding."""
    small = {**state, "embedding": state["embedding"][:104]}
    theirs = to_mamba_ssm({**small, "embedding": torch.nn.functional.pad(small["embedding"], (0, 0, 0, 24))}, CFG)
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        theirs[name] = small["embedding"].clone()
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in theirs.items()}
    torch.save({"model": wrapped, "step": 3}, tmp_path / "model.pt")
    imported, cfg = read_model(tmp_path / "model.pt", vocab_size=100)
    assert (cfg.vocab_size, cfg.n_heads, cfg.headdim, cfg.d_state, cfg.n_layers) == (100, 8, 16, 16, 3)
    expected = mamba_ssm_ref_logits({name: t.double() for name, t in theirs.items()}, cfg, tokens())
    assert relative(logits(imported, cfg, tokens(), 8)[..., :104], expected.float()) < TOLERANCE


def test_another_order_of_heads_is_the_same_model_at_full_width(state: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    orders = [torch.randperm(8, generator=generator).tolist() for _ in range(3)]
    moved = reorder_heads(state, CFG, orders)
    assert not torch.equal(moved["blocks.0.mixer.in_x"], state["blocks.0.mixer.in_x"])
    full, half = (logits(state, CFG, tokens(), n_heads) for n_heads in (8, 4))
    assert relative(logits(moved, CFG, tokens(), 8), full) < TOLERANCE
    assert relative(logits(moved, CFG, tokens(), 4), half) > 0.01, "a narrow width is other heads now"
    back = [[order.index(head) for head in range(8)] for order in orders]
    assert all(torch.equal(t, state[name]) for name, t in reorder_heads(moved, CFG, back).items())
    with pytest.raises(ValueError, match=r"permutations of 0 \.\. 7"):
        reorder_heads(state, CFG, [[0, 0, 1, 2, 3, 4, 5, 6]] * 3)


def test_importance_is_the_stated_product_of_norms(state: dict[str, Tensor]) -> None:
    found = head_importance(state, CFG, 1)
    for head in range(8):
        at = slice(16 * head, 16 * (head + 1))
        mixer = {name: state[f"blocks.1.mixer.{name}"].double() for name in ("out", "gated_norm", "in_x", "in_z")}
        leaving = sum(
            float(mixer["out"][d, i] * mixer["gated_norm"][i]) ** 2 for d in range(64) for i in range(512)[at]
        )
        entering = [float(mixer[name][at].square().sum()) for name in ("in_x", "in_z")]
        assert float(found[head]) == pytest.approx((leaving * entering[0] * entering[1]) ** 0.5)


def test_important_heads_that_stand_last_come_first(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Two planted heads of eight do nearly all the work: at width 1/4 the reordered model is nearly the whole one."""
    planted = {name: tensor.clone() for name, tensor in state.items()}
    for layer in range(3):
        for head in range(8):
            if head not in (3, 6):
                planted[f"blocks.{layer}.mixer.in_x"][16 * head : 16 * (head + 1)] *= 1e-3
                planted[f"blocks.{layer}.mixer.conv_x_bias"][16 * head : 16 * (head + 1)] *= 1e-3
    assert [set(order[:2]) for order in importance_order(planted, CFG)] == [{3, 6}] * 3
    export(planted, CFG, CFG.layer_widths(8), "mamba_ssm", tmp_path / "theirs")
    errors = {}
    for name, option in (("plain", []), ("reordered", ["--reorder-heads"])):
        assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / name), "--widths", "1,1/4", *option]) == 0
        model = load_model(tmp_path / name)
        with torch.no_grad():
            narrow, full = (model.logits(model(tokens(), CFG.layer_widths(n))) for n in (2, 8))
        assert relative(full, logits(planted, CFG, tokens(), 8)) < TOLERANCE
        # The gated norm divides by the channels in use: two heads of eight come out halved. Direction is what is left.
        errors[name] = 1 - float(torch.nn.functional.cosine_similarity(narrow.flatten(), full.flatten(), dim=0))
    assert errors["reordered"] < errors["plain"] / 4, errors


class _RunsCode:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("owned",)


def _edit(folder: Path, **values: Any) -> None:
    about = json.loads((folder / "config.json").read_text())
    inner = about["ssm_cfg"]
    for key, value in values.items():
        (inner if key in inner or key in ("ngroups", "bias") else about)[key] = value
    (folder / "config.json").write_text(json.dumps(about))


def _weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


def _index(folder: Path, file: str) -> None:
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: _edit(f, layer="Mamba1"), "layer='Mamba1'"),
        (lambda f: _edit(f, ngroups=8), "ngroups=8"),
        (lambda f: _edit(f, attn_layer_idx=[1]), "attn_layer_idx"),
        (lambda f: _edit(f, bias=True), "bias=True"),
        (lambda f: _edit(f, n_layer=10**12), "config.json says n_layers=1000000000000, the tensors say 3"),
        (lambda f: _edit(f, d_model="64"), "d_model='64' is not a positive number"),
        (lambda f: _edit(f, d_state=float("nan")), "d_state=nan is not a positive number"),
        (lambda f: _edit(f, vocab_size=1000), "pass --vocab-size, at most 128"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{}"), "neither mamba-ssm's"),
        (
            lambda f: (f / "pytorch_model.bin").write_bytes((f / "pytorch_model.bin").read_bytes()[:5000]),
            "plain tensors",
        ),
        (lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(_RunsCode())), "plain tensors"),
        (lambda f: torch.save({"a": _RunsCode()}, f / "pytorch_model.bin"), "plain tensors"),
        (lambda f: _weights(f, lambda s: s.pop("backbone.norm_f.weight")), "backbone.norm_f.weight: shape absent"),
        (lambda f: _weights(f, lambda s: s.update({"backbone.extra": torch.ones(1)})), "backbone.extra"),
        (
            lambda f: _weights(f, lambda s: s.update({"backbone.layers.9999999999.x": torch.ones(1)})),
            "not numbered 0 to 3",
        ),
        (lambda f: _weights(f, lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1})), "lm_head.weight"),
        (lambda f: _weights(f, lambda s: s.update({"ids": torch.ones(1, dtype=torch.int64)})), "floating-point"),
        (lambda f: _index(f, "../../secret.safetensors"), "not the name of a file in this folder"),
        (lambda f: _index(f, "/etc/passwd"), "not the name of a file in this folder"),
        (lambda f: _index(f, "absent.safetensors"), "absent.safetensors cannot be read"),
        (lambda f: (f / "pytorch_model.bin").unlink(), "has neither model.safetensors nor"),
    ],
)
def test_what_is_not_ours_or_damaged_or_hostile_is_refused(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any], says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    export(state, CFG, CFG.layer_widths(8), "mamba_ssm", tmp_path / "theirs")
    damage(tmp_path / "theirs")
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"], "nothing is written, nothing is run"


def test_a_cut_short_safetensors_file_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: t.clone() for name, t in to_mamba_ssm(state, CFG).items()}, path)
    read_model(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImportModelError, match=r"model\.safetensors cannot be read as plain tensors"):
        read_model(path)


def test_widths_that_do_not_fit_are_refused(
    state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(state, replace(CFG, widths=(8,)), CFG.layer_widths(8), "hf", tmp_path / "theirs")
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours"), "--widths", "1,1/3"]) == 2
    assert "width '1/3' of n_heads=8" in capsys.readouterr().err


def test_a_tokenizer_that_does_not_fit_is_left_out_when_asked(
    state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many models stand beside a tokenizer with another name for the end of a text, or with more ids than rows."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    export(state, CFG, CFG.layer_widths(8), "hf", theirs)
    write_tokenizer(theirs / "tokenizer.json")
    assert main([str(theirs), "-o", str(ours)]) == 2
    said = capsys.readouterr().err
    assert "it was trained with another tokenizer; --no-tokenizer imports the model without one" in said
    assert main([str(theirs), "-o", str(ours), "--no-tokenizer", "--tokenizer", "x.json"]) == 2
    assert not ours.exists()
    assert main([str(theirs), "-o", str(ours), "--no-tokenizer"]) == 0
    assert sorted(path.name for path in ours.iterdir()) == ["config.json", "model.safetensors"]


def test_a_sentencepiece_file_goes_along_too(state: dict[str, Tensor], tmp_path: Path) -> None:
    cfg = replace(CFG, vocab_size=300)
    pieces = train_tokenizer.train(
        iter(["a few words to train on"] * 20), vocab_size=280, model_type="bpe", n_threads=1
    )
    (tmp_path / "own.model").write_bytes(pieces)
    export(state, cfg, cfg.layer_widths(8), "remote_code", tmp_path / "theirs", tokenizer=tmp_path / "own.model")
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 0
    assert Path(tokenizer_beside(tmp_path / "ours")).read_bytes() == pieces


def test_the_output_is_asked_for_before_the_weights_are_read(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(state, CFG, CFG.layer_widths(8), "hf", tmp_path / "theirs")
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(import_model, "read_model", lambda *_, **__: pytest.fail("they were read"))
        for output, says in ((".", "is not empty"), ("file", "is a file")):
            assert main([str(tmp_path / "theirs"), "-o", output]) == 2
            assert f"{output} {says}" in capsys.readouterr().err
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    assert main([str(tmp_path / "theirs"), "-o", "."]) == 0
    assert load_model(tmp_path / "link").cfg == replace(CFG, widths=(8,))


def test_a_folder_of_anothers_is_not_called_damaged(state: dict[str, Tensor], tmp_path: Path) -> None:
    for target in ("hf", "mamba_ssm", "remote_code"):
        export(state, CFG, CFG.layer_widths(8), target, tmp_path / target)
        with pytest.raises(ModelFolderError, match=r"is another library's: python -m modeling\.import_model"):
            load_model(tmp_path / target)
