"""The lock on a run's folder: who is refused, what the refusal says, and what a dead process leaves."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pretrain.config_sections import ConfigError
from pretrain.run_lock import LOCK, HeldElsewhereError, RunLock

HOLD = """
import os, sys, time
from pretrain.run_lock import RunLock
lock = RunLock(sys.argv[1])
if os.fork() == 0:  # as a loader process
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def holding(run_dir: Path, **settings: str) -> subprocess.Popen[str]:
    """A process that holds the lock, and has a child; in a group of their own."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | settings,
    )  # fmt: skip
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    return process


def test_a_live_holder_is_named_and_a_dead_one_is_in_nobodys_way(tmp_path: Path) -> None:
    holder = holding(tmp_path / "run", SLURM_JOB_ID="4711")
    try:
        with pytest.raises(
            ConfigError, match=rf"in use by process {holder.pid} on {socket.gethostname()}, Slurm job 4711"
        ):
            RunLock(tmp_path / "run")
        holder.kill()
        holder.wait()
        RunLock(tmp_path / "run").release()  # its child lives on
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_holder_on_another_node_is_waited_for(tmp_path: Path) -> None:
    holder = holding(tmp_path)
    try:
        record = json.loads((tmp_path / LOCK).read_text())
        (tmp_path / LOCK).write_text(json.dumps(record | {"host": "a-dead-node"}))
        with pytest.raises(
            HeldElsewhereError, match=rf"in use by process {holder.pid} on a-dead-node.*still after 0 s"
        ):
            RunLock(tmp_path, lease_s=0.2)
        threading.Timer(0.5, holder.kill).start()
        RunLock(tmp_path, lease_s=20).release()
        assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(_file: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    caplog.set_level(logging.WARNING)
    RunLock(tmp_path).release()
    assert "has no locks (No locks available)" in caplog.text
