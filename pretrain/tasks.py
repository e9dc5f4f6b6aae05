"""The tasks that there are, by the run's config."""

from __future__ import annotations

from pretrain.config import LanguageRunConfig, RunConfig
from pretrain.language_task import LanguageTask
from pretrain.task import Task
from pretrain.vision_config import VisionRunConfig
from pretrain.vision_task import VisionTask


def task_of(cfg: RunConfig) -> Task:
    """What `cfg` trains."""
    if isinstance(cfg, VisionRunConfig):
        return VisionTask(cfg)
    assert isinstance(cfg, LanguageRunConfig)
    return LanguageTask(cfg)
