"""A preparation as the tests start it, what it left, and a disk that is full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import (
    shard_writer,
    tokenize_fineweb,
)
from data_prep.shard_reader import part_tokens, split_parts
from data_prep.shard_schema import read_manifest


def prepare(folder: Path, output: Path, *more: str, inputs: tuple[str, ...] = ("a.parquet", "b.jsonl")) -> int:
    arguments = ["--input", *(str(folder / name) for name in inputs), "--tokenizer", str(folder / "tokenizer.json")]
    arguments += ["--output", str(output), "--row-tokens", "64", "--shard-bytes", "1300", "--workers", "1"]
    return tokenize_fineweb.main([*arguments, "--val-fraction", "0.2", *more])


@contextlib.contextmanager
def full_disk(*, after: int) -> Iterator[None]:
    """Inside, the disk is full once so many files have got their final names."""
    real, n_left = shard_writer.os.replace, after

    def replace(source: Any, target: Any) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise OSError(28, "No space left on device")
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.os, "replace", replace)
        yield


def tokens(output: Path, split: str) -> list[int]:
    manifest = read_manifest(output)
    parts = split_parts(output, manifest, split)
    return [i for part in parts for ids in part_tokens(output, part, manifest, split) for i in ids.tolist()]
