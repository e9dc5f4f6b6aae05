"""Whether a run's config fits the dataset that its manifest describes. Light: scripts ask before a job has GPUs."""

from __future__ import annotations

from data_prep.image_schema import ImageManifest, read_image_manifest
from data_prep.shard_schema import Manifest, file_sha256, read_manifest
from pretrain.config import ConfigError, DataConfig, LanguageRunConfig, RunConfig
from pretrain.image_config import ImageDataConfig
from pretrain.vision_config import VisionRunConfig


def check_run(cfg: RunConfig) -> None:
    """Check the manifest of the run's dataset, which is a local folder.

    Raises FileNotFoundError (no manifest), ConfigError (the config asks for what the dataset is not) or ValueError (a dataset
    of another kind, or a manifest that cannot be read).
    """
    if isinstance(cfg, VisionRunConfig):
        check_image_manifest(read_image_manifest(cfg.data.path), cfg.data, cfg.model.n_classes)
    elif isinstance(cfg, LanguageRunConfig):
        check_manifest(read_manifest(cfg.data.path), cfg.data, cfg.model.vocab_size)


def check_manifest(manifest: Manifest, cfg: DataConfig, vocab_size: int) -> None:
    """Raise ConfigError unless vocabulary, tokenizer and rows are what `cfg` asks for."""
    if manifest.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}, but {cfg.path} was tokenized with {manifest.tokenizer_name}, whose ids "
            f"reach {manifest.vocab_size - 1}: set model.vocab_size={manifest.vocab_size} or more, or prepare the data "
            "with the tokenizer that the model is for"
        )
    if cfg.tokenizer:
        found = file_sha256(cfg.tokenizer)
        if found != manifest.tokenizer_sha256:
            raise ConfigError(
                f"data.tokenizer={cfg.tokenizer} has hash {found[:16]}..., but {cfg.path} was tokenized with "
                f"{manifest.tokenizer_name}, {manifest.tokenizer_sha256[:16]}...: name that file, or prepare the data again"
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
