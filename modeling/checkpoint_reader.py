"""Reading a sharded checkpoint (docs/checkpoints.md): its manifest, its hashes, one logical parameter at a time.

Writing and resuming are pretrain.checkpoint's and pretrain.resume's; this half is apart so that exporting and serving a
model need nothing of training. No pickle: loading a file runs nothing in it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modeling.config import BackboneConfig
from modeling.models import logical_shapes
from modeling.tensor_parallel import layout_of, local_index, local_shape

FORMAT_VERSION = 2
"""2: the manifest carries a hash of itself. Version 1, which does not, is read too."""
KINDS = ("master", "exp_avg", "exp_avg_sq")
EMA = "ema"
"""A fourth kind, where the run keeps a moving average of the weights: the manifest's "kinds" says so."""
WEIGHTS = ("auto", "master", "ema")
"""Which weights to take: those that were trained last, their moving average, or the average where there is one."""
WEIGHTS_HELP = "master: the last trained ones; ema: their moving average; auto: the average where the run keeps one"


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
    bad_steps: int = 0
    """Steps so far that updated nothing: a loss or gradient that was not finite, or a loss spike."""
    bad_in_a_row: int = 0
    """How many of them the last steps were."""
    rollbacks: int = 0
    """Times the run went back to an earlier checkpoint."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the last good steps, that a spike is measured against; empty where spikes are not looked for."""


def tensor_key(piece: Piece, kind: str) -> str:
    """The tensor's name in a file."""
    return f"{piece.name}|{kind}|{piece.tp_rank}|{piece.start}"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of the file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """Hex SHA-256 of a manifest's content without its own "sha256" entry, whatever its white space."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Reader:
    """A checkpoint on disk. Opening it checks the manifest; `verify` re-reads every byte."""

    def __init__(self, folder: str | Path) -> None:
        """Raises CheckpointError where the manifest is missing, damaged, of another version, or incomplete."""
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
            version = self.manifest["format_version"]
            said = self.manifest["sha256"] if version == FORMAT_VERSION else None
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: {self.folder} is not a whole checkpoint") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error!r}): take another checkpoint") from None
        if version not in (1, FORMAT_VERSION):
            raise CheckpointError(
                f"{path} has format version {version}, this code reads 1 to {FORMAT_VERSION}: use the code that wrote it"
            )
        if said is not None and said != manifest_sha256(self.manifest):
            raise CheckpointError(f"{path}: contents do not match its own SHA-256: take another checkpoint")
        try:
            self.kinds: tuple[str, ...] = tuple(str(kind) for kind in self.manifest.get("kinds", KINDS))
            if self.kinds not in (KINDS, (*KINDS, EMA)):
                raise ValueError(f"kinds {self.kinds}")
            state = self.manifest["state"]
            self.state = RunState(**{**state, "recent_losses": tuple(state.get("recent_losses", ()))})
            self.tp = int(self.manifest["layout"]["tensor"])
            self.files: list[dict[str, Any]] = self.manifest["files"]
            self._pieces: dict[str, list[tuple[str, Piece]]] = {}
            for entry in self.files:
                if Path(entry["file"]).name != entry["file"]:
                    raise ValueError(f"file {entry['file'][:80]!r}, which is not the name of one in this folder")
                for piece in entry["pieces"]:
                    self._pieces.setdefault(piece["name"], []).append((entry["file"], Piece(**piece)))
            self.shapes = {name: tuple(int(size) for size in shape) for name, shape in self.manifest["shapes"].items()}
            self._check_sizes()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} lacks or garbles {error}: take another checkpoint") from None

    def _check_sizes(self) -> None:
        """Raise ValueError where shapes ask for more than the pieces hold, or these for more than the files: before any
        memory is asked for."""
        for entry in self.files:
            numels = [piece["numel"] for piece in entry["pieces"]]
            if any(numel < 0 for numel in numels) or sum(numels) * 4 > entry["bytes"]:
                raise ValueError(f"{entry['file']}: pieces of {sum(numels)} numbers in {entry['bytes']} bytes")
        for name, shape in self.shapes.items():
            held = sum(piece.numel for _, piece in self._pieces.get(name, []))
            if min(shape, default=1) < 1 or held != math.prod(shape):
                raise ValueError(f"{name}: shape {shape}, and pieces of {held} numbers")

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

    def check_model(self, cfg: BackboneConfig) -> None:
        """Raise CheckpointError unless the checkpoint holds this model's parameters, in name and shape."""
        layers = {name.split(".")[1] for name in self.shapes if name.startswith("blocks.")}
        if len(layers) != cfg.n_layers:
            raise CheckpointError(f"{self.folder} has {len(layers)} layers, the config says {cfg.n_layers}")
        expected = logical_shapes(cfg)
        for name in sorted(expected.keys() | self.shapes.keys()):
            if expected.get(name) != self.shapes.get(name):
                raise CheckpointError(
                    f"{self.folder} is of another model: {name} is {self.shapes.get(name, 'absent')} there and "
                    f"{expected.get(name, 'absent')} in the config. Use the config saved beside it, or another run_dir"
                )

    def full(self, name: str, kind: str, n_heads: int) -> Tensor:
        """The logical parameter `name` in the model's own head order: float32, CPU. `kind` is one of self.kinds.

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

    def weights(self, n_heads: int, which: str = "auto") -> Iterator[tuple[str, Tensor]]:
        """Every logical parameter, one at a time; `which` is one of WEIGHTS. Raises CheckpointError where it is not there."""
        if which == EMA and EMA not in self.kinds:
            raise CheckpointError(
                f"{self.folder} has no moving average: its run had optim.ema_decay=0. Use --weights master"
            )
        kind = self.kinds[-1] if which == "auto" and EMA in self.kinds else "master" if which == "auto" else which
        for name in self.shapes:
            yield name, self.full(name, kind, n_heads)

    def _read(self, file: str, piece: Piece, kind: str) -> Tensor:
        try:
            with safe_open(self.folder / file, framework="pt") as f:
                return f.get_tensor(tensor_key(piece, kind))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: {piece.name} cannot be read ({error})") from None
