"""The moving average of the weights: what it is, that validation uses it, and that checkpoints carry it to any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.checkpoint_reader import EMA, KINDS, CheckpointError, Reader
from modeling.language import LanguageModel
from pretrain import train
from pretrain.checkpoint import candidates, checkpoint_dir
from pretrain.checkpoint_model import load_model
from pretrain.config import LanguageRunConfig
from pretrain.distributed import init_ranks
from pretrain.metrics import read_metrics
from pretrain.tasks import task_of
from tests.distributed.harness import run_ranks
from tests.distributed.test_train import state_after_loading
from tests.distributed.toy_run import losses, run_config, train_until

DECAY = {"ema_decay": 0.6}


def readers(cfg: LanguageRunConfig) -> list[Reader]:
    """Of every checkpoint, the oldest first."""
    return [Reader(folder) for folder in reversed(candidates(checkpoint_dir(cfg.run_dir)))]


def validation_loss(folder: Path, weights: str) -> list[float]:
    """Of every width, of these weights of a checkpoint, in this process's own group of one rank."""
    model, cfg = load_model(folder, weights=weights)
    ranks = init_ranks(1)
    task = task_of(cfg)
    submodels = [cfg.model.layer_widths(n) for n in cfg.model.widths]
    return [scores["loss"] for scores in task.scores(model, task.validation(ranks), submodels, ranks)]


@pytest.mark.parametrize("parallel", [{}, {"zero_stage": 2}], ids=["dp 2", "ZeRO 2"])
def test_it_is_the_average_of_every_updates_weights_and_validation_uses_it(
    parallel: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    cfg = run_config(
        dataset, tmp_path, optim=DECAY, parallel=parallel, checkpoint={"every_steps": 1, "keep_last": 10},
        logging={"eval_every_steps": 10},
    )  # fmt: skip
    run_ranks(2, train.main, cfg)
    whole = LanguageModel(cfg.model)
    whole.init_weights(cfg.seed)
    average = {name: p.detach().clone() for name, p in whole.named_parameters()}
    for n, reader in enumerate(readers(cfg), start=1):
        assert reader.kinds == (*KINDS, EMA)
        for name, value in average.items():
            value.lerp_(reader.full(name, "master", 8), 1 - min(0.6, (1 + n) / (10 + n)))
            assert torch.equal(reader.full(name, EMA, 8), value), (n, name)
    newest = readers(cfg)[-1].folder
    recorded = next(r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "eval")
    averaged, last = (run_ranks(1, validation_loss, newest, weights)[0] for weights in ("auto", "master"))
    assert list(recorded.values()) == pytest.approx(averaged, abs=1e-6)
    assert abs(averaged[0] - last[0]) > 1e-3, "the last weights are others"


def test_stopped_and_resumed_it_is_bitwise_the_same_and_loads_at_other_layouts(dataset: Path, tmp_path: Path) -> None:
    whole = run_config(dataset, tmp_path / "whole", optim=DECAY)
    run_ranks(2, train.main, whole)
    parts = run_config(dataset, tmp_path / "parts", optim=DECAY)
    assert run_ranks(2, train_until, parts, 6) == [train.EXIT_REQUEUE] * 2
    run_ranks(2, train.main, parts)
    assert losses(parts) == losses(whole)
    expected, resumed = readers(whole)[-1], readers(parts)[-1]
    for name in expected.shapes:
        assert torch.equal(expected.full(name, EMA, 8), resumed.full(name, EMA, 8)), name
    for world_size, tensor in ((1, 1), (2, 2)):
        other = run_config(
            dataset, tmp_path / f"tp{tensor}", optim=DECAY, parallel={"tensor": tensor},
            checkpoint={"resume": str(expected.folder)},
        )  # fmt: skip
        run_ranks(world_size, state_after_loading, other)
        again = readers(other)[-1]
        for name in expected.shapes:
            for kind in again.kinds:
                assert torch.equal(again.full(name, kind, 8), expected.full(name, kind, 8)), (name, kind)


def test_a_run_can_begin_and_cease_to_keep_one(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path, checkpoint={"every_steps": 5})
    run_ranks(1, train_until, cfg, 4)
    source = readers(cfg)[-1]
    assert source.kinds == KINDS
    with pytest.raises(CheckpointError, match=r"no moving average.*--weights master"):
        load_model(source.folder, weights="ema")
    begun = replace(cfg, optim=replace(cfg.optim, ema_decay=0.6), run_dir=str(tmp_path / "begun"))
    begun = replace(begun, checkpoint=replace(cfg.checkpoint, resume=str(source.folder)))
    run_ranks(1, state_after_loading, begun)
    there = readers(begun)[-1]
    for name in there.shapes:
        assert torch.equal(there.full(name, EMA, 8), source.full(name, "master", 8)), "it starts at the weights"
    ceased = replace(
        cfg, checkpoint=replace(cfg.checkpoint, resume=str(there.folder)), run_dir=str(tmp_path / "ceased")
    )
    run_ranks(1, state_after_loading, ceased)
    assert readers(ceased)[-1].kinds == KINDS
