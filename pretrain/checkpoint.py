"""Sharded checkpoints that do not depend on how the run was laid out; owns the on-disk format (docs/checkpoints.md).

    run_dir/checkpoints/step_00000120/manifest.json       what there is: config, step, data position, every file's hash
                                      rank_00000.safetensors ...   flat pieces of logical parameters
    run_dir/checkpoints/latest                            name of the newest whole checkpoint

Each rank writes what ZeRO left with it: for every parameter a flat piece of its tensor-parallel part, as float32
master, exp_avg and exp_avg_sq. A reader at any other layout puts the pieces together one parameter at a time. No pickle:
loading a file runs nothing in it.

A checkpoint is whole or absent: it is written under a temporary name, synced, and renamed, before `latest` names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling.config import LanguageConfig
from modeling.language import logical_shapes
from modeling.tensor_parallel import layout_of, local_index, local_shape

FORMAT_VERSION = 1
KINDS = ("master", "exp_avg", "exp_avg_sq")
TEMPORARY = ".writing-"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which file, what is wrong, and the way out."""


@dataclass(frozen=True)
class Piece:
    """Entries start .. start + numel of the flattened part that tensor-parallel rank `tp_rank` holds of a parameter."""

    name: str
    tp_rank: int
    start: int
    numel: int


@dataclass(frozen=True)
class RunState:
    """Where a run stands, beside its tensors. Everything random is a function of the seed and these."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens trained on, each counted once however many widths saw it."""
    sequence: int = 0
    """Sequences drawn from the global data order."""
    n_updates: int = 0
    """Optimizer updates applied; Adam's step."""


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
    entries = {_key(piece, kind): tensor for piece, kinds in tensors.items() for kind, tensor in kinds.items()}
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


def _key(piece: Piece, kind: str) -> str:
    return f"{piece.name}|{kind}|{piece.tp_rank}|{piece.start}"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of the file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def begin(root: Path, step: int) -> Path:
    """Make the empty temporary folder of a checkpoint; what an interrupted save left there is removed."""
    temporary = temporary_dir(root, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(root: Path, step: int, manifest: dict[str, Any], keep_last: int) -> Path:
    """Make the checkpoint whose rank files are all on disk the newest one, then prune. One rank calls this."""
    temporary, final = temporary_dir(root, step), root / step_name(step)
    _write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1))
    _sync_folder(temporary)
    temporary.rename(final)
    _sync_folder(root)
    _write_synced(root / ".latest", final.name + "\n")
    (root / ".latest").rename(root / "latest")
    _sync_folder(root)
    for old in sorted(root.glob("step_*"))[:-keep_last]:
        shutil.rmtree(old)
    return final


def set_aside(folders: list[Path]) -> None:
    """Rename damaged checkpoints so that neither resuming nor pruning counts them; people may still look into them."""
    for folder in folders:
        target = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)


def abandon(root: Path, step: int) -> None:
    """Remove what a failed save wrote; whole checkpoints are untouched."""
    shutil.rmtree(temporary_dir(root, step), ignore_errors=True)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def candidates(root: Path) -> list[Path]:
    """Checkpoints of a run, newest first. `latest` is for people and scripts; what is whole is decided by reading."""
    return sorted(root.glob("step_*"), reverse=True)


class Reader:
    """A checkpoint on disk. Opening it checks the manifest; `verify` re-reads every byte."""

    def __init__(self, folder: str | Path) -> None:
        """Raises CheckpointError where the manifest is missing, damaged, of another version, or incomplete."""
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
            version = self.manifest["format_version"]
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: {self.folder} is not a whole checkpoint") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error!r}): take another checkpoint") from None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, this code reads {FORMAT_VERSION}: use the code that wrote it"
            )
        try:
            self.state = RunState(**self.manifest["state"])
            self.tp = int(self.manifest["layout"]["tensor"])
            self.files: list[dict[str, Any]] = self.manifest["files"]
            self._pieces: dict[str, list[tuple[str, Piece]]] = {}
            for entry in self.files:
                for piece in entry["pieces"]:
                    self._pieces.setdefault(piece["name"], []).append((entry["file"], Piece(**piece)))
            self.shapes = {name: tuple(shape) for name, shape in self.manifest["shapes"].items()}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} lacks or garbles {error}: take another checkpoint") from None

    def verify(self, share: int = 0, of: int = 1) -> None:
        """Check presence, size and hash of every `of`-th file from `share` on. Raises CheckpointError naming a bad one."""
        for entry in self.files[share::of]:
            path = self.folder / entry["file"]
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            if path.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
            if file_sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{path}: contents do not match the manifest's SHA-256")

    def check_model(self, cfg: LanguageConfig) -> None:
        """Raise CheckpointError unless the checkpoint holds this model's parameters, in name and shape."""
        expected = logical_shapes(cfg)
        for name in sorted(expected.keys() | self.shapes.keys()):
            if expected.get(name) != self.shapes.get(name):
                raise CheckpointError(
                    f"{self.folder} is of another model: {name} is {self.shapes.get(name, 'absent')} there and "
                    f"{expected.get(name, 'absent')} in the config. Use the config saved beside it, or another run_dir"
                )

    def full(self, name: str, kind: str, n_heads: int) -> Tensor:
        """The logical parameter `name` in the model's own head order: float32, CPU. `kind` is one of KINDS.

        Holds one parameter in memory, and reads only its bytes. Raises CheckpointError where a piece is missing.
        """
        shape, layout = self.shapes[name], layout_of(name)
        local = local_shape(shape, layout, self.tp)
        full = torch.empty(shape)
        found = 0
        for tp_rank in range(self.tp if layout.is_sharded else 1):
            part = torch.empty(local).flatten()
            for file, piece in self._pieces.get(name, []):
                if piece.tp_rank == tp_rank:
                    part[piece.start : piece.start + piece.numel] = self._read(file, piece, kind)
                    found += piece.numel
            full[local_index(shape, layout, n_heads, self.tp, tp_rank)] = part.view(local)
        if found != full.numel():
            raise CheckpointError(f"{self.folder}: {found} of {full.numel()} entries of {name} are there")
        return full

    def weights(self, n_heads: int) -> Iterator[tuple[str, Tensor]]:
        """Every logical parameter, one at a time."""
        for name in self.shapes:
            yield name, self.full(name, "master", n_heads)

    def _read(self, file: str, piece: Piece, kind: str) -> Tensor:
        try:
            with safe_open(self.folder / file, framework="pt") as f:
                return f.get_tensor(_key(piece, kind))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: {piece.name} cannot be read ({error})") from None
