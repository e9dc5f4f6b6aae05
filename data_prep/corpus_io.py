"""Input files (data_prep.corpus_files) to chunks of documents: parquet and JSON lines (plain, .gz, .zst).

A chunk is the unit of work and of resumption: a parquet row group, or a block of whole lines. Chunking depends on the
file alone, so a run that is resumed, or has other workers, sees the same chunks. The parent makes chunks without
looking inside (a row group is only named; lines travel as bytes); the workers decode them.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpus_files import COMPRESSED_SUFFIXES, InputError, Source, kind_of, open_binary, reading, unreadable

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 1 << 30
MAX_WINDOW_BYTES = 1 << 31
"""How far back a zstd frame may reach: all that `zstd --long=31` makes, as large dumps are packed; its own readers stop at 128 MiB."""
BINARY_OF = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
LARGE_GROUP_BYTES = 256 << 20
LARGE_GROUP_DOCUMENTS = 512
MOST_BAD_LINES = 0.9
"""A file whose first block has a larger share of lines that are no JSON, or not UTF-8, is not JSON lines."""


@dataclass(frozen=True)
class Filters:
    """Which documents are kept; an empty or None field keeps all. Fields are FineWeb's and FineWeb-Edu's columns."""

    language: str = ""
    min_language_score: float | None = None
    min_score: float | None = None
    dumps: tuple[str, ...] = ()

    def columns(self) -> dict[str, str]:
        """Column that each filter in use reads: {column: option}."""
        in_use = {
            "language": ("--language", bool(self.language)),
            "language_score": ("--min-language-score", self.min_language_score is not None),
            "score": ("--min-score", self.min_score is not None),
            "dump": ("--dump", bool(self.dumps)),
        }
        return {column: option for column, (option, used) in in_use.items() if used}

    def keep(self, document: dict[str, Any]) -> bool:
        """Whether the document passes every filter; one that lacks a filtered field does not."""
        try:
            return (
                (not self.language or document["language"] == self.language)
                and (self.min_language_score is None or document["language_score"] >= self.min_language_score)
                and (self.min_score is None or document["score"] >= self.min_score)
                and (not self.dumps or document["dump"] in self.dumps)
            )
        except (KeyError, TypeError):
            return False


@dataclass(frozen=True)
class Chunk:
    """Documents `number` of `source`, still to be decoded: a row group's number, a record batch, or bytes of lines.

    The last chunk of a source has `payload` None: it asks for the file's checksum.
    """

    source: int
    path: str
    number: int
    payload: int | pa.RecordBatch | bytes | None
    fraction: float
    """How much of the source is done after this chunk, 0..1 (an estimate, for progress)."""
    footer_crc: int = 0
    """Of parquet: crc32 of the footer, which has the sizes, places and statistics of all in it."""

    def crc(self) -> int:
        """crc32 of what is in it: of the lines, or the footer's."""
        return zlib.crc32(self.payload) if isinstance(self.payload, bytes) else self.footer_crc


# --------------------------------------------------------------------------- chunks


def chunks(
    number: int, source: Source, columns: list[str], filters: Filters, skip: int = 0, skipped_crc: int | None = None
) -> Iterator[Chunk]:
    """The chunks of source number `number` from chunk `skip` on; those before it are `skipped_crc` where that is given.

    Raises InputError for a file that is cut short, is not what its name says, lacks a column, or held something else when
    what is skipped was read.
    """
    crc = 0
    try:
        for chunk in _all_chunks(number, source, columns, filters):
            is_last = chunk.payload is None
            if chunk.number < skip and not is_last:
                crc = crc_with(crc, chunk.crc())
                continue
            if chunk.number <= skip and skipped_crc not in (None, crc):
                raise InputError(
                    f"{source.path}: is not what it was when this job was interrupted, though of the same size, and the "
                    "beginning of what it was is in the shards. Put that back, or name another --output"
                )
            yield chunk
    except (pa.ArrowException, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(unreadable(source.path, error)) from error


def crc_with(crc: int, more: int) -> int:
    """The crc of several chunks, `crc`, and of one more after them."""
    return zlib.crc32(more.to_bytes(4, "little"), crc)


def _all_chunks(number: int, source: Source, columns: list[str], filters: Filters) -> Iterator[Chunk]:
    n_chunks = 0
    if kind_of(source.path) == "parquet":
        for payload, fraction, footer_crc in _parquet_payloads(source.path, columns, filters):
            yield Chunk(number, source.path, n_chunks, payload, fraction, footer_crc)
            n_chunks += 1
    else:
        for lines, fraction in _line_payloads(source):
            yield Chunk(number, source.path, n_chunks, lines, fraction)
            n_chunks += 1
    yield Chunk(number, source.path, n_chunks, None, 1.0)


def _parquet_payloads(
    path: str, columns: list[str], filters: Filters
) -> Iterator[tuple[int | pa.RecordBatch, float, int]]:
    """Numbers of row groups, batches of large ones; each with how much is done, and the crc32 of the file's footer."""
    with reading(path):
        raw = open_binary(path)
        file = pq.ParquetFile(raw)
        raw.seek(-8, os.SEEK_END)
        n_bytes = int.from_bytes(raw.read(4), "little")
        raw.seek(-8 - n_bytes, os.SEEK_END)
        footer_crc = zlib.crc32(raw.read(n_bytes))
    names = file.schema_arrow.names
    check_columns(path, names, columns[0], filters)
    for group in range(file.num_row_groups):
        done = (group + 1) / file.num_row_groups
        meta = file.metadata.row_group(group)
        if meta.total_byte_size <= LARGE_GROUP_BYTES:
            yield group, done, footer_crc
            continue
        # One worker would need all of it in memory, and the others would wait: the parent streams such a group.
        batches = file.iter_batches(LARGE_GROUP_DOCUMENTS, row_groups=[group], columns=columns)
        while True:
            with reading(path):
                batch = next(batches, None)
            if batch is None:
                break
            yield batch, done, footer_crc


def check_columns(path: str, names: list[str], text_column: str, filters: Filters) -> None:
    """Raise InputError unless the text column and each filter's column are among `names`, once."""
    if text_column not in names:
        raise InputError(f"{path}: no column {text_column!r}; it has {', '.join(names)}. Name one with --text-column")
    for column, option in filters.columns().items():
        if column not in names:
            raise InputError(f"{path}: {option} needs a column {column!r}; it has {', '.join(names)}")
    for column in (text_column, *filters.columns()):
        if names.count(column) > 1:
            raise InputError(
                f"{path}: {names.count(column)} columns are called {column!r}: give each a name of its own"
            )


def _line_payloads(source: Source) -> Iterator[tuple[bytes, float]]:
    """Blocks of whole lines, about BLOCK_BYTES each."""
    with open_binary(source.path) as raw:
        stream = _decompressed(source.path, raw)
        parts: list[bytes] = []  # of a line that is longer than a block
        begun = False
        while True:
            with reading(source.path):
                block = stream.read(BLOCK_BYTES)
            if not block:
                break
            if not begun and (block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or 0 in block[:2]):
                raise InputError(
                    f"{source.path}: begins as UTF-16 or UTF-32 does, and JSON lines are UTF-8: convert it (iconv -f UTF-16 "
                    "-t UTF-8), or leave it out of --input"
                )
            begun = True
            end = block.rfind(b"\n") + 1
            if not end:
                parts.append(block)
                if sum(map(len, parts)) > MAX_LINE_BYTES:
                    raise InputError(f"{source.path}: a line is over {MAX_LINE_BYTES >> 20} MiB: not JSON lines")
                continue
            whole = b"".join([*parts, block[:end]])
            parts = [block[end:]] if end < len(block) else []
            yield whole, min(1.0, raw.tell() / max(1, source.n_bytes))
        if parts:
            yield b"".join(parts), 1.0


def _decompressed(path: str, raw: Any) -> Any:
    """The lines' bytes: of a.jsonl.zst.gz, gzip is undone first, then zstd."""
    left, stream = path, raw
    while left.endswith(COMPRESSED_SUFFIXES):
        left, _, kind = left.rpartition(".")
        if kind == "gz":
            stream = gzip.GzipFile(fileobj=stream)
            continue
        try:
            import zstandard
        except ImportError:
            raise InputError(f"{path}: install zstandard (pip install 'matmamba-pretrain[data]')") from None
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        stream = io.BufferedReader(_WholeFrames(stream, decompressor), BLOCK_BYTES)
    return stream


class _WholeFrames(io.RawIOBase):
    """Decompressed bytes of concatenated zstd frames; EOFError where the last frame is cut short.

    zstandard's own stream reader takes the end of the file for the end of the data.
    """

    def __init__(self, raw: Any, decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._input or self._raw.read(1 << 17)
            self._input = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the last zstd frame does not end")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._output = self._frame.decompress(data)
            except Exception as error:  # ZstdError, which cannot be named without importing the extra
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._output))
        buffer[:n], self._output = self._output[:n], self._output[n:]
        return n


# --------------------------------------------------------------------------- documents


def documents(chunk: Chunk, text_column: str, filters: Filters, skipped: Counter[str]) -> Iterator[str]:
    """The texts of a chunk. What is left out is counted in `skipped` by reason:

    filtered (a filter said no), no_text (null, or not a string), malformed (a line that is not a JSON object),
    invalid_utf8 (bytes that are not UTF-8, or a lone surrogate). Raises InputError where the bytes do not decode, or nearly
    all lines of a file's first chunk are bad: it is of another kind than its name says.
    """
    raw = (
        _line_documents(chunk.payload, chunk, skipped)
        if isinstance(chunk.payload, bytes)
        else _rows(chunk, text_column, filters)
    )
    for document in raw:
        if not filters.keep(document):
            skipped["filtered"] += 1
            continue
        text = document.get(text_column)
        try:
            if isinstance(text, bytes):
                text = text.decode()
            elif isinstance(text, str):
                text.encode()
        except UnicodeError:
            skipped["invalid_utf8"] += 1
            continue
        if not isinstance(text, str):
            skipped["no_text"] += 1
            continue
        yield text


def _line_documents(block: bytes, chunk: Chunk, skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    n_lines = 0
    bad: Counter[str] = Counter()
    for line in block.split(b"\n"):
        if not line.strip():
            continue
        n_lines += 1
        try:
            document = json.loads(line)
        except UnicodeDecodeError:
            bad["invalid_utf8"] += 1
            continue
        except (ValueError, RecursionError):
            bad["malformed"] += 1
            continue
        if isinstance(document, dict):
            yield document
        else:
            bad["malformed"] += 1
    if chunk.number == 0 and bad.total() > MOST_BAD_LINES * n_lines:
        raise InputError(
            f"{chunk.path}: is not JSON lines: of its first {n_lines:,} lines {bad['malformed']:,} are no JSON object and "
            f"{bad['invalid_utf8']:,} are not UTF-8. Write one JSON object a line, or leave it out of --input"
        )
    skipped.update(bad)


@functools.lru_cache(maxsize=1)
def _parquet_file(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(open_binary(path))


def _rows(chunk: Chunk, text_column: str, filters: Filters) -> Iterator[dict[str, Any]]:
    columns = [text_column, *filters.columns()]
    try:
        if isinstance(chunk.payload, pa.RecordBatch):
            table = pa.Table.from_batches([chunk.payload])
        else:
            table = _parquet_file(chunk.path).read_row_group(chunk.payload, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(unreadable(chunk.path, error)) from error
    for batch in table.to_batches(max_chunksize=256):
        values = {name: batch.column(name) for name in columns}
        text = values[text_column]
        if pa.types.is_dictionary(text.type):
            text = text.dictionary_decode()
        as_binary = BINARY_OF.get(text.type)
        # So that one text that is not UTF-8 does not take the others with it.
        values[text_column] = text if as_binary is None else text.view(as_binary)
        for row in zip(*(column.to_pylist() for column in values.values()), strict=True):
            yield dict(zip(columns, row, strict=True))


def sha256_of(path: str) -> str:
    """Checksum of an input file; empty for one on the hub, whose repository already names its content."""
    if path.startswith("hf://"):
        return ""
    with reading(path), open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
