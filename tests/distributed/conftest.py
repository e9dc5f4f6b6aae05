"""The token dataset that the toy runs train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.datasets import write_token_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_token_dataset(tmp_path_factory.mktemp("data") / "shards", vocab_size=64, row_tokens=32, n_rows=48)
