"""Token ids to MDS shards on disk: packing into rows, the bytes of a shard, files that are whole or absent.

A shard file is what streaming's MDSWriter would write for the same rows (a test compares them byte for byte), laid
out here in one numpy call because a row has a fixed size. The writer can be stopped after any chunk and rebuilt from
`SplitState`, which is what makes the preparation resumable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.shard_schema import INDEX_NAME, SHARD_HASH, mds_columns, token_dtype

ASIDE_SUFFIX = ".tmp"
MAX_SHARD_BYTES = 2 << 30
"""What a shard may be asked to hold: half of what MDS's offsets reach, because sizes are estimates and offsets come on top."""

Ids = NDArray[np.unsignedinteger]


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """`data` as the file `path`: written aside, synced, renamed, so that a file under its name is always whole."""
    aside = path.with_name(f".{path.name}{ASIDE_SUFFIX}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_shard_bytes(shard_bytes: int) -> None:
    """Raise ValueError for a size that no MDS shard can have: its writing would show that only 4 GiB of work later."""
    if not 1 <= shard_bytes <= MAX_SHARD_BYTES:
        raise ValueError(f"--shard-bytes {shard_bytes}: must be at least 1, at most {MAX_SHARD_BYTES} (2 GiB)")


def mds_config(columns: dict[str, str], sizes: Sequence[int | None], compression: str = "") -> dict[str, Any]:
    """What an index says of each shard, and a shard of itself. `sizes` of the columns in bytes; None: it varies."""
    return {
        "version": 2,
        "format": "mds",
        "compression": compression or None,
        "hashes": [SHARD_HASH],
        "size_limit": None,
        "column_names": list(columns),
        "column_encodings": list(columns.values()),
        "column_sizes": list(sizes),
    }


def mds_file(config: dict[str, Any], sample_bytes: Sequence[int], samples: bytes) -> bytes:
    """The bytes of a shard: `samples` end to end, each of `sample_bytes`. Raises ValueError at MDS's limit of 4 GiB."""
    n = len(sample_bytes)
    header = json.dumps(config, sort_keys=True).encode()
    first = 4 + 4 * (n + 1) + len(header)
    offsets = first + np.cumsum([0, *sample_bytes], dtype=np.int64)
    if offsets[-1] >= 2**32:
        raise ValueError(f"a shard of {n} samples, {offsets[-1]:,} bytes, passes the 4 GiB of an MDS shard")
    return b"".join([np.uint32(n).tobytes(), offsets.astype("<u4").tobytes(), header, samples])


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """How ids become files; equal layouts and equal ids give equal bytes."""

    vocab_size: int
    eos_id: int
    row_tokens: int
    """Tokens in a row, without the one of look-ahead."""
    shard_rows: int
    """Rows in a shard, but for the last."""
    compression: str = ""
    """Empty, or zstd:LEVEL."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an id on disk."""
        return np.dtype(token_dtype(self.vocab_size))

    def mds_config(self) -> dict[str, Any]:
        """What the index says of each shard, and a shard of itself."""
        columns = mds_columns(self.vocab_size, self.row_tokens)
        return mds_config(columns, [(self.row_tokens + 1) * self.dtype.itemsize], self.compression)

    def shard_bytes(self, ids: Ids) -> bytes:
        """The MDS file of `ids`, n_rows * row_tokens + 1 of them."""
        n_rows = (len(ids) - 1) // self.row_tokens
        assert len(ids) == max(1, n_rows) * self.row_tokens + 1, f"{len(ids)} ids do not make rows"
        rows = np.lib.stride_tricks.sliding_window_view(ids, self.row_tokens + 1)[:: self.row_tokens]
        row_bytes = (self.row_tokens + 1) * self.dtype.itemsize
        return mds_file(self.mds_config(), [row_bytes] * n_rows, rows.tobytes())


@dataclass
class SplitState:
    """Where a split's writer stands after a chunk: everything but the pending ids, as JSON."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    """Entries of the MDS index, one a shard."""
    n_tokens: int = 0
    n_documents: int = 0


class SplitWriter:
    """Rows of one split, cut into shards in `folder`; `add` may write any number of shards, `finish` the last."""

    def __init__(self, folder: Path, layout: ShardLayout, state: SplitState, pending: Ids) -> None:
        self.state = state
        self._folder, self._layout = folder, layout
        self._pending = [pending] if len(pending) else []
        self._n_pending = len(pending)
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, ids: Ids, n_documents: int) -> None:
        """Append whole documents, each ended by eos."""
        self.state.n_tokens += len(ids)
        self.state.n_documents += n_documents
        self._pending.append(ids)
        self._n_pending += len(ids)
        per_shard = self._layout.shard_rows * self._layout.row_tokens
        while self._n_pending > per_shard:
            joined = self.pending()
            self._write(joined[: per_shard + 1])
            self._pending = [joined[per_shard:]]  # the look-ahead token starts the next shard
            self._n_pending = len(joined) - per_shard

    def pending(self) -> Ids:
        """Ids that no shard holds yet (the first one, after a shard, is that shard's look-ahead)."""
        joined = np.concatenate(self._pending) if self._pending else np.empty(0, self._layout.dtype)
        self._pending = [joined]
        return joined

    def finish(self) -> None:
        """Pad what is pending to whole rows with eos and write it."""
        ids = self.pending()
        if len(ids) > 1:
            n_rows = -(-(len(ids) - 1) // self._layout.row_tokens)
            padding = n_rows * self._layout.row_tokens + 1 - len(ids)
            self._write(np.concatenate([ids, np.full(padding, self._layout.eos_id, self._layout.dtype)]))
        self._pending, self._n_pending = [], 0

    def _write(self, ids: Ids) -> None:
        raw = self._layout.shard_bytes(ids)
        name = f"shard.{len(self.state.shards):05}.mds"
        entry = self._layout.mds_config() | {
            "samples": (len(ids) - 1) // self._layout.row_tokens,
            "raw_data": file_info(name, raw),
            "zip_data": None,
        }
        if self._layout.compression:
            import zstd  # what streaming decompresses with

            name, raw = f"{name}.zstd", zstd.compress(raw, int(self._layout.compression.partition(":")[2] or 3))
            entry["zip_data"] = file_info(name, raw)
        write_atomic(self._folder / name, raw)
        self.state.shards.append(entry)


def file_info(name: str, data: bytes) -> dict[str, Any]:
    """What an index says of a file: name, size, checksum."""
    return {"basename": name, "bytes": len(data), "hashes": {SHARD_HASH: hashlib.new(SHARD_HASH, data).hexdigest()}}


def write_index(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """The MDS index of a split, shards in order."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": 2, "shards": list(shards)}, sort_keys=True)
    write_atomic(folder / INDEX_NAME, text.encode())


def shards_in(shards: Sequence[dict[str, Any]], subfolder: str) -> list[dict[str, Any]]:
    """Index entries as seen from the folder above `subfolder`."""
    moved = []
    for shard in shards:
        files = {
            key: info and info | {"basename": f"{subfolder}/{info['basename']}"}
            for key, info in shard.items()
            if key in ("raw_data", "zip_data")
        }
        moved.append(shard | files)
    return moved
