"""Parameter groups and the learning-rate curve, as functions. A step's rate depends on the step alone: nothing to save."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from pretrain.config_sections import OptimConfig


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], cfg: OptimConfig) -> list[dict[str, Any]]:
    """Two AdamW groups: tensors of two or more dimensions decay, all others (biases, norms, A_log, D, dt_bias) do not."""
    parameters = [parameter for _, parameter in named_parameters]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def learning_rate(step: int, cfg: OptimConfig) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up, then cosine, or constant and a final linear decay (WSD)."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    floor = cfg.lr * cfg.min_lr_ratio
    if cfg.schedule == "cosine":
        done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
        return floor + (cfg.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    # By itself no longer than what the warm-up leaves, so that the rate does not jump.
    decay_steps = cfg.decay_steps or max(1, min(cfg.steps // 5, cfg.steps - cfg.warmup_steps))
    left = (cfg.steps - step) / decay_steps
    return floor + (cfg.lr - floor) * min(1.0, max(0.0, left))
