"""The search on losses that are known for every mix: what it finds, what it costs, what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from modeling.config import LanguageConfig
from modeling.flops import forward_flops_per_token, language_parameters
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.nesting import LayerWidths
from modeling.search import (
    Search,
    flops_of,
    interpolated,
    latency_of,
    memory_of,
    parameters_of,
    read_widths,
    write_presets,
)
from pretrain import evaluate, retrieval, search

CFG = LanguageConfig(n_layers=5, d_model=64, headdim=16, widths=(8, 4, 2, 1), d_state=16, vocab_size=100)
WORTH = (0.9, 0.1, 0.5, 0.3, 0.7)


def additive(widths: LayerWidths) -> float:
    return 3 - sum(worth * (1 - 1 / n) for worth, n in zip(WORTH, widths, strict=True))


def entangled(widths: LayerWidths) -> float:
    """Layers 0 and 4 are worth their width only together: what each is worth alone misleads."""
    together = min(widths[0], widths[4])
    return 3 - 0.08 * (widths[1] + widths[2] + widths[3]) / 8 - 0.3 * together / 8


def cheapest_loss(loss: object, budget: float, wide: int, narrow: int) -> float:
    """The least loss of any mix of the two widths within the budget, by trying all of them."""
    cost = flops_of(CFG)
    mixes = (m for m in itertools.product((wide, narrow), repeat=CFG.n_layers) if cost(m) <= budget)
    return min(loss(mix) for mix in mixes)  # type: ignore[operator]


def test_a_loss_beyond_what_a_perplexity_can_be_is_said() -> None:
    assert evaluate.line_of({"loss": 1.0}) == "loss 1.0000, perplexity 2.718"
    assert evaluate.line_of({"loss": 42102.3408}) == "loss 42102.3408, perplexity inf"


def test_the_layers_worth_most_are_widened_first() -> None:
    search, cost = Search(CFG, additive, flops_of(CFG)), flops_of(CFG)
    found = search.best(cost((8, 4, 4, 4, 8)))
    assert found.widths == (8, 4, 4, 4, 8)
    assert not found.trained
    assert search.n_losses <= 2 + 2 * CFG.n_layers + 1


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("pair", [(8, 4), (4, 2), (2, 1)])
def test_where_layers_add_up_no_mix_of_the_two_widths_is_better(k: int, pair: tuple[int, int]) -> None:
    budget = flops_of(CFG)((pair[0],) * k + (pair[1],) * (5 - k))
    found = Search(CFG, additive, flops_of(CFG)).best(budget)
    assert found.loss == pytest.approx(cheapest_loss(additive, budget, *pair))
    assert found.cost <= budget


def test_exchanges_mend_what_single_layers_hide() -> None:
    budget = flops_of(CFG)((8, 1, 1, 1, 8))
    cfg_pair = LanguageConfig(n_layers=5, d_model=64, headdim=16, widths=(8, 1), d_state=16, vocab_size=100)
    without = Search(cfg_pair, entangled, flops_of(CFG)).best(budget)
    with_exchanges = Search(cfg_pair, entangled, flops_of(CFG)).best(budget, trials=20)
    best = cheapest_loss(entangled, budget, 8, 1)
    assert with_exchanges.loss <= without.loss
    assert with_exchanges.loss == pytest.approx(best)


def test_exchanges_are_bounded() -> None:
    asked = 0

    def counted(widths: LayerWidths) -> float:
        nonlocal asked
        asked += 1
        return entangled(widths)

    search = Search(CFG, counted, flops_of(CFG))
    search.best(flops_of(CFG)((8, 8, 4, 4, 4)), trials=3)
    assert asked == search.n_losses <= 2 + 2 * CFG.n_layers + 1 + 3


def test_the_curve_falls_from_trained_width_to_trained_width() -> None:
    search = Search(CFG, additive, flops_of(CFG))
    points = search.curve(2)
    assert [p.name for p in points if p.trained] == ["8h", "4h", "2h", "1h"]
    costs = [p.cost for p in points]
    assert costs == sorted(costs, reverse=True)
    assert len([p for p in points if not p.trained]) == 6
    trained = search.trained()
    for point in points:
        if not point.trained:
            # Additive layers of unequal worth: taking the best first lies below the straight line.
            assert point.loss < interpolated(trained, point.cost)


def test_a_budget_is_kept_or_refused() -> None:
    search, cost = Search(CFG, additive, flops_of(CFG)), flops_of(CFG)
    assert search.best(1e18).widths == CFG.layer_widths(8)
    assert search.best(cost(CFG.layer_widths(2))).widths == CFG.layer_widths(2)
    with pytest.raises(ValueError, match="narrowest trained width already costs"):
        search.best(cost(CFG.layer_widths(1)) - 1)
    with pytest.raises(ValueError, match="budget nan"):
        search.best(math.nan)
    with pytest.raises(ValueError, match="outside the trained widths"):
        interpolated(search.trained(), 1.0)


def test_costs_are_what_they_say() -> None:
    mix = (8, 4, 2, 1, 8)
    assert parameters_of(CFG)(mix) == language_parameters(CFG, mix).total
    assert flops_of(CFG)(mix) == forward_flops_per_token(CFG, mix)
    model = LanguageModel(CFG)
    model.init_weights(0)
    for batch in (1, 3):
        states = InferenceModel(model).empty_state(batch, mix).n_bytes
        memory = memory_of(CFG, batch=batch, weight_bytes=4, state_bytes=4)(mix)
        assert memory == 4 * language_parameters(CFG, mix).total + states
    latency = latency_of(CFG, {8: 1.0, 4: 0.5, 2: 0.6, 1: 0.2})
    assert latency(CFG.layer_widths(8)) == pytest.approx(1.0)
    assert latency((8, 8, 1, 1, 1)) == pytest.approx((2 * 1.0 + 3 * 0.2) / 5)
    assert latency(CFG.layer_widths(4)) == pytest.approx(0.6), "a wider layer is never cheaper"


def test_presets_are_found_by_name(tmp_path: Path) -> None:
    path = tmp_path / "presets.json"
    points = Search(CFG, additive, flops_of(CFG)).curve(1)
    write_presets(path, CFG, "flops", points)
    for point in points:
        assert read_widths(f"@{path}:{point.name}", 8, 5) == point.widths
    assert read_widths("1/2", 8, 5) == (4,) * 5
    (tmp_path / "curve.png").write_bytes(b"\x89PNG")
    cases = {
        f"@{path}:9h": "no preset '9h': it has 8h",
        "@nowhere.json:1": "no presets file",
        f"@{tmp_path / 'curve.png'}:1": "curve.png is no presets file",
        "@name": "write @FILE:NAME",
    }
    for text, message in cases.items():
        with pytest.raises(ValueError, match=message):
            read_widths(text, 8, 5)
    with pytest.raises(ValueError, match="the model has 6 of 8"):
        read_widths(f"@{path}:8h", 8, 6)
    about = json.loads(path.read_text())
    about["presets"]["8h"]["widths"][2] = 99
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="layer 2: width 99"):
        read_widths(f"@{path}:8h", 8, 5)


@pytest.mark.parametrize("tool", [evaluate, retrieval, search])
def test_where_nothing_can_be_written_is_said_before_the_work(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = "--plot" if tool is search else "--json"
    for path, message in ((tmp_path / "none" / "x", "there is no folder"), (tmp_path, "cannot be written as a file")):
        assert tool.main(["no run", option, str(path)]) == 2
        assert message in capsys.readouterr().err
