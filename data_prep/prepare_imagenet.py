"""ImageNet, or any images in class folders, tar archives or parquet, to the image shards that `pretrain` reads.

    python data_prep/prepare_imagenet.py --input imagenet/ --output data/imagenet

Interrupted at any moment and run again, it makes the shards that are missing and ends with the same bytes as a run that was
never interrupted, whatever the number of workers and jobs. Run again when finished, it does nothing. See docs/images.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run by its path, a script finds its own folder first on sys.path and not the repository: make both ways work.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.corpus_files import InputError
from data_prep.image_listing import SourceOptions, find_splits, list_images
from data_prep.image_policy import MAX_PIXELS, ImagePolicy
from data_prep.image_preparation import ImagePreparation
from data_prep.prep_job import OutputError, cores, place_from_slurm

SHARD_BYTES = 64 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for what the user can mend."""
    args = _parser().parse_args(argv)
    try:
        job = _preparation(args)
        return job.merge() if args.merge else job.run()
    except (InputError, OutputError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: writing to {args.output} failed: {error}. Nothing half-written was kept under its final name; mend "
            "the cause and run the same command again: it goes on with the shards that are missing",
            file=sys.stderr,
        )
        return 2


def _preparation(args: argparse.Namespace) -> ImagePreparation:
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed}: must lie in 0 to {2**32 - 1}")
    policy = ImagePolicy(
        resize_short=args.resize_short,
        quality=args.quality,
        min_side=args.min_side,
        max_pixels=args.max_pixels,
        orientation=args.orientation,
    )
    train, val = tuple(args.train), tuple(args.val)
    if args.input:
        if train:
            raise ValueError("--input and --train: name the folder that holds both splits, or each split")
        train, found_val = find_splits(args.input)
        val = val or found_val
    if not train:
        raise ValueError("--input or --train is required")
    if val and args.val_fraction:
        raise ValueError(f"--val-fraction {args.val_fraction}, but there is a val source, {val[0]}: leave one out")
    options = SourceOptions(
        train=train,
        val=val,
        val_fraction=args.val_fraction,
        seed=args.seed,
        val_labels=args.val_labels,
        class_names=args.class_names,
        image_column=args.image_column,
        label_column=args.label_column,
    )
    print(f"train: {' '.join(train)}; val: {' '.join(val) or f'{args.val_fraction:g} of each class'}", file=sys.stderr)
    listing = list_images(options)
    counts = ", ".join(f"{split} {len(images):,} images" for split, images in listing.images.items())
    print(f"{len(listing.classes):,} classes, {counts}", file=sys.stderr)
    return ImagePreparation(
        output=Path(args.output),
        listing=listing,
        policy=policy,
        sources={"train": list(train), "val": list(val)},
        image_column=args.image_column,
        seed=args.seed,
        shard_bytes=args.shard_bytes,
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
        "--input", default="", metavar="DIR", help="folder (or OWNER/NAME on the hub) with train and val, found by name"
    )
    what.add_argument(
        "--train", nargs="+", default=[], metavar="PATH", help="instead of --input: folders, .tar, .parquet, globs"
    )
    what.add_argument("--val", nargs="+", default=[], metavar="PATH", help="likewise")
    what.add_argument(
        "--val-fraction", type=float, default=0.0, help="share of each class for val, where none is named"
    )
    what.add_argument(
        "--val-labels", default="", metavar="FILE", help="classes of a val archive or folder without them"
    )
    what.add_argument("--class-names", default="", metavar="FILE", help="names of numbered classes, one a line")
    what.add_argument("--image-column", default="image", help="parquet's column of bytes, or of {bytes, path}")
    what.add_argument("--label-column", default="label", help="parquet's column of class numbers or names")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--resize-short", type=int, default=0, help="reduce longer short sides to this; 0: keep every byte"
    )
    how.add_argument("--quality", type=int, default=90, help="JPEG quality of what is encoded anew")
    how.add_argument("--min-side", type=int, default=8, help="leave out images with a side of fewer pixels")
    how.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="leave out images of more pixels")
    how.add_argument(
        "--orientation", choices=("ignore", "apply"), default="ignore", help="what EXIF's orientation does to pixels"
    )
    how.add_argument("--seed", type=int, default=0, help="of the order of train, and of the share that becomes val")
    how.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="size of a shard, of the source's bytes")
    where = parser.add_argument_group("where")
    where.add_argument("--output", required=True, metavar="DIR", help="the dataset's folder")
    where.add_argument("--workers", type=int, default=0, help="processes; 0: one for each core this job may use")
    rank, world_size = place_from_slurm()
    where.add_argument("--rank", type=int, default=rank, help="this job's number; from Slurm where there")
    where.add_argument("--world-size", type=int, default=world_size, help="jobs that share the shards; likewise")
    where.add_argument("--merge", action="store_true", help="join the finished parts of an array into one dataset")
    return parser


if __name__ == "__main__":
    sys.exit(main())
