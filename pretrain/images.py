"""Image shards to batches: decoded and augmented pixels by their place in the stream, and validation images once each.

The order, the split over ranks and the position are pretrain.stream's: an image is a sequence. What is drawn for an image
is a function of the run's seed and of its place in the stream, so that any data-parallel size, any number of loader
processes and any point of resumption give the same pixels.

Legend: `b` images of a micro-batch, `c` the channels R, G, B, `h` and `w` rows and columns of pixels.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data_prep.image_codec import JpegError, Pixels
from data_prep.image_schema import IMAGE_COLUMN, LABEL_COLUMN, NAME_COLUMN, ImageManifest, read_image_manifest
from data_prep.shard_schema import SPLITS
from pretrain.dataset_check import check_index, manifest_folder
from pretrain.image_config import AugmentConfig, ImageDataConfig
from pretrain.image_transform import evaluation_pixels, training_pixels
from pretrain.manifest_check import check_image_manifest, of_its_kind
from pretrain.shard_store import DatasetError, RowStore
from pretrain.stream import RowOrder, StepLoader, batch_loader

log = logging.getLogger(__name__)

PREFETCH_MICRO_BATCHES = 2


@dataclass(frozen=True)
class ImageBatch:
    """One micro-batch of one data-parallel rank."""

    images_bchw: Tensor
    """uint8, [b, 3, image_size, image_size], in channels-last memory; cropped, and in training augmented but for what
    pretrain.augment does on the device."""
    labels_b: Tensor
    """int64 places in the manifest's classes."""
    numbers_b: Tensor
    """int64: each image's place in the training stream, or in the val split. Seeds what is random on the device."""

    def to(self, device: torch.device | str) -> ImageBatch:
        """The batch on `device`; copies from pinned memory do not wait."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> ImageBatch:
        """The batch in page-locked memory (DataLoader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, f: Any) -> ImageBatch:
        return ImageBatch(f(self.images_bchw), f(self.labels_b), f(self.numbers_b))


class ImageReader(Dataset[ImageBatch]):
    """Batches of images: `row_of(number)` is the row of an image, `pixels_of(jpeg, number)` what is made of its bytes."""

    def __init__(
        self,
        store: RowStore,
        *,
        size: int,
        n_classes: int,
        row_of: Callable[[int], int],
        pixels_of: Callable[[bytes, int], Pixels],
    ) -> None:
        self._store, self._size, self._n_classes = store, size, n_classes
        self._row_of, self._pixels_of = row_of, pixels_of

    def __getitem__(self, key: tuple[int, int] | list[int]) -> ImageBatch:
        """The images of a list of numbers, or of (first number, how many)."""
        return self.batch(key if isinstance(key, list) else range(key[0], key[0] + key[1]))

    def batch(self, numbers: Sequence[int]) -> ImageBatch:
        """The images of these numbers, stacked. Raises DatasetError naming the one that no shard may hold."""
        images_bhwc = torch.empty((len(numbers), self._size, self._size, 3), dtype=torch.uint8)
        if get_worker_info() is not None:
            images_bhwc.share_memory_()  # the training process reads it where it lies
        pixels_bhwc = images_bhwc.numpy()
        labels = []
        for i, number in enumerate(numbers):
            row = self._row_of(number)
            sample = self._store.sample(row)
            try:
                pixels_bhwc[i] = self._pixels_of(sample[IMAGE_COLUMN], number)
                labels.append(int(sample[LABEL_COLUMN]))
            except (JpegError, KeyError) as error:
                raise DatasetError(f"{self._place(row, sample)}: {error!r}. {self._store.way_out}") from error
            if not 0 <= labels[-1] < self._n_classes:
                raise DatasetError(
                    f"{self._place(row, sample)}: label {labels[-1]} is not below the manifest's "
                    f"{self._n_classes} classes. The shard is damaged or belongs to another dataset"
                )
        return ImageBatch(images_bhwc.permute(0, 3, 1, 2), torch.tensor(labels), torch.tensor(numbers))

    def _place(self, row: int, sample: dict[str, Any]) -> str:
        return f"shard {self._store.shard_of_row(row)}, row {row} ({sample.get(NAME_COLUMN, 'without a name')})"


class ImageLoader(StepLoader[ImageBatch]):
    """The training images of one data-parallel rank, step by step, without end.

    Every rank must build it (StreamingDataset has barriers in it), after torch.distributed is initialised.
    `n_sequences_per_step` counts images over all ranks; `start_sequence` is what `state_dict` holds. An image that does
    not decode, or whose label is no class of the manifest, raises DatasetError naming shard, row and source: preparation
    lets no such image into a shard.
    """

    def __init__(
        self,
        cfg: ImageDataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        dp_rank: int,
        dp_size: int,
        n_sequences_per_step: int,
        start_sequence: int = 0,
    ) -> None:
        augment.check_micro_batch(cfg.micro_batch)
        store = RowStore(cfg.path, "train", cache_dir=cfg.cache_dir)
        order = RowOrder(store.rows_per_shard, seed)
        reader = ImageReader(
            store,
            size=cfg.image_size,
            n_classes=_n_classes(cfg),
            row_of=partial(_row_in_stream, order),
            pixels_of=partial(_augmented, size=cfg.image_size, cfg=augment, seed=seed),
        )
        super().__init__(
            reader,
            n_sequences_per_epoch=order.n_rows,
            n_sequences_per_step=n_sequences_per_step,
            micro_batch=cfg.micro_batch,
            dp_rank=dp_rank,
            dp_size=dp_size,
            n_workers=cfg.n_workers,
            prefetch_micro_batches=PREFETCH_MICRO_BATCHES,
            start_sequence=start_sequence,
            sizes="data.images_per_step",
        )


def _row_in_stream(order: RowOrder, number: int) -> int:
    return order.row(*divmod(number, order.n_rows))


def _augmented(jpeg: bytes, number: int, *, size: int, cfg: AugmentConfig, seed: int) -> Pixels:
    # Random(int) and its random() are frozen by Python's documentation: an upgrade does not change a run that goes on.
    digest = hashlib.sha256(f"{seed} image {number}".encode()).digest()
    return training_pixels(jpeg, size, cfg, Random(int.from_bytes(digest[:16], "little")))


class ValidationImages:
    """This rank's share of the validation images, in batches; iterating starts loader processes, and again each time."""

    def __init__(self, reader: ImageReader, numbers: list[list[int]], n_workers: int) -> None:
        self._reader, self._numbers, self._n_workers = reader, numbers, n_workers

    def __len__(self) -> int:
        """Batches of this rank; 0 where there are fewer images than ranks."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[ImageBatch]:
        n_workers = min(self._n_workers, len(self._numbers))
        return iter(batch_loader(self._reader, self._numbers, n_workers, PREFETCH_MICRO_BATCHES))


def validation_images(cfg: ImageDataConfig, *, n_images: int, dp_rank: int, dp_size: int) -> ValidationImages:
    """This rank's share of `n_images` images (0: all) spread evenly over the val split: the same ones every time.

    Over all ranks each comes exactly once. Ranks may differ by one image, and so by a batch: what they compute is summed
    over ranks, never batch by batch. Batches hold data.micro_batch images, the last one what is left. Every rank must
    call this; iterating needs no other rank.
    """
    store = RowStore(cfg.path, "val", cache_dir=cfg.cache_dir)
    n_rows = store.n_rows
    n = min(n_images, n_rows) if n_images else n_rows
    chosen = [i * n_rows // n for i in range(n)]
    mine = chosen[dp_rank * n // dp_size : (dp_rank + 1) * n // dp_size]
    reader = ImageReader(
        store,
        size=cfg.image_size,
        n_classes=_n_classes(cfg),
        row_of=_same,
        pixels_of=partial(_centred, size=cfg.image_size, crop_ratio=cfg.eval_crop_ratio),
    )
    return ValidationImages(
        reader, [mine[i : i + cfg.micro_batch] for i in range(0, len(mine), cfg.micro_batch)], cfg.n_workers
    )


def _same(number: int) -> int:
    return number


def _centred(jpeg: bytes, number: int, *, size: int, crop_ratio: float) -> Pixels:
    return evaluation_pixels(jpeg, size, crop_ratio)


def check_image_dataset(cfg: ImageDataConfig, n_classes: int | None, *, training: bool = True) -> ImageManifest:
    """The dataset's manifest, once everything that can be known before training was found in order.

    Without `training` only val is read, which is what is checked then; n_classes None takes any number of classes.

    Raises FileNotFoundError (no dataset, a shard is missing), ConfigError (the config asks for what the dataset is
    not) or DatasetError (damaged). Touches no shared memory; any rank may call it alone.
    """
    manifest = _manifest_of(cfg)
    check_image_manifest(manifest, cfg, n_classes, training=training)
    for split in SPLITS if training else ("val",):
        if empty := manifest.empty_classes(split):
            raise DatasetError(
                f"{cfg.path}: split {split} has no image of {len(empty)} of {len(manifest.classes)} classes, {', '.join(empty[:5])} "
                "among them: prepare the data again"
            )
        n_rows = check_index(cfg.path, cfg.cache_dir, split)
        if n_rows != manifest.n_images[split]:
            raise DatasetError(
                f"{cfg.path}: the index of {split} lists {n_rows} images, the manifest says "
                f"{manifest.n_images[split]}: copy the dataset again, or prepare the data again"
            )
    short = math.floor(manifest.resize_short * cfg.eval_crop_ratio)
    if manifest.resize_short and short < cfg.image_size:
        log.warning(
            "%s was reduced to a short side of %d pixels: the %g of it that validation sees, %d pixels, are fewer than "
            "data.image_size=%d and will be enlarged. Prepare with a larger --resize-short, or 0",
            cfg.path,
            manifest.resize_short,
            cfg.eval_crop_ratio,
            short,
            cfg.image_size,
        )
    return manifest


def _manifest_of(cfg: ImageDataConfig) -> ImageManifest:
    with of_its_kind():
        return read_image_manifest(manifest_folder(cfg.path, cfg.cache_dir))


def _n_classes(cfg: ImageDataConfig) -> int:
    return len(_manifest_of(cfg).classes)
