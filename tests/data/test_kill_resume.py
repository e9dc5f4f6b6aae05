"""SIGKILL at random times, again and again: the output ends as if nothing had happened, and no worker stays behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import tokenize_fineweb
from tests.unit import corpus

REPOSITORY = Path(__file__).resolve().parents[2]


def arguments(folder: Path, output: Path, workers: int) -> list[str]:
    inputs = sorted(str(p) for p in folder.glob("*.parquet"))
    fixed = ["--row-tokens", "64", "--shard-bytes", "4000", "--val-fraction", "0.1", "--compression", "zstd"]
    where = ["--tokenizer", str(folder / "tokenizer.json"), "--output", str(output), "--workers", str(workers)]
    return ["--input", *inputs, *fixed, *where]


def start(folder: Path, output: Path, workers: int) -> subprocess.Popen[bytes]:
    script = str(REPOSITORY / "data_prep" / "tokenize_fineweb.py")  # by its path, as people run it
    return subprocess.Popen(
        [sys.executable, script, *arguments(folder, output, workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kill_during_work(process: subprocess.Popen[bytes], output: Path, delay_s: float, shards: str) -> None:
    """Kill the parent alone, `delay_s` after it wrote the first new file like `shards` (or let it end before)."""

    def n_shards() -> int:
        return len(list(output.rglob(shards)))

    before = n_shards()
    while process.poll() is None and n_shards() == before:
        time.sleep(0.005)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()


def assert_no_process_left(group: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    pytest.fail("workers outlived their killed parent")


@pytest.mark.parametrize("n_rounds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_random_kills_change_nothing(tmp_path: Path, n_rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))  # the manifest names commits; HEAD may move while this runs
    corpus.byte_level_tokenizer(tmp_path)
    for i in range(4):
        corpus.write_parquet(tmp_path / f"{i}.parquet", list(corpus.texts(60 * n_rounds, seed=i)), group=15)
    assert tokenize_fineweb.main(arguments(tmp_path, tmp_path / "whole", 1)) == 0
    rng = random.Random(n_rounds)
    output = tmp_path / "killed"
    n_killed = 0
    for _ in range(n_rounds):
        process = start(tmp_path, output, workers=rng.choice((1, 2)))
        kill_during_work(process, output, rng.uniform(0, 0.15), "shard.*.zstd")
        n_killed += process.returncode == -signal.SIGKILL
        assert_no_process_left(process.pid)
    process = start(tmp_path, output, workers=2)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()
    assert corpus.tree(output) == corpus.tree(tmp_path / "whole")
    assert n_killed >= n_rounds // 2, "the kills came too late to test anything: make the corpus larger"
