"""Token datasets that tests make themselves: small, seeded, with structure that a model can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from streaming import MDSWriter

from data_prep.shard_schema import MANIFEST_NAME, SHARD_HASH, SPLITS, TOKENS_COLUMN, Manifest, mds_columns, token_dtype

EOS_ID = 0


def write_token_dataset(folder: Path, *, vocab_size: int = 64, row_tokens: int = 64, n_rows: int = 64) -> Path:
    """A dataset of `n_rows` training rows and a quarter as many for validation, of a noisy counting language."""
    rng = np.random.default_rng(0)
    n_tokens = {}
    for split, rows in zip(SPLITS, (n_rows, max(4, n_rows // 4)), strict=True):
        steps = rng.choice([1, 2], size=rows * row_tokens + 1, p=[0.9, 0.1])
        ids = np.cumsum(steps) % vocab_size
        with MDSWriter(
            out=str(folder / split),
            columns=mds_columns(vocab_size, row_tokens),
            hashes=[SHARD_HASH],
            size_limit=1 << 14,
        ) as writer:
            for row in range(rows):
                start = row * row_tokens
                writer.write({TOKENS_COLUMN: ids[start : start + row_tokens + 1].astype(token_dtype(vocab_size))})
        n_tokens[split] = rows * row_tokens
    manifest = Manifest(
        tokenizer_sha256="0" * 64,
        tokenizer_name="counting",
        vocab_size=vocab_size,
        eos_id=EOS_ID,
        row_tokens=row_tokens,
        n_tokens=n_tokens,
        n_documents=dict.fromkeys(SPLITS, 1),
        extra={},
    )
    (folder / MANIFEST_NAME).write_text(manifest.text())
    return folder
