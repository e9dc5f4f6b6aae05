"""SIGKILL at random times, again and again: the image dataset ends as if nothing had happened, and no worker stays."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import make_demo_images, prepare_imagenet
from tests.data.test_kill_resume import REPOSITORY, assert_no_process_left, kill_during_work
from tests.unit.corpus import tree


def arguments(folder: Path, output: Path, workers: int) -> list[str]:
    how = ["--shard-bytes", "20000", "--resize-short", "40", "--seed", "3"]
    return ["--input", str(folder), "--output", str(output), "--workers", str(workers), *how]


def start(folder: Path, output: Path, workers: int) -> subprocess.Popen[bytes]:
    script = str(REPOSITORY / "data_prep" / "prepare_imagenet.py")  # by its path, as people run it
    return subprocess.Popen(
        [sys.executable, script, *arguments(folder, output, workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.parametrize("n_rounds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_random_kills_change_nothing(tmp_path: Path, n_rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))  # the manifest names a commit; HEAD may move while this runs
    folder, output = tmp_path / "images", tmp_path / "killed"
    make_demo_images.write(make_demo_images.drawn(6, 60 * n_rounds, 48), folder)
    assert prepare_imagenet.main(arguments(folder, tmp_path / "whole", 1)) == 0
    rng = random.Random(n_rounds)
    n_killed = 0
    for _ in range(n_rounds):
        process = start(folder, output, workers=rng.choice((1, 2)))
        kill_during_work(process, output, rng.uniform(0, 0.1), "shard.*.mds")
        n_killed += process.returncode == -signal.SIGKILL
        assert_no_process_left(process.pid)
    process = start(folder, output, workers=2)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()
    assert tree(output) == tree(tmp_path / "whole")
    assert n_killed >= n_rounds // 2, "the kills came too late to test anything: draw more images"
