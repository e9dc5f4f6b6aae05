"""Who is alive: every rank says so every few seconds, from a thread, over a key-value store of its own.

A rank that died or was stopped falls silent, whatever its partners wait in; that is how they can name it. A rank that is
alive but stands still keeps talking: the watchdog's bound on a step ends that.

The store lives in rank 0. Where that process or its node stands still, a call to the store waits for ever (its timeout is for
keys, not for answers), so the calls have a thread of their own, and one that does not come back is rank 0's silence.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from pretrain.distributed import Ranks
from pretrain.environment import lost_seconds

INTERVAL_S = 5.0
LOST_S = 60.0
"""Silence after which a rank counts as lost where LOST_SECONDS is not set."""
_ANSWER_S = 10


class Heartbeats:
    """This rank's voice and ears. Every rank must make it, at the same place, and then `start` it."""

    def __init__(self, ranks: Ranks) -> None:
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self.lost_s = lost_seconds(LOST_S)
        self.interval_s = min(INTERVAL_S, self.lost_s / 6)
        self._heard: dict[int, tuple[str, float]] = {}
        about = ranks.gather_objects((_free_port() if ranks.is_main else 0, socket.gethostname()))
        port = about[0][0]
        self._nodes = [node for _, node in about]
        timeout = datetime.timedelta(seconds=_ANSWER_S)
        self._count = 0
        self._reaches_rank_0 = True
        self._silent: list[str] = []
        self._asked_at: float | None = None
        self._done = threading.Event()

        def join() -> dist.TCPStore:
            host = os.environ["MASTER_ADDR"]
            return dist.TCPStore(host, port, is_master=ranks.is_main, wait_for_workers=False, timeout=timeout)

        store = join() if ranks.is_main else None
        ranks.gather_objects(None)  # rank 0 listens before the others call
        self._store = store or join()
        ranks.gather_objects(None)  # a run that has nothing left to do may end at once, and the store with rank 0

    def start(self, step: Callable[[], int]) -> None:
        """From now on say that this rank is alive, after `step()` steps, and listen to the others; without waiting for any."""
        self._thread = threading.Thread(target=self._talk, args=(step,), name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Fall silent."""
        self._done.set()
        self._thread.join(self.interval_s)  # a call that rank 0 does not answer is left behind

    def silent(self) -> list[str]:
        """The ranks that said nothing new for `lost_s` seconds, in words; times are this rank's own clock's. Never waits."""
        return self.unanswered(self.lost_s) or self._silent

    def unanswered(self, after_s: float) -> list[str]:
        """Rank 0, in words, where a call to its store has not come back for `after_s` seconds. Never waits."""
        asked_at = self._asked_at
        waited = 0.0 if asked_at is None else time.monotonic() - asked_at
        return [self._lost(0, waited)] if waited > after_s else []

    def _talk(self, step: Callable[[], int]) -> None:
        while not self._done.is_set():
            self._asked_at = time.monotonic()
            self._say(step())
            self._silent = self._listen()
            self._asked_at = None
            self._done.wait(self.interval_s)

    def _say(self, step: int) -> None:
        self._count += 1
        if self._reaches_rank_0:
            try:
                self._store.set(str(self._rank), f"{self._count} {step}")
            except (RuntimeError, ValueError):
                self._reaches_rank_0 = False

    def _listen(self) -> list[str]:
        now = time.monotonic()
        lost = []
        for rank in range(self._world_size):
            if rank == self._rank:
                continue
            if rank > 0 and not self._reaches_rank_0:
                continue  # the store went with rank 0: nobody else can be heard
            said = self._heard.get(rank, ("", now))[0]
            try:
                if self._reaches_rank_0 and self._store.check([str(rank)]):
                    said = self._store.get(str(rank)).decode()
            except (RuntimeError, ValueError):
                self._reaches_rank_0 = False
            before, since = self._heard.setdefault(rank, (said, now))
            if said != before:
                self._heard[rank] = (said, now)
            elif now - since > self.lost_s:
                lost.append(self._lost(rank, now - since))
        return lost

    def _lost(self, rank: int, silent_s: float) -> str:
        said, _ = self._heard.get(rank, ("", 0.0))
        last = f"last after step {said.split()[1]}" if said else "never heard"
        return f"rank {rank} on {self._nodes[rank]} (silent for {silent_s:.0f} s, {last})"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])
