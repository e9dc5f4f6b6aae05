"""One table and one plot of a folder of runs: `python -m pretrain.sweep runs/sweep`.

Each trained width of each run is a row, by the parameters that width uses; a run of one width is a separately trained
model to hold against the nested run's width of the same size.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from modeling.flops import submodel_parameters
from modeling.nesting import uniform, width_name
from pretrain.config_io import config_from_dict
from pretrain.config_sections import ConfigError
from pretrain.metrics import read_metrics
from pretrain.status import find_runs


@dataclass(frozen=True)
class Row:
    """The last validation of one width of one run."""

    run: str
    nested: bool
    width: str
    d_model: int
    n_layers: int
    heads: int
    parameters: int
    tokens: int
    loss: float


def collect(folder: Path) -> list[Row]:
    """Every width of every run in `folder` that has been validated, by size. Raises ConfigError where a config is unreadable."""
    rows = []
    for run in find_runs(folder):
        cfg = config_from_dict(yaml.safe_load((run / "config.yaml").read_text()))
        metrics = run / "metrics.jsonl"
        evals = [r for r in read_metrics(metrics) if r["kind"] == "eval"] if metrics.exists() else []
        if not evals:
            continue
        for heads in cfg.model.widths:
            name = width_name(heads, cfg.model.n_heads)
            parameters = submodel_parameters(cfg.model, uniform(heads, cfg.model.n_layers)).total
            rows.append(
                Row(
                    run=run.name,
                    nested=len(cfg.model.widths) > 1,
                    width=name,
                    d_model=cfg.model.d_model,
                    n_layers=cfg.model.n_layers,
                    heads=heads,
                    parameters=parameters,
                    tokens=evals[-1]["tokens"],
                    loss=evals[-1]["loss"][name],
                )
            )
    return sorted(rows, key=lambda row: (row.parameters, row.nested))


def markdown(rows: list[Row]) -> str:
    """The rows, and beside each nested width what the separate model of the same shape reached."""
    separate = {(row.d_model, row.n_layers, row.heads): row.loss for row in rows if not row.nested}
    lines = [
        "| run | width | parameters | tokens | validation loss | trained separately | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        alone = separate.get((row.d_model, row.n_layers, row.heads)) if row.nested else None
        beside = "" if alone is None else f"{alone:.4f}"
        difference = "" if alone is None else f"{row.loss - alone:+.4f}"
        lines.append(
            f"| {row.run} | {row.width} | {row.parameters:,} | {row.tokens:,} | {row.loss:.4f} | {beside} | {difference} |"
        )
    return "\n".join(lines) + "\n"


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
    except (ConfigError, OSError, yaml.YAMLError) as error:
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
