"""One live run a folder: what the trainer holds before it writes into run_dir.

The lock is the kernel's record lock on RUN_DIR/.lock: it ends with the process that holds it, however that dies, and no
process that it forks shares it. The file's content only says who that is. On a file system whose locks end at the node
(docs/slurm.md) two nodes do not see each other's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from pretrain.config_sections import ConfigError

logger = logging.getLogger(__name__)

LOCK = ".lock"
LEASE_S = 100.0
"""How long to wait for a holder on another node: an NFS server keeps a dead node's locks for its lease, mostly 90 s."""
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_WAY_OUT = "wait until it has ended, end it, or give this run a run_dir of its own"


class HeldElsewhereError(RuntimeError):
    """A process on another node holds the folder, or held it and its node is gone without the file system having noticed."""


class RunLock:
    """This process's hold on a run's folder, which is made where it is not there. One rank makes it."""

    def __init__(self, run_dir: str | Path, *, lease_s: float = LEASE_S) -> None:
        """Raises ConfigError where a live process of this node holds it, saying which one, or the folder cannot be written;
        HeldElsewhereError where one of another node does after `lease_s`: a dead node's lock may last longer, and a later
        start find it free.
        """
        self._file = -1
        path = Path(run_dir) / LOCK
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            end, is_waiting = time.monotonic() + lease_s, False
            while not self._take():
                holder = self._holder()
                in_use = f"run_dir={run_dir} is in use by {_described(holder)}"
                if holder.get("host", socket.gethostname()) == socket.gethostname():
                    raise ConfigError(f"{in_use}: {_WAY_OUT}")
                if time.monotonic() > end:
                    raise HeldElsewhereError(f"{in_use}, still after {lease_s:.0f} s: {_WAY_OUT}")
                if not is_waiting:
                    logger.warning(
                        "run_dir=%s: waiting %.0f s for the lock of %s", run_dir, lease_s, _described(holder)
                    )
                is_waiting = True
                time.sleep(min(5.0, lease_s / 10))
            self._say()
        except OSError as error:
            self.release()
            raise ConfigError(f"run_dir={run_dir} cannot be written: {error}") from None
        except (ConfigError, HeldElsewhereError):
            self.release()
            raise

    def release(self) -> None:
        """Let another process have it; the file stays, since removing it would let two hold locks on two files."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "run_dir's file system has no locks (%s): see to it that no other run writes there", error.strerror
            )
        return True

    def _say(self) -> None:
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "time": time.time(),
        }
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, (json.dumps(record) + "\n").encode(), 0)
        os.fsync(self._file)  # else other nodes may not see it

    def _holder(self) -> dict[str, object]:
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(os.pread(self._file, 4096, 0))
            if isinstance(record, dict):
                return record
        return {}


def _described(holder: dict[str, object]) -> str:
    if not holder:
        return "another process, which has not said its name yet"
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    since = holder.get("time")
    at = f", since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}" if isinstance(since, float) else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}{at}"
