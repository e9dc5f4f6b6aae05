"""The images' half of verify_shards.py: every byte, every image, every count; and a picture of some images."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.image_codec import JpegError, Pixels, decode_rgb
from data_prep.image_schema import ImageManifest, read_image_manifest
from data_prep.prep_job import WorkerPool
from data_prep.shard_reader import ShardError, read_image_shard, split_index
from data_prep.shard_schema import SPLITS

GRID = 8


@dataclass
class ShardReport:
    """What a shard holds, and what is wrong with it."""

    labels: Counter[int] = field(default_factory=Counter)
    n_bytes: int = 0
    n_pixels: int = 0
    problems: list[str] = field(default_factory=list)


def verify_images(folder: Path, picture: str, n_workers: int) -> int:
    """Print what is in the image dataset and every problem. Returns the exit status: 1 for a damaged dataset, 2 where that
    could not be found out."""
    try:
        manifest = read_image_manifest(folder)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems: list[str] = []
    for split in SPLITS:
        whole = ShardReport()
        try:
            entries = split_index(folder, split)
        except ShardError as error:
            problems.append(str(error))
            continue
        try:
            for report in _reports([(folder / split, entry, len(manifest.classes)) for entry in entries], n_workers):
                whole.labels.update(report.labels)
                whole.n_bytes += report.n_bytes
                whole.n_pixels += report.n_pixels
                whole.problems += report.problems
        except BrokenProcessPool:
            print(
                f"error: {split}: a process that decodes images was killed, for want of memory perhaps: run it again with "
                "fewer --workers",
                file=sys.stderr,
            )
            return 2
        found = [whole.labels[label] for label in range(len(manifest.classes))]
        if not whole.problems and found != manifest.images_per_class[split]:
            whole.problems.append(f"{split}: the images of each class are not those that the manifest counts")
        problems += whole.problems
        print(_describe(split, whole, len(entries)))
    if picture and not problems:
        _draw(folder, manifest, picture)
        print(f"images: {picture}")
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(f"{folder}: {len(problems)} problems" if problems else f"{folder}: whole")
    return 1 if problems else 0


def _describe(split: str, whole: ShardReport, n_shards: int) -> str:
    n = max(1, whole.labels.total())
    counts = whole.labels.values()
    return (
        f"{split}: {whole.labels.total():,} images in {n_shards:,} shards, {whole.n_bytes / n / 1000:,.1f} kB and "
        f"{whole.n_pixels / n:,.0f} pixels each; a class has {min(counts, default=0):,} to {max(counts, default=0):,}"
    )


def _reports(jobs: list[tuple[Path, dict[str, Any], int]], n_workers: int) -> Iterator[ShardReport]:
    if min(n_workers, len(jobs)) <= 1:
        yield from map(check_shard, jobs)
        return
    with WorkerPool(n_workers) as pool:
        yield from pool.map(check_shard, jobs)


def check_shard(job: tuple[Path, dict[str, Any], int]) -> ShardReport:
    """Read and decode every image of one shard: (folder of the split, its index entry, number of classes)."""
    folder, entry, n_classes = job
    report = ShardReport()
    where = f"shard {folder / entry['raw_data']['basename']}"
    try:
        for row, (jpeg, label, name) in enumerate(read_image_shard(folder, entry)):
            report.labels[label] += 1
            report.n_bytes += len(jpeg)
            if not 0 <= label < n_classes:
                report.problems.append(f"{where}, row {row} ({name}): label {label} of {n_classes} classes")
            try:
                report.n_pixels += decode_rgb(jpeg).size // 3
            except JpegError as error:
                report.problems.append(f"{where}, row {row} ({name}): {error}")
    except ShardError as error:
        report.problems.append(str(error))
    return report


def _draw(folder: Path, manifest: ImageManifest, path: str) -> None:
    """A PNG of the first images of train, as training will meet them, with their classes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = list(_first_images(folder, GRID * GRID))
    figure, axes = pyplot.subplots(GRID, GRID, figsize=(12, 12.8))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (pixels, label) in zip(axes.flat, shown, strict=False):
        axis.imshow(pixels)
        axis.set_title(manifest.classes[label][:18], fontsize=7, pad=2)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _first_images(folder: Path, n: int) -> Iterator[tuple[Pixels, int]]:
    for entry in split_index(folder, "train"):
        for jpeg, label, _ in read_image_shard(folder / "train", entry):
            if n <= 0:
                return
            n -= 1
            yield decode_rgb(jpeg), label
