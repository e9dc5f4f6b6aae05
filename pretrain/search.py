"""Search per-layer widths of a trained model for budgets between its trained widths, and say how good they are.

    python -m pretrain.search RUN --cost flops -o presets.json --plot curve.png

The search chooses on one half of the validation sequences; the table and the curve show losses on the other half, which it
never saw. A preset is used as `--width @presets.json:NAME` by modeling.generate, modeling.export, pretrain.evaluate and
pretrain.calibrate, and as `width=@presets.json:NAME` by modeling.lm_eval.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from modeling import search
from modeling.checkpoint_reader import CheckpointError
from modeling.cuda_graph import graphed
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.nesting import LayerWidths
from modeling.search import Point, Search
from pretrain.checkpoint_model import data_at, load_language_model
from pretrain.data import Batch, validation_batches
from pretrain.dataset_check import check_dataset
from pretrain.distributed import Ranks, close_ranks, init_ranks
from pretrain.evaluate import check_writable, perplexity
from pretrain.language_task import submodel_losses

COSTS = {"parameters": "parameters", "flops": "FLOPs a token", "memory": "bytes", "latency": "seconds a step"}
"""Kinds of cost and their units."""


def step_seconds(model: InferenceModel, batch: int, *, n_steps: int = 20) -> dict[int, float]:
    """Median seconds of a decoding step of `batch` sequences at each trained width, as this machine runs it."""
    found = {}
    for n_heads in model.cfg.widths:
        state = model.empty_state(batch, model.cfg.layer_widths(n_heads))
        tokens_b1 = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        step = graphed(lambda t_b1, s=state: model.logits(model.forward(t_b1, s)), [tokens_b1], [state])
        times = []
        for _ in range(n_steps + 3):  # the first three warm up
            start = time.perf_counter()
            step(tokens_b1)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found[n_heads] = sorted(times[3:])[n_steps // 2]
    return found


def cost_function(kind: str, model: LanguageModel, batch: int, ranks: Ranks) -> search.Measure:
    """The cost of `kind`, one of COSTS. Latency is measured on rank 0 and told to the others: all ranks must call."""
    cfg = model.cfg
    if kind == "parameters":
        return search.parameters_of(cfg)
    if kind == "flops":
        return search.flops_of(cfg)
    if kind == "memory":
        return search.memory_of(cfg, batch=batch, weight_bytes=2, state_bytes=4)
    on_gpu = ranks.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    told: list[dict[int, float]] = [{}]
    if ranks.is_main:
        told[0] = step_seconds(InferenceModel(model, dtype=dtype, device=ranks.device), batch)
    dist.broadcast_object_list(told, src=0, group=ranks.cpu_group)
    return search.latency_of(cfg, told[0])


def held_out(points: Sequence[Point], model: LanguageModel, batches: list[Batch], ranks: Ranks) -> list[Point]:
    """The same points with their losses on other data. All ranks must call."""
    losses = submodel_losses(model, batches, [point.widths for point in points], ranks)
    return [replace(point, loss=loss) for point, loss in zip(points, losses, strict=True)]


def plot(points: Sequence[Point], unit: str, png: Path) -> None:
    """Draw loss over cost: trained widths, the straight lines between them, and mixes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120)
    for label, style, chosen in (
        ("trained widths", "o-", [p for p in points if p.trained]),
        ("mixes found", "x", [p for p in points if not p.trained]),
    ):
        if chosen:
            axes.plot([p.cost for p in chosen], [p.loss for p in chosen], style, label=label)
    axes.set(xlabel=unit, ylabel="next-token loss (nats), held out", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(png, format="png")
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code. One rank a task; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder")
    parser.add_argument("--data", help="token shards; default: the run's")
    parser.add_argument("--cost", choices=COSTS, default="flops")
    parser.add_argument("--budget", type=float, help="one mix of at most this cost; default: the whole curve")
    parser.add_argument("--points", type=int, default=3, help="mixes between each two trained widths")
    parser.add_argument("--trials", type=int, default=16, help="exchanges tried for each mix")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once, for latency and memory")
    parser.add_argument(
        "--sequences", type=int, default=256, help="validation sequences, half to choose, half to report"
    )
    parser.add_argument("-o", "--output", type=Path, help="write presets here")
    parser.add_argument("--plot", type=Path, help="draw the curve into this PNG")
    args = parser.parse_args(argv)
    try:
        if args.points < 1 or args.trials < 0 or args.batch < 1:
            raise ValueError(f"--points {args.points} --trials {args.trials} --batch {args.batch}: too small")
        for path in (args.output, args.plot):
            check_writable(path)
        model, cfg = load_language_model(args.checkpoint)
        if len(cfg.model.widths) < 2:
            raise ValueError(f"model.widths={list(cfg.model.widths)}: there is nothing to mix with one trained width")
        data = data_at(cfg.data, args.data)
        check_dataset(data, cfg.model.vocab_size, training=False)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ranks = init_ranks(1)
    try:
        model.to(ranks.device)
        batches = validation_batches(
            replace(data, micro_batch=1),
            vocab_size=cfg.model.vocab_size,
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
            n_sequences=args.sequences,
        )
        if len(batches) < 2:
            raise ValueError(
                f"--sequences {args.sequences}: give each rank at least two, one to choose and one to report"
            )
        chosen_by, reported_on = _joined(batches[0::2], data.micro_batch), _joined(batches[1::2], data.micro_batch)

        def loss_of(widths: LayerWidths) -> float:
            return submodel_losses(model, chosen_by, [widths], ranks)[0]

        finder = Search(cfg.model, loss_of, cost_function(args.cost, model, args.batch, ranks))
        if args.budget is None:
            points = finder.curve(args.points, trials=args.trials)
        else:
            points = [*finder.trained(), finder.best(args.budget, trials=args.trials)]
        points = held_out(points, model, reported_on, ranks)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        close_ranks()
    if ranks.is_main:
        trained = [point for point in points if point.trained]
        unit = COSTS[args.cost]
        print(f"{finder.n_losses} submodels evaluated; losses below are on sequences that the search did not see")
        print(f"{'name':>14} {unit:>14} {'loss':>8} {'perplexity':>11} {'over the line':>14}  widths")
        for point in points:
            over = "" if point.trained else f"{point.loss - search.interpolated(trained, point.cost):+.4f}"
            print(
                f"{point.name:>14} {point.cost:>14.6g} {point.loss:>8.4f} {perplexity(point.loss):>11.3f} {over:>14}  "
                f"{','.join(f'{n}h' for n in point.widths)}"
            )
        if args.output is not None:
            search.write_presets(args.output, cfg.model, args.cost, points)
        if args.plot is not None:
            plot(points, unit, args.plot)
    return 0


def _joined(batches: list[Batch], size: int) -> list[Batch]:
    """Batches of one sequence put together to batches of up to `size`."""
    joined = []
    for i in range(0, len(batches), size):
        group = batches[i : i + size]
        docs = [batch.seq_idx_bt for batch in group if batch.seq_idx_bt is not None]
        joined.append(
            Batch(
                tokens_bt=torch.cat([batch.tokens_bt for batch in group]),
                targets_bt=torch.cat([batch.targets_bt for batch in group]),
                seq_idx_bt=torch.cat(docs) if docs else None,
            )
        )
    return joined


if __name__ == "__main__":
    sys.exit(main())
