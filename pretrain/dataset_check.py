"""What is known of a dataset before training: its manifest, and that its index and shards are in order."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from streaming.base.storage import CloudDownloader

from data_prep.shard_schema import INDEX_NAME, MANIFEST_NAME, Manifest, file_sha256, read_manifest
from pretrain.config import SampleData
from pretrain.config_sections import ConfigError, DataConfig
from pretrain.manifest_check import check_manifest, of_its_kind
from pretrain.shard_store import DatasetError


def check_dataset(cfg: DataConfig, vocab_size: int, *, training: bool = True) -> Manifest:
    """The dataset's manifest, once everything that can be known before training was found in order; without `training` of
    val alone.

    Raises FileNotFoundError (no dataset, a shard is missing), ConfigError (the config asks for what the dataset is
    not) or DatasetError (damaged). Touches no shared memory; any rank may call it alone.
    """
    manifest = manifest_of(cfg)
    check_manifest(manifest, cfg, vocab_size)
    for split, n_needed in (("train", cfg.sequences_per_step), ("val", 1)) if training else (("val", 1),):
        n_rows = check_index(cfg.path, cfg.cache_dir, split)
        n_sequences = n_rows * (manifest.row_tokens // cfg.seq_len)
        if split == "val" and not n_sequences:
            raise ConfigError(
                f"{cfg.path}: split val is empty, and the run validates on it: prepare the data again with a larger "
                "--val-fraction, into a new --output"
            )
        if n_sequences < n_needed:
            raise ConfigError(
                f"{cfg.path}: split {split} holds {n_sequences} sequences of {cfg.seq_len} tokens, a step needs "
                f"{n_needed}: prepare more data, or lower data.tokens_per_step"
            )
    return manifest


def check_index(dataset: str, cache_dir: str, split: str) -> int:
    """Rows that the split's index lists; for a local dataset, every shard it names is there in its full size.

    Raises FileNotFoundError or DatasetError, naming the shard.
    """
    if cache_dir:
        path = _fetch(f"{dataset}/{split}/{INDEX_NAME}", cache_dir)
    else:
        path = Path(dataset) / split / INDEX_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {dataset} has no split {split}; prepare the data again")
    try:
        shards = json.loads(path.read_text())["shards"]
        n_rows = sum(int(shard["samples"]) for shard in shards)
        files = [[info for info in (shard["raw_data"], shard["zip_data"]) if info] for shard in shards]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} is not an MDS index ({error!r}): prepare the data again") from error
    if cache_dir:
        path.unlink()
        return n_rows
    for either in files:
        present = [info for info in either if (path.parent / info["basename"]).is_file()]
        if not present:
            raise FileNotFoundError(
                f"shard {path.parent / either[0]['basename']} is missing, but {path} lists it: copy the dataset again, "
                "or prepare the data again"
            )
        for info in present:
            shard_path = path.parent / info["basename"]
            n_bytes = shard_path.stat().st_size
            if n_bytes != info["bytes"]:
                raise DatasetError(
                    f"shard {shard_path} has {n_bytes} bytes, the index says {info['bytes']}: it is truncated or "
                    "damaged; copy it again, or prepare the data again"
                )
    return n_rows


def dataset_sha256(data: SampleData) -> str:
    """SHA-256 of the index of the training split: with the shards' sizes and hashes in their order, what a run trains on.

    It does not depend on where the dataset lies. Raises FileNotFoundError.
    """
    if not data.cache_dir:
        return file_sha256(Path(data.path) / "train" / INDEX_NAME)
    fetched = _fetch(f"{data.path}/train/{INDEX_NAME}", data.cache_dir)
    try:
        return file_sha256(fetched)
    finally:
        fetched.unlink()


def manifest_of(cfg: DataConfig) -> Manifest:
    """The dataset's manifest, fetched anew where the dataset is remote; refuses a cache of another dataset."""
    with of_its_kind():
        return read_manifest(manifest_folder(cfg.path, cfg.cache_dir))


def manifest_folder(dataset: str, cache_dir: str) -> str:
    """The local folder that holds the manifest of `dataset`: fetched anew into `cache_dir` where it is remote.

    Raises FileNotFoundError where it cannot be fetched, ConfigError where the cache is of another dataset.
    """
    if not cache_dir:
        return dataset
    cached = Path(cache_dir) / MANIFEST_NAME
    fetched = _fetch(f"{dataset}/{MANIFEST_NAME}", cache_dir)
    if cached.is_file() and cached.read_bytes() != fetched.read_bytes():
        fetched.unlink()
        raise ConfigError(
            f"data.cache_dir={cache_dir} holds shards of another dataset than {dataset}: empty it or name another"
        )
    os.replace(fetched, cached)
    return cache_dir


def _fetch(remote: str, cache_dir: str) -> Path:
    """A private copy of the remote file in `cache_dir`; the caller moves or removes it."""
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".fetched-", dir=cache_dir)
    os.close(handle)
    os.unlink(name)  # the downloader leaves a file that exists alone
    try:
        downloader = CloudDownloader.get(remote if "://" in remote else None)
        downloader.download(remote, name)
    except Exception as error:  # each cloud client raises errors of its own
        raise FileNotFoundError(f"{remote} cannot be fetched: {error!r}. Is data.path right, and reachable?") from error
    return Path(name)
