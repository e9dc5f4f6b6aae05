"""What a worker process does: a chunk of documents in, ids, document lengths, split and counts out. Pure and stateless.

In a module of its own so that a spawned worker imports this and not the command line.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_prep.corpus_io import Chunk, Filters, documents, sha256_of
from data_prep.prep_job import WORKER_KILLED, OutputError, WorkerPool
from data_prep.shard_schema import token_dtype
from data_prep.tokenizers_io import TextTokenizer, open_tokenizer

SLICE_BYTES = 1 << 20
CHUNKS_AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Everything that decides what ids a chunk becomes."""

    tokenizer: str
    eos_token: str = ""
    text_column: str = "text"
    filters: Filters = field(default_factory=Filters)
    val_fraction: float = 0.0
    """Share of documents that go to val, by hash of their text: the same ones whatever else changes."""
    reference_encoder: bool = False
    """Keep to the tokenizers library where a faster encoder gives the same ids (so no part of the fingerprint)."""
    max_document_bytes: int = 16 << 20
    """Longer documents are skipped, as too_long: encoding one takes some 100 times its size in memory."""


@dataclass(frozen=True)
class EncodedChunk:
    """The documents of a chunk, end to end, each followed by eos."""

    chunk: Chunk
    """Which one; without its payload."""
    crc: int
    """Chunk.crc of it with its payload."""
    ids: NDArray[np.unsignedinteger]
    lengths: NDArray[np.int64]
    """Ids of each document, eos included."""
    is_val: NDArray[np.bool_]
    skipped: Counter[str]
    n_text_bytes: int
    source_sha256: str = ""
    """Of the whole file, on its last chunk."""


class Encoder:
    """Encodes chunks with one tokenizer."""

    def __init__(self, settings: EncodeSettings) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is the unit of parallelism here
        self._settings = settings
        self.tokenizer: TextTokenizer = open_tokenizer(
            settings.tokenizer, settings.eos_token, reference=settings.reference_encoder
        )
        self._dtype = np.dtype(token_dtype(self.tokenizer.vocab_size))

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """The chunk's ids. Raises InputError where its bytes do not decode."""
        done = Chunk(chunk.source, chunk.path, chunk.number, None, chunk.fraction)
        if chunk.payload is None:
            empty = np.empty(0, np.int64)
            digest = sha256_of(chunk.path)
            return EncodedChunk(done, 0, empty.astype(self._dtype), empty, empty.astype(bool), Counter(), 0, digest)
        skipped: Counter[str] = Counter()
        parts: list[NDArray[np.unsignedinteger]] = []
        lengths: list[int] = []
        is_val: list[bool] = []
        n_bytes = 0
        eos = np.array([self.tokenizer.eos_id], self._dtype)
        texts = documents(chunk, self._settings.text_column, self._settings.filters, skipped)
        for batch in self._slices(texts, skipped):
            encoded = self.tokenizer.encode_batch([text for text, _ in batch])
            for (_, raw), ids in zip(batch, encoded, strict=True):
                if ids is None:
                    skipped["not_encodable"] += 1
                    continue
                if not len(ids):
                    skipped["empty"] += 1
                    continue
                parts += [ids, eos]
                lengths.append(len(ids) + 1)
                is_val.append(in_val(raw, self._settings.val_fraction))
                n_bytes += len(raw)
        joined = np.concatenate(parts) if parts else np.empty(0, self._dtype)
        return EncodedChunk(
            done, chunk.crc(), joined, np.array(lengths, np.int64), np.array(is_val, bool), skipped, n_bytes
        )

    def _slices(self, texts: Iterable[str], skipped: Counter[str]) -> Iterator[list[tuple[str, bytes]]]:
        """Texts with their bytes, about SLICE_BYTES at a time: what an encoder returns is far larger than the text."""
        batch: list[tuple[str, bytes]] = []
        n_bytes = 0
        for text in texts:
            raw = text.encode()
            if not raw:
                skipped["empty"] += 1
                continue
            if len(raw) > self._settings.max_document_bytes:
                skipped["too_long"] += 1
                continue
            batch.append((text, raw))
            n_bytes += len(raw)
            if n_bytes >= SLICE_BYTES:
                yield batch
                batch, n_bytes = [], 0
        if batch:
            yield batch


def in_val(raw: bytes, fraction: float) -> bool:
    """Whether the document of these bytes belongs to val. A function of the text alone; copies stay together."""
    if fraction <= 0:
        return False
    digest = hashlib.blake2b(raw, digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def encode_in_order(chunks: Iterable[Chunk], settings: EncodeSettings, n_workers: int) -> Generator[EncodedChunk]:
    """The encoded chunks, in order, by `n_workers` processes (1: in this one).

    At most CHUNKS_AHEAD chunks a worker are in flight, so memory does not grow with the corpus. Raises OutputError where a
    worker was killed.
    """
    if n_workers <= 1:
        encoder = Encoder(settings)
        yield from map(encoder.encode, chunks)
        return
    waiting: list[Future[EncodedChunk]] = []
    try:
        with WorkerPool(n_workers, _open_encoder, settings) as pool:
            for chunk in chunks:
                waiting.append(pool.submit(_encode, chunk))
                if len(waiting) >= CHUNKS_AHEAD * n_workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
    except BrokenProcessPool:
        raise OutputError(WORKER_KILLED) from None


_encoder: Encoder | None = None


def _open_encoder(settings: EncodeSettings) -> None:
    global _encoder  # noqa: PLW0603 - the one place where a pool's worker can keep its tokenizer
    _encoder = Encoder(settings)


def _encode(chunk: Chunk) -> EncodedChunk:
    assert _encoder is not None, "the worker was not started"
    return _encoder.encode(chunk)
