"""FineWeb, or any parquet and JSON-lines text, to the token shards that `pretrain` reads.

    python data_prep/tokenize_fineweb.py --input 'fineweb/*.parquet' --tokenizer tokenizer.json --output data/fineweb

Interrupted at any moment and run again, it goes on from the last whole shard and ends with the same bytes as a run
that was never interrupted, whatever the number of workers. Run again when finished, it does nothing. See docs/data.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run by its path, a script finds its own folder first on sys.path and not the repository: make both ways work.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.corpus_files import InputError, find_sources
from data_prep.corpus_io import Filters
from data_prep.encode_worker import EncodeSettings
from data_prep.fast_bpe import EncoderDiffersError
from data_prep.prep_job import OutputError, cores, place_from_slurm
from data_prep.preparation import Preparation, merge_parts

SHARD_BYTES = 64 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for what the user can mend."""
    args = _parser().parse_args(argv)
    try:
        if args.merge:
            return merge_parts(Path(args.output))
        return _preparation(args).run()
    except (InputError, OutputError, EncoderDiffersError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: writing to {args.output} failed: {error}. Nothing half-written was kept under its final name; mend "
            "the cause and run the same command again: it goes on from the last whole shard",
            file=sys.stderr,
        )
        return 2


def _preparation(args: argparse.Namespace) -> Preparation:
    for name in ("input", "tokenizer"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is required")
    filters = Filters(args.language, args.min_language_score, args.min_score, tuple(args.dump))
    settings = EncodeSettings(
        tokenizer=args.tokenizer,
        eos_token=args.eos_token,
        text_column=args.text_column,
        filters=filters,
        val_fraction=args.val_fraction,
        reference_encoder=args.encoder == "reference",
        max_document_bytes=args.max_document_mb << 20,
    )
    return Preparation(
        output=Path(args.output),
        sources=find_sources(args.input, args.hub_config),
        settings=settings,
        row_tokens=args.row_tokens,
        shard_bytes=args.shard_bytes,
        compression=args.compression,
        max_tokens=args.max_tokens,
        rank=args.rank,
        world_size=args.world_size,
        n_workers=args.workers or cores(),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="files, globs, folders, or OWNER/NAME of a hub dataset"
    )
    what.add_argument(
        "--hub-config", default="", help="hub configuration: sample-10BT, sample-100BT, CC-MAIN-2024-10, default"
    )
    what.add_argument("--text-column", default="text", help="column or key that holds the text")
    what.add_argument("--language", default="", help="keep documents of this language")
    what.add_argument("--min-language-score", type=float, help="keep documents of at least this language_score")
    what.add_argument("--min-score", type=float, help="keep documents of at least this score (FineWeb-Edu)")
    what.add_argument("--dump", nargs="+", default=[], help="keep documents of these Common Crawl dumps")
    what.add_argument(
        "--max-tokens", type=int, default=0, help="stop after the document that reaches this many; 0: all"
    )
    what.add_argument("--max-document-mb", type=int, default=16, help="skip longer documents, counted as too_long")
    how = parser.add_argument_group("how")
    how.add_argument("--tokenizer", default="", help="tokenizer.json, sentencepiece .model, or tiktoken:ENCODING")
    how.add_argument("--eos-token", default="", help="the token that ends a document, where the tokenizer does not say")
    how.add_argument(
        "--encoder",
        choices=("auto", "reference"),
        default="auto",
        help="auto: the fastest that gives the tokenizers library's ids; reference: that library itself",
    )
    how.add_argument("--val-fraction", type=float, default=0.001, help="share of documents, by hash, that go to val")
    how.add_argument("--row-tokens", type=int, default=8192, help="tokens in a row; data.seq_len must divide it")
    how.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="size of a shard before compression")
    how.add_argument("--compression", default="", help="zstd or zstd:LEVEL; empty: none")
    where = parser.add_argument_group("where")
    where.add_argument("--output", required=True, metavar="DIR", help="the dataset's folder")
    where.add_argument("--workers", type=int, default=0, help="processes; 0: one for each core this job may use")
    rank, world_size = place_from_slurm()
    where.add_argument("--rank", type=int, default=rank, help="this job's number; from Slurm where there")
    where.add_argument("--world-size", type=int, default=world_size, help="jobs that share the input files; likewise")
    where.add_argument("--merge", action="store_true", help="join the finished parts of an array into one dataset")
    return parser


if __name__ == "__main__":
    sys.exit(main())
