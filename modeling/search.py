"""Mix'n'Match: which layers should be wide when not all can be. A cheap search over per-layer widths under a budget.

Between two trained widths, each layer is scored by what it is worth on its own: how much the loss falls when it alone is
widened in the narrow model, and how much it rises when it alone is narrowed in the wide one. The layers worth most are
widened until the budget is spent (2 n_layers losses for all budgets between the two widths); then single exchanges are
tried, likeliest first, and kept where the loss falls. Losses and costs are functions, so any data, any machine and any
kind of cost will do.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from modeling.config import LanguageConfig
from modeling.flops import forward_flops_per_token, language_parameters
from modeling.nesting import LayerWidths, check_layer_widths, parse_layer_widths

Measure = Callable[[LayerWidths], float]
PRESETS_FORMAT = "matmamba-presets"


@dataclass(frozen=True)
class Point:
    """One submodel on the accuracy-cost curve."""

    name: str
    widths: LayerWidths
    cost: float
    """In the unit of the cost function."""
    loss: float
    """Nats a token, on the data that the search chose by."""
    trained: bool
    """Whether this is a uniform width of the training; else a mix that was found."""


class Search:
    """Finds mixes of one model's trained widths. Every loss is computed once."""

    def __init__(self, cfg: LanguageConfig, loss_of: Measure, cost_of: Measure) -> None:
        """`loss_of` is a submodel's loss, `cost_of` what it costs: never less where a layer is wider."""
        self.cfg, self._loss_of, self._cost_of = cfg, loss_of, cost_of
        self._losses: dict[LayerWidths, float] = {}
        self._worth: dict[tuple[int, int], list[float]] = {}

    @property
    def n_losses(self) -> int:
        """Submodels evaluated so far: what the search has cost."""
        return len(self._losses)

    def loss(self, widths: LayerWidths) -> float:
        """The loss of `widths`."""
        if widths not in self._losses:
            self._losses[widths] = self._loss_of(widths)
        return self._losses[widths]

    def trained(self) -> list[Point]:
        """The trained uniform widths, widest first."""
        points = []
        for n_heads in self.cfg.widths:
            widths = self.cfg.layer_widths(n_heads)
            name = f"{n_heads}h"
            points.append(Point(name, widths, self._cost_of(widths), self.loss(widths), trained=True))
        return points

    def best(self, budget: float, *, trials: int = 0) -> Point:
        """The best submodel found that costs at most `budget`, after up to `trials` exchanges.

        Raises ValueError where even the narrowest trained width costs more.
        """
        ladder = [self.cfg.layer_widths(n_heads) for n_heads in self.cfg.widths]
        if not self._cost_of(ladder[-1]) <= budget:  # also where the budget is not a number
            raise ValueError(
                f"budget {budget:g}: the narrowest trained width already costs {self._cost_of(ladder[-1]):g}; give more"
            )
        i = next(i for i, widths in enumerate(ladder) if self._cost_of(widths) <= budget)
        widths = ladder[i]
        if i > 0:
            wide, narrow = self.cfg.widths[i - 1], self.cfg.widths[i]
            for layer in self._by_worth(wide, narrow):
                wider = _with(widths, layer, wide)
                if self._cost_of(wider) <= budget:
                    widths = wider
            widths = self._exchange(widths, wide, narrow, budget, trials)
        return Point(f"{budget:g}", widths, self._cost_of(widths), self.loss(widths), len(set(widths)) == 1)

    def curve(self, points_between: int, *, trials: int = 0) -> list[Point]:
        """The trained widths and, between each two, mixes at `points_between` evenly spaced costs; dearest first."""
        trained = self.trained()
        points = [trained[0]]
        for wide, narrow in itertools.pairwise(trained):
            for i in range(points_between, 0, -1):
                budget = narrow.cost + (wide.cost - narrow.cost) * i / (points_between + 1)
                found = self.best(budget, trials=trials)
                if not found.trained:
                    points.append(found)
            points.append(narrow)
        return points

    def _by_worth(self, wide: int, narrow: int) -> list[int]:
        """Layers in falling order of what widening them from `narrow` to `wide` heads is worth."""
        if (wide, narrow) not in self._worth:
            all_wide, all_narrow = self.cfg.layer_widths(wide), self.cfg.layer_widths(narrow)
            # Averaging the two ends: a layer's worth depends on how wide the others are, and they will be mixed.
            self._worth[wide, narrow] = [
                (self.loss(all_narrow) - self.loss(_with(all_narrow, layer, wide)))
                + (self.loss(_with(all_wide, layer, narrow)) - self.loss(all_wide))
                for layer in range(self.cfg.n_layers)
            ]
        worth = self._worth[wide, narrow]
        return sorted(range(self.cfg.n_layers), key=lambda layer: -worth[layer])

    def _exchange(self, widths: LayerWidths, wide: int, narrow: int, budget: float, trials: int) -> LayerWidths:
        """Swap a wide layer with a narrow one while the loss falls, nearest in worth first."""
        worth = self._worth[wide, narrow]
        improved = True
        while improved:
            improved = False
            pairs = [
                (out, into)
                for out in range(len(widths))
                for into in range(len(widths))
                if widths[out] == wide and widths[into] == narrow
            ]
            for out, into in sorted(pairs, key=lambda pair: worth[pair[0]] - worth[pair[1]]):
                swapped = _with(_with(widths, out, narrow), into, wide)
                known = swapped in self._losses
                if self._cost_of(swapped) > budget or (trials == 0 and not known):
                    continue
                trials -= not known
                if self.loss(swapped) < self.loss(widths):
                    widths, improved = swapped, True
                    break
        return widths


def interpolated(trained: Sequence[Point], cost: float) -> float:
    """The loss at `cost` on straight lines between the trained widths. Raises ValueError outside them."""
    for wide, narrow in itertools.pairwise(trained):
        if narrow.cost <= cost <= wide.cost:
            share = (cost - narrow.cost) / (wide.cost - narrow.cost)
            return narrow.loss + share * (wide.loss - narrow.loss)
    raise ValueError(f"cost {cost:g} is outside the trained widths' {trained[-1].cost:g} to {trained[0].cost:g}")


def parameters_of(cfg: LanguageConfig) -> Measure:
    """Cost: parameters of the submodel."""
    return lambda widths: float(language_parameters(cfg, widths).total)


def flops_of(cfg: LanguageConfig) -> Measure:
    """Cost: forward FLOPs a token."""
    return lambda widths: float(forward_flops_per_token(cfg, widths))


def memory_of(cfg: LanguageConfig, *, batch: int, weight_bytes: int, state_bytes: int) -> Measure:
    """Cost: bytes of the submodel cut out, and of `batch` sequences' states."""

    def cost(widths: LayerWidths) -> float:
        taps = cfg.d_conv - 1
        conv = sum(taps * (2 * cfg.d_state + n * cfg.headdim) for n in widths) * weight_bytes
        scan = sum(n * cfg.headdim * cfg.d_state for n in widths) * state_bytes
        return float(language_parameters(cfg, widths).total * weight_bytes + batch * (conv + scan))

    return cost


def latency_of(cfg: LanguageConfig, step_s: dict[int, float]) -> Measure:
    """Cost: seconds of a decoding step, out of those measured at the trained uniform widths.

    A layer's share is the step's over the number of layers, so a mix costs the mean of its layers' steps. The times are
    made never to fall with width: noise would otherwise make a wider layer cheaper.
    """
    falling, most = {}, 0.0
    for n_heads in sorted(step_s):
        most = max(most, step_s[n_heads])
        falling[n_heads] = most
    return lambda widths: sum(falling[n] for n in widths) / cfg.n_layers


def write_presets(path: Path, cfg: LanguageConfig, cost_name: str, points: Sequence[Point]) -> None:
    """Write the points as presets that `read_preset` finds by name."""
    about = {"format": PRESETS_FORMAT, "n_heads": cfg.n_heads, "n_layers": cfg.n_layers, "cost": cost_name}
    presets = {point.name: {k: v for k, v in asdict(point).items() if k != "name"} for point in points}
    path.write_text(json.dumps({**about, "presets": presets}, indent=1) + "\n")


def read_widths(text: str, n_heads: int, n_layers: int) -> LayerWidths:
    """Layer widths from what people write (`nesting.parse_layer_widths`) or from presets: "@FILE:NAME".

    Raises ValueError where the file holds no such preset, or one of another model.
    """
    if not text.startswith("@"):
        return parse_layer_widths(text, n_heads, n_layers)
    file, _, name = text[1:].rpartition(":")
    if not file:
        raise ValueError(f"width {text!r}: write @FILE:NAME, as in @presets.json:4h")
    try:
        about = json.loads(Path(file).read_text())
        if about["format"] != PRESETS_FORMAT or (about["n_heads"], about["n_layers"]) != (n_heads, n_layers):
            raise ValueError(
                f"{file} has presets of {about['n_layers']} layers of {about['n_heads']} heads, the model has {n_layers} "
                f"of {n_heads}: search with this model"
            )
        presets: dict[str, dict[str, object]] = about["presets"]
        if name not in presets:
            raise ValueError(f"{file} has no preset {name!r}: it has {', '.join(presets)}")
        widths = presets[name]["widths"]
        if not isinstance(widths, list) or not all(isinstance(n, int) for n in widths):
            raise ValueError(f"{file}: preset {name!r} is no list of head counts")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no presets file ({error!r})") from None
    check_layer_widths(widths, n_heads, n_layers, 1)
    return tuple(widths)


def _with(widths: LayerWidths, layer: int, n_heads: int) -> LayerWidths:
    return (*widths[:layer], n_heads, *widths[layer + 1 :])
