"""A rank that dies, is stopped, or drifts away from the others: the job ends on all ranks, soon, and says which it was."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import heartbeat, train
from pretrain.config import RunConfig
from pretrain.distributed import RankError
from pretrain.metrics import read_metrics
from pretrain.watchdog import EXIT_HANG, STEPS_BEFORE
from tests.distributed.harness import RankFailedError, run_ranks, start_ranks
from tests.distributed.toy_run import run_config

LOST_S = 2.0


def train_and_report(cfg: RunConfig, folder: Path) -> None:
    """Train; what ends it is written to a file of this rank."""
    try:
        train.main(cfg)
    except RankError as error:
        (folder / f"said_{os.environ['RANK']}").write_text(str(error))
        os._exit(1)


def wait_for_a_step(cfg: RunConfig, step: int = 3) -> None:
    metrics = Path(cfg.run_dir) / "metrics.jsonl"
    end = time.monotonic() + 60
    while not (metrics.exists() and any(record["step"] >= step for record in read_metrics(metrics))):
        assert time.monotonic() < end, "no step in a minute"
        time.sleep(0.02)


def join(processes: list[Any], within_s: float) -> None:
    end = time.monotonic() + within_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        assert process.exitcode is not None, f"a rank still runs after {within_s:.0f} s"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_other(
    victim: int, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOST_SECONDS", str(LOST_S))
    cfg = run_config(dataset, tmp_path / "run", optim={"steps": 100_000})
    processes = start_ranks(2, train_and_report, cfg, tmp_path)
    try:
        wait_for_a_step(cfg)
        os.kill(processes[victim].pid, signal.SIGKILL)
        join(processes, within_s=3 * LOST_S + 15)
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - victim].exitcode == 1
    assert f"rank {victim} on " in (tmp_path / f"said_{1 - victim}").read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_leave(
    victim: int, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 too, in whose process everybody listens to everybody: then no call comes back."""
    monkeypatch.setenv("LOST_SECONDS", str(LOST_S))
    cfg = run_config(dataset, tmp_path, optim={"steps": 100_000})
    processes = start_ranks(2, train.main, cfg)
    try:
        wait_for_a_step(cfg)
        os.kill(processes[victim].pid, signal.SIGSTOP)
        join([processes[1 - victim]], within_s=3 * LOST_S + 15)
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - victim].exitcode == EXIT_HANG
    said = (tmp_path / "hang" / f"rank_{1 - victim:05}.txt").read_text()
    assert f"rank {victim} on {socket.gethostname()} (silent for" in said.splitlines()[0]
    assert "lost, and no step for" in said.splitlines()[0]


def test_where_rank_0_stands_still_the_bound_on_a_step_still_holds(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOST_SECONDS", "60")
    monkeypatch.setenv("HANG_SECONDS", "3")
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.5)
    cfg = run_config(dataset, tmp_path, optim={"steps": 100_000})
    processes = start_ranks(2, train.main, cfg)
    try:
        wait_for_a_step(cfg, step=STEPS_BEFORE + 3)
        os.kill(processes[0].pid, signal.SIGSTOP)
        join(processes[1:], within_s=30)
    finally:
        for process in processes:
            process.kill()
    assert processes[1].exitcode == EXIT_HANG
    said = (tmp_path / "hang" / "rank_00001.txt").read_text().splitlines()[0]
    assert f"HANG_SECONDS sets its least); rank 0 on {socket.gethostname()} (silent for" in said


def flip_a_bit(tensor: torch.Tensor) -> None:
    tensor.data.view(torch.int32).flatten()[1] ^= 1


def train_and_drift(cfg: RunConfig, name: str) -> int:
    """One bit flips on rank 1 after step 3: of a parameter, from which the next update writes it."""
    advance = train.advance

    def flip(run: train.Run, *args: Any, **kwargs: Any) -> Any:
        if run.state.step == 3 and run.ranks.rank == 1:
            flip_a_bit(run.engine.parameters[name])
        return advance(run, *args, **kwargs)

    train.advance = flip
    return train.main(cfg)


@pytest.mark.parametrize(
    ("name", "tensor", "every"),
    [
        # ZeRO writes each data-parallel copy from one master, so the next update would mend this one.
        ("blocks.1.mixer.gated_norm", 1, 1),
        # These each tensor-parallel rank updates for itself: the drift stays, and is found at the next save.
        ("final_norm", 2, 0),
        ("blocks.0.mixer.in_bc", 2, 5),
    ],
    ids=str,
)
def test_ranks_that_drifted_apart_are_found_before_they_are_saved(
    name: str, tensor: int, every: int, dataset: Path, tmp_path: Path
) -> None:
    parallel = {"tensor": tensor, "check_replicas_every": every}
    cfg = run_config(dataset, tmp_path, parallel=parallel)
    with pytest.raises(RankFailedError, match=rf"parameters differ .* first {name} on ranks \[") as caught:
        run_ranks(2, train_and_drift, cfg, name)
    assert str(caught.value).count("RankError: ") == 2
    assert not list((tmp_path / "checkpoints").glob("step_*"))
