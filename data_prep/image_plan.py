"""Which images go into which shard: a function of the listing and the settings alone, made before any image is read.

So a shard can be made by any process of any job, in any order, again after a crash, with the same bytes. Train is shuffled
here, because training shuffles in windows of shards only: class-sorted shards would give class-sorted batches. Val keeps
the order of its source.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from data_prep.image_listing import Listing
from data_prep.image_sources import ImageRef
from data_prep.shard_schema import SPLITS

Item = TypeVar("Item")

GROUP_WINDOW_SHARDS = 8
"""Row groups of about this many shards are read together and mixed: one is read whole even for one image of it."""


@dataclass(frozen=True)
class Task:
    """Shards that are made together, because they share what must be read for them."""

    split: str
    first_shard: int
    shards: list[list[ImageRef]]


def plan(listing: Listing, shard_bytes: int, seed: int) -> list[Task]:
    """The tasks, shards of each split numbered from 0. Sizes are those of the source, before any conversion."""
    tasks: list[Task] = []
    for split in SPLITS:
        first = 0
        shuffle = np.random.RandomState(seed) if split == "train" else None  # RandomState: its streams are frozen
        for window in _windows(listing.images[split], shard_bytes, shuffle):
            shards = _parts(window, [ref.n_bytes for ref in window], shard_bytes)
            tasks.append(Task(split, first, shards))
            first += len(shards)
    return tasks


def _windows(
    images: Sequence[ImageRef], shard_bytes: int, shuffle: np.random.RandomState | None
) -> list[list[ImageRef]]:
    """Images that are mixed among themselves: row groups of GROUP_WINDOW_SHARDS shards, else those of one shard."""
    by_unit = itertools.groupby(images, lambda ref: (ref.path, ref.group, ref.offset if ref.group < 0 else 0))
    units = [list(unit) for _, unit in by_unit]
    window_bytes = shard_bytes * (GROUP_WINDOW_SHARDS if any(ref.group >= 0 for ref in images) else 1)
    if shuffle is not None:
        units = [units[i] for i in shuffle.permutation(len(units)).tolist()]
    parts = _parts(units, [sum(ref.n_bytes for ref in unit) for unit in units], window_bytes)
    windows = [list(itertools.chain.from_iterable(part)) for part in parts]
    if shuffle is not None:
        windows = [[window[i] for i in shuffle.permutation(len(window)).tolist()] for window in windows]
    return windows


def _parts(items: list[Item], sizes: list[int], part_size: int) -> list[list[Item]]:
    """`items` in order, as parts of about `part_size` that are all of about the same size."""
    ends = np.cumsum(sizes)
    n_parts = min(len(items), max(1, round(int(ends[-1]) / part_size)))
    bounds = np.searchsorted(ends, np.arange(1, n_parts) * (ends[-1] / n_parts)) + 1
    parts = [items[a:b] for a, b in itertools.pairwise([0, *bounds.tolist(), len(items)])]
    return [part for part in parts if part]
