"""One table and one plot of a folder of runs: `python -m pretrain.sweep runs/sweep`.

Each trained width of each run is a row, by the parameters that width uses; a run of one width is a separately trained
model to hold against the nested run's width of the same size, once both were validated after as many tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from modeling.flops import submodel_parameters
from modeling.nesting import uniform, width_name
from pretrain.config_io import load_config
from pretrain.config_sections import ConfigError
from pretrain.metrics import read_metrics
from pretrain.status import find_runs


@dataclass(frozen=True)
class Row:
    """The last validation of one width of one run."""

    run: str
    """The run's folder, from the sweep's on."""
    nested: bool
    width: str
    d_model: int
    n_layers: int
    heads: int
    parameters: int
    tokens: int
    """The run's; where its widths draw their own, a width's share."""
    loss: float


def collect(folder: Path) -> list[Row]:
    """Every width of every run in `folder` that has been validated, by size. Raises ConfigError where a config is unreadable."""
    rows = []
    for run in find_runs(folder):
        cfg = load_config(run / "config.yaml")
        metrics = run / "metrics.jsonl"
        evals = [r for r in read_metrics(metrics) if r["kind"] == "eval"] if metrics.exists() else []
        if not evals:
            continue
        for heads in cfg.model.widths:
            name = width_name(heads, cfg.model.n_heads)
            if name not in evals[-1]["loss"]:
                continue  # a start since then has added the width
            parameters = submodel_parameters(cfg.model, uniform(heads, cfg.model.n_layers)).total
            rows.append(
                Row(
                    run=run.name if run == folder else run.relative_to(folder).as_posix(),
                    nested=len(cfg.model.widths) > 1,
                    width=name,
                    d_model=cfg.model.d_model,
                    n_layers=cfg.model.n_layers,
                    heads=heads,
                    parameters=parameters,
                    tokens=evals[-1]["tokens"] // cfg.draws_per_micro_batch,
                    loss=evals[-1]["loss"][name],
                )
            )
    return sorted(rows, key=lambda row: (row.parameters, row.nested))


def markdown(rows: list[Row]) -> str:
    """The rows, and beside each nested width what every separate model of the same shape reached.

    A difference is of losses after as many tokens; else the cell names the run that is behind.
    """
    separate = defaultdict(list)
    for row in rows:
        if not row.nested:
            separate[_shape(row)].append(row)
    lines = [
        "| run | width | parameters | tokens | validation loss | trained separately | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside = separate[_shape(row)] if row.nested else []
        names = [f" ({alone.run})" if len(beside) > 1 else "" for alone in beside]
        losses = ", ".join(f"{alone.loss:.4f}{name}" for alone, name in zip(beside, names, strict=True))
        differences = ", ".join(_difference(row, alone) + name for alone, name in zip(beside, names, strict=True))
        lines.append(
            f"| {row.run} | {row.width} | {row.parameters:,} | {row.tokens:,} | {row.loss:.4f} | {losses} | {differences} |"
        )
    return "\n".join(lines) + "\n"


def _shape(row: Row) -> tuple[int, ...]:
    """What a nested width and a model trained separately have in common where they are the same network."""
    return row.d_model, row.n_layers, row.heads, row.parameters


def _difference(nested: Row, alone: Row) -> str:
    if nested.tokens == alone.tokens:
        return f"{nested.loss - alone.loss:+.4f}"
    return f"{min(nested, alone, key=lambda row: row.tokens).run} is behind"


def plot(rows: list[Row], png: Path) -> None:
    """Validation loss over parameters: a line for each nested run, a cross for each separately trained model."""
    import matplotlib  # takes a second to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for run in dict.fromkeys(row.run for row in rows if row.nested):
        points = [(row.parameters, row.loss) for row in rows if row.run == run]
        axes.plot(*zip(*points, strict=True), "o-", label=f"{run}, nested")
    alone = [(row.parameters, row.loss) for row in rows if not row.nested]
    if alone:
        axes.plot(*zip(*alone, strict=True), "kx", markersize=8, label="trained separately")
    axes.set(xlabel="parameters of the width", ylabel="validation loss (nats)", xscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(png)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.sweep", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of runs; sweep.{md,json,png} are written into it")
    args = parser.parse_args(argv)
    try:
        rows = collect(args.folder)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not rows:
        print(f"error: no run in {args.folder} has been validated yet", file=sys.stderr)
        return 2
    text = markdown(rows)
    print(text)
    (args.folder / "sweep.md").write_text(text)
    (args.folder / "sweep.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    plot(rows, args.folder / "sweep.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
