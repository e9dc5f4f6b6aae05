"""The tasks that there are, by the run's config."""

from __future__ import annotations

from pretrain.config import LanguageRunConfig, RunConfig
from pretrain.language_task import LanguageTask
from pretrain.task import Task
from pretrain.vision_config import VisionRunConfig


def task_of(cfg: RunConfig) -> Task:
    """What `cfg` trains."""
    if isinstance(cfg, VisionRunConfig):
        from pretrain.vision_task import VisionTask  # image decoders and transforms, which no language model needs

        return VisionTask(cfg)
    assert isinstance(cfg, LanguageRunConfig)
    return LanguageTask(cfg)
