"""How good a checkpoint is on the validation data at any width or mix, over all ranks.

python -m pretrain.evaluate RUN_OR_CHECKPOINT [--data DIR] [--width 1/4] [--width 1,1/2,...] [--samples N] [--image-size N]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from modeling.checkpoint_reader import WEIGHTS, WEIGHTS_HELP, CheckpointError
from modeling.nesting import uniform, width_name
from modeling.search import read_widths
from pretrain.checkpoint_model import data_at, load_model
from pretrain.config import RunConfig
from pretrain.config_sections import ConfigError
from pretrain.distributed import close_ranks, init_ranks
from pretrain.shard_store import DatasetError
from pretrain.task import Scores
from pretrain.tasks import task_of


def changed_data(cfg: RunConfig, path: str | None, n_samples: int, image_size: int | None) -> RunConfig:
    """The run with other validation data: another dataset, number of samples (0: the task's own), or size of images.

    Raises ConfigError where the run cannot have it.
    """
    changed: Any = data_at(cfg.data, path)  # type: ignore[type-var]
    if image_size is not None:
        if cfg.task != "vision":
            raise ConfigError(f"--image-size {image_size}: task={cfg.task} has no images")
        changed = replace(changed, image_size=image_size)
    return replace(cfg, data=changed, logging=replace(cfg.logging, eval_sequences=n_samples))


def check_writable(path: Path | None) -> None:
    """Raise ValueError where no file can be written at `path`, to say so before the work; None: none is to be."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent} to write it into")
    if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise ValueError(f"{path}: cannot be written as a file, name another")


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; a run that diverged may have more than a float can hold."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def line_of(scores: Scores) -> str:
    """What validation said, for people."""
    loss = f"loss {scores['loss']:.4f}"
    shares = [f"{name} {scores[name]:.2%}" for name in scores if name != "loss"]
    return ", ".join([loss, *(shares or [f"perplexity {perplexity(scores['loss']):.3f}"])])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code. One rank a task; rank 0 prints."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.evaluate", description="Validate a checkpoint at any width."
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder")
    parser.add_argument("--data", help="token or image shards; default: the run's")
    parser.add_argument(
        "--width", action="append", help="1/4, 16h, or one for each layer; default: every trained width"
    )
    parser.add_argument(
        "--samples", "--sequences", type=int, help="validation samples; default: 1024 sequences, or every image"
    )
    parser.add_argument("--image-size", type=int, help="pixels of a side; default: the run's")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help=WEIGHTS_HELP)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)
    try:
        check_writable(args.json)
        model, cfg = load_model(args.checkpoint, weights=args.weights)
        n_samples = args.samples if args.samples is not None else 0 if cfg.task == "vision" else 1024
        cfg = changed_data(cfg, args.data, n_samples, args.image_size)
        full, n_layers = cfg.model.n_heads, cfg.model.n_layers
        if args.width is None:
            submodels = {width_name(n, full): uniform(n, n_layers) for n in cfg.model.widths}
        else:
            submodels = {text: read_widths(text, full, n_layers) for text in args.width}
        task = task_of(cfg)
        task.check_data(training=False)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ranks = init_ranks(1)
    model.to(ranks.device)
    try:
        scores = task.scores(model, task.validation(ranks), list(submodels.values()), ranks)
    except (ConfigError, DatasetError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Other ranks may wait in a collective for this one; leaving without clean-up lets the launcher end them.
        os._exit(2 if isinstance(error, ConfigError) else 1)
    if ranks.is_main:
        for name, one in zip(submodels, scores, strict=True):
            print(f"width {name}: {line_of(one)}")
        if args.json is not None:
            found = {name: one["loss"] if len(one) == 1 else one for name, one in zip(submodels, scores, strict=True)}
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    close_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
