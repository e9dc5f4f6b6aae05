"""One preparation job: chunks through the encoder into shards, with a journal that makes it resumable.

After every chunk that completed a shard, the journal is replaced: which chunk comes next, the shards so far, the
counts, and the ids that no shard holds yet. Everything else is a function of the inputs, so a run that starts from any
journal ends with the same bytes. The order on disk is: shard, pending ids, journal; at the end: indexes, then the
manifest. What a crash leaves beyond the journal is written again, identically.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus_files import Source
from data_prep.corpus_io import Chunk, chunks, crc_with
from data_prep.encode_worker import EncodedChunk, EncodeSettings, encode_in_order
from data_prep.prep_job import (
    PROGRESS_FOLDER,
    OutputError,
    already_finished,
    check_settings,
    git_commit,
    locked,
    remove_progress,
)
from data_prep.progress import Progress
from data_prep.shard_schema import MANIFEST_NAME, SPLITS, Manifest, read_manifest
from data_prep.shard_writer import (
    ASIDE_SUFFIX,
    ShardLayout,
    SplitState,
    SplitWriter,
    check_shard_bytes,
    shards_in,
    write_atomic,
    write_index,
)
from data_prep.tokenizers_io import TextTokenizer, open_tokenizer


@dataclass
class Journal:
    """Where a job stands after a chunk."""

    settings: dict[str, Any]
    """Everything that decides the output; a run with other settings is refused."""
    source: int = 0
    chunk: int = 0
    """The next chunk: `chunk` of `source` (numbers in this job's list)."""
    crc: int | None = None
    """Of the chunks of `source` before it (corpus_io.crc_with); None in a journal of earlier code."""
    splits: dict[str, Any] | None = None
    skipped: dict[str, int] | None = None
    per_source: list[dict[str, Any]] | None = None
    git_commits: list[str] = field(default_factory=list)
    """Commits of the code that worked on it: one, unless it was resumed with other code."""
    n_commits: int = 0
    done: bool = False


@dataclass(kw_only=True)
class Preparation:
    """A job: `run` does it."""

    output: Path
    sources: list[Source]
    settings: EncodeSettings
    row_tokens: int = 8192
    shard_bytes: int = 64 << 20
    compression: str = ""
    max_tokens: int = 0
    rank: int = 0
    world_size: int = 1
    n_workers: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.settings.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.settings.val_fraction}: must lie in [0, 1)")
        if self.row_tokens < 1:
            raise ValueError(f"--row-tokens {self.row_tokens}: must be at least 1")
        least = {
            "--max-tokens": (self.max_tokens, 0),
            "--workers": (self.n_workers, 1),
            "--max-document-mb": (self.settings.max_document_bytes >> 20, 1),
        }
        for option, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{option} {value}: must be at least {bound}")
        check_shard_bytes(self.shard_bytes)
        kind, _, level = self.compression.partition(":")
        if self.compression and (kind != "zstd" or (level and not (level.isdigit() and 1 <= int(level) <= 22))):
            raise ValueError(f"--compression {self.compression}: use zstd or zstd:LEVEL, 1..22")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"--rank {self.rank} of --world-size {self.world_size}: must lie in 0..world size - 1")
        if len(self.sources) < self.world_size:
            raise ValueError(
                f"--world-size {self.world_size}, but {len(self.sources)} input files: files are what jobs share"
            )
        if 0 < self.max_tokens < self.world_size:
            raise ValueError(
                f"--max-tokens {self.max_tokens} over {self.world_size} jobs: some would have none, use fewer jobs"
            )

    @property
    def part(self) -> str:
        """Name of this job's share of the output."""
        return f"part-{self.rank:05}-of-{self.world_size:05}"

    def run(self) -> int:
        """Do what is left to do. Returns the exit status."""
        tokenizer = open_tokenizer(
            self.settings.tokenizer, self.settings.eos_token, reference=self.settings.reference_encoder
        )
        mine = self.sources[self.rank :: self.world_size]
        fingerprint = self._fingerprint(tokenizer, mine)
        if (self.output / MANIFEST_NAME).is_file():
            made_with = read_manifest(self.output).extra["parts"].get(self.part, {}).get("settings")
            check_settings(self.output, made_with, fingerprint)
            return already_finished(self.output)
        self.output.mkdir(parents=True, exist_ok=True)
        print(f"{tokenizer.name}: encoding with {tokenizer.encoder}; {self.n_workers} workers", file=sys.stderr)
        with locked(self.output, self.part):
            return self._run(self._layout(tokenizer), mine, fingerprint)

    def _run(self, layout: ShardLayout, mine: list[Source], fingerprint: dict[str, Any]) -> int:
        journal = _read_journal(self.output, self.part) or Journal(settings=fingerprint, crc=0)
        check_settings(self.output, journal.settings, fingerprint)
        commit = git_commit()
        if journal.done:
            print(f"{self.output}: {self.part} is finished: nothing to do")
        else:
            if commit not in journal.git_commits:
                journal.git_commits.append(commit)
            self._encode_all(journal, layout, mine)
        if self.world_size == 1:
            return merge_parts(self.output)
        empty = "" if any(_part_tokens(journal).values()) else f" and holds no document, skipped {journal.skipped}"
        print(f"{self.part} is whole{empty}. When all {self.world_size} are: --merge --output {self.output}")
        return 0

    def _layout(self, tokenizer: TextTokenizer) -> ShardLayout:
        layout = ShardLayout(
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            row_tokens=self.row_tokens,
            shard_rows=1,
            compression=self.compression,
        )
        rows = max(1, self.shard_bytes // ((self.row_tokens + 1) * layout.dtype.itemsize))
        return ShardLayout(**(asdict(layout) | {"shard_rows": rows}))

    def _fingerprint(self, tokenizer: TextTokenizer, mine: list[Source]) -> dict[str, Any]:
        plain = asdict(self.settings) | {
            "tokenizer": tokenizer.name,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "row_tokens": self.row_tokens,
            "shard_bytes": self.shard_bytes,
            "compression": self.compression,
            "max_tokens": self.max_tokens,
            "world_size": self.world_size,
            "sources": [[source.path, source.n_bytes] for source in mine],
        }
        if self.world_size > 1:  # a job that sees another list takes another share: some files twice, some never
            listed = json.dumps([[source.path, source.n_bytes] for source in self.sources])
            plain["all_sources_sha256"] = hashlib.sha256(listed.encode()).hexdigest()
        del plain["reference_encoder"]  # decides the speed, not the bytes
        plain_copy: dict[str, Any] = json.loads(json.dumps(plain))  # tuples become lists, as after a resume
        return plain_copy

    def _encode_all(self, journal: Journal, layout: ShardLayout, mine: list[Source]) -> None:
        folder = self.output / PROGRESS_FOLDER
        writers = {split: self._writer(split, journal, layout) for split in SPLITS}
        skipped = Counter(journal.skipped or {})
        per_source = journal.per_source or [
            {"path": s.path, "n_bytes": s.n_bytes, "n_documents": 0, "n_tokens": 0, "sha256": ""} for s in mine
        ]
        budget = self._token_budget()
        n_shards = _n_shards(writers)
        before = list(itertools.accumulate((source.n_bytes for source in mine), initial=0))
        with Progress(
            "tokens", total=before[-1], done=before[journal.source], n_made=_n_tokens(writers), n_workers=self.n_workers
        ) as progress:
            todo = self._chunks(mine, journal)
            encoded = encode_in_order(todo, self.settings, self.n_workers)
            with contextlib.closing(encoded):
                for piece in encoded:
                    n_left = budget - _n_tokens(writers) if budget else None
                    piece_lengths, full = _up_to(piece, n_left)
                    _add(writers, piece, piece_lengths)
                    skipped.update(piece.skipped)
                    record = per_source[piece.chunk.source]
                    record["n_documents"] += len(piece_lengths)
                    record["n_tokens"] += int(piece_lengths.sum())
                    record["sha256"] = piece.source_sha256 or record["sha256"]
                    done = before[piece.chunk.source] + piece.chunk.fraction * mine[piece.chunk.source].n_bytes
                    progress.update(done, n_made=_n_tokens(writers), n_skipped=skipped.total())
                    before_it = journal.crc if piece.chunk.source == journal.source else 0
                    journal.crc = None if before_it is None else crc_with(before_it, piece.crc)
                    journal.source, journal.chunk = piece.chunk.source, piece.chunk.number + 1
                    if full:
                        break
                    if _n_shards(writers) > n_shards:
                        n_shards = _n_shards(writers)
                        self._commit(folder, journal, writers, skipped, per_source)
        # One of several jobs may end empty, such as one whose files hold no document of --dump: the others' count too.
        if not _n_tokens(writers) and self.world_size == 1:
            raise OutputError(_nothing_left(skipped, self.settings.text_column))
        for writer in writers.values():
            writer.finish()
        journal.done = True
        self._commit(folder, journal, writers, skipped, per_source)

    def _chunks(self, mine: list[Source], journal: Journal) -> Iterator[Chunk]:
        columns = [self.settings.text_column, *self.settings.filters.columns()]
        first_source, first_chunk, first_crc = journal.source, journal.chunk, journal.crc
        for number in range(first_source, len(mine)):
            skip, crc = (first_chunk, first_crc) if number == first_source else (0, 0)
            yield from chunks(number, mine[number], columns, self.settings.filters, skip, crc)

    def _token_budget(self) -> int:
        """This job's share of --max-tokens; 0 means all."""
        share, extra = divmod(self.max_tokens, self.world_size)
        return share + (self.rank < extra)

    def _writer(self, split: str, journal: Journal, layout: ShardLayout) -> SplitWriter:
        folder = self.output / split / (self.part if self.world_size > 1 else "")
        state, pending = SplitState(), np.empty(0, layout.dtype)
        if journal.splits is not None:
            saved = journal.splits[split]
            state = SplitState(**saved["state"])
            data = (self.output / PROGRESS_FOLDER / saved["pending"]).read_bytes()
            pending = np.frombuffer(data, layout.dtype)
        return SplitWriter(folder, layout, state, pending)

    def _commit(
        self,
        folder: Path,
        journal: Journal,
        writers: dict[str, SplitWriter],
        skipped: Counter[str],
        per_source: list[dict[str, Any]],
    ) -> None:
        """Make everything up to now survive a crash."""
        old = [saved["pending"] for saved in (journal.splits or {}).values()]
        journal.n_commits += 1
        journal.splits = {}
        for split, writer in writers.items():
            name = f"{self.part}.{split}.{journal.n_commits}.pending"
            write_atomic(folder / name, writer.pending().data)
            journal.splits[split] = {"state": asdict(writer.state), "pending": name}
        journal.skipped, journal.per_source = dict(skipped), per_source
        write_atomic(folder / f"{self.part}.json", json.dumps(asdict(journal)).encode())
        for name in old:
            (folder / name).unlink(missing_ok=True)


def _add(writers: dict[str, SplitWriter], piece: EncodedChunk, lengths: np.ndarray) -> None:
    """Hand the first `len(lengths)` documents of the chunk to their splits, runs of neighbours at once."""
    is_val = piece.is_val[: len(lengths)]
    ends = np.cumsum(lengths)
    changes = np.flatnonzero(np.diff(is_val)) + 1
    bounds = [0, *changes.tolist(), len(lengths)]
    for first, last in itertools.pairwise(bounds):
        if first < last:
            begin = int(ends[first] - lengths[first])
            writers["val" if is_val[first] else "train"].add(piece.ids[begin : int(ends[last - 1])], last - first)


def _up_to(piece: EncodedChunk, n_left: int | None) -> tuple[np.ndarray, bool]:
    """Lengths of the documents to take, up to the one that reaches `n_left` tokens; whether that was reached."""
    if n_left is None:
        return piece.lengths, False
    reached = int(np.searchsorted(np.cumsum(piece.lengths), n_left)) + 1
    return piece.lengths[:reached], reached <= len(piece.lengths)


def _n_tokens(writers: dict[str, SplitWriter]) -> int:
    return sum(writer.state.n_tokens for writer in writers.values())


def _n_shards(writers: dict[str, SplitWriter]) -> int:
    return sum(len(writer.state.shards) for writer in writers.values())


def _read_journal(output: Path, part: str) -> Journal | None:
    path = output / PROGRESS_FOLDER / f"{part}.json"
    try:
        return Journal(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error}): remove {output} and start again") from None


def merge_parts(output: Path) -> int:
    """Join the finished parts in `output` into a dataset: indexes, then the manifest. Returns the exit status.

    Raises OutputError where a part is missing or not finished, where there is none, or where all are empty.
    """
    if (output / MANIFEST_NAME).is_file():
        read_manifest(output)
        return already_finished(output)
    names = sorted(path.stem for path in (output / PROGRESS_FOLDER).glob("part-*.json"))
    if not names:
        raise OutputError(f"{output} holds no prepared part: run without --merge first")
    world_size = int(names[0].rpartition("-")[2])
    expected = [f"part-{rank:05}-of-{world_size:05}" for rank in range(world_size)]
    journals = {name: _read_journal(output, name) for name in expected}
    unfinished = [name for name, journal in journals.items() if journal is None or not journal.done]
    if unfinished or set(names) != set(expected):
        raise OutputError(
            f"{output}: {', '.join(unfinished) or names} not finished: run those jobs again, then --merge"
        )
    finished = {name: journal for name, journal in journals.items() if journal is not None}
    _check_same(output, finished)
    manifest = _manifest(finished)
    if not any(manifest.n_tokens.values()):
        why = _nothing_left(manifest.extra["skipped"], finished[expected[0]].settings["text_column"])
        raise OutputError(f"{output}: {why} Remove {output} and prepare it again")
    for split in SPLITS:
        for aside in (output / split).rglob(f".*{ASIDE_SUFFIX}"):  # a kill may have come while one was written
            aside.unlink()
        shards: list[dict[str, Any]] = []
        for name, journal in finished.items():
            assert journal.splits is not None, "a finished journal has its splits"
            own = journal.splits[split]["state"]["shards"]
            shards += own if world_size == 1 else shards_in(own, name)
        write_index(output / split, shards)
    write_atomic(output / MANIFEST_NAME, manifest.text().encode())
    remove_progress(output)
    counts = ", ".join(f"{split} {manifest.n_tokens[split]:,} tokens" for split in SPLITS)
    print(f"{output}: {counts}; skipped {manifest.extra['skipped'] or 'none'}")
    for split, option in (("train", "smaller"), ("val", "larger")):
        if not manifest.n_tokens[split]:
            print(
                f"the {split} split is empty, and pretrain needs both: prepare again with a {option} --val-fraction, into a "
                "new --output"
            )
    return 0


def _nothing_left(skipped: Mapping[str, int], text_column: str) -> str:
    return (
        f"no document was left to write: skipped {dict(skipped)}. Is --text-column {text_column!r} right, and do the "
        "filters leave any?"
    )


def _part_tokens(journal: Journal) -> dict[str, int]:
    """Tokens of each split."""
    return {split: saved["state"]["n_tokens"] for split, saved in (journal.splits or {}).items()}


def _check_same(output: Path, journals: dict[str, Journal]) -> None:
    first, *others = [{k: v for k, v in j.settings.items() if k != "sources"} for j in journals.values()]
    changed = sorted({key for other in others for key in first | other if first.get(key) != other.get(key)})
    if "all_sources_sha256" in changed:
        raise OutputError(
            f"{output}: its jobs saw different lists of input files, so some files may be in it twice and others not at "
            "all: when no file comes or goes any more, prepare all parts again, into another --output"
        )
    if changed:
        raise OutputError(
            f"{output}: its parts were made with different settings ({', '.join(changed)}): prepare all of them again, "
            "into another --output"
        )


def _manifest(journals: dict[str, Journal]) -> Manifest:
    settings = next(iter(journals.values())).settings
    skipped: Counter[str] = Counter()
    n_tokens, n_documents = Counter[str](), Counter[str]()
    for journal in journals.values():
        skipped.update(journal.skipped)
        for split, saved in (journal.splits or {}).items():
            n_tokens[split] += saved["state"]["n_tokens"]
            n_documents[split] += saved["state"]["n_documents"]
    commits = sorted({commit for journal in journals.values() for commit in journal.git_commits})
    parts = {
        name: {
            "settings": journal.settings,
            "n_tokens": _part_tokens(journal),
            "sources": journal.per_source,
        }
        for name, journal in journals.items()
    }
    return Manifest(
        tokenizer_sha256=settings["tokenizer_sha256"],
        tokenizer_name=settings["tokenizer"],
        vocab_size=settings["vocab_size"],
        eos_id=settings["eos_id"],
        row_tokens=settings["row_tokens"],
        n_tokens={split: n_tokens[split] for split in SPLITS},
        n_documents={split: n_documents[split] for split in SPLITS},
        extra={"parts": parts, "skipped": dict(sorted(skipped.items())), "git_commits": commits},
    )
