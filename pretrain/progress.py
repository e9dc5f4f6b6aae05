"""Progress for people: a bar on a terminal, plain lines in a log. Rank 0 only."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class TrainingProgress:
    """Shows each record as it comes. Use as a context manager; does nothing where `enabled` is false."""

    def __init__(self, *, start_step: int, n_steps: int, enabled: bool) -> None:
        self._enabled = enabled
        self._n_steps = n_steps
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            columns = (
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[news]}"), console=Console(stderr=True))
            self._task = self._bar.add_task("train", total=n_steps, completed=start_step, news="")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, kind: str, record: dict[str, Any]) -> None:
        """Show a "train", "eval" or "event" record."""
        if not self._enabled:
            return
        if self._bar is not None and kind == "train":
            self._bar.update(self._task, news=f"{_by_width('loss', record['loss'])}  {speed(record)}")
            return
        line = _line(kind, record, self._n_steps)
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            logger.info(line)


def _line(kind: str, record: dict[str, Any], n_steps: int) -> str:
    head = f"step {record['step']}/{n_steps}"
    if kind == "event":
        return f"{head}  {record['event']}"
    if kind == "eval":
        measures = [name for name in ("loss", "top1", "top5") if name in record]
        return f"{head}  validation " + "  ".join(_by_width(name, record[name]) for name in measures)
    mfu = "" if record["mfu"] is None else f"  MFU {record['mfu']:.1%}"
    return (
        f"{head}  {_by_width('loss', record['loss'])}  lr {record['lr']:.2e}  norm {record['grad_norm']:.3f}  "
        f"{speed(record)}  {record['tflops_per_device']:.3g} TFLOP/s{mfu}  "
        f"{record['memory_gib']:.1f} GiB  {_duration(record['eta_s'])} left"
    )


def speed(record: dict[str, Any]) -> str:
    """A training record's speed in the unit of what is trained on."""
    if "images_per_s" in record:
        return f"{record['images_per_s']:,.0f} img/s"
    return f"{record['tokens_per_s']:,.0f} tok/s"


def _by_width(name: str, values: dict[str, float]) -> str:
    digits = ".4f" if name == "loss" else ".2%"
    return f"{name} " + "  ".join(f"[{width}] {value:{digits}}" for width, value in values.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
