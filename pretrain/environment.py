"""Numbers that the environment sets (docs/slurm.md), read in one place and checked before anything is built on them."""

from __future__ import annotations

import math
import os

from pretrain.config_sections import ConfigError


def hang_seconds(default: float) -> float:
    """HANG_SECONDS: least time without a step before the watchdog acts. Raises ConfigError where it is not positive."""
    return _number("HANG_SECONDS", default)


def lost_seconds(default: float) -> float:
    """LOST_SECONDS: silence after which a rank counts as lost. Raises ConfigError where it is not positive."""
    return _number("LOST_SECONDS", default)


def all_reduce_gb_s(default: float) -> float:
    """ALLREDUCE_GB_S: slowest all-reduce that a run starts with; 0: any. Raises ConfigError where it is negative."""
    return _number("ALLREDUCE_GB_S", default, may_be_zero=True)


def check_environment() -> None:
    """Raise ConfigError where any of them cannot be used."""
    for read in (hang_seconds, lost_seconds, all_reduce_gb_s):
        read(1.0)


def _number(name: str, default: float, *, may_be_zero: bool = False) -> float:
    """The variable `name`; `default` where it is not set, or empty."""
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
        raise ConfigError(
            f"{name}={text}: must be a {'number from 0 on' if may_be_zero else 'positive number'}, or unset"
        )
    return value
