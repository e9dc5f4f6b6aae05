"""Which folders are checkpoints, which of them go, and what counts as a width's best."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint import candidates
from pretrain.config_sections import CheckpointConfig
from pretrain.retention import prune


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
