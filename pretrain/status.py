"""`python -m pretrain status FOLDER`: where every run in a folder stands, from its files alone; --html writes reports."""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pretrain.metrics import Record, read_metrics
from pretrain.progress import speed
from pretrain.restarts import latest_step, read_events

STALE_S = 900
"""Seconds without a record after which a run that has not finished is called silent."""


@dataclass(frozen=True)
class RunStatus:
    """What the files of one run say."""

    folder: Path
    n_steps: int
    records: list[Record]
    events: list[dict[str, Any]]
    checkpoint: int
    """Step of the newest checkpoint, -1 before the first."""

    @property
    def last(self) -> Record | None:
        """The newest training record."""
        return next((record for record in reversed(self.records) if record["kind"] == "train"), None)

    @property
    def last_eval(self) -> Record | None:
        """The newest validation record."""
        return next((record for record in reversed(self.records) if record["kind"] == "eval"), None)

    @property
    def state(self) -> str:
        """finished, training, silent (no record for a while), stopped (with the reason), or not started.

        A run at its last step whose last end that was noted had another exit code than 0 is not finished: its last checkpoint may
        have been refused. It was where the validation there is not finite, which is told without a batch script's notes too.
        """
        if self.last is None:
            return self._stopped() or "not started"
        last_end = next((event for event in reversed(self.events) if event["event"] == "end"), None)
        if self.last["step"] >= self.n_steps and (last_end is None or last_end["code"] == 0):
            return "finished" if self._is_sound() else "stopped: the last validation is not finite"
        age = time.time() - self.last["time"]
        stopped = self._stopped()
        if stopped:
            return stopped
        return "training" if age < STALE_S else f"silent for {age / 60:.0f} min"

    @property
    def restarts(self) -> int:
        """Starts after the first."""
        return max(0, sum(event["event"] == "start" for event in self.events) - 1)

    def _is_sound(self) -> bool:
        """Whether no loss of the newest validation, if there is one, is other than finite."""
        return self.last_eval is None or all(map(math.isfinite, self.last_eval["loss"].values()))

    def _another_job_trains(self, end: dict[str, Any]) -> bool:
        """Whether `end` is of a job that found the folder in use: one that has not ended has written a record since."""
        running: set[str | None] = set()
        for event in self.events:
            (running.add if event["event"] == "start" else running.discard)(event.get("job"))
        return bool(running) and self.last is not None and self.last["time"] > end["time"]

    def _stopped(self) -> str | None:
        if not self.events or self.events[-1]["event"] != "end":
            return None
        end = self.events[-1]
        if self._another_job_trains(end):
            return None
        return f"{'requeued' if end.get('requeue') else 'stopped'}: {end.get('why', end['code'])}"


def read_run(folder: Path) -> RunStatus:
    """The status of the run in `folder`. Raises FileNotFoundError where it is none."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    metrics = folder / "metrics.jsonl"
    return RunStatus(
        folder=folder,
        n_steps=int(config["optim"]["steps"]),
        records=read_metrics(metrics) if metrics.exists() else [],
        events=read_events(folder),
        checkpoint=latest_step(folder),
    )


def find_runs(folder: Path) -> list[Path]:
    """The run in `folder`, or the runs up to two folders below it."""
    if (folder / "config.yaml").exists():
        return [folder]
    return sorted({path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.yaml")})


def table(runs: Sequence[RunStatus]) -> Table:
    """One row a run."""
    shown = Table("run", "step", "loss per width", "validation", "speed", "MFU", "left", "saved", "restarts", "state")
    for run in runs:
        last = run.last
        if last is None:
            shown.add_row(run.folder.name, f"0/{run.n_steps}", *[""] * 5, "", str(run.restarts), run.state)
            continue
        mfu = "" if last["mfu"] is None else f"{last['mfu']:.1%}"
        shown.add_row(
            run.folder.name,
            f"{last['step']:,}/{run.n_steps:,}",
            _losses(last),
            "" if run.last_eval is None else _validation(run.last_eval),
            speed(last),
            mfu,
            "" if last["step"] >= run.n_steps else _duration(last["eta_s"]),
            "none" if run.checkpoint < 0 else f"{run.checkpoint:,}",
            str(run.restarts),
            run.state,
        )
    return shown


def write_report(run: RunStatus) -> Path:
    """RUN_DIR/report.html: curves, figures and restarts of one run in one file that loads nothing else."""
    rows = []
    for event in run.events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"]))
        why = event.get("why", "")
        cells = [when, event["event"], event.get("job") or "", event.get("nodes") or "", str(event["step"]), why]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    last = run.last
    facts = {"state": run.state, "step": f"{0 if last is None else last['step']:,} of {run.n_steps:,}"}
    if last is not None:
        facts |= {
            "training loss": _losses(last),
            "validation": "none yet" if run.last_eval is None else _validation(run.last_eval),
            "tokens": f"{last['tokens']:,}",
            **({"images": f"{last['images']:,}"} if "images" in last else {}),
            "speed": speed(last),
            "MFU": "not known for this device" if last["mfu"] is None else f"{last['mfu']:.1%}",
            "memory": f"{last['memory_gib']:.1f} GiB",
            "newest checkpoint": "none" if run.checkpoint < 0 else f"step {run.checkpoint:,}",
            "restarts": str(run.restarts),
        }
    name = html.escape(run.folder.name)
    page = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.25em .8em;text-align:left}"
        "img{max-width:100%}</style>",
        f"<h1>{name}</h1><table>",
        *(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items()),
        "</table>",
        _curves(run) if last is not None else "<p>No training record yet.</p>",
    ]
    if rows:
        page += ["<h2>Starts and ends</h2><table><tr><th>UTC<th>event<th>job<th>nodes<th>step<th>why</tr>", *rows]
        page.append("</table>")
    path = run.folder / "report.html"
    path.write_text("\n".join(page) + "</html>\n")
    return path


def _curves(run: RunStatus) -> str:
    from pretrain.plot import plot_losses  # matplotlib takes a second to import

    picture = io.BytesIO()
    plot_losses(run.folder / "metrics.jsonl", picture)
    return f'<img alt="loss over tokens" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'


def _losses(record: Record) -> str:
    return "  ".join(f"[{name}] {loss:.3f}" for name, loss in record["loss"].items())


def _validation(record: Record) -> str:
    """A classifier's shares of right answers, a language model's losses."""
    if "top1" not in record:
        return _losses(record)
    return "  ".join(f"[{name}] {share:.2%}" for name, share in record["top1"].items())


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain status", description=__doc__)
    parser.add_argument("folder", type=Path, help="a run, or a folder of runs")
    parser.add_argument("--html", action="store_true", help="also write each run's report.html")
    args = parser.parse_args(argv)
    runs = []
    for folder in find_runs(args.folder):
        try:
            runs.append(read_run(folder))
        except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
            print(f"error: {folder}: not a readable run: {error}", file=sys.stderr)
    if not runs:
        print(f"error: no run in {args.folder}: a run's folder has a config.yaml", file=sys.stderr)
        return 2
    width = None if sys.stdout.isatty() else 220
    Console(width=width).print(table(runs))
    if args.html:
        for run in runs:
            print(write_report(run))
    return 0
