"""What is read as text, what is skipped, and what is no input."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import (
    corpus_files,
    corpus_io,
    tokenize_fineweb,
    verify_shards,
)
from data_prep.corpus_files import InputError, Source, find_sources
from data_prep.corpus_io import Filters, chunks, documents
from data_prep.image_sources import in_folder, in_tar
from data_prep.shard_schema import read_manifest
from tests.unit import corpus
from tests.unit.text_data.preparing import prepare


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
    assert "the val split is empty, and pretrain needs both" in capsys.readouterr().out
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


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = pa.array(["a text"])
    pq.write_table(pa.Table.from_arrays([texts, texts, texts], names=["text", "other", "other"]), path)
    source = Source(str(path), path.stat().st_size)
    assert len(list(chunks(0, source, ["text"], Filters()))) == 2
    with pytest.raises(InputError, match=r"x\.parquet: 2 columns are called 'other'"):
        list(chunks(0, source, ["other"], Filters()))


@pytest.mark.parametrize("window_log", [28, 31])
def test_frames_that_reach_far_back_are_read(tmp_path: Path, window_log: int) -> None:
    """As `zstd --long` makes them. This one is written by hand: one raw block, and no size that would bound the window."""
    pytest.importorskip("zstandard", reason="needs the optional extra [data]: zstandard")
    lines = corpus.write_jsonl(tmp_path / "p.jsonl", list(corpus.texts(5))).read_bytes()
    header = 0xFD2FB528.to_bytes(4, "little") + bytes([0, (window_log - 10) << 3])
    data = header + (len(lines) << 3 | 1).to_bytes(3, "little") + lines
    (tmp_path / "far.jsonl.zst").write_bytes(data)
    found = chunks(0, Source(str(tmp_path / "far.jsonl.zst"), len(data)), ["text"], Filters())
    assert [chunk.payload for chunk in found] == [lines, None]


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
