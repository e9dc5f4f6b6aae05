"""Progress of a preparation: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

LINE_EVERY_S = 10.0


class Progress:
    """How much of the input is done; what was made, a second and in all; time left, what was skipped. Writes to stderr.

    `total` and `done` weigh the input (bytes, say), `n_made` counts the output in `unit`.
    """

    def __init__(self, unit: str, *, total: int, done: int, n_made: int, n_workers: int) -> None:
        self._unit, self._total, self._n_workers = unit, max(1, total), n_workers
        self._started = self._last_line = time.monotonic()
        self._n_made_at_start = n_made
        self._done_at_start = done
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (BarColumn(), TextColumn("{task.percentage:5.1f}%"), TextColumn("{task.description}"))
            self._bar = RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._total, completed=done)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: float, *, n_made: int, n_skipped: int) -> None:
        """Note how far the work is."""
        now = time.monotonic()
        if self._bar is None and now - self._last_line < LINE_EVERY_S:
            return
        rate = (n_made - self._n_made_at_start) / max(1e-9, now - self._started)
        text = (
            f"{n_made:,} {self._unit}, {rate:,.0f}/s, {rate / self._n_workers:,.0f}/s a worker, skipped {n_skipped:,}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
            return
        self._last_line = now
        speed = (done - self._done_at_start) / max(1e-9, now - self._started)
        left = (self._total - done) / speed if speed > 0 else float("inf")
        print(f"{100 * done / self._total:5.1f}% {text}, {left / 60:.1f} min left", file=sys.stderr, flush=True)
