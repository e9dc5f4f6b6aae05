"""Fixtures that several unit tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.datasets import blob_image, jpeg
from tests.unit.imagenet import CLASSES, N_TRAIN, N_VAL, write_tree


@pytest.fixture(scope="module")
def originals() -> dict[str, dict[str, bytes]]:
    """By split, CLASS/NAME to JPEG bytes."""
    rng = np.random.default_rng(0)
    return {
        split: {
            f"{name}/{name}_{i}.JPEG": jpeg(blob_image(label, rng, height=24, width=32), quality=85)
            for label, name in enumerate(CLASSES)
            for i in range(n)
        }
        for split, n in (("train", N_TRAIN), ("val", N_VAL))
    }


@pytest.fixture(scope="module")
def folder(originals: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder tree: train/CLASS/NAME, val/CLASS/NAME."""
    root = tmp_path_factory.mktemp("imagefolder")
    for split, images in originals.items():
        write_tree(root / split, images)
    return root
