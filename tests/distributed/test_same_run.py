"""Starting a run again with other settings: it goes on with the tokens it has not seen, or does not start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.checkpoint_reader import Reader
from pretrain import train
from pretrain.checkpoint import candidates, checkpoint_dir
from pretrain.config import RunConfig
from pretrain.config_io import config_to_yaml
from pretrain.restarts import main as restarts
from pretrain.same_run import DATASET
from tests.datasets import write_token_dataset
from tests.distributed.harness import RankFailedError, run_ranks
from tests.distributed.toy_run import losses, run_config, train_until


def tokens_seen(cfg: RunConfig) -> list[int]:
    """Train, and the tokens of every step in their order."""
    accumulate = train.accumulate_gradients
    seen = []

    def noting(run: train.Run, micro_batches: Any) -> float:
        seen.append(torch.cat([batch.tokens_bt.flatten() for batch in micro_batches]))
        return accumulate(run, micro_batches)

    train.accumulate_gradients = noting
    assert train.main(cfg) == 0
    return torch.cat(seen).tolist()


def test_with_shorter_sequences_it_goes_on_with_the_next_tokens(dataset: Path, tmp_path: Path) -> None:
    (whole,) = run_ranks(1, tokens_seen, run_config(dataset, tmp_path / "whole"))
    (first,) = run_ranks(1, tokens_seen, run_config(dataset, tmp_path / "run", optim={"steps": 3}))
    shorter = run_config(dataset, tmp_path / "run", data={"seq_len": 16}, model={"chunk_size": 8})
    (rest,) = run_ranks(1, tokens_seen, shorter)
    assert first + rest == whole, "over the epoch's border too"
    state = Reader(candidates(checkpoint_dir(shorter.run_dir))[0]).state
    assert (state.sequence, state.tokens) == (10 * 16, 10 * 256)


def test_a_run_that_began_at_a_named_checkpoint_goes_on_by_the_same_command(dataset: Path, tmp_path: Path) -> None:
    """As a job does that requeues itself; by then the run that it branched from may have pruned that checkpoint."""
    source = run_config(dataset, tmp_path / "source", checkpoint={"every_steps": 4})
    run_ranks(1, train.main, source)
    named = checkpoint_dir(source.run_dir) / "step_00000004"
    whole, branch = (
        run_config(dataset, tmp_path / name, checkpoint={"resume": str(named)}, optim={"lr": 5e-3})
        for name in ("whole", "branch")
    )
    run_ranks(1, train.main, whole)
    assert run_ranks(1, train_until, branch, 6) == [train.EXIT_REQUEUE]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(named, elsewhere)
    with pytest.raises(RankFailedError, match="holds 1 checkpoints after step 4"):
        run_ranks(1, train.main, run_config(dataset, tmp_path / "branch", checkpoint={"resume": str(elsewhere)}))
    shutil.rmtree(named)
    (tmp_path / "branch.yaml").write_text(config_to_yaml(branch))
    assert restarts(["check", str(tmp_path / "branch.yaml")]) == 0
    assert run_ranks(1, train.main, branch) == [0]
    assert losses(branch) == losses(whole)


def test_another_order_of_the_data_or_model_is_refused_before_anything_is_trained_or_recorded(
    dataset: Path, tmp_path: Path
) -> None:
    cfg = run_config(dataset, tmp_path / "run", optim={"steps": 3})
    run_ranks(1, train.main, cfg)
    assert len(Reader(candidates(checkpoint_dir(cfg.run_dir))[0]).manifest[DATASET]) == 64
    records = [tmp_path / "run" / name for name in ("config.yaml", "provenance.json")]
    recorded = [(path.read_text(), path.stat().st_mtime_ns) for path in records]
    other = write_token_dataset(tmp_path / "other", vocab_size=64, row_tokens=32, n_rows=40)
    for changed, says in (
        (run_config(dataset, tmp_path / "run", seed=5), "ConfigError: seed=5"),
        (run_config(other, tmp_path / "run"), "is another dataset than"),
        (run_config(dataset, tmp_path / "run", model={"d_state": 16}), "is of another model"),
    ):
        with pytest.raises(RankFailedError, match=says) as failed:
            run_ranks(2, train.main, changed)
        assert str(failed.value).count("ConfigError: ") == 2, "on both ranks"
        assert [(path.read_text(), path.stat().st_mtime_ns) for path in records] == recorded, "as the run was started"
