"""Which widths a step trains, as a function of the config, the seed and the step."""

from __future__ import annotations

from collections import Counter

import pytest

from modeling.config import LanguageConfig
from pretrain.config_io import config_from_dict
from pretrain.config_sections import ConfigError, NestingConfig
from pretrain.objective import WeightedWidth, step_widths

MODEL = LanguageConfig(n_layers=6, d_model=32, headdim=8, widths=(8, 4, 2, 1), vocab_size=64)
WEIGHTS = (0.25,) * 4


def widths_at(step: int, *, seed: int = 0, **nesting: object) -> list[WeightedWidth]:
    return step_widths(MODEL, NestingConfig(**nesting), WEIGHTS, seed, step)  # type: ignore[arg-type]


def test_without_mixes_every_pass_is_uniform() -> None:
    for width in widths_at(3):
        assert width.layers == MODEL.layer_widths(width.n_heads)
        assert not width.is_mix


@pytest.mark.parametrize("rule", ["all", "sandwich"])
def test_a_mix_is_of_a_width_and_the_next_wider(rule: str) -> None:
    mixes: Counter[int] = Counter()
    for step in range(300):
        widths = widths_at(step, rule=rule, mix_rate=1.0)
        assert widths[0].layers == MODEL.layer_widths(8), "the full width is always itself"
        assert sum(width.weight for width in widths) == pytest.approx(1.0)
        mixed = [width for width in widths if width.is_mix]
        assert len(mixed) <= 1
        for width in mixed:
            wider = MODEL.widths[MODEL.widths.index(width.n_heads) - 1]
            assert set(width.layers) <= {width.n_heads, wider}
            mixes[width.n_heads] += 1
    # All layers of six fall on the narrower one, which is then no mix, once in 64 draws.
    assert sum(mixes.values()) > 280
    assert set(mixes) == {4, 2, 1}


def test_the_rate_is_a_share_of_steps() -> None:
    n = sum(any(width.is_mix for width in widths_at(step, mix_rate=0.25)) for step in range(2000))
    assert 0.19 < n / 2000 < 0.30  # 0.25 x 63/64, six standard errors


def test_a_resumed_run_draws_the_same() -> None:
    assert widths_at(17, mix_rate=0.9) == widths_at(17, mix_rate=0.9)
    drawn = {tuple(width.layers for width in widths_at(17, seed=seed, mix_rate=1.0)) for seed in range(20)}
    assert len(drawn) > 10


@pytest.mark.parametrize(("rate", "widths"), [(1.5, [16, 8]), (-0.1, [16, 8]), (0.5, [16])])
def test_senseless_mixes_are_refused(rate: float, widths: list[int]) -> None:
    raw = {
        "run_dir": "runs/test",
        "model": {"n_layers": 2, "d_model": 32, "headdim": 4, "widths": widths, "vocab_size": 64},
        "data": {"path": "shards", "seq_len": 32, "tokens_per_step": 256},
        "optim": {"lr": 1e-3, "steps": 50, "warmup_steps": 5},
        "nesting": {"mix_rate": rate},
    }
    with pytest.raises(ConfigError, match="mix_rate"):
        config_from_dict(raw)
