"""Real ranks for tests: forked processes that talk over gloo on this machine.

Importing torch, DeepSpeed and megatron takes many seconds a process; forking after one import takes none. Forked ranks
must run torch on one thread: OpenMP's pool does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the message has its number and traceback."""


def run_ranks(world_size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """`work(*args)` in each of `world_size` forked ranks; their results (which must pickle) by rank.

    torch.distributed's variables are set; the ranks join it themselves. The first failure ends all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(world_size, Path(folder), work, args)
        try:
            _wait(processes, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        failed = [process.exitcode != 0 for process in processes]
        if any(failed):
            reports = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
            codes = [process.exitcode for process in processes]
            raise RankFailedError(f"exit codes {codes}\n" + "\n".join(reports))
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def start_ranks(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """The forked ranks of `work(*args)`, running; the caller ends and joins them."""
    return _start(world_size, Path(tempfile.mkdtemp()), work, args)


def run_python(*arguments: object, timeout_s: float = 400, **settings: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, which chooses its devices anew: for tests that need a GPU, which no fork can use.

    `settings` are environment variables.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | settings
    environment.pop("DS_ACCELERATOR", None)  # what pretrain.engine chose for this process
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def _start(world_size: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    context, port = multiprocessing.get_context("fork"), _free_port()
    processes = [
        context.Process(target=_rank_main, args=(rank, world_size, port, folder, work, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _wait(processes: list[Any], deadline: float, timeout_s: float) -> None:
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            time.sleep(1.0)  # the others may be about to report the same failure
            return
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise RankFailedError(f"ranks {alive} still run after {timeout_s:.0f} s")
        time.sleep(0.02)


def _rank_main(
    rank: int, world_size: int, port: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        result = work(*args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
