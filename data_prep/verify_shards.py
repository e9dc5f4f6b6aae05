"""Is this dataset whole and right? Checks every byte, and draws the lengths of its documents, or some of its images.

    python data_prep/verify_shards.py data/fineweb --tokenizer tokenizer.json --picture lengths.png
    python data_prep/verify_shards.py data/imagenet --picture images.png

Checks sizes, checksums and layout. Of tokens: that every id is below the vocabulary, that each row goes on where the last
one ended, and the manifest's counts of tokens and documents. Of images: that every one decodes, and the manifest's counts
of each class. Every problem is listed; the exit status is 1 where there is one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run by its path, a script finds its own folder first on sys.path and not the repository: make both ways work.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray

from data_prep.prep_job import cores
from data_prep.shard_reader import Part, ShardError, part_tokens, read_shard, split_parts
from data_prep.shard_schema import SPLITS, Manifest, manifest_kind, read_manifest
from data_prep.tokenizers_io import TextTokenizer, open_tokenizer
from data_prep.verify_images import verify_images


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 for a damaged dataset, 2 for a wrong command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="DIR", help="the dataset's folder")
    parser.add_argument("--tokenizer", default="", help="decode samples with it; must be the manifest's")
    parser.add_argument("--eos-token", default="", help="as for tokenize_fineweb.py")
    parser.add_argument("--samples", type=int, default=3, help="documents of each split to decode")
    parser.add_argument("--picture", default="", metavar="PNG", help="where to draw document lengths, or images")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images; 0: one for each core")
    args = parser.parse_args(argv)
    for option, value in (("--samples", args.samples), ("--workers", args.workers)):
        if value < 0:
            print(f"error: {option} {value}: must be at least 0", file=sys.stderr)
            return 2
    if args.picture and Path(args.picture).suffix != ".png":
        print(f"error: --picture {args.picture}: must end in .png", file=sys.stderr)
        return 2
    if args.picture and not Path(args.picture).parent.is_dir():
        print(f"error: --picture {args.picture}: there is no folder to put it into", file=sys.stderr)
        return 2
    if manifest_kind(args.folder) == "images":
        return verify_images(Path(args.folder), args.picture, args.workers or cores())
    try:
        manifest = read_manifest(args.folder)
        tokenizer = open_tokenizer(args.tokenizer, args.eos_token) if args.tokenizer else None
        if tokenizer is not None and tokenizer.sha256 != manifest.tokenizer_sha256:
            raise ValueError(f"--tokenizer {args.tokenizer} is not {manifest.tokenizer_name} of the manifest")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems: list[str] = []
    lengths: dict[str, NDArray[np.int64]] = {}
    for split in SPLITS:
        lengths[split], found = check_split(Path(args.folder), manifest, split)
        problems += found
        print(describe(split, lengths[split]))
        if tokenizer is not None and not found:
            print_samples(Path(args.folder), manifest, split, tokenizer, args.samples)
    if args.picture:
        draw_lengths(lengths, args.picture)
        print(f"document lengths: {args.picture}")
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(f"{args.folder}: {len(problems)} problems" if problems else f"{args.folder}: whole")
    return 1 if problems else 0


def check_split(folder: Path, manifest: Manifest, split: str) -> tuple[NDArray[np.int64], list[str]]:
    """Lengths of the split's documents in tokens, eos included, and what is wrong with it."""
    problems: list[str] = []
    lengths: list[NDArray[np.int64]] = []
    n_tokens = 0
    try:
        parts = split_parts(folder, manifest, split)
    except ShardError as error:
        return np.empty(0, np.int64), [str(error)]
    for part in parts:
        problems += _check_rows(folder, part, manifest, split)
        open_length = 0  # tokens of the document that the last shard left open
        try:
            for ids in part_tokens(folder, part, manifest, split):
                n_tokens += len(ids)
                ends = np.flatnonzero(ids == manifest.eos_id)
                if len(ends):
                    inside = np.diff(ends, prepend=-1)
                    inside[0] += open_length
                    lengths.append(inside)
                    open_length = len(ids) - 1 - int(ends[-1])
                else:
                    open_length += len(ids)
        except ShardError:
            continue  # _check_rows named it
        if open_length:
            problems.append(f"{split}, {part.name}: the last document does not end with the end-of-text id")
    joined = np.concatenate(lengths) if lengths else np.empty(0, np.int64)
    if not problems and n_tokens != manifest.n_tokens[split]:
        problems.append(f"{split}: {n_tokens} tokens, the manifest says {manifest.n_tokens[split]}")
    if not problems and len(joined) != manifest.n_documents[split]:
        problems.append(f"{split}: {len(joined)} documents, the manifest says {manifest.n_documents[split]}")
    return joined, problems


def _check_rows(folder: Path, part: Part, manifest: Manifest, split: str) -> list[str]:
    problems: list[str] = []
    last: int | None = None
    for entry in part.shards:
        name = entry["raw_data"]["basename"]
        try:
            rows = read_shard(folder / split, entry, manifest)
        except ShardError as error:
            problems.append(str(error))
            last = None
            continue
        if int(rows.max()) >= manifest.vocab_size:
            problems.append(f"shard {split}/{name}: id {rows.max()} is not below vocab_size {manifest.vocab_size}")
        joined = np.array_equal(rows[1:, 0], rows[:-1, -1]) and (last is None or int(rows[0, 0]) == last)
        if not joined:
            problems.append(f"shard {split}/{name}: a row does not go on where the one before it ended")
        last = int(rows[-1, -1])
    return problems


def describe(split: str, lengths: NDArray[np.int64]) -> str:
    """One line about the documents of a split."""
    if not len(lengths):
        return f"{split}: no documents"
    middle, high = (int(np.percentile(lengths, q)) for q in (50, 99))
    return (
        f"{split}: {len(lengths):,} documents, {int(lengths.sum()):,} tokens; length median {middle:,}, 99% {high:,}, "
        f"longest {int(lengths.max()):,}"
    )


def print_samples(folder: Path, manifest: Manifest, split: str, tokenizer: TextTokenizer, n: int) -> None:
    """Print the beginnings of the first `n` documents."""
    for part in split_parts(folder, manifest, split)[:1]:
        for ids in part_tokens(folder, part, manifest, split):
            ends = np.flatnonzero(ids == manifest.eos_id)[:n].tolist()
            for begin, end in zip([0, *(e + 1 for e in ends)], ends, strict=False):
                text = tokenizer.decode(ids[begin:end].tolist())
                print(f"  {split}: {text[:100]!r}{'...' if len(text) > 100 else ''}")
            return


def draw_lengths(lengths: dict[str, NDArray[np.int64]], path: str) -> None:
    """A PNG of how many documents, and how many tokens, lie in documents of which length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    longest = max((int(x.max()) for x in lengths.values() if len(x)), default=1)
    edges = np.unique(np.geomspace(1, longest + 1, 60).astype(np.int64))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharex=True)
    for split, values in lengths.items():
        for axis, weights, label in zip(axes, (None, values), ("documents", "tokens"), strict=True):
            axis.hist(values, bins=edges, weights=weights, histtype="step", label=split)
            axis.set(xscale="log", yscale="log", xlabel="document length, tokens (eos included)", ylabel=label)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
