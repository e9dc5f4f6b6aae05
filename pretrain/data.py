"""Token shards to batches: a sequence by its place in the stream (pretrain.stream has the order and the position).

Legend: `b` sequences of a micro-batch, `t` tokens of a sequence.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data_prep.shard_schema import TOKENS_COLUMN, Manifest
from pretrain.config_sections import ConfigError, DataConfig
from pretrain.dataset_check import manifest_of
from pretrain.shard_store import DatasetError, RowStore
from pretrain.stream import FileOrder, RowOrder, StepLoader

log = logging.getLogger(__name__)

PREFETCH_MICRO_BATCHES = 4


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
        ids = self._store.sample(number)[TOKENS_COLUMN]
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


class TokenLoader(StepLoader[Batch]):
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
        store = RowStore(cfg.path, split, cache_dir=cfg.cache_dir)
        order = RowOrder(store.rows_per_shard, seed)
        reader = SequenceReader(store, order, manifest_of(cfg), cfg, vocab_size)
        super().__init__(
            reader,
            n_sequences_per_epoch=reader.n_sequences,
            n_sequences_per_step=n_sequences_per_step,
            micro_batch=cfg.micro_batch,
            dp_rank=dp_rank,
            dp_size=dp_size,
            n_workers=cfg.n_workers,
            prefetch_micro_batches=PREFETCH_MICRO_BATCHES,
            start_sequence=start_sequence,
            sizes="data.tokens_per_step",
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
    reader = SequenceReader(store, FileOrder(store.rows_per_shard), manifest, cfg, vocab_size)
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
