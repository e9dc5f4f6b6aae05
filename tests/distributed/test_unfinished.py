"""A run whose end is not in order says so, keeps its good checkpoints, and is not taken for finished at the next start."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.checkpoint_reader import Reader, RunState
from pretrain import resume, train
from pretrain.checkpoint import candidates, checkpoint_dir
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.language_task import LanguageTask
from pretrain.retention import read_best
from tests.distributed.harness import RankFailedError, run_ranks
from tests.distributed.test_checkpoints import events, steps_on_disk, train_over_bad_data
from tests.distributed.toy_run import losses, run_config


def train_with_an_update_that_overflows(cfg: RunConfig, n_good: int) -> int:
    """The update after `n_good` of them leaves a weight of the last rank that is not finite, once."""
    step = Engine.step
    calls = []

    def overflowing(self: Engine, lr: float) -> float:
        norm = step(self, lr)
        calls.append(norm)
        if len(calls) == n_good + 1:
            self.model.final_norm.data[0] = torch.inf
        return norm

    Engine.step = overflowing
    return train.main(cfg)


def test_weights_that_are_not_finite_are_never_saved(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path / "a", checkpoint={"every_steps": 2})
    assert run_ranks(2, train_with_an_update_that_overflows, cfg, 5) == [0, 0]
    assert "rolled back from step 6 to 4; sequences 32 to 48 are left out" in [event for _, event in events(cfg)]
    state = Reader(candidates(checkpoint_dir(cfg.run_dir))[0]).state
    assert (state.step, state.rollbacks, state.bad_steps) == (10, 1, 0)
    assert all(math.isfinite(loss) for _, _, found in losses(cfg) for loss in found.values())
    late = run_config(dataset, tmp_path / "b", stability={"max_skips": 20})
    with pytest.raises(RankFailedError, match="the weights are not finite, and not saved, and no checkpoint") as failed:
        run_ranks(2, train_with_an_update_that_overflows, late, 3)
    assert str(failed.value).count("NonFiniteError: step 9") == 2
    assert steps_on_disk(late) == []


def test_saving_in_a_streak_keeps_what_a_roll_back_needs(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(
        dataset, tmp_path, checkpoint={"every_steps": 1, "keep_last": 1}, stability={"max_skips": 2, "max_rollbacks": 1}
    )
    assert run_ranks(2, train_over_bad_data, cfg, 5 * 8, 3 * 8) == [0, 0]
    assert "rolled back from step 8 to 5; sequences 40 to 64 are left out" in [event for _, event in events(cfg)]
    assert steps_on_disk(cfg) == [10]


def test_a_run_that_ends_in_a_streak_is_not_finished(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path / "two")
    for _ in range(2):  # a second start finds nothing to do, and the same end
        with pytest.raises(RankFailedError, match="the last 2 of 10 steps updated nothing") as failed:
            run_ranks(2, train_over_bad_data, cfg, 8 * 8, 2 * 8)
        assert str(failed.value).count("NonFiniteError: ") == 2
    assert run_ranks(2, train.main, run_config(dataset, tmp_path / "two", optim={"steps": 11})) == [0, 0]
    assert run_ranks(1, train_over_bad_data, run_config(dataset, tmp_path / "one"), 9 * 8, 8) == [0]
    only = run_config(dataset, tmp_path / "only", optim={"steps": 1, "warmup_steps": 0})
    with pytest.raises(RankFailedError, match="the last 1 of 1 steps"):
        run_ranks(1, train_over_bad_data, only, 0, 8)


def test_a_run_that_ends_in_a_streak_keeps_what_a_roll_back_needs(dataset: Path, tmp_path: Path) -> None:
    """The advice is to go on with more steps; the first of those may be bad as well."""
    asked: dict[str, Any] = {"checkpoint": {"every_steps": 3, "keep_last": 1}, "stability": {"max_skips": 3}}
    cfg = run_config(dataset, tmp_path, **asked)
    with pytest.raises(RankFailedError, match="the last 2 of 10 steps updated nothing"):
        run_ranks(1, train_over_bad_data, cfg, 8 * 8, 2 * 8)
    assert steps_on_disk(cfg) == [6, 9, 10]
    longer = run_config(dataset, tmp_path, **asked, optim={"steps": 14})
    assert run_ranks(1, train_over_bad_data, longer, 8 * 8, 4 * 8) == [0]
    assert "rolled back from step 12 to 6; sequences 48 to 96 are left out" in [event for _, event in events(longer)]
    assert steps_on_disk(longer) == [14]


def train_and_be_killed_in(name: str, cfg: RunConfig) -> int:
    """SIGKILL as soon as the trainer calls what it knows as `name`."""
    setattr(train, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    return train.main(cfg)


def train_to_a_loss_that_is_not_finite(cfg: RunConfig, killed_in: str = "") -> int:
    """The narrowest width's validation is not finite; `killed_in` as in train_and_be_killed_in."""
    scores = LanguageTask.scores
    LanguageTask.scores = lambda *args: [*scores(*args)[:-1], {"loss": math.nan}]
    return train_and_be_killed_in(killed_in, cfg) if killed_in else train.main(cfg)


def test_a_last_validation_that_is_not_finite_is_no_end(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path, optim={"steps": 4}, checkpoint={"every_steps": 3, "keep_last": 1})
    with pytest.raises(RankFailedError, match=r"last step is not finite \(1: .*, 1/4: nan\)") as failed:
        run_ranks(2, train_to_a_loss_that_is_not_finite, cfg)
    assert str(failed.value).count("NonFiniteError: ") == 2
    root = checkpoint_dir(cfg.run_dir)
    assert steps_on_disk(cfg) == [3], "what the last one made old was still wanted"
    assert (root / "latest").read_text() == "step_00000003\n"
    assert (root / "not-finite-step_00000004").is_dir()
    assert run_ranks(2, train.main, cfg) == [0, 0]
    assert steps_on_disk(cfg) == [4]


def test_a_run_that_was_killed_before_its_last_validation_is_not_finished(dataset: Path, tmp_path: Path) -> None:
    whole, killed = (
        run_config(
            dataset,
            tmp_path / name,
            optim={"steps": 4},
            checkpoint={"every_steps": 3, "keep_last": 1, "keep_best": True},
            logging={"eval_every_steps": 0},
        )
        for name in ("whole", "killed")
    )
    run_ranks(2, train.main, whole)
    with pytest.raises(RankFailedError, match=f"-{signal.SIGKILL}"):
        run_ranks(2, train_and_be_killed_in, "evaluate", killed)
    assert steps_on_disk(killed) == [3, 4]
    assert [kind for kind, _, _ in losses(killed)] == ["train"] * 4
    assert run_ranks(2, train.main, killed) == [0, 0]
    assert losses(killed) == losses(whole)
    assert read_best(checkpoint_dir(killed.run_dir)) == read_best(checkpoint_dir(whole.run_dir)) != {}
    assert steps_on_disk(killed) == [4]
    assert run_ranks(2, train.main, killed) == [0, 0]
    assert losses(killed) == losses(whole), "one that was validated is finished"


def test_a_run_that_was_killed_before_its_last_checkpoint_was_refused_is_not_finished(
    dataset: Path, tmp_path: Path
) -> None:
    cfg = run_config(
        dataset, tmp_path, optim={"steps": 4}, checkpoint={"every_steps": 3}, logging={"eval_every_steps": 0}
    )
    with pytest.raises(RankFailedError, match=f"-{signal.SIGKILL}"):
        run_ranks(1, train_to_a_loss_that_is_not_finite, cfg, "set_aside")
    assert losses(cfg)[-1][:2] == ("eval", 4)
    with pytest.raises(RankFailedError, match=r"last step is not finite .* is now not-finite-step_00000004"):
        run_ranks(1, train_to_a_loss_that_is_not_finite, cfg)
    assert steps_on_disk(cfg) == [3]


def test_a_run_whose_only_checkpoint_was_refused_does_not_start_anew(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path, optim={"steps": 4}, checkpoint={"every_steps": 0})
    with pytest.raises(RankFailedError, match="last step is not finite"):
        run_ranks(1, train_to_a_loss_that_is_not_finite, cfg)
    assert not (checkpoint_dir(cfg.run_dir) / "latest").exists()
    with pytest.raises(
        RankFailedError, match="no checkpoint to go on from, only what was set aside: not-finite-step_00000004"
    ):
        run_ranks(1, train.main, cfg)


def train_over_bad_data_with_a_disk_that_fails(cfg: RunConfig) -> int:
    """The last rank can read no checkpoint when the run goes back over the data of steps 5, 6 and 7."""
    go_back = resume.go_back

    def failing(*args: Any) -> RunState | None:
        if os.environ["RANK"] == "1":
            Reader.verify = unreadable
        return go_back(*args)

    def unreadable(self: Reader, *args: int) -> None:
        raise OSError(5, "Input/output error")

    resume.go_back = failing
    return train_over_bad_data(cfg, 5 * 8, 3 * 8)


def test_a_run_that_can_read_nothing_to_go_back_to_keeps_it(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(
        dataset, tmp_path, checkpoint={"every_steps": 2, "keep_last": 9}, stability={"max_skips": 2, "max_rollbacks": 1}
    )
    with pytest.raises(RankFailedError, match=r"3 bad steps in a row .* and no checkpoint before them"):
        run_ranks(2, train_over_bad_data_with_a_disk_that_fails, cfg)
    root = checkpoint_dir(cfg.run_dir)
    assert steps_on_disk(cfg) == [2, 4, 6]
    assert (root / "latest").read_text() == "step_00000006\n"
    for folder in candidates(root):  # as an earlier version left them
        folder.rename(folder.with_name(f"rolled-back-{folder.name}"))
    with pytest.raises(RankFailedError, match="only what was set aside: rolled-back-step_00000002, ") as failed:
        run_ranks(2, train.main, cfg)
    assert str(failed.value).count("CheckpointError: ") == 2
    (root / "rolled-back-step_00000004").rename(root / "step_00000004")
    assert run_ranks(2, train.main, cfg) == [0, 0]
    assert [step for kind, step, _ in losses(cfg) if kind == "train"] == list(range(1, 11))
