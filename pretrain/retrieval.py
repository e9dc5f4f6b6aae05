"""Image retrieval across widths: search a database that one width has embedded with queries embedded by another.

    python -m pretrain.retrieval RUN_OR_CHECKPOINT [--query 1/8] [--database 1] [--samples N] [--image-size N] [--json FILE]

Widths that were trained nested share one metric space (arXiv 2410.06718, section 4.1): a phone may embed the query with an
eighth of the model and search what the whole one embedded. Queries and database are the validation images, each left out of
its own search; features are the pooled normed embeddings, compared by cosine. For every pair of widths: recall@1 (which is the
accuracy of a nearest-neighbour classifier), recall@5 and mean average precision.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from modeling.checkpoint_reader import WEIGHTS, WEIGHTS_HELP, CheckpointError
from modeling.nesting import LayerWidths, width_name
from modeling.retrieval import RetrievalScores, retrieval_scores
from modeling.search import read_widths
from modeling.vision import VisionModel
from pretrain.augment import normalised
from pretrain.checkpoint_model import load_model
from pretrain.distributed import Ranks, close_ranks, init_ranks
from pretrain.dry_run import plain_console
from pretrain.evaluate import changed_data, check_writable
from pretrain.images import ImageBatch, check_image_dataset
from pretrain.tasks import task_of
from pretrain.vision_config import VisionRunConfig
from pretrain.vision_task import features


@torch.no_grad()
def embed(
    model: VisionModel, batches: Iterable[ImageBatch], submodels: Sequence[LayerWidths], ranks: Ranks
) -> tuple[list[Tensor], Tensor]:
    """Every validation image's features by each submodel (n d, float32), and labels (n), of all ranks, on every rank.

    In the order of the images' numbers, whatever the ranks. Every rank must call.
    """
    found: list[list[Tensor]] = [[] for _ in submodels]
    labels, numbers = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for batch in batches:
        images_bchw = normalised(batch.images_bchw.to(ranks.device), model.dtype)
        for one, widths in zip(found, submodels, strict=True):
            one.append(features(model, images_bchw, widths).float().cpu())
        labels.append(batch.labels_b)
        numbers.append(batch.numbers_b)
    mine = ([torch.cat(one) if one else None for one in found], torch.cat(labels), torch.cat(numbers))
    every = ranks.gather_objects(mine)
    order = torch.cat([number for _, _, number in every]).argsort()
    by_submodel = [torch.cat([held[i] for held, _, _ in every if held[i] is not None]) for i in range(len(submodels))]
    label_n = torch.cat([label for _, label, _ in every])
    return [feature_nd[order].to(ranks.device) for feature_nd in by_submodel], label_n[order].to(ranks.device)


def matrix(
    model: VisionModel,
    batches: Iterable[ImageBatch],
    queries: dict[str, LayerWidths],
    databases: dict[str, LayerWidths],
    ranks: Ranks,
) -> dict[tuple[str, str], RetrievalScores]:
    """The scores of every pair of a query's submodel and a database's, by name. Every rank must call."""
    submodels = list(dict.fromkeys([*queries.values(), *databases.values()]))
    embedded, label_n = embed(model, batches, submodels, ranks)
    of = dict(zip(submodels, embedded, strict=True))
    return {
        (query, database): retrieval_scores(of[asked], of[held], label_n, label_n, own_n=True)
        for query, asked in queries.items()
        for database, held in databases.items()
    }


def tables(found: dict[tuple[str, str], RetrievalScores]) -> list[Table]:
    """One table a measure: queries down, databases across."""
    queries, databases = (list(dict.fromkeys(pair[side] for pair in found)) for side in (0, 1))
    made = []
    for title, measure in (("recall@1", 0), ("recall@5", 1), ("mean average precision", 2)):
        table = Table(title=title)
        table.add_column("query \\ database")
        for database in databases:
            table.add_column(database, justify="right")
        for query in queries:
            table.add_row(query, *(f"{found[query, database][measure]:.2%}" for database in databases))
        made.append(table)
    return made


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code. One rank a task; rank 0 prints."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder")
    for side in ("query", "database"):
        parser.add_argument(
            f"--{side}", action="append", help="1/4, 16h, or one for each layer; default: every trained width"
        )
    parser.add_argument("--data", help="image shards; default: the run's")
    parser.add_argument("--samples", type=int, default=0, help="validation images; default: all")
    parser.add_argument("--image-size", type=int, help="pixels of a side; default: the run's")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help=WEIGHTS_HELP)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)
    try:
        check_writable(args.json)
        model, cfg = load_model(args.checkpoint, weights=args.weights)
        if not isinstance(model, VisionModel):
            raise ValueError(f"{args.checkpoint} is of task={cfg.task}: retrieval is of images")
        cfg = changed_data(cfg, args.data, args.samples, args.image_size)
        full, n_layers = cfg.model.n_heads, cfg.model.n_layers
        trained = [width_name(n_heads, full) for n_heads in cfg.model.widths]
        queries, databases = (
            {text: read_widths(text, full, n_layers) for text in asked or trained}
            for asked in (args.query, args.database)
        )
        assert isinstance(cfg, VisionRunConfig)
        check_image_dataset(cfg.data, None, training=False)  # of any classes: nothing is classified
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ranks = init_ranks(1)
    model.to(ranks.device)
    try:
        found = matrix(model, task_of(cfg).validation(ranks), queries, databases, ranks)
    except ValueError as error:  # on every rank alike: they hold all features and labels
        if ranks.is_main:
            print(f"error: {error} (--samples {args.samples})", file=sys.stderr)
        close_ranks()
        return 2
    if ranks.is_main:
        console = plain_console()
        for table in tables(found):
            console.print(table)
        if args.json is not None:
            rows = [{"query": q, "database": d, **scores._asdict()} for (q, d), scores in found.items()]
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    close_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
