"""The contract between image preparation and training: what an MDS image shard holds. Standard library only.

An image dataset is a folder of MosaicML Streaming (MDS) shards, one folder a split. A sample is one image: the bytes of
a JPEG that decodes without complaint to 8-bit grey or RGB, the number of its class, and the name it had at its source.
Images of train lie in a seeded order that mixes the classes, those of val in the order of the source.

    DIR/manifest.json            what the images are (see ImageManifest); written last, so its presence means whole
    DIR/policy.jsonl             every image that was left out or changed: split, name, what was done
    DIR/train/index.json         MDS index of the split
    DIR/train/shard.00000.mds    and so on
    DIR/val/...
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.shard_schema import SPLITS, manifest_values

IMAGE_SCHEMA_VERSION = 1
IMAGE_COLUMN = "image"
LABEL_COLUMN = "label"
NAME_COLUMN = "name"
IMAGE_COLUMNS = {IMAGE_COLUMN: "bytes", LABEL_COLUMN: "int", NAME_COLUMN: "str"}
"""Column name to MDS encoding, in the order in which a sample holds them."""
POLICY_LOG_NAME = "policy.jsonl"


@dataclass(frozen=True, kw_only=True)
class ImageManifest:
    """What an image dataset is. `extra` carries what only people and the preparation tools read."""

    classes: list[str]
    """Names of the classes; a label is a place in this list."""
    n_images: dict[str, int]
    """Images of each split."""
    images_per_class: dict[str, list[int]]
    """Images of each class, in the order of `classes`, of each split; every class has some in both."""
    policy: dict[str, dict[str, int]]
    """For each split, how many images were left out (skipped_...) or changed (converted_..., kept_...), by reason."""
    resize_short: int
    """Pixels to which the short side of larger images was reduced; 0: images are as they were."""
    source_sha256: str
    """Hash of the names, sizes and labels of the source's images: two datasets of equal hash and settings are equal."""
    extra: dict[str, Any]
    """Settings, sources, git commits, versions of what decoded and encoded."""
    kind: str = "images"
    """Tells this manifest from that of a token dataset."""
    schema_version: int = IMAGE_SCHEMA_VERSION
    """Version of this layout; a reader refuses one it does not know."""

    def __post_init__(self) -> None:
        for split in SPLITS:
            counts = self.images_per_class.get(split, [])
            if len(counts) != len(self.classes) or sum(counts) != self.n_images.get(split):
                raise ValueError(
                    f"the manifest contradicts itself: split {split} has {self.n_images.get(split)} images, but "
                    f"{sum(counts)} in {len(counts)} classes, of {len(self.classes)}: prepare the data again"
                )

    def text(self) -> str:
        """The manifest as JSON with sorted keys: equal manifests are equal bytes."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    def empty_classes(self, split: str) -> list[str]:
        """Names of the classes of which `split` holds no image."""
        return [name for name, n in zip(self.classes, self.images_per_class[split], strict=True) if not n]


def read_image_manifest(folder: str | Path) -> ImageManifest:
    """The manifest of the image dataset at `folder`.

    Raises FileNotFoundError where there is none, ValueError where it is not one that this version can read.
    """
    return ImageManifest(
        **manifest_values(folder, ImageManifest, what="image dataset", script="data_prep/prepare_imagenet.py")
    )
