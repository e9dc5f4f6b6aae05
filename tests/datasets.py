"""Datasets that tests make themselves: small, seeded, with structure that a model can learn."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from streaming import MDSWriter

from data_prep.image_schema import IMAGE_COLUMN, IMAGE_COLUMNS, LABEL_COLUMN, NAME_COLUMN, ImageManifest
from data_prep.shard_schema import MANIFEST_NAME, SHARD_HASH, SPLITS, TOKENS_COLUMN, Manifest, mds_columns, token_dtype

EOS_ID = 0


def write_token_dataset(
    folder: Path, *, vocab_size: int = 64, row_tokens: int = 64, n_rows: int = 64, tokenizer_name: str = "counting"
) -> Path:
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
        tokenizer_name=tokenizer_name,
        vocab_size=vocab_size,
        eos_id=EOS_ID,
        row_tokens=row_tokens,
        n_tokens=n_tokens,
        n_documents=dict.fromkeys(SPLITS, 1),
        extra={},
    )
    (folder / MANIFEST_NAME).write_text(manifest.text())
    return folder


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    """JPEG bytes of uint8 pixels, [h, w, 3] or [h, w]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def blob_image(label: int, rng: np.random.Generator, *, height: int = 48, width: int = 64) -> np.ndarray:
    """[height, width, 3]: noise around a colour and a stripe width that are the class's own."""
    hue = np.array([60 + 37 * label % 160, 60 + 71 * label % 160, 60 + 113 * label % 160])
    stripes = 40 * np.sign(np.sin(np.arange(width) / (2 + label)))[None, :, None]
    return (hue + stripes + rng.normal(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8)


def write_image_dataset(
    folder: Path, *, n_classes: int = 5, n_train: int = 60, n_val: int = 13, shard_bytes: int = 12_000
) -> Path:
    """A dataset of `n_train` images, label i % n_classes, in shards of about `shard_bytes`; by streaming's own writer."""
    rng = np.random.default_rng(0)
    counts = dict(zip(SPLITS, (n_train, n_val), strict=True))
    for split, n in counts.items():
        with MDSWriter(
            out=str(folder / split), columns=IMAGE_COLUMNS, hashes=[SHARD_HASH], size_limit=shard_bytes
        ) as writer:
            for i in range(n):
                label = i % n_classes
                size = {"height": int(rng.integers(30, 90)), "width": int(rng.integers(30, 90))}
                image = jpeg(blob_image(label, rng, **size), quality=90)
                writer.write({IMAGE_COLUMN: image, LABEL_COLUMN: label, NAME_COLUMN: f"{split}/{label}/{i}.JPEG"})
    manifest = ImageManifest(
        classes=[f"class {i}" for i in range(n_classes)],
        n_images=counts,
        images_per_class={s: np.bincount(np.arange(n) % n_classes).tolist() for s, n in counts.items()},
        policy={split: {} for split in SPLITS},
        resize_short=0,
        source_sha256="0" * 64,
        extra={},
    )
    (folder / MANIFEST_NAME).write_text(manifest.text())
    return folder
