"""What a preparation of text writes, alone and as an array of jobs."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter

from data_prep import (
    tokenize_fineweb,
    verify_shards,
)
from data_prep.encode_worker import in_val
from data_prep.shard_schema import mds_columns, read_manifest
from data_prep.shard_writer import ShardLayout
from data_prep.tokenizers_io import open_tokenizer
from tests.unit import corpus
from tests.unit.text_data.preparing import prepare, tokens


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


def test_an_empty_split_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(folder, tmp_path / "out", "--val-fraction", "0.9999999") == 0
    assert "the train split is empty, and pretrain needs both: prepare again with a smaller" in capsys.readouterr().out


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
