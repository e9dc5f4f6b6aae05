"""Rows of one split of a dataset, by number: streaming's StreamingDataset used as a store of shards.

StreamingDataset downloads, decompresses and caches; the order of rows is `pretrain.stream`'s alone. Four of its habits
need care, and get it here:

- It keeps state in shared memory that outlives a crash and then blocks the next start ("Reused local directory").
  `clean_stale_shared_memory` of the library removes every segment on the node, a live neighbour's too. Ours removes
  the segments of a prefix only where no living process maps one of them.
- It picks the first free prefix without a lock, so two runs that start at once on a node collide. One process a node
  holds a file lock while the dataset is built.
- It learns its place from RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE alone, which Slurm does not set. They are
  set while it is built, to what torch.distributed knows.
- Its shared memory stays until the process ends. It goes with its RowStore.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import logging
import os
import re
import socket
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.constant import SHM_TO_CLEAN
from torch import distributed

from data_prep.shard_schema import SHARD_HASH

log = logging.getLogger(__name__)

SHM_DIR = Path("/dev/shm")
NODE_LOCK_TIMEOUT_S = 120.0


class DatasetError(ValueError):
    """What is on disk is not what the dataset's index or manifest says."""


class RowStore:
    """Random access to the rows of `split`. Every rank of the run must build it, in the same order as its neighbours.

    `path` is a folder or a remote URI; `cache_dir`, where given, is the local folder into which shards are copied.
    """

    def __init__(self, path: str, split: str, *, cache_dir: str = "") -> None:
        self.split = split
        local = cache_dir or path
        self.folder = Path(local) / split
        with _one_at_a_time_on_this_node():
            self._dataset = StreamingDataset(
                remote=path if cache_dir else None, local=local, split=split, predownload=1
            )
        weakref.finalize(self, _release, _segments(self._dataset), os.getpid())
        self.rows_per_shard: NDArray[np.int64] = self._dataset.samples_per_shard.copy()
        self._is_fetched = bool(cache_dir)
        self._files: list[Any] = [shard.raw_data for shard in self._dataset.shards]  # type: ignore[attr-defined]
        # Shared with the loader processes that are forked from this one: one of them checks a shard for all. Two that
        # are both first check it twice.
        self._checked = torch.zeros(len(self._files), dtype=torch.bool).share_memory_().numpy()

    @property
    def way_out(self) -> str:
        """What to do about a shard that cannot be read. Only what was copied from elsewhere may be deleted."""
        mend = "Put back a whole copy of it"
        if self._is_fetched:
            mend = "Delete it, so that it is fetched again from data.path"
        elif any(shard.compression for shard in self._dataset.shards):
            mend = "Delete it, so that it is unpacked again from the compressed file beside it"
        return f"{mend}; or prepare the data again. data_prep/verify_shards.py DIR lists every damaged shard"

    @property
    def n_rows(self) -> int:
        """Rows of the split."""
        return int(self.rows_per_shard.sum())

    def sample(self, number: int) -> dict[str, Any]:
        """Row `number`: its columns by name. Raises DatasetError naming the shard where it cannot be read.

        A shard's checksum is verified before the first row is taken from it (64 MB take about 0.05 s).
        """
        shard_number, _ = self._dataset.spanner[number]
        name = self.shard_name(shard_number)
        try:
            if not self._checked[shard_number]:
                self._dataset.get_item(number)  # downloads and decompresses where needed
                self._check_shard(shard_number)
                self._checked[shard_number] = True
            sample: dict[str, Any] = self._dataset.get_item(number)
        except DatasetError:
            raise
        except Exception as error:  # whatever the library stumbles over, the shard's name is what helps
            raise DatasetError(f"shard {name}, row {number}: cannot be read ({error!r}). {self.way_out}") from error
        return sample

    def shard_name(self, shard_number: int) -> str:
        """The shard's file, as a person looks for it."""
        return str(self.folder / self._files[shard_number].basename)

    def shard_of_row(self, number: int) -> str:
        """Name of the shard that holds row `number`."""
        return self.shard_name(self._dataset.spanner[number][0])

    def _check_shard(self, shard_number: int) -> None:
        info = self._files[shard_number]
        expected = info.hashes.get(SHARD_HASH)
        if expected is None:
            return  # a dataset written by another tool may carry no checksums
        with open(self.shard_name(shard_number), "rb") as file:
            found = hashlib.file_digest(file, SHARD_HASH).hexdigest()
        if found != expected:
            raise DatasetError(
                f"shard {self.shard_name(shard_number)}: checksum {found[:16]}... is not the index's "
                f"{expected[:16]}..., the file is damaged. {self.way_out}"
            )


def _segments(dataset: Any) -> list[Any]:
    """The shared memory that `dataset` created or attached to for itself."""
    arrays = [dataset._shared_barrier._arr, dataset._shard_states, dataset._shard_access_times]
    arrays += [scalar.arr for scalar in (dataset._next_epoch, dataset._cache_usage)]
    return [dataset._locals_shm, *(array.shm for array in arrays)]


def _release(segments: list[Any], owner: int) -> None:
    """Close shared memory; in a process that was forked from its `owner`, leave it alone.

    The library does this only when the process ends, and each new dataset attaches to all that is there: a process that
    builds sixty one after the other has 20,000 files open.
    """
    if os.getpid() != owner:
        return
    for segment in segments:
        atexit.unregister(segment.cleanup)
        with contextlib.suppress(BufferError):  # a row that is still being read
            segment.cleanup()


@contextlib.contextmanager
def _one_at_a_time_on_this_node() -> Iterator[None]:
    """Clean up after crashed runs and hold the node's lock: in local rank 0; the others wait until it is held."""
    place = _place()
    local_rank = int(place["LOCAL_RANK"])
    before = {name: os.environ.get(name) for name in place}
    with contextlib.ExitStack() as stack:
        if local_rank == 0:
            stack.enter_context(_node_lock())
            removed = remove_stale_shared_memory()
            if removed:
                log.warning("removed shared memory that crashed runs left behind: prefixes %s", removed)
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()
        os.environ.update(place)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _place() -> dict[str, str]:
    """Where this process stands among the run's, in the variables that `streaming` reads; alone without a group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    hosts: list[str] = [""] * world_size
    distributed.all_gather_object(hosts, socket.gethostname())
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(hosts[:rank].count(hosts[rank])),
        "LOCAL_WORLD_SIZE": str(hosts.count(hosts[rank])),
    }


@contextlib.contextmanager
def _node_lock() -> Iterator[None]:
    """Hold this user's file lock on the node; go on without it, saying so, after NODE_LOCK_TIMEOUT_S.

    Two jobs that share two nodes could each hold one node's lock and wait for the other's: hence the timeout.
    """
    path = Path(tempfile.gettempdir()) / f"matmamba-streaming-{os.getuid()}.lock"
    with open(path, "a") as file:
        deadline = time.monotonic() + NODE_LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    log.warning("%s is held by another process for %.0f s: going on", path, NODE_LOCK_TIMEOUT_S)
                    break
                time.sleep(0.02)
        yield


def remove_stale_shared_memory(shm_dir: Path = SHM_DIR, proc_dir: Path = Path("/proc")) -> list[str]:
    """Remove this user's `streaming` shared memory that no living process maps; the prefixes that were removed.

    A run that shares /dev/shm but not /proc with us (another container) would be taken for dead: give each container
    a /dev/shm of its own, as container runtimes do by default.
    """
    pattern = re.compile(rf"(\d{{6,}})_(?:{'|'.join(SHM_TO_CLEAN)})")
    found: dict[str, list[Path]] = {}
    for segment in shm_dir.glob("*_*") if shm_dir.is_dir() else ():
        match = pattern.fullmatch(segment.name)
        with contextlib.suppress(FileNotFoundError):
            if match and segment.stat().st_uid == os.getuid():
                found.setdefault(match[1], []).append(segment)
    if not found:
        return []
    living = _mapped_prefixes(shm_dir, proc_dir)
    stale = sorted(set(found) - living)
    for prefix in stale:
        locks = [Path(tempfile.gettempdir()) / f"{prefix}_{name}" for name in ("barrier_filelock", "cache_filelock")]
        for leftover in found[prefix] + locks:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                leftover.unlink()
    return stale


def _mapped_prefixes(shm_dir: Path, proc_dir: Path) -> set[str]:
    pattern = re.compile(rf"{re.escape(str(shm_dir))}/(\d{{6,}})_")
    prefixes: set[str] = set()
    for maps in proc_dir.glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process ended, or is another user's
            prefixes.update(pattern.findall(maps.read_text(errors="replace")))
    return prefixes
