"""A token dataset as llm.c's `.bin` files, to train the reference on the same tokens.

    python data_prep/export_llmc.py data/fineweb --output data/fineweb-llmc

Follows dev/data of llm.c: a header of 256 int32 (magic, version, tokens in the file), then the ids. llm.c puts the
end-of-text id before each document and we put it after, so the stream starts with one and gives up its last. Every
token goes into a file; the last file of a split is shorter.
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# Run by its path, a script finds its own folder first on sys.path and not the repository: make both ways work.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray

from data_prep.shard_reader import ShardError, part_tokens, split_parts
from data_prep.shard_schema import SPLITS, Manifest, read_manifest, token_dtype
from data_prep.shard_writer import write_atomic

MAGIC_AND_VERSION = {"uint16": (20240520, 1), "uint32": (20240801, 7)}  # llm.c: its gpt-2 and its llama-3 data


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="DIR", help="the dataset's folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the .bin files go")
    parser.add_argument("--file-tokens", type=int, default=10**8, help="tokens in a file (llm.c: 10^8)")
    args = parser.parse_args(argv)
    try:
        manifest = read_manifest(args.folder)
        for split in SPLITS:
            export(Path(args.folder).absolute(), manifest, split, Path(args.output), args.file_tokens)
    except (ShardError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(folder: Path, manifest: Manifest, split: str, output: Path, file_tokens: int) -> int:
    """Write `output/NAME_split_000000.bin` and so on; the number of files. Raises FileExistsError where some are there."""
    if file_tokens < 1:
        raise ValueError(f"--file-tokens {file_tokens}: must be at least 1")
    output.mkdir(parents=True, exist_ok=True)
    # Whoever trains on them takes all that match: some of an earlier export would give it tokens twice.
    if earlier := sorted(output.glob(f"{glob.escape(folder.name)}_{split}_*.bin")):
        raise FileExistsError(f"{earlier[0]} is there already: name a new folder, or remove the earlier files")
    n_files = 0
    pending = np.empty(0, token_dtype(manifest.vocab_size))
    for ids in _stream(folder, manifest, split):
        pending = np.concatenate([pending, ids])
        while len(pending) >= file_tokens:
            _write(output / f"{folder.name}_{split}_{n_files:06}.bin", pending[:file_tokens])
            pending, n_files = pending[file_tokens:], n_files + 1
    if len(pending):
        _write(output / f"{folder.name}_{split}_{n_files:06}.bin", pending)
        n_files += 1
    print(f"{split}: {n_files} files in {output}")
    return n_files


def _stream(folder: Path, manifest: Manifest, split: str) -> Iterator[NDArray[np.unsignedinteger]]:
    """The split with each end-of-text before its document."""
    held = np.array([manifest.eos_id], token_dtype(manifest.vocab_size))
    for part in split_parts(folder, manifest, split):
        for ids in part_tokens(folder, part, manifest, split):
            if len(ids):
                yield np.concatenate([held, ids[:-1]])
                held = ids[-1:]


def _write(path: Path, ids: NDArray[np.unsignedinteger]) -> None:
    magic, version = MAGIC_AND_VERSION[str(ids.dtype)]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    write_atomic(path, header.tobytes() + ids.tobytes())


if __name__ == "__main__":
    sys.exit(main())
