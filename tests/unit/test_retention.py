"""Which folders are checkpoints, which of them go, and what counts as a width's best."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint import candidates, remove_interrupted
from pretrain.config_sections import CheckpointConfig
from pretrain.retention import go_back, note_losses, prune, read_best


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}


def test_folders_that_somebody_named_are_left_alone(tmp_path: Path) -> None:
    theirs = {"step_00000001.keep", "step_final", "step_2", "step_000000003", "my-step_00000004", "step_"}
    make(tmp_path, *theirs, *(f"step_0000000{step}" for step in (1, 2, 3)))
    assert [path.name for path in candidates(tmp_path)] == ["step_00000003", "step_00000002", "step_00000001"]
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert names_in(tmp_path) == {*theirs, "step_00000003"}


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        make(tmp_path, f"step_0000000{step}")
        for name in ("manifest.json", "rank_00000.safetensors"):
            (tmp_path / f"step_0000000{step}" / name).touch()

    def die(folder: Path, **_: object) -> None:
        (folder / "manifest.json").unlink(missing_ok=True)
        if folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, CheckpointConfig(keep_last=1))
    monkeypatch.undo()
    assert [path.name for path in candidates(tmp_path)] == ["step_00000002"]
    assert remove_interrupted(tmp_path) == [".removing-step_00000001"]
    assert names_in(tmp_path) == {"step_00000002"}


def test_a_step_that_is_validated_again_has_the_later_loss(tmp_path: Path) -> None:
    note_losses(tmp_path, 4, {"1": 2.0, "1/2": 3.0})
    note_losses(tmp_path, 4, {"1": 2.5})
    assert read_best(tmp_path) == {"1": {"step": 4, "loss": 2.5}}


def test_going_back_forgets_later_bests_and_finds_the_earlier_ones_again(tmp_path: Path) -> None:
    curve = {2: (5.0, 2.5), 4: (3.0, 4.0), 6: (3.5, 3.9), 8: (1.0, 2.0)}
    evals = [{"kind": "eval", "step": step, "loss": {"1": a, "1/2": b}} for step, (a, b) in curve.items()]
    make(tmp_path, *(f"step_0000000{step}" for step in (4, 6, 8)))  # 2, the half width's second best, was pruned
    for record in evals:
        note_losses(tmp_path, record["step"], record["loss"])
    assert read_best(tmp_path) == {"1": {"step": 8, "loss": 1.0}, "1/2": {"step": 8, "loss": 2.0}}
    go_back(tmp_path, 6, evals)
    assert read_best(tmp_path) == {"1": {"step": 4, "loss": 3.0}, "1/2": {"step": 6, "loss": 3.9}}
    note_losses(tmp_path, 8, {"1": 3.2, "1/2": 3.8})
    prune(tmp_path, CheckpointConfig(keep_last=1, keep_best=True))
    assert names_in(tmp_path) == {"step_00000004", "step_00000008"}
    go_back(tmp_path, 8, [])
    assert read_best(tmp_path) == {"1": {"step": 4, "loss": 3.0}, "1/2": {"step": 8, "loss": 3.8}}, (
        "no record, no change"
    )


def test_a_run_without_validations_gets_no_file(tmp_path: Path) -> None:
    go_back(tmp_path, 3, [])
    assert list(tmp_path.iterdir()) == []
