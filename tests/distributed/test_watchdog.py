"""A rank that stands still ends itself with its stacks written; one that works, saves or warms up does not."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain import preflight as preflight_module
from pretrain.config_io import config_from_dict
from pretrain.distributed import RankError, close_ranks, init_ranks
from pretrain.watchdog import EXIT_HANG, STEPS_BEFORE, Watchdog
from tests.distributed.harness import run_ranks


def _hang(folder: str) -> None:
    watchdog = Watchdog(folder, 3, least_s=0.4)
    for step in range(STEPS_BEFORE + 3):
        watchdog.beat(step)
    time.sleep(60)


def _work(folder: str, still_s: float) -> None:
    watchdog = Watchdog(folder, 0, least_s=0.4)
    time.sleep(still_s)  # the first step compiles
    for step in range(STEPS_BEFORE + 3):
        watchdog.beat(step)
    with watchdog.pause():
        time.sleep(still_s)  # a save
    watchdog.beat(99)
    watchdog.stop()


def _exit_code(work: object, *args: object) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=work, args=args)  # type: ignore[arg-type]
    process.start()
    process.join(20)
    assert process.exitcode is not None, "still running after 20 s"
    return process.exitcode


def test_a_hang_is_ended_and_its_stacks_are_written(tmp_path: Path) -> None:
    start = time.monotonic()
    assert _exit_code(_hang, str(tmp_path)) == EXIT_HANG
    assert time.monotonic() - start < 10
    said = (tmp_path / "hang" / "rank_00003.txt").read_text()
    assert "rank 3 on" in said
    assert "in _hang" in said


def test_warm_up_and_saving_are_no_hang(tmp_path: Path) -> None:
    assert _exit_code(_work, str(tmp_path), 1.2) == 0
    assert not (tmp_path / "hang").exists()


def test_the_bound_follows_the_run(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, least_s=1.0)
    assert watchdog.bound_s() is None
    for step in range(STEPS_BEFORE + 2):
        watchdog.beat(step)
    watchdog._durations.extend([3.0] * 10)
    assert watchdog.bound_s() == pytest.approx(60.0)
    with watchdog.pause():
        assert watchdog.bound_s() == pytest.approx(360.0)
    watchdog.stop()


def test_a_step_is_measured_without_its_pause(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, least_s=1.0)
    for step in range(STEPS_BEFORE + 4):
        time.sleep(0.1)
        with watchdog.pause():  # as in training: before the beat, in every step
            time.sleep(0.3)
        watchdog.beat(step)
    bound = watchdog.bound_s()
    watchdog.stop()
    assert bound is not None
    assert 20 * 0.1 <= bound < 20 * 0.3


def _no_room(folder: str) -> str:
    usage = namedtuple("usage", "total used free")
    shutil.disk_usage = lambda path: usage(10, 10, 1000)  # type: ignore[assignment]
    return _preflight(folder)


def _broken_device(folder: str) -> str:
    def check_device(device: torch.device) -> None:
        if os.environ["RANK"] == "1":
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    preflight_module._check_device = check_device
    return _preflight(folder)


def _wrong_sum(folder: str) -> str:
    all_reduce = dist.all_reduce

    def corrupted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        done = all_reduce(tensor, *args, **kwargs)
        if os.environ["RANK"] == "1" and tensor.dtype == torch.float32:
            tensor += 1
        return done

    dist.all_reduce = corrupted
    return _preflight(folder)


def _preflight(folder: str) -> str:
    """What preflight said, or "passed"."""
    cfg = config_from_dict(
        {
            "run_dir": f"{folder}/not/made/yet",
            "model": {"n_layers": 1, "d_model": 32, "headdim": 8, "vocab_size": 64},
            "data": {"path": "shards", "seq_len": 32, "tokens_per_step": 64, "micro_batch": 1},
            "optim": {"lr": 1e-2, "steps": 2, "warmup_steps": 1},
        }
    )
    ranks = init_ranks(1)
    try:
        preflight_module.preflight(cfg, ranks)
    except RankError as error:
        return str(error)
    finally:
        close_ranks()
    return "passed"


def test_a_full_disk_is_said_on_all_ranks_with_the_node(tmp_path: Path) -> None:
    first, second = run_ranks(2, _no_room, str(tmp_path))
    assert first == second
    assert "rank 0: on node" in first
    assert "two checkpoints of this run take" in first


def test_an_error_of_the_device_itself_is_said_with_the_node(tmp_path: Path) -> None:
    first, second = run_ranks(2, _broken_device, str(tmp_path))
    assert first == second == f"rank 1: on node {socket.gethostname()}: CUDA error: uncorrectable ECC error encountered"


def test_a_sum_that_arrives_wrong_on_one_rank_is_said_on_all_with_the_node(tmp_path: Path) -> None:
    first, second = run_ranks(2, _wrong_sum, str(tmp_path))
    assert first == second
    assert f"rank 1: on node {socket.gethostname()}: an all-reduce of ones over 2 ranks gave 3.0" in first
