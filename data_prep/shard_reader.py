"""Shards back to ids or images, without `streaming`: for verification, export and tests."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.image_schema import IMAGE_COLUMNS
from data_prep.shard_schema import INDEX_NAME, SHARD_HASH, Manifest, token_dtype

Ids = NDArray[np.unsignedinteger]


class ShardError(ValueError):
    """A shard is not what its index says; the message names it."""


@dataclass(frozen=True)
class Part:
    """One chain of rows of a split: all of it, or what one job of an array wrote."""

    name: str
    shards: list[dict[str, Any]]
    n_tokens: int
    """Tokens before the padding."""


def split_parts(folder: Path, manifest: Manifest, split: str) -> list[Part]:
    """The parts of `split` in the order of its index. Raises ShardError where the index cannot be read."""
    shards = split_index(folder, split)
    parts = manifest.extra.get("parts") or {"all": {"n_tokens": manifest.n_tokens}}
    if len(parts) == 1:
        return [Part(name, shards, part["n_tokens"][split]) for name, part in parts.items()]
    return [
        Part(name, [s for s in shards if s["raw_data"]["basename"].startswith(f"{name}/")], part["n_tokens"][split])
        for name, part in parts.items()
    ]


def split_index(folder: Path, split: str) -> list[dict[str, Any]]:
    """The entries of the split's index, one a shard. Raises ShardError where it cannot be read."""
    path = folder / split / INDEX_NAME
    try:
        shards: list[dict[str, Any]] = json.loads(path.read_text())["shards"]
        for shard in shards:
            _check_entry(shard)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} cannot be read: {error!r}") from None
    return shards


def _check_entry(shard: dict[str, Any]) -> None:
    """Raise KeyError or TypeError where the entry lacks what is read from it here: a bit of the index may be another."""
    for info in (shard["raw_data"], shard["zip_data"] or shard["raw_data"]):
        if missing := {"basename", "bytes", "hashes"} - set(info):
            raise KeyError(*missing)
    if missing := {"samples", "column_names"} - set(shard):
        raise KeyError(*missing)


def read_shard(folder: Path, entry: dict[str, Any], manifest: Manifest) -> Ids:
    """The shard's rows, [n, row_tokens + 1]. Raises ShardError where size, checksum or layout are not the index's."""
    path, data = shard_bytes(folder, entry)
    dtype = np.dtype(token_dtype(manifest.vocab_size))
    n_rows, width = entry["samples"], manifest.row_tokens + 1
    begin = int.from_bytes(data[4:8], "little")
    if len(data) - begin != n_rows * width * dtype.itemsize or int.from_bytes(data[:4], "little") != n_rows:
        raise ShardError(f"shard {path}: it does not hold {n_rows} rows of {width} {dtype} ids")
    return np.frombuffer(data, dtype, offset=begin).reshape(n_rows, width)


def read_image_shard(folder: Path, entry: dict[str, Any]) -> Iterator[tuple[bytes, int, str]]:
    """(JPEG, label, name) of each sample. Raises ShardError where size, checksum or layout are not the index's."""
    path, data = shard_bytes(folder, entry)
    n = entry["samples"]
    if entry["column_names"] != list(IMAGE_COLUMNS) or int.from_bytes(data[:4], "little") != n:
        raise ShardError(f"shard {path}: it does not hold {n} samples of {', '.join(IMAGE_COLUMNS)}")
    offsets = np.frombuffer(data, "<u4", n + 1, offset=4).tolist()
    for begin, end in itertools.pairwise(offsets):
        image_bytes, name_bytes = np.frombuffer(data, "<u4", 2, offset=begin).tolist()
        label_at = begin + 8 + image_bytes
        if label_at + 8 + name_bytes != end:
            raise ShardError(f"shard {path}: the sizes of a sample do not add up")
        label = int.from_bytes(data[label_at : label_at + 8], "little", signed=True)
        yield data[begin + 8 : label_at], label, data[label_at + 8 : end].decode()


def shard_bytes(folder: Path, entry: dict[str, Any]) -> tuple[Path, bytes]:
    """The shard's file and its bytes, decompressed. Raises ShardError where size or checksum are not the index's.

    Where training has decompressed a shard beside itself, both files are checked: the next run reads the one that it made.
    """
    raw_info, zip_info = entry["raw_data"], entry["zip_data"]
    present = [info for info in (zip_info, raw_info) if info and (folder / info["basename"]).is_file()]
    for info in present or [raw_info]:
        path = folder / info["basename"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ShardError(f"shard {path}: {error.strerror}") from None
        _check_bytes(path, data, info)
    if info is zip_info:
        import zstd

        data = zstd.decompress(data)
        _check_bytes(path, data, raw_info)
    return path, data


def _check_bytes(path: Path, data: bytes, info: dict[str, Any]) -> None:
    if len(data) != info["bytes"]:
        raise ShardError(f"shard {path}: {len(data)} bytes, the index says {info['bytes']}")
    expected = info["hashes"].get(SHARD_HASH)
    if expected is not None and hashlib.new(SHARD_HASH, data).hexdigest() != expected:
        raise ShardError(f"shard {path}: the checksum is not the index's")


def part_tokens(folder: Path, part: Part, manifest: Manifest, split: str) -> Iterator[Ids]:
    """The ids of a part in order, shard by shard, padding left out. Raises ShardError."""
    left = part.n_tokens
    for number, entry in enumerate(part.shards):
        rows = read_shard(folder / split, entry, manifest)
        ids = rows[:, :-1].reshape(-1)
        if number == len(part.shards) - 1:
            ids = np.append(ids, rows[-1, -1])
        yield ids[:left]
        left -= min(left, len(ids))
