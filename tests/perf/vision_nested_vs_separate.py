"""Nested widths beside models of the same widths that were trained alone, on small images and a CPU.

    python -m tests.perf.vision_nested_vs_separate [--sets digits drawn] [--seeds 1 2 3] [--folder DIR] [--out FILE.json]
        [--plot FILE.png]

For each data set and seed: one nested run of configs/vision_tiny.yaml, and one run for each of its widths that has only that
width; same steps, same images in the same order, same augmentation. Digits are scikit-learn's 1,797; drawn are 200 classes made
by data_prep/make_demo_images.py. Every run is the trainer's own (`python -m pretrain`), on one thread; what is reported is
validation top-1 after the last step. Finished runs are kept in the folder and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

from pretrain.config_io import load_config
from pretrain.metrics import read_metrics
from pretrain.provenance import git_commit, versions

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONFIG = "configs/vision_tiny.yaml"
SETS: dict[str, tuple[list[str], list[str]]] = {  # arguments of make_demo_images, overrides of the config
    "digits": (["digits"], []),
    "drawn": (
        ["drawn", "--classes", "200", "--images", "60"],
        [
            "model.n_classes=200",
            "optim.steps=1000",
            "optim.warmup_steps=100",
            "augment.crop_scale=[0.5, 1.0]",
            "logging.eval_every_steps=250",
        ],
    ),
}
"""Drawn images show 64 pixels a side; the model sees 32."""
WIDTHS = {8: "1", 4: "1/2", 2: "1/4", 1: "1/8"}


def prepare(name: str, folder: Path) -> Path:
    """The data set's shards."""
    raw, shards = folder / f"{name}_raw", folder / name
    if not (shards / "manifest.json").exists():
        make, prepare_ = "data_prep/make_demo_images.py", "data_prep/prepare_imagenet.py"
        subprocess.run([sys.executable, make, SETS[name][0][0], str(raw), *SETS[name][0][1:]], check=True)
        subprocess.run(
            [sys.executable, prepare_, "--input", str(raw), "--output", str(shards), "--workers", "1"], check=True
        )
    return shards


def train(shards: Path, run_dir: Path, name: str, seed: int, heads: int | None) -> dict[str, Any]:
    """The last validation of a run, nested (`heads` None) or of one width alone; trained where that is not done yet."""
    overrides = [*SETS[name][1], f"data.path={shards}", f"run_dir={run_dir}", f"seed={seed}"]
    if heads is not None:
        overrides += [f"model.n_heads={heads}", f"model.widths=[{heads}]"]
    steps = load_config(CONFIG, overrides).optim.steps
    metrics = run_dir / "metrics.jsonl"
    done = [r for r in read_metrics(metrics) if r["kind"] == "eval" and r["step"] == steps] if metrics.exists() else []
    if not done:
        # One thread: the models are small, and a second one mostly waits for the first.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "pretrain", CONFIG, *overrides], check=True, env=environment)
        done = [r for r in read_metrics(metrics) if r["kind"] == "eval" and r["step"] == steps]
    return done[-1]


def measure(name: str, seeds: list[int], folder: Path) -> list[dict[str, Any]]:
    """One row a width: top-1 of every seed, nested and alone."""
    shards = prepare(name, folder)
    runs = folder / "runs" / name
    nested = [train(shards, runs / f"nested_{seed}", name, seed, None)["top1"] for seed in seeds]
    rows = []
    for heads, width in WIDTHS.items():
        alone = [train(shards, runs / f"alone_{heads}_{seed}", name, seed, heads)["top1"]["1"] for seed in seeds]
        both = {"nested": [one[width] for one in nested], "alone": alone}
        rows.append({"set": name, "width": width, "seeds": seeds, **both})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def plot(rows: list[dict[str, Any]], png: Path) -> None:
    """Every seed as a dot, means as lines, one panel a data set."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure, panels = plt.subplots(1, len(sets), figsize=(5.5 * len(sets), 4), dpi=120, squeeze=False)
    for axes, name in zip(panels[0], sets, strict=True):
        of = [row for row in rows if row["set"] == name][::-1]
        for kind, colour in (("nested", "tab:blue"), ("alone", "tab:orange")):
            places = range(len(of))
            axes.plot(places, [100 * statistics.mean(row[kind]) for row in of], color=colour, label=kind)
            for place, row in zip(places, of, strict=True):
                axes.plot(
                    [place] * len(row[kind]), [100 * value for value in row[kind]], "o", color=colour, markersize=4
                )
        axes.set_xticks(range(len(of)), [row["width"] for row in of])
        axes.set(title=name, xlabel="width", ylabel="validation top-1 (%)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("demo/nested_vs_separate"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/vision_nested_vs_separate.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/vision_nested_vs_separate.png"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.sets:
        rows += measure(name, args.seeds, args.folder)
        about = {"config": CONFIG, "sets": SETS, "commit": git_commit(), "versions": versions()}
        args.out.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")
    plot(rows, args.plot)
    print("\n| set | width | nested top-1 | trained alone | difference |\n|---|---|---|---|---|")
    for row in rows:
        difference = 100 * (statistics.mean(row["nested"]) - statistics.mean(row["alone"]))
        print(
            f"| {row['set']} | {row['width']} | {spread(row['nested'])} | {spread(row['alone'])} | {difference:+.1f} |"
        )


if __name__ == "__main__":
    main()
