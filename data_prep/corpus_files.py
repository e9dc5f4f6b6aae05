"""Which files are read: local paths, folders and globs, Hugging Face datasets; and their bytes."""

from __future__ import annotations

import glob
import gzip
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED_SUFFIXES = (".gz", ".zst")


class InputError(ValueError):
    """An input cannot be read; the message names the file and the way out."""


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: str
    """Local path, or hf://datasets/OWNER/NAME/FILE."""
    n_bytes: int
    """Size on disk or on the hub: weighs the progress and guards a resumed run against a changed input."""


def find_sources(inputs: list[str], hub_config: str = "") -> list[Source]:
    """The files that the inputs name, in order, each once: paths, globs, folders, or OWNER/NAME on the hub.

    Raises InputError where an input names nothing or a file is of an unknown kind.
    """
    sources: dict[str, Source] = {}
    for text in inputs:
        with reading(f"--input {text}"):
            named = _expand(text, hub_config)
        for source in named:
            sources.setdefault(file_place(source.path), source)
    return list(sources.values())


def file_place(path: str) -> str:
    """One text for all the ways to write the path of a file: ./a, a and /where/we/are/a. A link is a file of its own."""
    return path if path.startswith("hf://") else os.path.abspath(path)


def folders_below(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """`folder` and every folder in it at any depth, behind links too, in order, each with the names of its files in order.

    What is hidden, whose name begins with a dot, is left out, as by globs: notebooks' checkpoints, halves of downloads.
    Raises InputError where a folder cannot be listed, or a link leads back to a folder that it lies in.
    """

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out in silence
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.islink(place) and any(map(Path(place).samefile, Path(place).absolute().parents)):
            raise InputError(f"{place}: is a link to a folder that it lies in, so its files would never end: remove it")
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield place, sorted(name for name in names if not name.startswith("."))


def _expand(text: str, hub_config: str) -> list[Source]:
    if text.startswith("hf://"):
        return _hub_sources(text.removeprefix("hf://").removeprefix("datasets/"), hub_config)
    path = Path(text)
    if path.is_dir():
        paths = sorted(
            str(Path(place, name)) for place, names in folders_below(path) for name in names if kind_of(name)
        )
    elif path.is_file():
        paths = [text]
    else:
        paths = sorted(p for p in glob.glob(text, recursive=True) if Path(p).is_file())
        if not paths and re.fullmatch(r"[\w.-]+/[\w.-]+(/.*)?", text) and not path.parent.exists():
            return _hub_sources(text, hub_config)
    if not paths:
        raise InputError(f"--input {text}: no such file, no file matches, and not OWNER/NAME of a hub dataset")
    for name in paths:
        if not kind_of(name):
            raise InputError(f"--input {name}: unknown kind. Use .parquet or .jsonl, the latter also .gz or .zst")
    return [Source(name, Path(name).stat().st_size) for name in paths]


def kind_of(name: str) -> str:
    """parquet, or lines for JSON lines, compressed or not; empty for what is not read."""
    if name.endswith(".parquet"):
        return "parquet"
    while name.endswith(COMPRESSED_SUFFIXES):
        name = name.rpartition(".")[0]
    return "lines" if name.endswith(LINE_SUFFIXES) else ""


def hub_file_system() -> Any:
    """The hub as an fsspec file system; huggingface_hub is an optional extra. HF_TOKEN and HF_HOME apply."""
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise InputError(
            "reading from the hub needs huggingface_hub: pip install 'matmamba-pretrain[data]', or download the files"
        ) from None
    return HfFileSystem()


def _hub_sources(name: str, hub_config: str) -> list[Source]:
    """Files of OWNER/NAME[/FOLDER]; `hub_config` is a FineWeb configuration: sample-10BT, CC-MAIN-2024-10, default."""
    if hub_config.startswith("sample-"):
        folder = f"{name}/sample/{hub_config.removeprefix('sample-')}"
    elif hub_config and hub_config != "default":
        folder = f"{name}/data/{hub_config}"
    else:
        folder = f"{name}/data" if name.count("/") == 1 else name
    try:
        found = hub_file_system().find(f"datasets/{folder}", detail=True)
    except InputError:
        raise
    except Exception as error:  # network, credentials and absence raise a dozen different types
        raise InputError(f"--input {name}: datasets/{folder} cannot be listed on the hub: {error!r}") from error
    sources = [Source(f"hf://{path}", int(info["size"])) for path, info in sorted(found.items()) if kind_of(path)]
    if not sources:
        raise InputError(f"--input {name}: datasets/{folder} on the hub holds no parquet or jsonl file")
    return sources


def open_binary(path: str) -> Any:
    """The bytes of a local file or of one on the hub (streamed by range requests), as a seekable file. Raises InputError."""
    with reading(path):
        if path.startswith("hf://"):
            return hub_file_system().open(path.removeprefix("hf://"), "rb")
        return open(path, "rb")


@contextmanager
def reading(path: str) -> Iterator[None]:
    """What the system says against reading `path` inside, as InputError: an OSError elsewhere is of the output."""
    try:
        yield
    except gzip.BadGzipFile:  # an OSError that the bytes raise, and not the system
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def unreadable(path: str, error: Exception) -> str:
    """The message for a file whose bytes do not decode."""
    return f"{path}: cannot be read, it is cut short or damaged ({error}). Fetch it again, or leave it out of --input"
