"""One preparation job of images: shards by worker processes, a record of each, and at the end the dataset.

A shard is written whole, then its record beside the other progress: what it holds, what was left out or changed. A job
that starts again makes the shards that have no record. Jobs of an array share the shards out; the result is the same for
any number of jobs and workers. The last step joins the records: indexes, the log of policy, then the manifest.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
from PIL import Image

from data_prep.image_listing import Listing
from data_prep.image_plan import Task, plan
from data_prep.image_policy import ImagePolicy, prepare_image
from data_prep.image_schema import IMAGE_COLUMNS, POLICY_LOG_NAME, ImageManifest, read_image_manifest
from data_prep.image_sources import ImageRef, read_images
from data_prep.prep_job import (
    PROGRESS_FOLDER,
    WORKER_KILLED,
    OutputError,
    WorkerPool,
    already_finished,
    check_settings,
    git_commit,
    locked,
    remove_progress,
)
from data_prep.progress import Progress
from data_prep.shard_schema import MANIFEST_NAME, SPLITS
from data_prep.shard_writer import (
    ASIDE_SUFFIX,
    check_shard_bytes,
    file_info,
    mds_config,
    mds_file,
    write_atomic,
    write_index,
)

TASKS_AHEAD = 2
COUNTED_ONLY = "converted_size"
"""What happens to every image of a reduced dataset is counted, and not logged by name."""
MDS_CONFIG = mds_config(IMAGE_COLUMNS, [None, 8, None])


@dataclass
class ShardRecord:
    """What a finished shard holds."""

    entry: dict[str, Any] | None
    """The shard's entry in the index; None where every image was left out, and there is no file."""
    n_per_label: dict[str, int]
    counts: dict[str, int]
    """Images by what was done to them."""
    log: list[dict[str, str]]
    """A line for each image that was left out or changed."""


@dataclass(kw_only=True)
class ImagePreparation:
    """A job: `run` does it."""

    output: Path
    listing: Listing
    policy: ImagePolicy
    sources: dict[str, list[str]]
    """What the command named, by split; for people."""
    image_column: str = "image"
    seed: int = 0
    shard_bytes: int = 64 << 20
    rank: int = 0
    world_size: int = 1
    n_workers: int = 1
    settings: dict[str, Any] = field(init=False)
    """Everything that decides the output; a run with other settings is refused."""

    def __post_init__(self) -> None:
        check_shard_bytes(self.shard_bytes)
        if self.n_workers < 1:
            raise ValueError(f"--workers {self.n_workers}: must be at least 1, or 0 for all cores")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"--rank {self.rank} of --world-size {self.world_size}: must lie in 0..world size - 1")
        self.settings = asdict(self.policy) | {
            "seed": self.seed,
            "shard_bytes": self.shard_bytes,
            "source_sha256": self.listing.sha256(),
            "n_classes": len(self.listing.classes),
            "encoders": f"Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}",
        }

    def run(self) -> int:
        """Do what is left to do. Returns the exit status."""
        if (self.output / MANIFEST_NAME).is_file():
            check_settings(self.output, read_image_manifest(self.output).extra["settings"], self.settings)
            return already_finished(self.output)
        self.output.mkdir(parents=True, exist_ok=True)
        part = f"part-{self.rank:05}-of-{self.world_size:05}"
        with locked(self.output, part):
            self._agree_on_settings(part)
            tasks = plan(self.listing, self.shard_bytes, self.seed)
            for split in SPLITS:
                (self.output / split).mkdir(exist_ok=True)
            mine = tasks[self.rank :: self.world_size]
            self._make_all([task for task in mine if not self._is_done(task)], n_tasks=len(mine))
            if self.world_size == 1:
                return self._join(tasks)
        print(f"{part} is whole. When all {self.world_size} are: the same command with --merge")
        return 0

    def merge(self) -> int:
        """Join the finished parts of an array. Returns the exit status; raises OutputError where one is not finished."""
        if (self.output / MANIFEST_NAME).is_file():
            check_settings(self.output, read_image_manifest(self.output).extra["settings"], self.settings)
            return already_finished(self.output)
        tasks = plan(self.listing, self.shard_bytes, self.seed)
        if not (self.output / PROGRESS_FOLDER).is_dir():
            raise OutputError(f"{self.output} holds no prepared part: run without --merge first")
        self._agree_on_settings("merge")
        unfinished = [task for task in tasks if not self._is_done(task)]
        if unfinished:
            raise OutputError(
                f"{self.output}: {sum(len(task.shards) for task in unfinished)} shards are not made, "
                f"{shard_name(unfinished[0].first_shard)} of {unfinished[0].split} among them: run the unfinished jobs "
                "again, then --merge"
            )
        return self._join(tasks)

    def _agree_on_settings(self, part: str) -> None:
        """Refuse to add to what was begun with other settings; leave ours for those who come after."""
        folder = self.output / PROGRESS_FOLDER
        for path in sorted(folder.glob("settings.*.json")):
            check_settings(self.output, json.loads(path.read_text()), self.settings)
        write_atomic(folder / f"settings.{part}.json", json.dumps(self.settings).encode())

    def _is_done(self, task: Task) -> bool:
        return all(
            self._record(task.split, task.first_shard + number) is not None for number in range(len(task.shards))
        )

    def _record(self, split: str, number: int) -> ShardRecord | None:
        """The record of a shard whose file is there in its full size."""
        try:
            record = ShardRecord(**json.loads(record_path(self.output, split, number).read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise OutputError(
                f"{self.output}: the record of {split} {number} is damaged ({error}): remove it"
            ) from None
        if record.entry is not None:
            info = record.entry["raw_data"]
            path = self.output / split / info["basename"]
            if not path.is_file() or path.stat().st_size != info["bytes"]:
                return None
        return record

    def _make_all(self, todo: list[Task], n_tasks: int) -> None:
        total = sum(_n_bytes(task) for task in todo)
        if len(todo) < n_tasks:
            print(f"{n_tasks - len(todo)} of {n_tasks} pieces of work were done before", file=sys.stderr)
        done = n_made = n_skipped = 0
        with Progress("images", total=total, done=0, n_made=0, n_workers=self.n_workers) as progress:
            for task, counts in self._finished(todo):
                done += _n_bytes(task)
                n_made += counts["made"]
                n_skipped += counts["skipped"]
                progress.update(done, n_made=n_made, n_skipped=n_skipped)

    def _finished(self, todo: list[Task]) -> Iterator[tuple[Task, Counter[str]]]:
        """Tasks as they are finished, by `n_workers` processes (1: by this one)."""
        job = (self.output, self.policy, self.image_column)
        if self.n_workers == 1:
            for task in todo:
                yield task, make_shards(task, *job)
            return
        running: dict[Future[Counter[str]], Task] = {}
        try:
            with WorkerPool(self.n_workers) as pool:
                for task in todo:
                    running[pool.submit(make_shards, task, *job)] = task
                    if len(running) >= TASKS_AHEAD * self.n_workers:
                        yield from _done(running)
                while running:
                    yield from _done(running)
        except BrokenProcessPool:
            raise OutputError(f"{self.output}: {WORKER_KILLED}") from None

    def _join(self, tasks: list[Task]) -> int:
        """Indexes, log and manifest of the finished shards."""
        n_shards = Counter[str]()
        for task in tasks:
            n_shards[task.split] += len(task.shards)
        n_per_class = {split: [0] * len(self.listing.classes) for split in SPLITS}
        policy: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        log: list[dict[str, str]] = []
        entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            for aside in (self.output / split).glob(f".*{ASIDE_SUFFIX}"):  # a kill may have come while one was written
                aside.unlink()
            for number in range(n_shards[split]):
                record = self._record(split, number)
                assert record is not None, f"{split} {number} was said to be done"
                if record.entry is not None:
                    entries[split].append(record.entry)
                for label, n in record.n_per_label.items():
                    n_per_class[split][int(label)] += n
                policy[split].update(record.counts)
                log += record.log
        write_atomic(self.output / POLICY_LOG_NAME, "".join(f"{json.dumps(line)}\n" for line in log).encode())
        for split in SPLITS:
            write_index(self.output / split, entries[split])
        manifest = ImageManifest(
            classes=self.listing.classes,
            n_images={split: sum(n_per_class[split]) for split in SPLITS},
            images_per_class=n_per_class,
            policy={split: dict(sorted(policy[split].items())) for split in SPLITS},
            resize_short=self.policy.resize_short,
            source_sha256=self.settings["source_sha256"],
            extra={"settings": self.settings, "sources": self.sources, "git_commit": git_commit()},
        )
        for split in SPLITS:
            if empty := manifest.empty_classes(split):
                raise OutputError(
                    f"{self.output}: every image of {len(empty)} classes in {split}, {', '.join(empty[:5])} among them, was "
                    f"left out; {POLICY_LOG_NAME} says why. Mend them, remove the classes, or change the policy, and "
                    "prepare into another --output"
                )
        write_atomic(self.output / MANIFEST_NAME, manifest.text().encode())
        remove_progress(self.output)
        print(f"{self.output}: {len(manifest.classes)} classes")
        for split in SPLITS:
            print(
                f"{split}: {manifest.n_images[split]:,} images; {manifest.policy[split] or 'none skipped or converted'}"
            )
        return 0


def make_shards(task: Task, output: Path, policy: ImagePolicy, image_column: str) -> Counter[str]:
    """Make the task's shards and their records in `output`; how many images were made and skipped. Runs in a worker.

    Raises InputError where a source cannot be read.
    """
    Image.MAX_IMAGE_PIXELS = 2 * policy.max_pixels  # the policy's own limit is checked first
    shard_of = {(ref.path, ref.group, ref.offset): i for i, refs in enumerate(task.shards) for ref in refs}
    prepared: list[dict[ImageRef, bytes]] = [{} for _ in task.shards]
    records = [ShardRecord(None, {}, {}, []) for _ in task.shards]
    totals = Counter[str]()
    for ref, data in read_images([ref for refs in task.shards for ref in refs], image_column):
        i = shard_of[ref.path, ref.group, ref.offset]
        outcome = prepare_image(data, policy)
        for reason, detail in outcome.what.items():
            records[i].counts[reason] = records[i].counts.get(reason, 0) + 1
            if reason != COUNTED_ONLY:
                records[i].log.append({"split": task.split, "name": ref.name, "what": reason, "detail": detail})
        if outcome.jpeg is not None:
            prepared[i][ref] = outcome.jpeg
        totals["made" if outcome.jpeg is not None else "skipped"] += 1
    for i, (refs, jpegs, record) in enumerate(zip(task.shards, prepared, records, strict=True)):
        number = task.first_shard + i
        kept = [ref for ref in refs if ref in jpegs]
        if kept:
            samples = [sample_bytes(jpegs[ref], ref.label, ref.name) for ref in kept]
            raw = mds_file(MDS_CONFIG, [len(sample) for sample in samples], b"".join(samples))
            name = shard_name(number)
            write_atomic(output / task.split / name, raw)
            record.entry = MDS_CONFIG | {"samples": len(kept), "raw_data": file_info(name, raw), "zip_data": None}
        labels = Counter(ref.label for ref in kept)
        record.n_per_label = {str(label): n for label, n in sorted(labels.items())}
        write_atomic(record_path(output, task.split, number), json.dumps(asdict(record)).encode())
    return totals


def sample_bytes(jpeg: bytes, label: int, name: str) -> bytes:
    """An MDS sample of IMAGE_COLUMNS: sizes of the columns whose size varies, then the columns."""
    name_bytes = name.encode(errors="surrogateescape")
    name_bytes = name_bytes.decode(errors="replace").encode()  # a file's name need not be text, a str column must
    sizes = np.array([len(jpeg), len(name_bytes)], "<u4").tobytes()
    return sizes + jpeg + np.int64(label).tobytes() + name_bytes


def shard_name(number: int) -> str:
    """The shard's file in its split's folder."""
    return f"shard.{number:05}.mds"


def record_path(output: Path, split: str, number: int) -> Path:
    """Where a shard's record is kept until the dataset is whole."""
    return output / PROGRESS_FOLDER / f"{split}.{number:05}.json"


def _done(running: dict[Future[Counter[str]], Task]) -> Iterator[tuple[Task, Counter[str]]]:
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        yield running.pop(future), future.result()


def _n_bytes(task: Task) -> int:
    return sum(ref.n_bytes for refs in task.shards for ref in refs)
