"""Token shards to batches: the order of sequences, their split over ranks, and a position that is one integer.

**Order.** The training stream is endless and the same for every layout. Epoch e is a seeded permutation of the rows:
shards are permuted, then rows are shuffled inside windows of WINDOW_SHARDS consecutive shards of that permutation, so
that a remote dataset is still downloaded nearly in sequence. A row gives `row_tokens / seq_len` consecutive sequences.
Step k takes the next `n_sequences_per_step` of the stream, across epoch borders; data-parallel rank r takes the r-th
contiguous slice of them. So "how many sequences were consumed" is the whole state: exact at any data-parallel size,
with any number of workers, in any epoch. Ranks of one tensor-parallel group pass the same `dp_rank`.

Legend: `b` sequences of a micro-batch, `t` tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_prep.shard_schema import Manifest
from pretrain.config import ConfigError, DataConfig
from pretrain.dataset_check import manifest_of
from pretrain.shard_store import DatasetError, RowStore

log = logging.getLogger(__name__)

WINDOW_SHARDS = 16
PREFETCH_MICRO_BATCHES = 4
WORKER_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank."""

    tokens_bt: Tensor
    """int64 ids."""
    targets_bt: Tensor
    """int64: the id that follows each token."""
    seq_idx_bt: Tensor | None
    """int32 number of the document inside the sequence, from 0; None unless data.reset_at_documents."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; copies from pinned memory do not wait."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (DataLoader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, f: Any) -> Batch:
        seq_idx_bt = None if self.seq_idx_bt is None else f(self.seq_idx_bt)
        return Batch(f(self.tokens_bt), f(self.targets_bt), seq_idx_bt)


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


class SequenceReader(Dataset[Batch]):
    """Batches of sequences by their place in the stream: `reader[first, n]` is sequences first .. first + n - 1."""

    def __init__(self, store: RowStore, order: RowOrder, manifest: Manifest, cfg: DataConfig, vocab_size: int) -> None:
        self._store = store
        self._order = order
        self._seq_len = cfg.seq_len
        self._per_row = manifest.row_tokens // cfg.seq_len
        self._row_tokens = manifest.row_tokens
        self._eos_id = manifest.eos_id
        self._reset_at_documents = cfg.reset_at_documents
        self._vocab_size = vocab_size
        self._last_row: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        self.n_sequences = order.n_rows * self._per_row

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        first, n = key
        return self.batch(range(first, first + n))

    def batch(self, sequences: range | list[int]) -> Batch:
        """The sequences at these places of the stream, stacked."""
        ids_bt = torch.from_numpy(np.stack([self._sequence(number) for number in sequences]))  # [b, seq_len + 1]
        tokens_bt = ids_bt[:, :-1].contiguous()
        seq_idx_bt = None
        if self._reset_at_documents:
            ends_bt = (tokens_bt == self._eos_id).to(torch.int32)
            seq_idx_bt = ends_bt.cumsum(dim=1, dtype=torch.int32) - ends_bt  # an eos still belongs to its document
        return Batch(tokens_bt, ids_bt[:, 1:].contiguous(), seq_idx_bt)

    def _sequence(self, number: int) -> NDArray[np.int64]:
        epoch, in_epoch = divmod(number, self.n_sequences)
        position, piece = divmod(in_epoch, self._per_row)
        ids = self._row(self._order.row(epoch, position))
        return ids[piece * self._seq_len : (piece + 1) * self._seq_len + 1]

    def _row(self, number: int) -> NDArray[np.int64]:
        if self._last_row[0] == number:  # the sequences of a row are neighbours in the stream
            return self._last_row[1]
        ids = self._store.row(number)
        if ids.shape != (self._row_tokens + 1,):
            raise DatasetError(
                f"shard {self._store.shard_of_row(number)}, row {number}: {ids.shape} ids, the manifest says "
                f"{self._row_tokens} + 1. The shard belongs to another dataset: prepare the data again"
            )
        largest = int(ids.max())
        if largest >= self._vocab_size:
            raise DatasetError(
                f"shard {self._store.shard_of_row(number)}, row {number}: token id {largest} is not below the model's "
                f"vocab_size={self._vocab_size}. The shard is damaged or was made with another tokenizer"
            )
        self._last_row = (number, ids.astype(np.int64))
        return self._last_row[1]


class _MicroBatches(Sampler[tuple[int, int]]):
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


class TokenLoader:
    """The batches of one data-parallel rank, step by step, without end.

    Every rank must build it (StreamingDataset has barriers in it), after torch.distributed is initialised.
    `n_sequences_per_step` counts over all ranks; `start_sequence` is what `state_dict` holds.
    """

    def __init__(
        self,
        cfg: DataConfig,
        *,
        split: str,
        vocab_size: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
        n_sequences_per_step: int,
        start_sequence: int = 0,
    ) -> None:
        if n_sequences_per_step % (dp_size * cfg.micro_batch):
            raise ConfigError(
                f"{n_sequences_per_step} sequences a step do not divide into data-parallel size {dp_size} x "
                f"data.micro_batch={cfg.micro_batch}: change data.tokens_per_step or data.micro_batch"
            )
        assert 0 <= dp_rank < dp_size, f"dp_rank {dp_rank} of {dp_size}"
        self._cfg = cfg
        self._per_step = n_sequences_per_step
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._n_micro_batches = n_sequences_per_step // (dp_size * cfg.micro_batch)
        store = RowStore(cfg.path, split, cache_dir=cfg.cache_dir)
        order = RowOrder(store.rows_per_shard, seed)
        self._reader = SequenceReader(store, order, manifest_of(cfg), cfg, vocab_size)
        self._sequence = start_sequence
        self._batches: Iterator[Batch] | None = None

    @property
    def n_sequences_per_epoch(self) -> int:
        """Sequences of the split."""
        return self._reader.n_sequences

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step. Raises DatasetError where a shard is damaged."""
        if self._batches is None:
            self._batches = iter(self._loader())
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

    def _loader(self) -> DataLoader[Batch]:
        n_workers = self._cfg.n_workers
        return DataLoader(
            self._reader,
            batch_size=None,  # an item already is a micro-batch
            sampler=_MicroBatches(
                start=self._sequence,
                per_step=self._per_step,
                dp_rank=self._dp_rank,
                dp_size=self._dp_size,
                micro_batch=self._cfg.micro_batch,
            ),
            collate_fn=_identity,
            num_workers=n_workers,
            prefetch_factor=PREFETCH_MICRO_BATCHES if n_workers else None,
            timeout=WORKER_TIMEOUT_S if n_workers else 0,
            worker_init_fn=_ignore_signals,
            pin_memory=torch.cuda.is_available(),
        )


def validation_batches(
    cfg: DataConfig, *, vocab_size: int, dp_rank: int, dp_size: int, n_sequences: int
) -> list[Batch]:
    """This rank's share of `n_sequences` sequences spread evenly over the val split: the same ones every time.

    Over all ranks each comes exactly once, and all ranks get batches of equal shapes (ZeRO-3 gathers in every forward).
    Where the split holds fewer, the largest multiple of `dp_size` that it holds. Every rank must call this.
    """
    store = RowStore(cfg.path, "val", cache_dir=cfg.cache_dir)
    manifest = manifest_of(cfg)
    reader = SequenceReader(store, _FileOrder(store.rows_per_shard), manifest, cfg, vocab_size)
    n = min(n_sequences, reader.n_sequences) // dp_size * dp_size
    if n != n_sequences and dp_rank == 0:
        log.info("validation: %d of %d sequences, the most that %d ranks can share evenly", n, n_sequences, dp_size)
    if n == 0:
        raise ConfigError(
            f"validation: {min(n_sequences, reader.n_sequences)} sequences (logging.eval_sequences={n_sequences}, the "
            f"val split holds {reader.n_sequences}) for {dp_size} data-parallel ranks: give each at least one"
        )
    chosen = [i * reader.n_sequences // n for i in range(n)]
    mine = chosen[dp_rank * n // dp_size : (dp_rank + 1) * n // dp_size]
    return [reader.batch(mine[i : i + cfg.micro_batch]) for i in range(0, len(mine), cfg.micro_batch)]


class _FileOrder(RowOrder):
    """Rows as they lie in the files."""

    def __init__(self, rows_per_shard: NDArray[np.int64]) -> None:
        super().__init__(rows_per_shard, seed=0)

    def row(self, epoch: int, position: int) -> int:
        return position


def _identity(batch: Any) -> Any:
    return batch


def _ignore_signals(_worker: int) -> None:
    """A scheduler signals every process of a job; only the training process may act on it, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
