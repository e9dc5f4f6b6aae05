"""Starting a run from weights that another training left: imported, exported, or another run's. Every rank calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modeling.backbone import Backbone
from modeling.checkpoint_reader import CheckpointError, Reader
from modeling.config import BackboneConfig
from modeling.model_folder import CONFIG_NAME, WEIGHTS_NAME, ModelFolderError, read_config
from modeling.models import logical_shapes
from modeling.tensor_parallel import layout_of, local_part
from pretrain.checkpoint import candidates, checkpoint_dir
from pretrain.checkpoint_model import find_checkpoint
from pretrain.config import RunConfig
from pretrain.config_io import config_from_dict
from pretrain.config_sections import ConfigError
from pretrain.distributed import RankError, Ranks

logger = logging.getLogger(__name__)

FREE = ("widths", "chunk_size", "expand", "dropout", "drop_path")
"""Fields of the model that may differ: they change how it is trained and run, not what its weights mean."""


def warm_start(model: Backbone, cfg: RunConfig, ranks: Ranks) -> None:
    """Fill `model` with what cfg.checkpoint.init_from names, unless the run has checkpoints to resume from.

    Call it before the engine takes its master copies. Holds one parameter in memory beside the model. Raises ConfigError
    on all ranks where the source is of other sizes, damaged or not there.
    """
    source = cfg.checkpoint.init_from
    if not source:
        return
    has_own = ranks.gather_objects(bool(candidates(checkpoint_dir(cfg.run_dir))) if ranks.is_main else None)[0]
    if has_own and cfg.checkpoint.resume != "never":
        return
    try:
        ranks.attempt(lambda: _fill(model, Path(source), cfg.model, ranks), (OSError, CheckpointError, ValueError))
    except RankError as error:
        raise ConfigError(f"checkpoint.init_from: {error}") from None
    if ranks.is_main:
        logger.info("weights from %s; optimizer and data start anew", source)


@torch.no_grad()
def _fill(model: Backbone, source: Path, cfg: BackboneConfig, ranks: Ranks) -> None:
    theirs, weights = _open(source)
    if type(theirs) is not type(cfg):
        raise ValueError(f"{source} holds a {_kind(theirs)}, the run trains a {_kind(cfg)}: take another source")
    differing = {
        name: (getattr(theirs, name), getattr(cfg, name))
        for name in vars(cfg)
        if name not in FREE and getattr(theirs, name) != getattr(cfg, name)
    }
    if differing:
        said = ", ".join(f"model.{name}={mine}, there {other}" for name, (other, mine) in differing.items())
        raise ValueError(f"{source} is another model: {said}. Take the sizes of its config")
    parameters = dict(model.named_parameters())
    filled = set()
    for name, value in weights:
        part = local_part(value, layout_of(name), cfg.n_heads, ranks.tp.size, ranks.tp.rank)
        parameters[name].copy_(part)
        filled.add(name)
    if filled != parameters.keys():
        raise ValueError(f"{source} lacks {', '.join(sorted(parameters.keys() - filled))}: export or import it again")


def _kind(cfg: BackboneConfig) -> str:
    return type(cfg).__name__.removesuffix("Config").lower() + " model"


def _open(source: Path) -> tuple[BackboneConfig, Iterator[tuple[str, Tensor]]]:
    """The config, and every parameter (float32, CPU) one at a time, of a model folder, a run or a checkpoint."""
    if (source / CONFIG_NAME).exists():
        theirs, held = read_config(source)
        if set(held) != {theirs.n_heads}:
            raise ModelFolderError(f"{source} holds a mix that was cut out: start from a whole model")
        return theirs, _folder_weights(source, theirs)
    folder = find_checkpoint(source)
    reader = Reader(folder)
    reader.verify()
    theirs = config_from_dict(reader.manifest["config"]).model
    reader.check_model(theirs)
    return theirs, reader.weights(theirs.n_heads)


def _folder_weights(folder: Path, theirs: BackboneConfig) -> Iterator[tuple[str, Tensor]]:
    path = folder / WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name, shape in logical_shapes(theirs).items():
                value = file.get_tensor(name) if name in names else None
                if value is None or tuple(value.shape) != shape:
                    raise ModelFolderError(
                        f"{path}: {name} is {'absent' if value is None else tuple(value.shape)}, {CONFIG_NAME} says {shape}"
                    )
                yield name, value.float()
    except (OSError, SafetensorError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error}): export it again") from None
