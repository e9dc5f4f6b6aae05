"""What one optimizer step minimises: which widths train, on which tokens, and how their losses add up."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling.config import BackboneConfig
from modeling.loss import Loss
from modeling.nesting import LayerWidths
from pretrain.config import RunConfig
from pretrain.config_sections import NestingConfig
from pretrain.distributed import Ranks
from pretrain.engine import Engine
from pretrain.passes import GraphedPasses
from pretrain.tasks import task_of


@dataclass(frozen=True)
class WeightedWidth:
    """A width that trains in this step, and the weight of its loss."""

    n_heads: int
    """The trained width that this pass is of, or, of a mix, its narrower one."""
    weight: float
    layers: LayerWidths
    """What runs: n_heads in every layer, or a mix."""

    @property
    def is_mix(self) -> bool:
        """Whether this is not the trained width itself."""
        return set(self.layers) != {self.n_heads}


def step_widths(
    model: BackboneConfig, cfg: NestingConfig, weights: tuple[float, ...], seed: int, step: int
) -> list[WeightedWidth]:
    """The widths of step `step`, widest first. A function of the seed and the step, so a resumed run draws the same.

    sandwich keeps the sum of the weights: the drawn widths' weights are scaled up to it. With cfg.mix_rate one width may be
    a mix of itself and the next wider one, at the same weight.
    """
    chosen = list(range(len(model.widths)))
    if cfg.rule == "sandwich":
        drawn = random.Random(f"{seed}:{step}").choice(chosen[1:-1])
        chosen = [0, drawn, chosen[-1]]
    scale = sum(weights) / sum(weights[i] for i in chosen)
    layers = [model.layer_widths(model.widths[i]) for i in chosen]
    drawing = random.Random(f"{seed}:{step}:mix")
    if drawing.random() < cfg.mix_rate:
        place = drawing.randrange(1, len(chosen))
        pair = model.widths[chosen[place] - 1 : chosen[place] + 1]
        layers[place] = tuple(drawing.choice(pair) for _ in range(model.n_layers))
    return [
        WeightedWidth(n_heads=model.widths[i], weight=weights[i] * scale, layers=widths)
        for i, widths in zip(chosen, layers, strict=True)
    ]


def add_gradients(
    engine: Engine,
    batches: Sequence[Any],
    widths: Sequence[WeightedWidth],
    cfg: RunConfig,
    *,
    n_micro: int = 1,
    last: bool,
) -> Iterator[tuple[WeightedWidth, Loss]]:
    """Forward and backward of each width on one of a step's `n_micro` micro-batches; yields its loss, detached.

    One width's activations are alive at a time. `batches` holds one batch that all widths share, or one for each, on the
    device. `last` marks the step's last micro-batch. With distillation the first, widest one teaches the others. A loss is
    to be read before the next one is asked for. All ranks must call, and exhaust the iterator alike.
    """
    task, teacher = task_of(cfg), None
    inputs_of = [task.inputs(batch) for batch in batches]
    embedding = engine.embedding
    if embedding is not None:
        inputs_of = [inputs._replace(embedded_md=embedding.begin(inputs.tokens_bt)) for inputs in inputs_of]
    for i, width in enumerate(widths):
        inputs = inputs_of[i % len(batches)]
        inputs = inputs._replace(scale=torch.full_like(inputs.scale, width.weight / n_micro))
        gathered, after = engine.gathered, widths[i + 1 :]
        if gathered is not None and gathered.runs(width.layers):
            gathered.wait_fetched()
        if engine.graphs is not None:
            loss = engine.graphs(width.layers, inputs)
        else:
            loss, lesson = _pass(engine, width.layers, inputs, cfg, teacher, last=last and not after)
            if cfg.nesting.distill_weight and i == 0:
                teacher = lesson.detach()
        if gathered is not None and last and after:
            gathered.start_return(above=max(max(narrower.layers) for narrower in after))
        yield width, loss
    if embedding is not None:
        embedding.end(inputs_of[0].tokens_bt)


def _pass(
    engine: Engine,
    widths: LayerWidths,
    inputs: Any,
    cfg: RunConfig,
    teacher: Tensor | None = None,
    *,
    last: bool,
) -> tuple[Loss, Tensor]:
    """One forward and backward: the loss, detached, and what a narrower submodel learns from."""
    loss, lesson = task_of(cfg).loss(engine, widths, inputs, teacher)
    engine.backward(loss.total * inputs.scale, last=last)
    return Loss(loss.total.detach(), loss.cross_entropy), lesson


def graphed(engine: Engine, cfg: RunConfig, ranks: Ranks) -> GraphedPasses:
    """This engine's passes as CUDA graphs."""

    def run(widths: LayerWidths, inputs: Any) -> Loss:
        return _pass(engine, widths, inputs, cfg, last=False)[0]

    return GraphedPasses(run, ranks.agree_any)
