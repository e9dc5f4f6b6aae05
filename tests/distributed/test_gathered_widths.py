"""Widths whose weights ranks gather: training on them is training on one rank, and what forgets an exchange is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.gathered_widths import GatheredWidths
from modeling.language import LanguageModel
from modeling.models import logical_shapes
from modeling.tensor_parallel import TensorParallel, by_rank, layout_of, local_part, split_heads
from pretrain import train
from pretrain.config import RunConfig
from pretrain.config_sections import ConfigError
from pretrain.data import Batch
from pretrain.distributed import init_ranks
from pretrain.engine import Engine
from pretrain.objective import add_gradients, step_widths
from pretrain.peers import shared_out
from tests.distributed.harness import RankFailedError, run_ranks
from tests.distributed.test_layouts import compare, small_run
from tests.distributed.toy_run import losses, run_config, train_until

GATHERED: dict[str, Any] = {"parallel": {"tensor": 2, "sequence": True}, "data": {"micro_batch": 2}}


def test_a_ranks_heads_are_those_that_it_owns() -> None:
    cfg = small_run().model
    for name, shape in logical_shapes(cfg).items():
        layout = layout_of(name)
        if not layout.is_sharded or name == "embedding":
            continue
        whole = torch.arange(2.0 * torch.Size(shape).numel()).view(2, *shape)  # of two layers
        for rank, heads in enumerate(by_rank(whole, layout, cfg.n_heads, 4)):
            own = [local_part(layer, layout, cfg.n_heads, 4, rank) for layer in whole]
            assert torch.equal(heads, torch.stack([split_heads(part, layout, cfg.n_heads // 4) for part in own])), name


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"nesting": {"rule": "sandwich"}}, {"nesting": {"distill_weight": 0.5}}],
    ids=["all widths", "sandwich", "distillation"],
)
def test_a_run_has_the_losses_of_one_rank(overrides: dict[str, Any], tp: int, dataset: Path, tmp_path: Path) -> None:
    """Ten steps: heads that no narrower width runs go back before the narrower ones run."""
    widths = {"widths": [16, 8, 4], "headdim": 4}
    alone = run_config(dataset, tmp_path / "alone", data={"micro_batch": 4}, model=widths, **overrides)
    parallel = {"tensor": tp, "sequence": True}
    cfg = run_config(dataset, tmp_path / "ranks", parallel=parallel, data={"micro_batch": 4}, model=widths, **overrides)
    assert cfg.gathered_heads == 8
    assert run_ranks(1, train.main, alone) == [0]
    assert run_ranks(tp, train.main, cfg) == [0] * tp
    for (*key, found), (*other, expected) in zip(losses(cfg), losses(alone), strict=True):
        assert key == other
        assert found == pytest.approx(expected, rel=1e-4), key


def test_a_resume_at_another_layout_takes_over_its_weights(dataset: Path, tmp_path: Path) -> None:
    """Stopped with every width split by heads, gone on with two gathered."""
    whole, parts = (run_config(dataset, tmp_path / name, **GATHERED) for name in ("whole", "parts"))
    split = run_config(
        dataset, tmp_path / "parts", data={"micro_batch": 2}, parallel={**GATHERED["parallel"], "gathered_width": 0.0}
    )
    assert (whole.gathered_heads, split.gathered_heads) == (4, 0)
    assert run_ranks(2, train.main, whole) == [0, 0]
    assert run_ranks(2, train_until, split, 6) == [train.EXIT_REQUEUE] * 2
    assert run_ranks(2, train.main, parts) == [0, 0]
    for (*key, found), (*other, expected) in zip(losses(parts), losses(whole), strict=True):
        assert key == other
        assert found == pytest.approx(expected, rel=1e-4), key


def train_with_a_late_stream(cfg: RunConfig, left_out: str) -> int:
    """A run whose gathered weights and gradients travel as late as a GPU's own stream may let them: when they are waited for."""
    queued: list[Callable[[], None]] = []

    def start(self: GatheredWidths, work: Callable[[], None]) -> None:
        queued.append(work)

    def wait(self: GatheredWidths) -> None:
        while queued:
            queued.pop(0)()

    GatheredWidths._start = start  # type: ignore[method-assign]
    for name in {"wait", "wait_fetched"} - {left_out}:
        setattr(GatheredWidths, name, wait)
    return train.main(cfg)


@pytest.mark.parametrize("left_out", ["", "wait", "wait_fetched"])
def test_what_travels_is_waited_for(left_out: str, dataset: Path, tmp_path: Path) -> None:
    """With two micro-batches a step; with either wait left out the run is another."""
    early, late = (run_config(dataset, tmp_path / name, **GATHERED) for name in ("early", "late"))
    assert run_ranks(2, train.main, early) == [0, 0]
    assert run_ranks(2, train_with_a_late_stream, late, left_out) == [0, 0]
    assert (losses(late) == losses(early)) is (not left_out)


def _nothing(self: GatheredWidths, *_: Any, **__: Any) -> None:
    return


@pytest.mark.parametrize("left_out", ["start_fetch", "start_return", "start_clear"])
def test_an_exchange_that_is_left_out_is_noticed(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatheredWidths, left_out, _nothing)
    with pytest.raises((AssertionError, RankFailedError), match="relative error"):
        compare(small_run(**GATHERED), 2)


def after_a_discarded_step(cfg: RunConfig) -> tuple[float, float]:
    """Gradient norms of a step, alone and after one whose gradients were thrown away half returned."""
    ranks = init_ranks(2, sequence=True)
    model = LanguageModel(cfg.model, tp=ranks.tp, in_place_gradients=True)
    model.init_weights(0)
    engine = Engine(model, cfg, ranks)
    ids = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)

    def gradients() -> None:
        widths = step_widths(cfg.model, cfg.nesting, cfg.loss_weights, 0, 0)
        list(add_gradients(engine, [batch], widths, cfg, last=True))

    gradients()
    engine.discard()
    gradients()
    after = engine.step(0.0)
    gradients()
    return after, engine.step(0.0)


def test_a_discarded_step_leaves_no_gradients_behind(tmp_path: Path) -> None:
    cfg = run_config(tmp_path / "no dataset is read", tmp_path / "run", **GATHERED, optim={"weight_decay": 0.0})
    for after, alone in run_ranks(2, after_a_discarded_step, cfg):
        assert after == alone > 0


@pytest.mark.parametrize(
    ("overrides", "heads"),
    [
        (GATHERED, 4),
        ({**GATHERED, "parallel": {"tensor": 2, "sequence": True, "gathered_width": 0.25}}, 2),
        ({**GATHERED, "parallel": {"tensor": 2, "sequence": True, "gathered_width": 0.2}}, 0),
        ({**GATHERED, "parallel": {"tensor": 2, "sequence": True, "zero_stage": 2}}, 0),
        ({**GATHERED, "parallel": {"tensor": 2}}, 0),
        ({"parallel": {"tensor": 2, "sequence": True}, "data": {"micro_batch": 1}}, 0),
        ({}, 0),
    ],
)
def test_what_is_gathered_where_it_can_be(overrides: dict[str, Any], heads: int) -> None:
    assert run_config(Path("unused"), Path("unused"), **overrides).gathered_heads == heads


@pytest.mark.parametrize("width", [-0.1, 1.0, float("nan")])
def test_the_full_width_is_never_gathered(width: float) -> None:
    with pytest.raises(ConfigError, match="gathered_width"):
        run_config(Path("unused"), Path("unused"), parallel={"gathered_width": width})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({}, "sequences, up to width 1/2, whose weights every rank gathers; heads, of wider ones"),
        ({"parallel": {"sequence": False}}, "heads, of every width (parallel.sequence=false)"),
        ({"parallel": {"zero_stage": 2}}, "heads, of every width (ZeRO 2 takes gradients away in each backward)"),
        (
            {"data": {"micro_batch": 1}},
            "heads, of every width (data.micro_batch=1 does not give 2 ranks whole sequences)",
        ),
        ({"parallel": {"gathered_width": 0.1}}, "heads, of every width (parallel.gathered_width=0.1)"),
    ],
)
def test_the_log_says_what_is_shared_out_and_why(overrides: dict[str, Any], said: str) -> None:
    settings = {section: {**GATHERED[section], **overrides.get(section, {})} for section in GATHERED}
    assert shared_out(run_config(Path("unused"), Path("unused"), **settings)) == said


def test_ranks_want_whole_sequences() -> None:
    assert TensorParallel(size=2, rank=1).own(4) == slice(2, 4)
    with pytest.raises(ValueError, match="3 sequences do not divide into tp=2"):
        TensorParallel(size=2, rank=1).own(3)
