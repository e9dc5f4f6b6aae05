"""A picture of a run: training and validation loss of every width over tokens, of images also the share of right answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pretrain.metrics import read_metrics


def plot_losses(metrics_path: str | Path, png: str | Path | IO[bytes], title: str = "") -> None:
    """Draw the losses recorded in a metrics.jsonl into a PNG file: lines for training, dots for validation, one colour a width.

    Raises ValueError where the file holds no training record.
    """
    records = read_metrics(metrics_path)
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "eval"]
    if not train:
        raise ValueError(f"{metrics_path} holds no training record yet")
    names = list(dict.fromkeys(name for record in train for name in record["loss"]))
    of_images = "images" in train[0]
    figure, panels = plt.subplots(1, 1 + of_images, figsize=(8 + 5 * of_images, 4.5), dpi=120, squeeze=False)
    axes = panels[0][0]
    for name, colour in zip(
        names, plt.get_cmap("viridis")([i / max(1, len(names)) for i in range(len(names))]), strict=True
    ):
        seen = [(record["tokens"], record["loss"][name]) for record in train if name in record["loss"]]
        axes.plot(*zip(*seen, strict=True), color=colour, label=f"width {name}", linewidth=1.2)
        checked = [(record["tokens"], record["loss"][name]) for record in validation if name in record["loss"]]
        if checked:
            axes.plot(*zip(*checked, strict=True), "o", color=colour, markersize=4)
        if of_images and checked:
            right = [(record["tokens"], 100 * record["top1"][name]) for record in validation if name in record["top1"]]
            panels[0][1].plot(*zip(*right, strict=True), "o-", color=colour, markersize=4, linewidth=1.2)
    axes.set(xlabel="tokens", ylabel="cross-entropy (nats)", title=title)
    axes.legend(title="lines: train, dots: validation")
    if of_images:
        panels[0][1].set(xlabel="tokens", ylabel="validation top-1 (%)")
    for one in panels[0]:
        one.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(png, format="png")
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m pretrain.plot RUN_DIR/metrics.jsonl losses.png")
    try:
        plot_losses(sys.argv[1], sys.argv[2])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
