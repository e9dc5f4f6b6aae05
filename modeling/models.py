"""The networks that there are, by their config."""

from __future__ import annotations

from typing import Any

from modeling.backbone import Backbone
from modeling.config import BackboneConfig, LanguageConfig, VisionConfig
from modeling.language import LanguageModel
from modeling.vision import VisionModel

_CLASSES: dict[type[BackboneConfig], type[LanguageModel] | type[VisionModel]] = {
    LanguageConfig: LanguageModel,
    VisionConfig: VisionModel,
}


def build_model(cfg: BackboneConfig, **options: Any) -> Backbone:
    """The network of `cfg`; the options are those of Backbone."""
    return _CLASSES[type(cfg)](cfg, **options)


def logical_shapes(cfg: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the whole model, whatever tp is."""
    return _CLASSES[type(cfg)].logical_shapes(cfg)
