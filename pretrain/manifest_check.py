"""Whether what a run's config names is there, and fits the dataset's manifest. Light: scripts ask before a job has GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.image_schema import ImageManifest, read_image_manifest
from data_prep.shard_schema import MANIFEST_NAME, KindError, Manifest, file_sha256, read_manifest
from modeling.text import TIKTOKEN
from pretrain.config import LanguageRunConfig, RunConfig
from pretrain.config_sections import ConfigError, DataConfig
from pretrain.image_config import ImageDataConfig
from pretrain.retention import CHECKPOINTS
from pretrain.vision_config import VisionRunConfig


def check_paths(cfg: RunConfig) -> None:
    """Raise ConfigError where a folder or file that the config names, and that this start would read, is not there."""
    data, checkpoint = cfg.data, cfg.checkpoint
    if "://" not in data.path and not (Path(data.path) / "train").is_dir():
        script = "prepare_imagenet.py" if cfg.task == "vision" else "tokenize_fineweb.py"
        raise ConfigError(
            f"data.path={data.path} has no folder train: name a folder that {script} wrote (DATA=... for a script of slurm/)"
        )
    tokenizer = getattr(data, "tokenizer", "")
    if tokenizer and not tokenizer.startswith(TIKTOKEN) and not Path(tokenizer).is_file():
        raise ConfigError(
            f"data.tokenizer={tokenizer}: no such file; name the one that the dataset was made with (a file or "
            f"{TIKTOKEN}NAME), or none"
        )
    named = _named_checkpoint(cfg)
    if named is not None and not has_begun(cfg) and not (named / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"checkpoint.resume={checkpoint.resume} is no checkpoint: name a folder step_N, or auto or never"
        )
    source = Path(checkpoint.init_from)
    # A run that goes on from a checkpoint of its own needs its source no more.
    starts_anew = checkpoint.resume == "never" or not any((Path(cfg.run_dir) / "checkpoints").glob(CHECKPOINTS))
    places = (source / "config.json", source / MANIFEST_NAME, *(source / "checkpoints").glob(CHECKPOINTS))
    if checkpoint.init_from and starts_anew and not any(place.exists() for place in places):
        raise ConfigError(
            f"checkpoint.init_from={source} is neither a model folder, nor a checkpoint nor a run that has one: name one"
        )


def _named_checkpoint(cfg: RunConfig) -> Path | None:
    """The checkpoint that the config says to begin at, where it names one."""
    return None if cfg.checkpoint.resume in ("auto", "never") else Path(cfg.checkpoint.resume)


def has_begun(cfg: RunConfig) -> bool:
    """Whether the run began at the checkpoint that the config names, and has newer ones of its own: what the same command goes
    on from when it is given again, by a job that requeues itself."""
    if _named_checkpoint(cfg) is None:
        return False
    for folder in sorted((Path(cfg.run_dir) / "checkpoints").glob(CHECKPOINTS), reverse=True):
        try:
            began_at = json.loads((folder / MANIFEST_NAME).read_text())["config"]["checkpoint"]["resume"]
        except (OSError, ValueError, KeyError, TypeError):  # damaged: an older one tells as well
            continue
        return bool(began_at == cfg.checkpoint.resume)
    return False


def check_run(cfg: RunConfig) -> None:
    """Check the manifest of the run's dataset, which is a local folder.

    Raises FileNotFoundError (no manifest), ConfigError (the config asks for what the dataset is not) or ValueError (a dataset
    of another kind, or a manifest that cannot be read).
    """
    if isinstance(cfg, VisionRunConfig):
        check_image_manifest(read_image_manifest(cfg.data.path), cfg.data, cfg.model.n_classes)
    elif isinstance(cfg, LanguageRunConfig):
        check_manifest(read_manifest(cfg.data.path), cfg.data, cfg.model.vocab_size)


@contextmanager
def of_its_kind() -> Iterator[None]:
    """A dataset of another kind than the run's, when its manifest is read inside, is the config's mistake: ConfigError."""
    try:
        yield
    except KindError as error:
        raise ConfigError(f"data.path: {error}") from error


def check_manifest(manifest: Manifest, cfg: DataConfig, vocab_size: int) -> None:
    """Raise ConfigError unless vocabulary, tokenizer and rows are what `cfg` asks for."""
    if manifest.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}, but {cfg.path} was tokenized with {manifest.tokenizer_name}, whose ids "
            f"reach {manifest.vocab_size - 1}: set model.vocab_size={manifest.vocab_size} or more, or prepare the data "
            "with the tokenizer that the model is for"
        )
    if cfg.tokenizer.startswith(TIKTOKEN):
        # Its ranks are fetched over the network, so the name stands for them.
        if cfg.tokenizer != manifest.tokenizer_name:
            raise ConfigError(
                f"data.tokenizer={cfg.tokenizer}, but {cfg.path} was tokenized with {manifest.tokenizer_name}: name that "
                "one, or none (data.tokenizer=), or prepare the data again"
            )
    elif cfg.tokenizer:
        found = file_sha256(cfg.tokenizer)
        if found != manifest.tokenizer_sha256:
            raise ConfigError(
                f"data.tokenizer={cfg.tokenizer} has hash {found[:16]}..., but {cfg.path} was tokenized with "
                f"{manifest.tokenizer_name}, {manifest.tokenizer_sha256[:16]}...: name that one, or prepare the data again"
            )
    if manifest.row_tokens % cfg.seq_len:
        divisors = [d for d in range(1, manifest.row_tokens + 1) if manifest.row_tokens % d == 0]
        raise ConfigError(
            f"data.seq_len={cfg.seq_len} does not divide the dataset's rows of {manifest.row_tokens} tokens: use one "
            f"of {divisors[-8:]}, or prepare the data with --row-tokens a multiple of {cfg.seq_len}"
        )


def check_image_manifest(
    manifest: ImageManifest, cfg: ImageDataConfig, n_classes: int | None, *, training: bool = True
) -> None:
    """Raise ConfigError unless classes are as many as the model has (None: any number) and train fills a step."""
    if n_classes not in (None, len(manifest.classes)):
        raise ConfigError(
            f"model.n_classes={n_classes}, but {cfg.path} has {len(manifest.classes)} classes: set "
            f"model.n_classes={len(manifest.classes)}, or name another dataset"
        )
    if training and manifest.n_images["train"] < cfg.images_per_step:
        raise ConfigError(
            f"{cfg.path}: split train holds {manifest.n_images['train']} images, a step needs {cfg.images_per_step}: "
            "lower data.images_per_step"
        )
