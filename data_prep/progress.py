"""Progress of a preparation: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType

from data_prep.corpus_io import Source
from data_prep.encode_worker import EncodedChunk

LINE_EVERY_S = 10.0


class Progress:
    """How much of the input, by bytes, is done; tokens a second, time left, skipped documents. Writes to stderr."""

    def __init__(self, sources: list[Source], first_source: int, n_tokens: int, n_workers: int) -> None:
        self._before = [0]
        for source in sources:
            self._before.append(self._before[-1] + source.n_bytes)
        self._n_workers = n_workers
        self._started = self._last_line = time.monotonic()
        self._n_tokens_at_start = n_tokens
        self._done_at_start = self._before[first_source]
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (BarColumn(), TextColumn("{task.percentage:5.1f}%"), TextColumn("{task.description}"))
            self._bar = RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=max(1, self._before[-1]), completed=self._done_at_start)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, piece: EncodedChunk, n_tokens: int, skipped: Counter[str]) -> None:
        """Note that `piece` is written."""
        now = time.monotonic()
        source = piece.chunk.source
        size = self._before[source + 1] - self._before[source]
        done = self._before[source] + piece.chunk.fraction * size
        if self._bar is None and now - self._last_line < LINE_EVERY_S:
            return
        rate = (n_tokens - self._n_tokens_at_start) / max(1e-9, now - self._started)
        n_skipped = sum(skipped.values())
        text = f"{n_tokens:,} tokens, {rate:,.0f}/s, {rate / self._n_workers:,.0f}/s a worker, skipped {n_skipped:,}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
            return
        self._last_line = now
        speed = (done - self._done_at_start) / max(1e-9, now - self._started)
        left = (self._before[-1] - done) / speed if speed > 0 else float("inf")
        percent = 100 * done / max(1, self._before[-1])
        print(f"{percent:5.1f}% {text}, {left / 60:.1f} min left", file=sys.stderr, flush=True)
