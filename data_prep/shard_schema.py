"""The contract between data preparation and training: what an MDS token shard holds. Standard library only.

A token dataset is a folder of MosaicML Streaming (MDS) shards, one folder a split. The documents of the split, each
followed by the end-of-text token, are laid end to end and cut into rows of `row_tokens` tokens. A row is stored with
the one token that follows it, so a sample holds `row_tokens + 1` ids and every token of the split but the first is
predicted exactly once: sample i ends with the id that sample i + 1 starts with. Training slices a row into sequences
of any length that divides `row_tokens`. The last row is padded with the end-of-text token. Where several jobs of an
array prepared the dataset, each wrote a part: such a chain of rows of its own, padded at its end.

    DIR/manifest.json            what the tokens are (see Manifest); written last, so its presence means whole
    DIR/train/index.json         MDS index of the split
    DIR/train/shard.00000.mds    and so on; DIR/train/part-00003-of-00016/shard.00000.mds from an array
    DIR/val/...
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
TOKENS_COLUMN = "tokens"
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.json"
SHARD_HASH = "sha256"
SPLITS = ("train", "val")


class KindError(ValueError):
    """A dataset of another kind than the one that is read: tokens for images, or the other way."""


def token_dtype(vocab_size: int) -> str:
    """The narrowest of uint16 and uint32 that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def mds_columns(vocab_size: int, row_tokens: int) -> dict[str, str]:
    """Column name to MDS encoding: one array of `row_tokens + 1` ids."""
    return {TOKENS_COLUMN: f"ndarray:{token_dtype(vocab_size)}:{row_tokens + 1}"}


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of the bytes of the file at `path`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a token dataset is. `extra` carries what only people and the preparation tools read."""

    tokenizer_sha256: str
    """Hash of the tokenizer file's bytes; a run whose config names another is refused."""
    tokenizer_name: str
    """File name or encoding name of the tokenizer."""
    vocab_size: int
    """Ids the tokenizer can produce, 0 .. vocab_size - 1."""
    eos_id: int
    """The id that ends every document."""
    row_tokens: int
    """Tokens in a row, without the one token of look-ahead stored with it."""
    n_tokens: dict[str, int]
    """Tokens of each split, eos included, padding not."""
    n_documents: dict[str, int]
    """Documents of each split."""
    extra: dict[str, Any]
    """Source files, checksums, counts of skipped documents, git commit, versions."""
    schema_version: int = SCHEMA_VERSION
    """Version of this layout; a reader refuses one it does not know."""

    def text(self) -> str:
        """The manifest as JSON with sorted keys: equal manifests are equal bytes."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the token dataset at `folder`.

    Raises FileNotFoundError where there is none, ValueError where it is not one that this version can read.
    """
    raw = manifest_values(folder, Manifest, what="token dataset", script="data_prep/tokenize_fineweb.py")
    return Manifest(**raw)


def manifest_kind(folder: str | Path) -> str:
    """What the dataset at `folder` holds: tokens or images; tokens too where no manifest can be read."""
    try:
        raw = json.loads((Path(folder) / MANIFEST_NAME).read_text())
    except (OSError, ValueError):
        return "tokens"
    return str(raw.get("kind", "tokens")) if isinstance(raw, dict) else "tokens"


def manifest_values(folder: str | Path, kind: type[Any], *, what: str, script: str) -> dict[str, Any]:
    """The fields of the `kind` of manifest at `folder`, for the constructor. `what` and `script` are for the messages.

    Raises FileNotFoundError where there is none, KindError where it is of another kind, ValueError where it is not one that
    this version can read.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} is missing: not {'an' if what[0] in 'aeiou' else 'a'} {what}, or one whose preparation did not "
            f"finish. Run {script} again; it goes on from the last whole shard"
        ) from None
    try:
        raw: dict[str, Any] = json.loads(text)
        version = raw["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest ({error!r}): prepare the data again") from error
    known = {field.name: field.default for field in fields(kind)}
    found_kind, own_kind = raw.get("kind", "tokens"), known.get("kind", "tokens")
    if found_kind != own_kind:
        raise KindError(f"{path} is of {found_kind}, not of {own_kind}: name a dataset made by {script}")
    if version != known["schema_version"]:
        raise ValueError(
            f"{path} has schema version {version}, this code reads {known['schema_version']}: prepare the data again"
        )
    if set(raw) != set(known):
        raise ValueError(f"{path}: keys {sorted(set(raw) ^ set(known))} are missing or unknown: prepare the data again")
    return raw
