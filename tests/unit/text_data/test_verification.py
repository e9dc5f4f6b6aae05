"""The shards of text: verified, read back, and written for others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from streaming import StreamingDataset

from data_prep import (
    export_llmc,
    verify_shards,
)
from data_prep.shard_reader import read_shard, split_parts
from data_prep.shard_schema import read_manifest
from tests.unit.text_data.preparing import prepare, tokens


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
