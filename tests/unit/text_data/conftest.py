"""What the tests of the preparation of text begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit import corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json, a.parquet and b.jsonl with 60 documents each."""
    folder = tmp_path_factory.mktemp("inputs")
    corpus.byte_level_tokenizer(folder)
    corpus.write_parquet(folder / "a.parquet", list(corpus.texts(60, seed=1)))
    corpus.write_jsonl(folder / "b.jsonl", list(corpus.texts(60, seed=2)))
    return folder
