"""The preparation from files to shards: what is written, what is skipped, what is refused."""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
import os
import resource
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import MDSWriter, StreamingDataset

from data_prep import (
    corpus_files,
    corpus_io,
    encode_worker,
    export_llmc,
    fast_bpe,
    prep_job,
    preparation,
    shard_writer,
    tokenize_fineweb,
    verify_shards,
)
from data_prep.corpus_files import InputError, Source, find_sources
from data_prep.corpus_io import Filters, chunks, documents
from data_prep.encode_worker import in_val
from data_prep.image_sources import in_folder, in_tar
from data_prep.shard_reader import part_tokens, read_shard, split_parts
from data_prep.shard_schema import mds_columns, read_manifest
from data_prep.shard_writer import ShardLayout
from data_prep.tokenizers_io import open_tokenizer
from tests.unit import corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json, a.parquet and b.jsonl with 60 documents each."""
    folder = tmp_path_factory.mktemp("inputs")
    corpus.byte_level_tokenizer(folder)
    corpus.write_parquet(folder / "a.parquet", list(corpus.texts(60, seed=1)))
    corpus.write_jsonl(folder / "b.jsonl", list(corpus.texts(60, seed=2)))
    return folder


def prepare(folder: Path, output: Path, *more: str, inputs: tuple[str, ...] = ("a.parquet", "b.jsonl")) -> int:
    arguments = ["--input", *(str(folder / name) for name in inputs), "--tokenizer", str(folder / "tokenizer.json")]
    arguments += ["--output", str(output), "--row-tokens", "64", "--shard-bytes", "1300", "--workers", "1"]
    return tokenize_fineweb.main([*arguments, "--val-fraction", "0.2", *more])


@contextlib.contextmanager
def full_disk(*, after: int) -> Iterator[None]:
    """Inside, the disk is full once so many files have got their final names."""
    real, n_left = shard_writer.os.replace, after

    def replace(source: Any, target: Any) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise OSError(28, "No space left on device")
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.os, "replace", replace)
        yield


def tokens(output: Path, split: str) -> list[int]:
    manifest = read_manifest(output)
    parts = split_parts(output, manifest, split)
    return [i for part in parts for ids in part_tokens(output, part, manifest, split) for i in ids.tolist()]


def test_every_document_is_there_in_order_ended_by_eos(folder: Path, tmp_path: Path) -> None:
    assert prepare(folder, tmp_path / "out") == 0
    tokenizer = open_tokenizer(str(folder / "tokenizer.json"), reference=True)
    expected: dict[str, list[int]] = {"train": [], "val": []}
    counts: Counter[str] = Counter()
    texts = corpus.texts(60, seed=1) + corpus.texts(60, seed=2)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        split = "val" if in_val(text.encode(), 0.2) else "train"
        expected[split] += [*ids.tolist(), tokenizer.eos_id]
        counts[split] += 1
    for split in ("train", "val"):
        assert tokens(tmp_path / "out", split) == expected[split]
    manifest = read_manifest(tmp_path / "out")
    assert manifest.n_documents == dict(counts)
    assert manifest.n_tokens == {split: len(ids) for split, ids in expected.items()}
    assert not (tmp_path / "out" / ".progress").exists()
    assert verify_shards.main([str(tmp_path / "out")]) == 0


def test_a_shard_is_what_streaming_writes(tmp_path: Path) -> None:
    layout = ShardLayout(vocab_size=300, eos_id=0, row_tokens=8, shard_rows=3)
    ids = np.arange(25, dtype=np.uint16)
    with MDSWriter(out=str(tmp_path), columns=mds_columns(300, 8), hashes=["sha256"], size_limit=None) as writer:
        for row in range(3):
            writer.write({"tokens": ids[row * 8 : row * 8 + 9]})
    assert layout.shard_bytes(ids) == (tmp_path / "shard.00000.mds").read_bytes()
    (entry,) = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert {k: v for k, v in entry.items() if k not in ("raw_data", "zip_data", "samples")} == layout.mds_config()


@pytest.mark.parametrize("compression", ["", "zstd:3"])
def test_workers_do_not_change_a_byte(folder: Path, tmp_path: Path, compression: str) -> None:
    assert prepare(folder, tmp_path / "one", "--compression", compression) == 0
    assert prepare(folder, tmp_path / "two", "--compression", compression, "--workers", "2") == 0
    assert corpus.tree(tmp_path / "one") == corpus.tree(tmp_path / "two")
    assert verify_shards.main([str(tmp_path / "one")]) == 0


def test_a_finished_job_does_nothing_and_other_settings_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(folder, tmp_path / "out") == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert prepare(folder, tmp_path / "out") == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert "nothing to do" in capsys.readouterr().out
    assert prepare(folder, tmp_path / "out", "--max-tokens", "50") == 2
    assert "max_tokens: 0 there, 50 asked" in capsys.readouterr().err


def test_an_array_of_jobs_is_merged(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare(folder, out, "--world-size", "2", "--rank", "1") == 0
    assert tokenize_fineweb.main(["--merge", "--output", str(out)]) == 2
    assert "part-00000-of-00002 not finished" in capsys.readouterr().err
    assert prepare(folder, out) == 2, "a task of an array run again alone takes itself for the only one"
    assert "was begun by 2 jobs, this is one of 1" in capsys.readouterr().err
    assert prepare(folder, out, "--world-size", "2", "--rank", "0") == 0
    assert tokenize_fineweb.main(["--merge", "--output", str(out)]) == 0
    assert prepare(folder, tmp_path / "whole") == 0
    for split in ("train", "val"):
        assert tokens(out, split) == tokens(tmp_path / "whole", split)
    assert verify_shards.main([str(out)]) == 0
    assert prepare(folder, out, "--world-size", "2", "--rank", "0") == 0
    assert prepare(folder, out, "--world-size", "3", "--rank", "0") == 2


def test_jobs_that_saw_other_files_are_not_merged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that comes between two jobs' starts moves the others' places: here b and d would be there twice, c never."""
    files = tmp_path / "files"
    files.mkdir()
    for name in "abcd":
        corpus.write_jsonl(files / f"{name}.jsonl", [f"a text of {name}"])
    out = tmp_path / "out"
    assert prepare(folder, out, "--world-size", "2", "--rank", "1", inputs=(str(files),)) == 0
    corpus.write_jsonl(files / "a2.jsonl", ["a text that came later"])
    assert prepare(folder, out, "--world-size", "2", "--rank", "0", inputs=(str(files),)) == 0
    assert tokenize_fineweb.main(["--merge", "--output", str(out)]) == 2
    assert "its jobs saw different lists of input files" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()


def test_parts_of_other_settings_are_not_merged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(folder, out, "--world-size", "2", "--rank", "0") == 0
    assert prepare(folder, out, "--world-size", "2", "--rank", "1", "--max-document-mb", "2") == 0
    assert tokenize_fineweb.main(["--merge", "--output", str(out)]) == 2
    assert "made with different settings (max_document_bytes)" in capsys.readouterr().err


def test_a_part_that_the_filters_leave_empty_does_not_stop_the_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FineWeb has its dumps in files of their own: --dump leaves some jobs of an array nothing."""
    raw = tmp_path / "raw"
    raw.mkdir()
    corpus.byte_level_tokenizer(raw)
    for name in ("X", "Y"):
        corpus.write_parquet(raw / f"{name}.parquet", [f"a text of {name}", "more"], dump=[name, name])
    out, none = tmp_path / "out", tmp_path / "none"
    files = ("X.parquet", "Y.parquet")
    for rank in ("0", "1"):
        assert prepare(raw, out, "--world-size", "2", "--rank", rank, "--dump", "X", inputs=files) == 0
        assert prepare(raw, none, "--world-size", "2", "--rank", rank, "--dump", "Z", inputs=files) == 0
    assert "part-00001-of-00002 is whole and holds no document, skipped {'filtered': 2}" in capsys.readouterr().out
    assert tokenize_fineweb.main(["--merge", "--output", str(out)]) == 0
    assert verify_shards.main([str(out)]) == 0
    assert sum(read_manifest(out).n_documents.values()) == 2
    again = prepare(raw, out, "--world-size", "2", "--rank", "1", "--dump", "X", inputs=files)
    assert again == 0, "finished: nothing to do"
    assert tokenize_fineweb.main(["--merge", "--output", str(none)]) == 2
    assert "no document was left to write: skipped {'filtered': 4}" in capsys.readouterr().err
    assert not (none / "manifest.json").exists()


def test_slurm_says_rank_and_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(**variables: str) -> tuple[int, int]:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        args = tokenize_fineweb._parser().parse_args(["--output", "x"])
        return args.rank, args.world_size

    assert place() == (0, 1)
    assert place(NTASKS="8", PROCID="0") == (0, 1)  # a batch script that calls it once
    assert place(NTASKS="8", STEP_NUM_TASKS="8", PROCID="3") == (3, 8)
    array = {"ARRAY_TASK_ID": "10", "ARRAY_TASK_MIN": "4", "ARRAY_TASK_COUNT": "5", "ARRAY_TASK_STEP": "2"}
    assert place(**array, NTASKS="1", PROCID="0") == (3, 5)


def test_max_tokens_ends_with_a_whole_document(folder: Path, tmp_path: Path) -> None:
    assert prepare(folder, tmp_path / "out", "--max-tokens", "1000", "--val-fraction", "0") == 0
    ids = tokens(tmp_path / "out", "train")
    eos = read_manifest(tmp_path / "out").eos_id
    assert len(ids) >= 1000
    assert ids[-1] == eos
    assert len(ids) - 1 - max(i for i, token in enumerate(ids[:-1]) if token == eos) < 1000 or eos not in ids[999:-1]


def test_an_array_shares_out_no_fewer_tokens_than_it_has_jobs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A share of nothing would be all that there is."""
    assert prepare(folder, tmp_path / "out", "--max-tokens", "1", "--rank", "1", "--world-size", "2") == 2
    assert "--max-tokens 1 over 2 jobs" in capsys.readouterr().err


def test_filters(tmp_path: Path) -> None:
    path = corpus.write_parquet(
        tmp_path / "f.parquet",
        ["a", "b", "c", "d", "e"],
        language=["en", "de", "en", "en", None],
        language_score=[0.9, 0.9, 0.5, 0.8, 0.9],
        dump=["X", "X", "X", "Y", "X"],
    )
    skipped: Counter[str] = Counter()
    filters = Filters(language="en", min_language_score=0.6, dumps=("X",))
    columns = ["text", *filters.columns()]
    found = chunks(0, Source(str(path), 1), columns, filters)
    kept = [t for chunk in found if chunk.payload is not None for t in documents(chunk, "text", filters, skipped)]
    assert kept == ["a"]
    assert skipped == {"filtered": 4}


def test_what_cannot_be_a_document_is_counted(folder: Path, tmp_path: Path) -> None:
    hostile: list[Any] = [
        "kept",
        "",
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800"}',
        b'{"text": 5}',
        b'{"other": "x"}',
        b"[1, 2]",
        b'{"text": "cut sho',
        b"   ",
        "x" * (2 << 20),
        "nul \x00 kept, <|endoftext|> too",
    ]
    corpus.write_jsonl(tmp_path / "h.jsonl", hostile)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    arguments = ("--max-document-mb", "1", "--val-fraction", "0")
    assert prepare(tmp_path, tmp_path / "out", *arguments, inputs=("h.jsonl",)) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.extra["skipped"] == {"empty": 1, "invalid_utf8": 2, "malformed": 2, "no_text": 2, "too_long": 1}
    assert manifest.n_documents["train"] == 2


LINES = "".join(json.dumps({"text": text}) + "\n" for text in corpus.texts(60, seed=3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINES.encode("utf-16"), "begins as UTF-16 or UTF-32 does, and JSON lines are UTF-8"),
        (LINES.encode("utf-16-be"), "begins as UTF-16 or UTF-32 does"),
        (LINES.encode("utf-32"), "begins as UTF-16 or UTF-32 does"),
        (b"text,score\n" * 50, "of its first 50 lines 50 are no JSON object and 0 are not UTF-8"),
        (json.dumps([{"text": "a"}] * 9, indent=1).encode(), "are no JSON object"),
        (
            '{"text": "\xe9t\xe9"}\n'.encode("latin-1") * 50,
            "of its first 50 lines 0 are no JSON object and 50 are not UTF-8",
        ),
    ],
    ids=["utf-16", "utf-16 without a mark", "utf-32", "csv", "an array", "latin-1"],
)
def test_a_file_that_is_not_json_lines_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    """Beside one that is: its documents would have been all that there is, and the exit status 0."""
    for name in ("tokenizer.json", "b.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "c.jsonl").write_bytes(content)
    assert prepare(tmp_path, tmp_path / "out", inputs=("b.jsonl", "c.jsonl")) == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path}/c.jsonl: " in error
    assert message in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_is_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus.write_jsonl(tmp_path / "a.jsonl", ["a text"])
    assert verify_shards.main([str(path)]) == 2
    assert "a.jsonl/manifest.json is missing: not a token dataset" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_invalid_utf8_in_parquet_costs_one_document(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    texts = pa.array([b"good", b"\xff\xfe bad", None, b"fine"], pa.binary()).view(pa.string())
    if kind == "dictionary":
        texts = texts.dictionary_encode()
    elif kind == "large_string":
        texts = texts.view(pa.binary()).cast(pa.large_binary()).view(pa.large_string())
    elif kind == "string_view":
        texts = texts.view(pa.binary()).cast(pa.binary_view()).view(pa.string_view())
    pq.write_table(pa.table({"text": texts}), tmp_path / "u.parquet")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert prepare(tmp_path, tmp_path / "out", "--val-fraction", "0", inputs=("u.parquet",)) == 0
    assert "the val split is empty, and pretrain needs one" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out")
    assert manifest.extra["skipped"] == {"invalid_utf8": 1, "no_text": 1}
    assert manifest.n_documents["train"] == 2


def test_a_file_is_read_once_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("raw/a.jsonl", "raw/more/b.jsonl", "elsewhere/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        corpus.write_jsonl(tmp_path / name, ["a text"])
    (tmp_path / "raw" / "linked").symlink_to(tmp_path / "elsewhere")
    inputs = ["raw", "./raw/a.jsonl", "raw/../raw/more/*.jsonl", str(tmp_path / "raw")]
    assert [source.path for source in find_sources(inputs)] == ["raw/a.jsonl", "raw/linked/c.jsonl", "raw/more/b.jsonl"]


def test_what_is_hidden_in_a_folder_is_neither_text_nor_a_class(tmp_path: Path) -> None:
    """Notebooks keep copies of files in .ipynb_checkpoints, and other systems their own ._a beside a."""
    folder = tmp_path / ".here"  # what is named itself may be hidden
    names = ("a/x", "a/.ipynb_checkpoints/x-copy", ".ipynb_checkpoints/x-copy", ".ipynb_checkpoints/y-copy", "a/._x")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        corpus.write_jsonl(folder / f"{name}.jsonl", ["a text"])
        (folder / f"{name}.png").write_bytes(b"an image")
    assert [source.path for source in find_sources([str(folder)])] == [str(folder / "a" / "x.jsonl")]
    assert [(found.class_name, found.ref.name) for found in in_folder(folder)] == [("a", "a/x.png")]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            archive.add(folder / f"{name}.png", f"./{name}.png")
    assert [(found.class_name, found.ref.name) for found in in_tar(str(tmp_path / "x.tar"))] == [("a", "a/x.png")]


@pytest.mark.parametrize("sources", [find_sources, lambda folders: list(in_folder(Path(folders[0])))])
def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: Callable[[list[str]], Any]
) -> None:
    """Left out in silence, it would take a share of the texts with it, or a class."""
    (tmp_path / "raw" / "closed").mkdir(parents=True)
    real = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="closed: cannot be listed"):
        sources([str(tmp_path / "raw")])
    (tmp_path / "raw" / "closed").rmdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "raw" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "loop").symlink_to(tmp_path / "raw")
    with pytest.raises(InputError, match="loop: is a link to a folder that it lies in"):
        sources([str(tmp_path / "raw")])


def test_compressed_lines_are_read_and_cut_ones_refused(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs the optional extra [data]: zstandard")
    plain = corpus.write_jsonl(tmp_path / "p.jsonl", list(corpus.texts(50))).read_bytes()
    half = len(plain) // 2
    compressor = zstandard.ZstdCompressor()
    packed = {
        "x.jsonl.gz": gzip.compress(plain),
        "x.jsonl.zst": compressor.compress(plain[:half]) + compressor.compress(plain[half:]),
        "x.jsonl.zst.gz": gzip.compress(compressor.compress(plain)),
        "x.jsonl.gz.zst": compressor.compress(gzip.compress(plain)),
    }
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
        assert [source.path for source in find_sources([str(tmp_path / name)])] == [str(tmp_path / name)]
        found = chunks(0, Source(str(tmp_path / name), len(data)), ["text"], Filters())
        skipped: Counter[str] = Counter()
        texts = [t for c in found if c.payload is not None for t in documents(c, "text", Filters(), skipped)]
        assert texts == corpus.texts(50)
        (tmp_path / name).write_bytes(data[: len(data) * 3 // 4])
        with pytest.raises(InputError, match=f"{name}: cannot be read, it is cut short"):
            list(chunks(0, Source(str(tmp_path / name), len(data)), ["text"], Filters()))


def test_blocks_hold_whole_lines_and_resume_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_io, "BLOCK_BYTES", 100)
    path = corpus.write_jsonl(tmp_path / "p.jsonl", list(corpus.texts(20)))
    source = Source(str(path), path.stat().st_size)
    whole = list(chunks(0, source, ["text"], Filters()))
    payloads = [c.payload for c in whole[:-1]]
    assert b"".join(p for p in payloads if isinstance(p, bytes)) == path.read_bytes()
    assert all(isinstance(p, bytes) and p.endswith(b"\n") for p in payloads)
    assert list(chunks(0, source, ["text"], Filters(), skip=3)) == whole[3:]


def test_a_large_row_group_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus.write_parquet(tmp_path / "g.parquet", list(corpus.texts(50)), group=50)
    monkeypatch.setattr(corpus_io, "LARGE_GROUP_BYTES", 10)
    monkeypatch.setattr(corpus_io, "LARGE_GROUP_DOCUMENTS", 7)
    found = list(chunks(0, Source(str(path), 1), ["text"], Filters()))
    assert len(found) == 9
    texts = [t for c in found if c.payload is not None for t in documents(c, "text", Filters(), Counter())]
    assert texts == corpus.texts(50)


@pytest.mark.parametrize(
    ("more", "inputs", "message"),
    [
        ((), ("none.parquet",), "no such file"),
        ((), ("tokenizer.json",), "no document was left"),
        (("--text-column", "body"), ("a.parquet",), "no column 'body'; it has text"),
        (("--language", "en"), ("a.parquet",), "--language needs a column 'language'"),
        (("--val-fraction", "1"), ("a.parquet",), "must lie in"),
        (("--compression", "lz4"), ("a.parquet",), "use zstd"),
        (("--rank", "3", "--world-size", "2"), ("a.parquet", "b.jsonl"), "--rank 3"),
        (("--world-size", "2"), ("a.parquet",), "1 input files"),
        (("--max-tokens", "-5"), ("a.parquet",), "--max-tokens -5: must be at least 0"),
        (("--shard-bytes", "0"), ("a.parquet",), "--shard-bytes 0: must be at least 1"),
        (("--shard-bytes", str(5 << 30)), ("a.parquet",), "must be at least 1, at most 2147483648 (2 GiB)"),
        (("--workers", "-2"), ("a.parquet",), "--workers -2: must be at least 1"),
        (("--max-document-mb", "0"), ("a.parquet",), "--max-document-mb 0: must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_commands_end_in_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    more: tuple[str, ...],
    inputs: tuple[str, ...],
    message: str,
) -> None:
    assert prepare(folder, tmp_path / "out", *more, inputs=inputs) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_tokenizer_that_cannot_be_fetched_is_no_failed_write(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="needs the optional extra [data]: tiktoken")

    def no_network(name: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    assert prepare(folder, tmp_path / "out", "--tokenizer", "tiktoken:gpt2") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: tokenizer tiktoken:gpt2: tiktoken could not fetch it (no route to host)")
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_cut_short_is_named_and_resumable(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    data = (folder / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    assert prepare(tmp_path, tmp_path / "out", inputs=("a.parquet",)) == 2
    assert "a.parquet: cannot be read, it is cut short or damaged" in capsys.readouterr().err


def test_an_input_that_the_system_refuses_is_not_the_outputs_fault(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ("--tokenizer", str(folder / "tokenizer.json"))
    (tmp_path / "broken.jsonl").symlink_to("/proc/self/mem")  # it opens, and reading its first byte is an I/O error
    assert prepare(tmp_path, tmp_path / "out", *tokenizer, inputs=("broken.jsonl",)) == 2
    assert f"error: {tmp_path}/broken.jsonl: cannot be read ([Errno 5]" in capsys.readouterr().err

    def refuse(path: str, mode: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(corpus_files, "open", refuse, raising=False)
    for name in ("a.parquet", "b.jsonl"):
        assert prepare(folder, tmp_path / "other", inputs=(name,)) == 2
        assert f"error: {folder}/{name}: cannot be read ([Errno 13]" in capsys.readouterr().err


def test_a_full_disk_keeps_nothing_half_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(folder, tmp_path / "whole") == 0
    with full_disk(after=5):
        assert prepare(folder, tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare(folder, tmp_path / "out") == 0
    assert corpus.tree(tmp_path / "out") == corpus.tree(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_changed_in_the_middle_of_it_is_not_resumed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Rewritten in place, at the same size: shards would have the beginning of one and the rest of another."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    monkeypatch.setattr(corpus_io, "BLOCK_BYTES", 2000)
    path = tmp_path / f"a.{kind}"

    def write(last_word: str) -> None:
        documents = [f"{text} {last_word}" for text in corpus.texts(60)]
        if kind == "jsonl":
            corpus.write_jsonl(path, documents)
        else:
            table = pa.table({"text": documents})
            pq.write_table(table, path, row_group_size=5, compression="none", use_dictionary=False)

    write("one")
    assert prepare(tmp_path, tmp_path / "whole", inputs=(path.name,)) == 0
    n_bytes = path.stat().st_size
    with full_disk(after=15):
        assert prepare(tmp_path, tmp_path / "out", inputs=(path.name,)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "out" / "train" / "shard.00001.mds").exists()
    write("two")
    assert path.stat().st_size == n_bytes
    assert prepare(tmp_path, tmp_path / "out", inputs=(path.name,)) == 2
    assert f"error: {path}: is not what it was when this job was interrupted" in capsys.readouterr().err
    write("one")
    assert prepare(tmp_path, tmp_path / "out", inputs=(path.name,)) == 0
    assert corpus.tree(tmp_path / "out") == corpus.tree(tmp_path / "whole")


def test_a_file_size_limit_is_an_error_too(folder: Path, tmp_path: Path) -> None:
    """The kernel refuses the write itself, in a child, so that the limit does not reach the test runner."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
        os._exit(prepare(folder, tmp_path / "out"))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert not list((tmp_path / "out").rglob("shard.*"))


def test_a_killed_worker_is_an_error_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel kills one for want of memory."""
    real = preparation.chunks

    def and_a_kill(*arguments: Any) -> Iterator[Any]:
        for chunk in real(*arguments):
            yield chunk
            for worker in multiprocessing.active_children():  # those of an earlier test may still be about to end
                worker.kill()

    monkeypatch.setattr(preparation, "chunks", and_a_kill)
    assert prepare(folder, tmp_path / "out", "--workers", "2") == 2
    assert "error: a worker process was killed" in capsys.readouterr().err
    monkeypatch.undo()
    assert prepare(folder, tmp_path / "out") == 0


def test_a_worker_that_dies_while_another_starts_is_no_error_of_the_disk(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool shuts its pipes when it finds one dead, and the start of another meets them: OSError, handle is closed."""
    real = prep_job.WorkerPool.__init__

    def with_shut_pipes(pool: Any, *arguments: Any) -> None:
        real(pool, *arguments)
        pool._call_queue._reader.close()

    monkeypatch.setattr(prep_job.WorkerPool, "__init__", with_shut_pipes)
    assert prepare(folder, tmp_path / "out", "--workers", "2") == 2
    assert "error: a worker process was killed" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ids_that_differ_from_the_references_are_an_error_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    pytest.importorskip("tiktoken", reason="needs the optional extra [data]: tiktoken")
    if workers == "1":
        monkeypatch.setattr(fast_bpe, "GPT2_PATTERN", r"\S+|\s+")
    else:  # a spawned process knows nothing of that: what comes back of one is the error
        monkeypatch.setattr(encode_worker, "_encode", differ)
    assert prepare(folder, tmp_path / "out", "--workers", workers) == 2
    assert "error: the fast encoder differs from the tokenizers library" in capsys.readouterr().err
    monkeypatch.undo()
    assert prepare(folder, tmp_path / "out", "--encoder", "reference") == 0, "the way out"


def differ(chunk: object) -> None:
    """In the place of a worker's function."""
    raise fast_bpe.EncoderDiffersError("the fast encoder differs from the tokenizers library on a document")


def test_verification_names_every_damage(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare(folder, out) == 0
    first, second = (out / "train" / f"shard.0000{i}.mds" for i in range(2))
    data = bytearray(first.read_bytes())
    data[-1] ^= 255
    first.write_bytes(bytes(data))
    second.write_bytes(second.read_bytes()[:-9])
    (out / "val" / "shard.00000.mds").unlink()
    picture = tmp_path / "lengths.png"
    assert verify_shards.main([str(out), "--picture", str(picture)]) == 1
    problems = capsys.readouterr().out
    for expected in (
        "train/shard.00000.mds: the checksum",
        "train/shard.00001.mds",
        "val/shard.00000.mds: No such file",
    ):
        assert expected in problems
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("key", ["shards", "raw_data", "zip_data", "basename", "bytes", "samples"])
def test_verification_survives_a_damaged_index(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """One bit of a key that is another leaves an index that is JSON."""
    out = tmp_path / "out"
    assert prepare(folder, out) == 0
    index = out / "train" / "index.json"
    index.write_text(index.read_text().replace(f'"{key}"', f'"{key[:-1]}_"', 1))
    assert verify_shards.main([str(out)]) == 1
    assert f"PROBLEM {index} cannot be read: KeyError('{key}')" in capsys.readouterr().out


def test_verification_reads_what_training_decompressed_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that finds the decompressed shard reads that one."""
    out = tmp_path / "out"
    assert prepare(folder, out, "--compression", "zstd") == 0
    StreamingDataset(local=str(out), split="train")[0]
    assert verify_shards.main([str(out)]) == 0
    raw = out / "train" / "shard.00000.mds"
    data = bytearray(raw.read_bytes())
    data[-1] ^= 255
    raw.write_bytes(bytes(data))
    assert verify_shards.main([str(out)]) == 1
    assert "train/shard.00000.mds: the checksum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--samples", "-1", "must be at least 0"),
        ("--workers", "-2", "must be at least 0"),
        ("--picture", "lengths.abc", "must end in .png"),
        ("--picture", "none/lengths.png", "there is no folder to put it into"),
    ],
)
def test_wrong_commands_of_verification_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert verify_shards.main([str(tmp_path), option, value]) == 2
    assert capsys.readouterr().err == f"error: {option} {value}: {message}\n"


def test_verification_finds_wrong_ids_and_counts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(folder, out) == 0
    raw = json.loads((out / "manifest.json").read_text())
    raw["n_documents"]["train"] += 1
    raw["vocab_size"] = 300
    (out / "manifest.json").write_text(json.dumps(raw))
    assert verify_shards.main([str(out)]) == 1
    assert "is not below vocab_size 300" in capsys.readouterr().out
    assert verify_shards.main([str(tmp_path)]) == 2


def test_llmc_files_hold_the_same_tokens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare(folder, out) == 0
    assert export_llmc.main([str(out), "--output", str(tmp_path / "bin"), "--file-tokens", "1000"]) == 0
    ids: list[int] = []
    for path in sorted((tmp_path / "bin").glob("out_train_*.bin")):
        header = np.fromfile(path, "<i4", 256)
        body = np.fromfile(path, np.uint16, offset=1024)
        assert header[:3].tolist() == [20240520, 1, len(body)]
        ids += body.tolist()
    expected = tokens(out, "train")
    assert ids == [expected[-1], *expected[:-1]]
    # Larger files would leave the last of these behind, which a trainer would take for part of the set.
    assert export_llmc.main([str(out), "--output", str(tmp_path / "bin"), "--file-tokens", "2000"]) == 2
    assert "out_train_000000.bin is there already: name a new folder" in capsys.readouterr().err


def test_shards_read_back(folder: Path, tmp_path: Path) -> None:
    assert prepare(folder, tmp_path / "out", "--compression", "zstd") == 0
    manifest = read_manifest(tmp_path / "out")
    (part,) = split_parts(tmp_path / "out", manifest, "train")
    rows = read_shard(tmp_path / "out" / "train", part.shards[0], manifest)
    assert rows.shape[1] == 65
    assert (rows[1:, 0] == rows[:-1, -1]).all()


def test_a_hub_dataset_is_listed_and_streamed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub as a folder: the listing rules and the reading by file object, without the network."""

    class Hub:
        def find(self, path: str, detail: bool) -> dict[str, dict[str, int]]:
            assert detail
            assert path == "datasets/Owner/fineweb/sample/10BT"
            return {f"{path}/000.parquet": {"size": 10}, f"{path}/readme.md": {"size": 1}}

        def open(self, path: str, mode: str) -> Any:
            assert path == "datasets/Owner/fineweb/sample/10BT/000.parquet"
            return open(folder / "a.parquet", mode)

    monkeypatch.setattr(corpus_files, "hub_file_system", Hub)
    arguments = [
        "--input",
        "Owner/fineweb",
        "--hub-config",
        "sample-10BT",
        "--tokenizer",
        str(folder / "tokenizer.json"),
    ]
    arguments += ["--row-tokens", "64", "--workers", "1", "--output", str(tmp_path / "out")]
    assert tokenize_fineweb.main(arguments) == 0
    n_documents = read_manifest(tmp_path / "out").n_documents
    assert sum(n_documents.values()) == 60
