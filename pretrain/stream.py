"""The order of samples, their split over ranks, and a position that is one integer; for tokens and images alike.

The training stream is endless and the same for every layout. Epoch e is a seeded permutation of the rows: shards are
permuted, then rows are shuffled inside windows of WINDOW_SHARDS consecutive shards of that permutation, so that a
remote dataset is still downloaded nearly in sequence. A row gives one or more consecutive sequences (an image is one).
Step k takes the next `n_sequences_per_step` of the stream, across epoch borders; data-parallel rank r takes the r-th
contiguous slice of them. So "how many sequences were consumed" is the whole state: exact at any data-parallel size,
with any number of workers, in any epoch. Ranks of one tensor-parallel group pass the same `dp_rank`.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from pretrain.config_sections import ConfigError

WINDOW_SHARDS = 16
WORKER_TIMEOUT_S = 1800.0

AnyBatch = TypeVar("AnyBatch")


class RowOrder:
    """Row numbers in training order: `row(epoch, position)` for positions 0 .. n_rows - 1 is a permutation.

    Held lazily: a window's permutation is made when it is first asked for, so that 10^9 rows cost nothing up front.
    """

    def __init__(self, rows_per_shard: NDArray[np.int64], seed: int, window_shards: int = WINDOW_SHARDS) -> None:
        self._rows_per_shard = np.asarray(rows_per_shard, np.int64)
        self._first_row = np.cumsum(self._rows_per_shard) - self._rows_per_shard
        self._seed = seed
        self._window_shards = window_shards
        self.n_rows = int(self._rows_per_shard.sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def __getstate__(self) -> dict[str, Any]:
        return {"args": (self._rows_per_shard, self._seed, self._window_shards)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["args"])  # type: ignore[misc]

    def row(self, epoch: int, position: int) -> int:
        """The row number at `position` of `epoch`."""
        _, window_starts = self._epoch(epoch)
        window = int(np.searchsorted(window_starts, position, side="right")) - 1
        return int(self._window(epoch, window)[position - window_starts[window]])

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard numbers in this epoch's order, and the position at which each window starts."""
        shards = self._generator(epoch, "shards").permutation(len(self._rows_per_shard))
        ends = np.cumsum(self._rows_per_shard[shards])
        starts = ends - self._rows_per_shard[shards]
        return shards, starts[:: self._window_shards]

    def _make_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        shards, _ = self._epoch(epoch)
        inside = shards[window * self._window_shards : (window + 1) * self._window_shards]
        rows = [np.arange(self._first_row[s], self._first_row[s] + self._rows_per_shard[s]) for s in inside]
        return self._generator(epoch, f"window {window}").permutation(np.concatenate(rows))

    def _generator(self, epoch: int, what: str) -> np.random.RandomState:
        # RandomState, because its streams are frozen: a numpy upgrade must not reorder a run that is resumed.
        digest = hashlib.sha256(f"{self._seed} {epoch} {what}".encode()).digest()
        return np.random.RandomState(np.frombuffer(digest, np.uint32))


class FileOrder(RowOrder):
    """Rows as they lie in the files."""

    def __init__(self, rows_per_shard: NDArray[np.int64]) -> None:
        super().__init__(rows_per_shard, seed=0)

    def row(self, epoch: int, position: int) -> int:
        return position


class MicroBatches(Sampler[tuple[int, int]]):
    """(first sequence, how many) of each micro-batch of one rank, from `start` on, without end."""

    def __init__(self, *, start: int, per_step: int, dp_rank: int, dp_size: int, micro_batch: int) -> None:
        self._start, self._per_step, self._micro_batch = start, per_step, micro_batch
        self._per_rank = per_step // dp_size
        self._offset = dp_rank * self._per_rank

    def __iter__(self) -> Iterator[tuple[int, int]]:
        step_start = self._start
        while True:
            first = step_start + self._offset
            for begin in range(first, first + self._per_rank, self._micro_batch):
                yield begin, self._micro_batch
            step_start += self._per_step


class StepLoader(Generic[AnyBatch]):
    """The batches of one data-parallel rank, step by step, without end.

    `reader[first, n]` is the batch of sequences first .. first + n - 1 of the stream. `n_sequences_per_step` counts
    over all ranks; `start_sequence` is what `state_dict` holds. `sizes` names the settings, for the message.
    """

    def __init__(
        self,
        reader: Dataset[AnyBatch],
        *,
        n_sequences_per_epoch: int,
        n_sequences_per_step: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        n_workers: int,
        prefetch_micro_batches: int,
        start_sequence: int = 0,
        sizes: str,
    ) -> None:
        if n_sequences_per_step % (dp_size * micro_batch):
            raise ConfigError(
                f"{n_sequences_per_step} sequences a step do not divide into data-parallel size {dp_size} x "
                f"data.micro_batch={micro_batch}: change {sizes} or data.micro_batch"
            )
        assert 0 <= dp_rank < dp_size, f"dp_rank {dp_rank} of {dp_size}"
        self._reader = reader
        self._per_step, self._micro_batch = n_sequences_per_step, micro_batch
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._n_micro_batches = n_sequences_per_step // (dp_size * micro_batch)
        self._n_workers, self._prefetch = n_workers, prefetch_micro_batches
        self._sequence = start_sequence
        self._batches: Iterator[AnyBatch] | None = None
        self.n_sequences_per_epoch = n_sequences_per_epoch
        """Sequences of the split."""

    def next_step(self) -> list[AnyBatch]:
        """This rank's micro-batches of the next optimizer step. Raises DatasetError where a shard is damaged."""
        if self._batches is None:
            sampler = MicroBatches(
                start=self._sequence,
                per_step=self._per_step,
                dp_rank=self._dp_rank,
                dp_size=self._dp_size,
                micro_batch=self._micro_batch,
            )
            self._batches = iter(batch_loader(self._reader, sampler, self._n_workers, self._prefetch))
        step = [next(self._batches) for _ in range(self._n_micro_batches)]
        self._sequence += self._per_step
        return step

    def state_dict(self) -> dict[str, int]:
        """The global number of sequences consumed: what was prefetched but not handed out does not count."""
        return {"sequence": self._sequence}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after `state["sequence"]` sequences, whatever layout consumed them."""
        self.close()
        self._sequence = state["sequence"]

    def close(self) -> None:
        """End the loader processes. `next_step` after this starts them again."""
        if self._batches is not None:
            shutdown = getattr(self._batches, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()
            self._batches = None


def batch_loader(
    reader: Dataset[AnyBatch], sampler: Iterable[Any], n_workers: int, prefetch_batches: int
) -> DataLoader[AnyBatch]:
    """`reader[key]` for each key of `sampler`, in its order, made by `n_workers` processes (0: by this one)."""
    return DataLoader(
        reader,
        batch_size=None,  # an item already is a micro-batch
        sampler=sampler,
        collate_fn=_identity,
        num_workers=n_workers,
        prefetch_factor=prefetch_batches if n_workers else None,
        timeout=WORKER_TIMEOUT_S if n_workers else 0,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each start draws from the global one, and a resumed run's dropout differs
    )


def _identity(batch: Any) -> Any:
    return batch


def _ignore_signals(_worker: int) -> None:
    """A scheduler signals every process of a job; only the training process may act on it, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
