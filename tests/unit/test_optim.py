"""The learning rate of every step."""

from __future__ import annotations

import itertools

import pytest

from pretrain.config_sections import OptimConfig
from pretrain.optim import learning_rate


def curve(**optim: object) -> list[float]:
    cfg = OptimConfig(**{"lr": 1.0, **optim})  # type: ignore[arg-type]
    return [learning_rate(step, cfg) for step in range(cfg.steps)]


def test_wsd_holds_the_peak_and_falls_in_the_last_fifth() -> None:
    assert curve(steps=10, warmup_steps=2, schedule="wsd") == [0.5, *[1.0] * 8, 0.5]
    assert curve(steps=10, warmup_steps=2, schedule="wsd", decay_steps=4, min_lr_ratio=0.5)[6:] == [
        1,
        0.875,
        0.75,
        0.625,
    ]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup_steps", range(40))
def test_the_rate_reaches_its_peak_and_never_jumps(schedule: str, warmup_steps: int) -> None:
    rates = curve(steps=40, warmup_steps=warmup_steps, schedule=schedule)
    assert max(rates) == 1
    falls = [before - after for before, after in itertools.pairwise(rates[max(0, warmup_steps - 1) :])]
    assert all(fall >= 0 for fall in falls)
    if len(falls) > 1 and schedule == "wsd":
        # The decay is one straight line.
        assert max(falls) == pytest.approx(falls[-1])
