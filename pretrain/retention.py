"""Which checkpoints of a run stay: the newest, every n-th, and for each width the one with its best validation loss."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from pretrain.config_sections import CheckpointConfig

CHECKPOINTS = "step_" + 8 * "[0-9]"
"""Pattern of the folders that are a run's checkpoints. Others beside them, such as a copy step_N.keep, are somebody's own."""
REMOVING = ".removing-"
"""Before the name of a checkpoint on its way out, so that what is left where that is interrupted is no checkpoint."""
BEST = "best.json"
"""In the folder of checkpoints: width name to {"step", "loss"} of its best validation that has a checkpoint."""

Best = dict[str, dict[str, float]]


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step_"))


def read_best(root: Path) -> Best:
    """The best validation of each width so far; empty before the first, or where the file is damaged."""
    try:
        best = json.loads((root / BEST).read_text())
        return {width: {"step": int(entry["step"]), "loss": float(entry["loss"])} for width, entry in best.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def note_losses(root: Path, step: int, losses: dict[str, float]) -> None:
    """Remember the validation losses at the checkpoint of `step`. One rank calls this, before that one is pruned.

    A best of this step or a later one is of a stretch that the run has gone back over: it no longer counts. A loss that is not
    finite is no best.
    """
    best = _up_to(step - 1, read_best(root))
    _note(best, step, losses)
    _write_best(root, best)


def go_back(root: Path, step: int, evals: list[dict[str, Any]]) -> None:
    """Forget a width's best of a step after `step`, from which the run goes on. One rank calls this.

    Its best is then again the lowest among `evals`, the run's records of validations, whose checkpoint is still there: one that
    was pruned because a later one was better does not come back.
    """
    before = read_best(root)
    best = _up_to(step, before)
    there = {step_of(folder) for folder in root.glob(CHECKPOINTS)}
    for record in evals:
        if record["step"] <= step and record["step"] in there:
            _note(best, record["step"], record["loss"])
    if best != before:
        _write_best(root, best)


def _up_to(step: int, best: Best) -> Best:
    return {width: entry for width, entry in best.items() if entry["step"] <= step and math.isfinite(entry["loss"])}


def _note(best: Best, step: int, losses: dict[str, float]) -> None:
    for width, loss in losses.items():
        if math.isfinite(loss) and (width not in best or loss < best[width]["loss"]):
            best[width] = {"step": step, "loss": loss}


def _write_best(root: Path, best: Best) -> None:
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{BEST}"
    temporary.write_text(json.dumps(best, indent=1))
    temporary.rename(root / BEST)


def prune(root: Path, cfg: CheckpointConfig) -> None:
    """Remove the checkpoints that `cfg` does not keep. One rank calls this, after a new one is whole."""
    folders = sorted(root.glob(CHECKPOINTS))
    best = {int(entry["step"]) for entry in read_best(root).values()} if cfg.keep_best else set()
    for folder in folders[: -cfg.keep_last]:
        step = step_of(folder)
        if step in best or (cfg.keep_every_steps and step % cfg.keep_every_steps == 0):
            continue
        doomed = folder.with_name(f"{REMOVING}{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)  # of the same step, on a disk that refused before
        folder.rename(doomed)
        shutil.rmtree(doomed)
