"""When a run should save and stop before it is done: a signal, the job's time limit, or a file that somebody touched."""

from __future__ import annotations

import enum
import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType

from pretrain.distributed import Ranks

logger = logging.getLogger(__name__)

STOP_FILE = "stop"
"""Touch RUN_DIR/stop and the run saves and ends, with exit code 0: it is not started again. The run removes the file."""
LARGEST_SHARE = 0.1
"""The margin before a time limit is at most this share of the job's time: a short job must still train."""


class Stop(enum.IntEnum):
    """Why a run stops early, the most pressing last."""

    NO = 0
    FILE = 1
    TIME_LIMIT = 2
    SIGNAL = 3

    @property
    def text(self) -> str:
        """What the log and the events say."""
        return {
            Stop.NO: "not stopped",
            Stop.FILE: f"stopped by the file {STOP_FILE}",
            Stop.TIME_LIMIT: "stopped before the time limit",
            Stop.SIGNAL: "stopped by a signal",
        }[self]


class StopWatch:
    """Asked once a step. SIGTERM and SIGUSR1 reach any rank; the file and the clock are rank 0's to look at."""

    def __init__(self, run_dir: str | Path, ranks: Ranks, margin_s: float) -> None:
        self._file, self._ranks = Path(run_dir) / STOP_FILE, ranks
        self._signalled = False
        self._end = _job_end()
        self._margin_s = 0.0
        if self._end is not None and margin_s > 0:
            started = float(os.environ.get("SLURM_JOB_START_TIME", time.time()))
            self._margin_s = min(margin_s, LARGEST_SHARE * max(0.0, self._end - started))
            if ranks.is_main:
                logger.info("the job ends in %.0f s; saving before that", self._end - time.time())
        self._slowest_step_s = 0.0
        self._last: float | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def ask(self, save_s: float) -> Stop:
        """Whether to stop after this step, the same answer on every rank; every rank must call, once a step.

        `save_s`: seconds that the slowest save so far took.
        """
        now = time.monotonic()  # of which a step is measured: the clock may be set in between
        if self._last is not None:
            self._slowest_step_s = max(self._slowest_step_s, now - self._last)
        self._last = now
        mine = Stop.SIGNAL if self._signalled else Stop.NO
        if self._ranks.is_main and mine is Stop.NO:
            needed = self._margin_s + save_s + self._slowest_step_s
            if self._margin_s and self._end is not None and time.time() + needed > self._end:
                mine = Stop.TIME_LIMIT
            elif self._file.exists():
                mine = Stop.FILE
        return Stop(self._ranks.agree_max(mine))

    def obeyed(self) -> None:
        """The run has saved: remove the file, so that the next start goes on. Every rank may call."""
        if self._ranks.is_main:
            self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True


def _job_end() -> float | None:
    """When Slurm will end this job, in seconds since 1970; None where there is no limit that it told of."""
    try:
        end = float(os.environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return None
    return end if end > 0 else None
