"""Launch settings that a search found on this machine (modeling.ops.kernels.tune), laid over those that are shipped.

Shipped settings are for the GPUs that they were measured on, and are what runs there. Any other GPU runs them too, until
its own have been searched; nothing is tuned while a run starts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

SHIPPED_FOR = ("H100", "H200")
SETTINGS = frozenset({"HEADS", "num_warps", "num_stages", "maxnreg"})
SOURCES = ("scan_common.py", "scan_walks.py", "scan_forward.py", "scan_backward.py")
"""What a search is of: settings of other kernels than these say nothing."""
Table = dict[str, dict[int, dict[str, int]]]
"""Settings by kernel and width of its tile."""

_trial: Table = {}


def settings_of(kernel: str, columns: int, shipped: Table) -> dict[str, int]:
    """How to launch `kernel` on tiles of `columns` on this machine's GPU."""
    for table in (_trial, _found()):
        if columns in table.get(kernel, {}):
            return table[kernel][columns]
    return shipped[kernel][columns]


def origin() -> str:
    """Where this GPU's settings are from, for the log. Raises ValueError as `read` does."""
    name = torch.cuda.get_device_name()
    if is_shipped(name):
        return f"launched as measured on {SHIPPED_FOR[0]} and {SHIPPED_FOR[1]}"
    if _found():
        return f"launched as {kept_at(name)} says"
    return f"launched as measured on an {SHIPPED_FOR[0]}; python -m modeling.ops.kernels.tune searches this GPU's best"


def kept_at(gpu: str) -> Path:
    """Where a search of this GPU is kept: a file for each version of Triton and of the kernels."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matmamba"
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update((Path(__file__).parent / source).read_bytes())
    slug = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
    return folder / f"launches_{slug}_triton{triton.__version__}_{digest.hexdigest()[:12]}.json"


def read(path: Path) -> Table:
    """The settings of a file that `write` made. Raises ValueError where it is anything else."""
    try:
        return _checked(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path}: no launch settings ({error}): delete it, or search again with python -m modeling.ops.kernels.tune"
        ) from None


def write(path: Path, table: Table, *, gpu: str) -> None:
    """Keep `table`: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(json.dumps({"gpu": gpu, "triton": triton.__version__, "launches": table}, indent=1) + "\n")
    aside.replace(path)


@contextlib.contextmanager
def trying(kernel: str, columns: int, settings: dict[str, int]) -> Iterator[None]:
    """Inside, `kernel` is launched with `settings`."""
    _trial[kernel] = {columns: settings}
    try:
        yield
    finally:
        del _trial[kernel]


def is_shipped(gpu: str) -> bool:
    """Whether settings were measured on a GPU of this name: those run there, whatever was searched."""
    return any(name in gpu for name in SHIPPED_FOR)


@functools.cache
def _found() -> Table:
    if not torch.cuda.is_available():
        return {}
    gpu = torch.cuda.get_device_name()
    path = kept_at(gpu)
    return {} if is_shipped(gpu) or not path.exists() else read(path)


def _checked(record: Any) -> Table:
    table: Table = {}
    for kernel, by_columns in record["launches"].items():
        table[kernel] = {int(columns): dict(settings) for columns, settings in by_columns.items()}
        for settings in table[kernel].values():
            if settings.keys() - SETTINGS or not all(type(value) is int and value > 0 for value in settings.values()):
                raise ValueError(f"{kernel}: {settings}")
    return table
