"""What stops a preparation of text: commands, inputs, disks and workers, and what is left then."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import (
    corpus_files,
    corpus_io,
    encode_worker,
    fast_bpe,
    prep_job,
    preparation,
)
from tests.unit import corpus
from tests.unit.text_data.preparing import full_disk, prepare


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
