"""Sharded checkpoints that do not depend on how the run was laid out; owns the on-disk format (docs/checkpoints.md).

    run_dir/checkpoints/step_00000120/manifest.json       what there is: config, step, data position, every file's hash
                                      rank_00000.safetensors ...   flat pieces of logical parameters
    run_dir/checkpoints/latest                            name of the newest whole checkpoint

Each rank writes what ZeRO left with it: for every parameter a flat piece of its tensor-parallel part, as float32
master, exp_avg and exp_avg_sq. A reader (modeling.checkpoint_reader) at any other layout puts the pieces together one
parameter at a time. No pickle: loading a file runs nothing in it.

A checkpoint is whole or absent: it is written under a temporary name, synced, and renamed, before `latest` names it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from modeling.checkpoint_reader import Piece, file_sha256, manifest_sha256, tensor_key
from pretrain.retention import CHECKPOINTS, REMOVING

TEMPORARY = ".writing-"
SET_ASIDE = ("damaged", "not-finite", "rolled-back")
"""Why a checkpoint was set aside: the words before its name."""


def checkpoint_dir(run_dir: str | Path) -> Path:
    """The folder that holds the checkpoints of a run."""
    return Path(run_dir) / "checkpoints"


def temporary_dir(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is whole."""
    return root / f"{TEMPORARY}{step_name(step)}"


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def write_rank_file(folder: Path, rank: int, tensors: dict[Piece, dict[str, Tensor]]) -> dict[str, Any]:
    """Write one rank's pieces (flat float32 CPU tensors by kind), synced to disk. Returns the file's manifest entry.

    Raises OSError where the disk is full or not writable.
    """
    path = folder / f"rank_{rank:05d}.safetensors"
    entries = {tensor_key(piece, kind): tensor for piece, kinds in tensors.items() for kind, tensor in kinds.items()}
    try:
        save_file(entries, path)
    except SafetensorError as error:  # the library wraps the operating system's error
        raise OSError(f"{path}: {error}") from error
    with path.open("rb+") as f:
        os.fsync(f.fileno())
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "pieces": [asdict(piece) for piece in tensors],
    }


def begin(root: Path, step: int) -> Path:
    """Make the empty temporary folder of a checkpoint; what an interrupted save left there is removed."""
    temporary = temporary_dir(root, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(root: Path, step: int, manifest: dict[str, Any]) -> Path:
    """Make the checkpoint whose rank files are all on disk the newest one. One rank calls this."""
    temporary, final = temporary_dir(root, step), root / step_name(step)
    signed = {**manifest, "sha256": manifest_sha256(manifest)}
    _write_synced(temporary / "manifest.json", json.dumps(signed, indent=1))
    _sync_folder(temporary)
    temporary.rename(final)
    _sync_folder(root)
    _point_latest_at(root, final.name)
    return final


def set_aside(folders: list[Path], why: str) -> None:
    """Rename checkpoints of one run to `why`-step_N, `why` one of SET_ASIDE, so that neither resuming nor pruning counts them;
    people may look into them. `latest` then names the newest of the others."""
    assert why in SET_ASIDE, why
    for folder in folders:
        target = folder.with_name(f"{why}-{folder.name}")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    for root in {folder.parent for folder in folders}:
        left = candidates(root)
        if left:
            _point_latest_at(root, left[0].name)
        else:
            (root / "latest").unlink(missing_ok=True)


def abandon(root: Path, step: int) -> None:
    """Remove what a failed save wrote; whole checkpoints are untouched."""
    shutil.rmtree(temporary_dir(root, step), ignore_errors=True)


def remove_interrupted(root: Path) -> list[str]:
    """Remove what saves and removals that never ended left, and return their folders' names. Under the run's lock: nobody is
    writing."""
    folders = sorted(folder for begun in (TEMPORARY, REMOVING) for folder in root.glob(f"{begun}*"))
    for folder in folders:
        shutil.rmtree(folder)
    return [folder.name for folder in folders]


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _point_latest_at(root: Path, name: str) -> None:
    _write_synced(root / ".latest", name + "\n")
    (root / ".latest").rename(root / "latest")
    _sync_folder(root)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def candidates(root: Path) -> list[Path]:
    """Checkpoints of a run, newest first. `latest` is for people and scripts; what is whole is decided by reading."""
    return sorted(root.glob(CHECKPOINTS), reverse=True)


def those_set_aside(root: Path) -> list[Path]:
    """Checkpoints that a run has set aside, by name."""
    return sorted(folder for why in SET_ASIDE for folder in root.glob(f"{why}-{CHECKPOINTS}"))


if __name__ == "__main__":
    from pretrain.checkpoint_tool import main

    raise SystemExit(main())
