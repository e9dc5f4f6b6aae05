"""Whole runs of the image classifier on real ranks: against plain torch, stopped and resumed, at other layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.checkpoint_reader import EMA, Reader
from modeling.export import main as export
from modeling.model_folder import load_model as load_folder
from modeling.noise import Noise
from modeling.retrieval import RetrievalScores
from modeling.vision import VisionModel
from pretrain import train
from pretrain.augment import normalised, training_inputs
from pretrain.checkpoint import candidates, checkpoint_dir
from pretrain.checkpoint_model import load_model
from pretrain.config_io import config_from_dict
from pretrain.config_sections import ConfigError
from pretrain.distributed import init_ranks
from pretrain.evaluate import main as evaluate
from pretrain.images import ImageBatch, ImageLoader, validation_images
from pretrain.metrics import read_metrics
from pretrain.optim import learning_rate, parameter_groups
from pretrain.retrieval import main as retrieve
from pretrain.retrieval import matrix
from pretrain.tasks import task_of
from pretrain.vision_config import VisionRunConfig
from pretrain.vision_task import features
from tests.datasets import write_image_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.toy_run import train_until

WIDTHS = (8, 4, 2)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes; 40 training images, and 13 to validate with, which no number of ranks divides."""
    return write_image_dataset(tmp_path_factory.mktemp("images") / "shards", n_classes=4, n_train=40, n_val=13)


def run_config(dataset: Path, run_dir: Path, **overrides: Any) -> VisionRunConfig:
    """Eight steps of a two-layer classifier: the second epoch starts in step 6."""
    raw: dict[str, Any] = {
        "task": "vision",
        "run_dir": str(run_dir),
        "model": {
            "n_layers": 2,
            "d_model": 32,
            "headdim": 8,
            "d_state": 8,
            "widths": list(WIDTHS),
            "chunk_size": 8,
            "n_classes": 4,
            "image_size": 16,
            "patch_size": 4,
            "dropout": 0.1,
            "drop_path": 0.2,
        },
        "data": {"path": str(dataset), "image_size": 16, "images_per_step": 8, "micro_batch": 2, "n_workers": 0},
        "augment": {"rand_augment_ops": 1, "crop_scale": [0.5, 1.0]},
        "optim": {"lr": 4e-3, "steps": 8, "warmup_steps": 2, "ema_decay": 0.5},
        "checkpoint": {"every_steps": 0, "keep_last": 3},
        "logging": {"every_steps": 1, "eval_every_steps": 4},
    }
    for section, values in overrides.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    cfg = config_from_dict(raw)
    assert isinstance(cfg, VisionRunConfig)
    return cfg


def records(cfg: VisionRunConfig) -> list[tuple[Any, ...]]:
    """What every record says but times."""
    kept = ("loss", "top1", "top5", "images", "tokens", "grad_norm")
    found = read_metrics(Path(cfg.run_dir) / "metrics.jsonl")
    return [(r["kind"], r["step"], {key: r.get(key) for key in kept}) for r in found if r["kind"] != "event"]


def newest(cfg: VisionRunConfig) -> Reader:
    return Reader(candidates(checkpoint_dir(cfg.run_dir))[0])


def assert_same_state(a: Reader, b: Reader) -> None:
    assert a.state == b.state
    for name in a.shapes:
        for kind in a.kinds:
            assert torch.equal(a.full(name, kind, 8), b.full(name, kind, 8)), (name, kind)


def plain_torch(cfg: VisionRunConfig) -> list[dict[str, float]]:
    """The run without DeepSpeed, ranks and our trainer: cross-entropies of every width added up, AdamW, clipping."""
    model = VisionModel(cfg.model)
    model.init_weights(cfg.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), cfg.optim), betas=cfg.optim.betas, eps=cfg.optim.eps
    )
    draws = 1 if cfg.nesting.draw == "shared" else len(WIDTHS)
    loader = ImageLoader(
        cfg.data, cfg.augment, seed=cfg.seed, dp_rank=0, dp_size=1, n_sequences_per_step=8 * draws
    )  # fmt: skip
    losses = []
    for step in range(cfg.optim.steps):
        micro_batches = loader.next_step()
        sums = dict.fromkeys(("1", "1/2", "1/4"), 0.0)
        for place, batch in enumerate(micro_batches):
            x, target = training_inputs(batch, cfg.augment, n_classes=4, seed=cfg.seed, dtype=torch.float32)
            for i, (name, n_heads) in enumerate(zip(sums, WIDTHS, strict=True)):
                if draws > 1 and place % draws != i:
                    continue
                noise = Noise(cfg.seed, batch.numbers_b)
                logits = model.logits(model(x, cfg.model.layer_widths(n_heads), noise=noise))
                loss = -(target * torch.log_softmax(logits, -1)).sum(-1).mean()
                (loss / (4 * len(WIDTHS))).backward()
                sums[name] += float(loss.detach()) / 4
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg.optim)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sums)
    loader.close()
    return losses


@pytest.mark.parametrize(
    ("world_size", "draw", "parallel"),
    [
        (1, "shared", {}),
        (2, "shared", {}),
        (2, "separate", {}),
        (2, "separate", {"tensor": 2}),
        (2, "shared", {"tensor": 2, "sequence": True, "activation_checkpointing": "block"}),
    ],
    ids=["1", "dp 2", "dp 2, separate", "tp 2, separate", "sequence"],
)
def test_every_layout_trains_as_plain_torch_does(
    world_size: int, draw: str, parallel: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    """Separate draws are the reference's rotation: each width in turn on images of its own, one update after all."""
    cfg = run_config(images, tmp_path, parallel=parallel, nesting={"draw": draw}, optim={"steps": 4})
    run_ranks(world_size, train.main, cfg)
    expected = plain_torch(cfg)
    found = [r[2]["loss"] for r in records(cfg) if r[0] == "train"]
    for step, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        # AdamW divides by roots of small squares: rounding in another order shows at 1e-4 after some updates.
        assert actual == pytest.approx(wanted, rel=1e-5 if step == 0 else 5e-4), f"step {step}"


@pytest.mark.parametrize(
    "overrides",
    [
        {"data": {"n_workers": 1}},
        {"nesting": {"rule": "sandwich", "draw": "separate"}, "parallel": {"zero_stage": 2}, "model": {"pool": "avg"}},
        {"nesting": {"distill_weight": 0.5, "mix_rate": 0.5}, "parallel": {"tensor": 2}},
    ],
    ids=["all widths", "sandwich, separate draws, ZeRO 2, average", "distillation, mixes, tp 2"],
)
def test_stopped_mid_epoch_and_resumed_is_bitwise_the_run_that_never_stopped(
    overrides: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    whole = run_config(images, tmp_path / "whole", **overrides)
    assert run_ranks(2, train.main, whole) == [0, 0]
    parts = run_config(images, tmp_path / "parts", **overrides)
    assert run_ranks(2, train_until, parts, 5) == [train.EXIT_REQUEUE] * 2
    assert records(parts)[-1][1] == 6, "the step in progress is finished and saved"
    assert run_ranks(2, train.main, parts) == [0, 0]
    assert records(parts) == records(whole)
    assert_same_state(newest(whole), newest(parts))
    assert newest(whole).state.tokens == newest(whole).state.sequence * whole.tokens_per_sequence


def numbers_and_state(cfg: VisionRunConfig, seen: str) -> int:
    """Train, and note the numbers of the images that each step consumed."""
    accumulate = train.accumulate_gradients

    def noting(run: train.Run, micro_batches: list[ImageBatch]) -> float:
        mine = torch.cat([batch.numbers_b for batch in micro_batches]).tolist()
        everyone = [
            numbers
            for one in run.ranks.gather_objects((run.ranks.tp.rank, mine))
            if one[0] == 0
            for numbers in [one[1]]
        ]
        if run.ranks.is_main:
            with Path(seen).open("a") as f:
                f.write(f"{run.state.step} {sorted(n for numbers in everyone for n in numbers)}\n")
        return accumulate(run, micro_batches)

    train.accumulate_gradients = noting
    return train.main(cfg)


@pytest.mark.parametrize(("first", "then"), [((2, 1), (1, 1)), ((2, 2), (1, 1))], ids=str)
def test_saved_at_two_ranks_it_goes_on_at_other_layouts_with_the_same_images(
    first: tuple[int, int], then: tuple[int, int], images: Path, tmp_path: Path
) -> None:
    whole = run_config(images, tmp_path / "whole", parallel={"tensor": first[1]})
    run_ranks(first[0], numbers_and_state, whole, str(tmp_path / "whole.txt"))
    begun = run_config(images, tmp_path / "parts", parallel={"tensor": first[1]})
    run_ranks(first[0], train_until, begun, 2)
    source = newest(begun)
    assert source.state.step == 3
    resumed = run_config(images, tmp_path / "parts", parallel={"tensor": then[1]})
    run_ranks(then[0], numbers_and_state, resumed, str(tmp_path / "parts.txt"))
    expected = (tmp_path / "whole.txt").read_text().splitlines()
    assert (tmp_path / "parts.txt").read_text().splitlines() == expected[3:], "the same images in the same steps"
    for (_, step, a), (_, _, b) in zip(records(whole), records(resumed), strict=True):
        # Bitwise up to the save; from there on sums are taken in another order.
        tolerance = 0 if step <= 3 else 5e-4
        assert list(a["loss"].values()) == pytest.approx(list(b["loss"].values()), rel=tolerance, abs=0), step


def test_validation_counts_every_image_once_and_is_evaluates(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = run_config(images, tmp_path, optim={"steps": 4}, data={"micro_batch": 4})
    run_ranks(2, train.main, cfg)
    recorded = next(r for r in records(cfg) if r[0] == "eval")[2]
    model, _ = load_model(tmp_path)
    loader = validation_images(cfg.data, n_images=0, dp_rank=0, dp_size=1)
    batches = list(loader)
    labels = torch.cat([batch.labels_b for batch in batches])
    assert len(labels) == 13
    with torch.no_grad():
        for name, n_heads in zip(("1", "1/2", "1/4"), WIDTHS, strict=True):
            logits = torch.cat(
                [
                    model.logits(model(normalised(batch.images_bchw, torch.float32), cfg.model.layer_widths(n_heads)))
                    for batch in batches
                ]
            )
            assert recorded["loss"][name] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
            assert recorded["top1"][name] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
            assert recorded["top5"][name] == 1.0, "of four classes"
    assert run_ranks(1, evaluate, [str(tmp_path), "--width", "1/2", "--json", str(tmp_path / "out.json")]) == [0]
    said = capfd.readouterr().out
    top1 = recorded["top1"]["1/2"]
    assert f"width 1/2: loss {recorded['loss']['1/2']:.4f}, top1 {top1:.2%}, top5 100.00%" in said
    assert export([str(tmp_path), "--format", "matmamba", "--width", "1/4", "-o", str(tmp_path / "quarter")]) == 0
    quarter = load_folder(tmp_path / "quarter")
    with torch.no_grad():
        x = normalised(batches[0].images_bchw, torch.float32)
        assert torch.equal(quarter(x, (2, 2)), model(x, (2, 2))), "the moving average is what is exported"
    assert run_ranks(1, evaluate, [str(tmp_path), "--image-size", "24", "--width", "1,1/4"]) == [0]
    assert run_ranks(1, evaluate, [str(tmp_path), "--image-size", "18"]) == [2]
    assert "multiple of model.patch_size=4" in capfd.readouterr().err


def test_a_run_starts_from_anothers_average_with_other_drops(images: Path, tmp_path: Path) -> None:
    first = run_config(images, tmp_path / "first", optim={"steps": 3})
    run_ranks(1, train.main, first)
    second = run_config(
        images, tmp_path / "second", model={"dropout": 0.3, "drop_path": 0.0, "widths": [8, 2]},
        optim={"steps": 1, "lr": 1e-12, "warmup_steps": 0}, checkpoint={"init_from": first.run_dir},
    )  # fmt: skip
    run_ranks(2, train.main, second)
    for name in newest(first).shapes:
        expected = newest(first).full(name, EMA, 8)
        torch.testing.assert_close(newest(second).full(name, "master", 8), expected, atol=1e-9, rtol=0)
    other = run_config(images, tmp_path / "other", model={"pool": "avg"}, checkpoint={"init_from": first.run_dir})
    with pytest.raises(AssertionError, match=r"model\.pool=avg, there cls"):
        run_ranks(1, train.main, other)


def retrieved(folder: str) -> dict[tuple[str, str], RetrievalScores]:
    model, cfg = load_model(Path(folder))
    ranks, task = init_ranks(1), task_of(cfg)
    widths = {"1": (8, 8), "1/4": (2, 2), "mix": (8, 2)}
    return matrix(model, task.validation(ranks), widths, widths, ranks)  # type: ignore[arg-type]


def test_retrieval_across_widths_does_not_depend_on_ranks(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = run_config(images, tmp_path, optim={"steps": 6, "lr": 1e-2}, model={"dropout": 0.0, "drop_path": 0.0})
    run_ranks(2, train.main, cfg)
    one = run_ranks(1, retrieved, str(tmp_path))[0]
    for two in run_ranks(2, retrieved, str(tmp_path)):
        for pair, scores in one.items():
            assert two[pair] == pytest.approx(scores), pair
    assert one["1/4", "1"] != one["1", "1/4"], "who asks whom matters"
    model, _ = load_model(tmp_path)
    batches = list(validation_images(cfg.data, n_images=0, dp_rank=0, dp_size=1))
    with torch.no_grad():
        asked, held = (
            torch.cat([F.normalize(model(normalised(b.images_bchw, torch.float32), widths), dim=-1) for b in batches])
            for widths in ((2, 2), (8, 8))
        )
    labels = torch.cat([batch.labels_b for batch in batches])
    nearest = (asked @ held.T).fill_diagonal_(-2).argmax(-1)
    assert one["1/4", "1"].recall_at_1 == pytest.approx(float((labels[nearest] == labels).double().mean()))
    out = tmp_path / "scores.json"
    arguments = [str(tmp_path), "--query", "1/4", "--database", "1", "--database", "1,1/4", "--json", str(out)]
    assert run_ranks(1, retrieve, arguments) == [0]
    said = capfd.readouterr().out
    assert "mean average precision" in said
    assert f"{one['1/4', '1'].recall_at_1:.2%}" in said
    assert [(row["query"], row["database"]) for row in json.loads(out.read_text())] == [("1/4", "1"), ("1/4", "1,1/4")]
    other = write_image_dataset(tmp_path / "other", n_classes=3, n_train=3, n_val=6)
    assert run_ranks(1, retrieve, [str(tmp_path), "--data", str(other)]) == [0], "classes that training never saw"
    assert run_ranks(1, retrieve, [str(tmp_path), "--data", str(other), "--samples", "1"]) == [2]
    assert "use more images (--samples 1)" in capfd.readouterr().err


def partial_batch(cfg: VisionRunConfig) -> tuple[Tensor, Tensor]:
    ranks = init_ranks(2, sequence=True)
    model = VisionModel(cfg.model, tp=ranks.tp)
    model.init_weights(0)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = model(torch.cat([x, x[:1]]), cfg.model.layer_widths(4))[:3]
    return features(model, x, cfg.model.layer_widths(4)).detach(), whole.detach()


def test_a_last_batch_that_ranks_cannot_share_is_filled_up(images: Path, tmp_path: Path) -> None:
    cfg = run_config(images, tmp_path)  # 17 tokens an image: two ranks cannot share three images
    for padded, whole in run_ranks(2, partial_batch, cfg):
        torch.testing.assert_close(padded, whole)


def test_ties_are_no_hits_and_neither_is_nan(images: Path, tmp_path: Path) -> None:
    cfg = run_config(images, tmp_path)
    scores = run_ranks(1, scores_of_a_head_of, cfg, 0.0)[0]
    assert scores["top1"] == 0
    assert scores["loss"] == pytest.approx(torch.log(torch.tensor(4.0)).item())
    broken = run_ranks(1, scores_of_a_head_of, cfg, float("nan"))[0]
    assert (broken["top1"], broken["top5"]) == (0, 1), "of four classes, all are among the five likeliest"


def scores_of_a_head_of(cfg: VisionRunConfig, value: float) -> dict[str, float]:
    ranks, task = init_ranks(1), task_of(cfg)
    model = VisionModel(cfg.model)
    model.init_weights(0)
    torch.nn.init.constant_(model.head, value)
    return task.scores(model, task.validation(ranks), [cfg.model.layer_widths(8)], ranks)[0]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"vocab_size": 3}, "unknown key model.vocab_size"),
        ("data", {"seq_len": 3}, "unknown key data.seq_len"),
        ("data", {"image_size": 18}, "data.image_size=18.*multiple of model.patch_size=4"),
        ("data", {"micro_batch": 3}, "odd, but mixup"),
        ("augment", {"smoothing": 1.0}, "augment.smoothing"),
        ("model", {"n_classes": 1}, "model.n_classes=1"),
        ("model", {"pool": "max"}, "model.pool"),
        ("model", {"norm": "batch"}, "model.norm"),
        ("model", {"dropout": 1.0}, "model.dropout=1.0"),
        ("model", {"drop_path": -0.1}, "model.drop_path=-0.1"),
        ("model", {"image_size": 18}, "multiple of model.patch_size"),
        ("task", "audio", "task='audio': must be one of language, vision"),
        ("task", "language", "did you mean|unknown key"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(section: str, values: Any, message: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(images, tmp_path, **{section: values})


def test_classes_of_another_dataset_are_refused_before_training(images: Path, tmp_path: Path) -> None:
    cfg = run_config(images, tmp_path, model={"n_classes": 7})
    with pytest.raises(AssertionError, match=r"model.n_classes=7, but .* has 4 classes"):
        run_ranks(1, train.main, cfg)
