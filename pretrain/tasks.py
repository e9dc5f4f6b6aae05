"""The tasks that there are, by the run's config."""

from __future__ import annotations

from pretrain.config import LanguageRunConfig, RunConfig
from pretrain.language_task import LanguageTask
from pretrain.task import Task


def task_of(cfg: RunConfig) -> Task:
    """What `cfg` trains."""
    assert isinstance(cfg, LanguageRunConfig)
    return LanguageTask(cfg)
