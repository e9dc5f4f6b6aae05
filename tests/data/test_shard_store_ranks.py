"""The shard store among processes: ranks of one run, two runs on a node, what a crash leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.shard_store import remove_stale_shared_memory
from tests.unit.test_data_loader import write_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
PREAMBLE = """
import os, sys, time, torch
from torch import distributed as dist
from pretrain.config_sections import DataConfig
from pretrain.data import TokenLoader, validation_batches
path, cache, rank, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if size > 1:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[5]}", rank=rank, world_size=size)
cfg = DataConfig(path=path, cache_dir=cache, seq_len=8, tokens_per_step=96, micro_batch=2, n_workers=1)
loader = TokenLoader(cfg, split="train", vocab_size=300, seed=7, dp_rank=rank, dp_size=size, n_sequences_per_step=12)
val = validation_batches(cfg, vocab_size=300, dp_rank=rank, dp_size=size, n_sequences=4)
steps = [torch.cat([b.tokens_bt for b in loader.next_step()]) for _ in range(3)]
"""
PRINT = "print('TOKENS', torch.cat(steps)[:, 0].tolist(), flush=True)\nloader.close()\n"
HANG = "print('READY', flush=True)\ntime.sleep(600)\n"


def start(code: str, path: Path, cache: Path, *, rank: int = 0, size: int = 1, port: int = 0) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, str(path), str(cache), str(rank), str(size), str(port)],
        env=env | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def tokens_of(process: subprocess.Popen[str]) -> list[int]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("TOKENS"))
    return [int(word) for word in line.removeprefix("TOKENS").strip(" []").split(",")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_ranks_a_neighbour_and_a_crash(tmp_path: Path) -> None:
    """One process dies by SIGKILL; its shared memory must not stop the next start, nor may cleaning hurt a live run."""
    source = write_dataset(tmp_path / "remote")
    cache = tmp_path / "cache"
    crashed = start(HANG, source, cache)
    neighbour = start(HANG, source, tmp_path / "cache-of-neighbour")
    try:
        for process in (crashed, neighbour):
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "READY", process.stderr and process.stderr.read()
        os.killpg(crashed.pid, signal.SIGKILL)
        crashed.wait()
        port = free_port()
        ranks = [start(PRINT, source, cache, rank=rank, size=2, port=port) for rank in range(2)]
        first, second = (tokens_of(process) for process in ranks)
        alone = tokens_of(start(PRINT, source, tmp_path / "cache-alone"))
        both = [t for k in range(3) for half in (first, second) for t in half[6 * k : 6 * k + 6]]
        assert both == alone
        assert neighbour.poll() is None
    finally:
        for process in (crashed, neighbour):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_only_what_nobody_maps_is_removed(tmp_path: Path) -> None:
    shm, proc = tmp_path / "shm", tmp_path / "proc"
    for folder in (shm, proc / "17"):
        folder.mkdir(parents=True)
    for name in ("900001_locals", "900001_barrier", "900002_locals", "unrelated_locals", "900003_other"):
        (shm / name).write_bytes(b"")
    (proc / "17" / "maps").write_text(f"7f00-7f10 rw-s 00000000 00:19 5 {shm}/900002_locals\n")
    assert remove_stale_shared_memory(shm, proc) == ["900001"]
    assert sorted(p.name for p in shm.iterdir()) == ["900002_locals", "900003_other", "unrelated_locals"]


@pytest.mark.slow
def test_many_runs_may_start_at_once(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "remote")
    runs = [start(PRINT, source, tmp_path / f"cache{i}") for i in range(4)]
    assert len({tuple(tokens_of(run)) for run in runs}) == 1
