"""A small ImageNet: its classes, how it is written in each form it comes in, and how a prepared one is read back."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep import prepare_imagenet
from data_prep.shard_reader import read_image_shard, split_index
from tests.datasets import blob_image, jpeg

CLASSES = ["ant", "bee", "cat"]
N_TRAIN, N_VAL = 8, 3  # of each class

PIXELS = blob_image(1, np.random.default_rng(3), height=40, width=60)
PICTURE = Image.fromarray(PIXELS)
WHOLE = jpeg(PIXELS, quality=90)


def write_tree(root: Path, images: dict[str, bytes]) -> Path:
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def prepare(output: Path, *arguments: str) -> int:
    return prepare_imagenet.main(["--output", str(output), "--workers", "1", "--shard-bytes", "4000", *arguments])


def contents(output: Path, split: str) -> list[tuple[bytes, int, str]]:
    return [image for entry in split_index(output, split) for image in read_image_shard(output / split, entry)]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
