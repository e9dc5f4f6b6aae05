"""A model out of a checkpoint, for sampling, evaluation and export: no ranks, no optimizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from modeling.backbone import Backbone
from modeling.checkpoint_reader import CheckpointError, Reader
from modeling.language import LanguageModel
from modeling.models import build_model
from pretrain.checkpoint import candidates, checkpoint_dir
from pretrain.config import LanguageRunConfig, RunConfig
from pretrain.config_io import config_from_dict
from pretrain.config_sections import DataConfig
from pretrain.image_config import ImageDataConfig

AnyData = TypeVar("AnyData", DataConfig, ImageDataConfig)


def find_checkpoint(folder: Path) -> Path:
    """`folder` if it is a checkpoint, the newest one of it if it is a run. Raises CheckpointError where it is neither."""
    if (folder / "manifest.json").exists():
        return folder
    newest = candidates(checkpoint_dir(folder))
    if not newest:
        raise CheckpointError(f"{folder} is neither a checkpoint nor a run that has one")
    return newest[0]


def load_model(folder: Path, *, weights: str = "auto") -> tuple[Backbone, RunConfig]:
    """The whole model of a checkpoint or of a run's newest one, float32 on the CPU, and the run's config.

    `weights` is one of WEIGHTS: the moving average where the run keeps one, unless told otherwise.

    Raises CheckpointError where there is none, or where its files are not what was written.
    """
    reader = Reader(find_checkpoint(folder))
    reader.verify()
    cfg = config_from_dict(reader.manifest["config"])
    reader.check_model(cfg.model)
    model = build_model(cfg.model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in reader.weights(cfg.model.n_heads, weights):
            parameters[name].copy_(value)
    return model.eval(), cfg


def load_language_model(folder: Path) -> tuple[LanguageModel, LanguageRunConfig]:
    """As `load_model`, for what only language models do. Raises CheckpointError for another kind of run too."""
    model, cfg = load_model(folder)
    if not isinstance(model, LanguageModel) or not isinstance(cfg, LanguageRunConfig):
        raise CheckpointError(f"{folder} is of task={cfg.task}: this is for language models")
    return model, cfg


def data_at(data: AnyData, path: str | None) -> AnyData:
    """A run's data, at `path` where one is given. A folder is read where it lies: the run's cache holds the run's own dataset."""
    if path is None:
        return data
    return replace(data, path=path, cache_dir=data.cache_dir if "://" in path else "")
