"""Validation loss of every width, over all ranks: in a run, and of a checkpoint.

python -m pretrain.evaluate RUN_OR_CHECKPOINT [--data DIR] [--width 1/4] [--width 1,1/2,...] [--sequences N]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from modeling.checkpoint_reader import CheckpointError
from modeling.language import LanguageModel
from modeling.loss import next_token_loss
from modeling.nesting import LayerWidths, uniform, width_name
from modeling.search import read_widths
from pretrain.checkpoint_model import load_model
from pretrain.data import Batch, validation_batches
from pretrain.dataset_check import check_dataset
from pretrain.distributed import Ranks, close_ranks, init_ranks


def validation_losses(
    model: LanguageModel, batches: Iterable[Batch], widths: Sequence[int], ranks: Ranks
) -> dict[int, float]:
    """Mean next-token loss in nats of each uniform width (head count) over all ranks' batches, each token counted once.

    `batches` is this data-parallel rank's share. All ranks must call. Ranks may hold different numbers of batches.
    """
    losses = submodel_losses(model, batches, [model.cfg.layer_widths(n_heads) for n_heads in widths], ranks)
    return dict(zip(widths, losses, strict=True))


@torch.no_grad()
def submodel_losses(
    model: LanguageModel, batches: Iterable[Batch], submodels: Sequence[LayerWidths], ranks: Ranks
) -> list[float]:
    """As `validation_losses`, for any submodels: one head count a layer each."""
    sums = torch.zeros(len(submodels) + 1, dtype=torch.float64)
    for batch in batches:
        n_tokens = batch.targets_bt.numel()
        tokens_bt, targets_bt = batch.tokens_bt.to(ranks.device), batch.targets_bt.to(ranks.device)
        seq_idx_bt = None if batch.seq_idx_bt is None else batch.seq_idx_bt.to(ranks.device)
        for i, widths in enumerate(submodels):
            hidden_btd = model(tokens_bt, widths, seq_idx_bt=seq_idx_bt)
            sums[i] += n_tokens * next_token_loss(model, hidden_btd, targets_bt).next_token.double().cpu()
        sums[-1] += n_tokens
    # Ranks of one replica hold the same sums; adding all of them leaves the ratio as it is.
    dist.all_reduce(sums, group=ranks.cpu_group)
    return [float(total / sums[-1]) for total in sums[:-1]]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code. One rank a task; rank 0 prints."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.evaluate", description="Validate a checkpoint at any width."
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder")
    parser.add_argument("--data", help="token shards; default: the run's")
    parser.add_argument(
        "--width", action="append", help="1/4, 16h, or one for each layer; default: every trained width"
    )
    parser.add_argument("--sequences", type=int, default=1024, help="validation sequences to read")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)
    try:
        model, cfg = load_model(args.checkpoint)
        data = cfg.data if args.data is None else replace(cfg.data, path=args.data)
        full, n_layers = cfg.model.n_heads, cfg.model.n_layers
        if args.width is None:
            submodels = {width_name(n, full): uniform(n, n_layers) for n in cfg.model.widths}
        else:
            submodels = {text: read_widths(text, full, n_layers) for text in args.width}
        check_dataset(data, cfg.model.vocab_size)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ranks = init_ranks(1)
    model.to(ranks.device)
    batches = validation_batches(
        data,
        vocab_size=cfg.model.vocab_size,
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        n_sequences=args.sequences,
    )
    losses = submodel_losses(model, batches, list(submodels.values()), ranks)
    if ranks.is_main:
        for name, loss in zip(submodels, losses, strict=True):
            print(f"width {name}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
        if args.json is not None:
            args.json.write_text(json.dumps(dict(zip(submodels, losses, strict=True)), indent=1) + "\n")
    close_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
