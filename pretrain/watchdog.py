"""Ends a rank whose training stands still, so that the job can be started again instead of burning hours.

A rank that waits in a collective for one that died or hangs waits for ever, or for the library's half hour. Each rank
watches itself from a thread: where no step ends within a bound it writes every thread's stack (and on a GPU NCCL's flight
recorder) into RUN_DIR/hang/ and to stderr, and leaves with EXIT_HANG. Slurm then ends the other ranks, and the batch
script requeues.
"""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pretrain.environment import hang_seconds
from pretrain.heartbeat import Heartbeats

EXIT_HANG = 70
LEAST_S = 600.0
"""Bound on a step where HANG_SECONDS is not set: longer than a slow file system, shorter than anybody's patience."""
STEPS_BEFORE = 3
"""Steps that are not watched: kernels compile, caches fill, and there is nothing yet to compare with."""
TIMES_MEDIAN = 20
REMEMBERED = 50


class Watchdog:
    """Start it before training, call `beat` after each step, hold `pause` around saving and validation.

    With `heartbeats` the rank also says that it is alive, from its start on, and leaves where another fell silent.

    The bound is the larger of `least_s` (by default HANG_SECONDS, or ten minutes) and twenty times the median step, so it
    follows the run; inside `pause` it is six times that.
    """

    def __init__(
        self, run_dir: str | Path, rank: int, *, least_s: float | None = None, heartbeats: Heartbeats | None = None
    ) -> None:
        self._folder, self._rank = Path(run_dir) / "hang", rank
        self._least_s = hang_seconds(LEAST_S) if least_s is None else least_s
        self._heartbeats = heartbeats
        self._is_asked = False  # then whoever asked reports, and ends the rank
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._step = 0
        self._beats = 0
        self._paused = False
        self._durations: deque[float] = deque(maxlen=REMEMBERED)
        self._done = threading.Event()
        if heartbeats is not None:
            heartbeats.start(lambda: self._step)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """Step `step` is done."""
        with self._lock:
            now = time.monotonic()
            self._beats += 1
            if self._beats > STEPS_BEFORE:
                self._durations.append(now - self._last)
            self._last, self._step = now, step

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is no part of a step, and may take longer; the step's own time before it counts."""
        with self._lock:
            worked_s = time.monotonic() - self._last
            self._paused, self._last = True, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._paused, self._last = False, time.monotonic() - worked_s

    def stop(self) -> None:
        """Watch no longer."""
        self._done.set()
        self._thread.join()
        if self._heartbeats is not None:
            self._heartbeats.stop()

    def lost_ranks(self) -> list[str]:
        """The ranks that fell silent, in words, after waiting long enough to be sure; empty without heartbeats."""
        if self._heartbeats is None:
            return []
        self._is_asked = True
        end = time.monotonic() + self._heartbeats.lost_s + 4 * self._heartbeats.interval_s
        while not (silent := self._heartbeats.silent()) and time.monotonic() < end:
            time.sleep(0.1)
        return silent

    def bound_s(self) -> float | None:
        """Seconds without a step after which the rank is ended; None while nothing is watched."""
        if not self._durations:
            return None
        bound = max(self._least_s, TIMES_MEDIAN * statistics.median(self._durations))
        return 6 * bound if self._paused else bound

    def _watch(self) -> None:
        pause = min(1.0, self._least_s / 4)
        lost_s = math.inf
        if self._heartbeats is not None:
            lost_s = self._heartbeats.lost_s
            pause = min(pause, self._heartbeats.interval_s)
        were_silent = False
        while not self._done.wait(pause):
            now = time.monotonic()
            with self._lock:
                bound, waited, step = self.bound_s(), now - self._last, self._step
            silent = [] if self._heartbeats is None else self._heartbeats.silent()
            # Looked at twice: where this process itself stood still, it may look before it has listened again.
            if silent and were_silent and waited > lost_s and not self._is_asked:
                self._end(f"{'; '.join(silent)}: lost, and no step for {waited:.0f} s")
            were_silent = bool(silent)
            if bound is not None and waited > bound:
                if not silent and self._heartbeats is not None:
                    silent = self._heartbeats.unanswered(2 * self._heartbeats.interval_s)
                others = "; ".join(silent) or "every rank is alive, so the stacks tell which one stands still"
                self._end(
                    f"no step for {waited:.0f} s after step {step} (bound {bound:.0f} s, HANG_SECONDS sets its least); {others}"
                )

    def _end(self, why: str) -> None:
        said = (
            f"error: rank {self._rank} on {socket.gethostname()}: {why}. Stacks are in {self._folder}; leaving with code "
            f"{EXIT_HANG}"
        )
        print(said, file=sys.stderr, flush=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self._rank:05}.txt").open("w") as f:
                f.write(said + "\n\n")
                f.flush()
                faulthandler.dump_traceback(file=f, all_threads=True)
            if torch.cuda.is_available():
                trace = getattr(torch._C._distributed_c10d, "_dump_nccl_trace")()  # noqa: B009
                (self._folder / f"nccl_{self._rank:05}.bin").write_bytes(trace)
        except Exception as error:  # whatever fails here, the rank must still end
            print(f"error: rank {self._rank}: writing the stacks failed: {error}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_HANG)
