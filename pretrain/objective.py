"""What one optimizer step minimises: which widths train, on which tokens, and how their losses add up."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.config import LanguageConfig
from modeling.loss import Loss, next_token_loss
from modeling.nesting import LayerWidths
from pretrain.config import NestingConfig, RunConfig
from pretrain.data import Batch
from pretrain.engine import Engine
from pretrain.passes import GraphedPasses, PassInputs


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
    model: LanguageConfig, cfg: NestingConfig, weights: tuple[float, ...], seed: int, step: int
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


def draws_per_micro_batch(model: LanguageConfig, cfg: NestingConfig) -> int:
    """Micro-batches that the widths of a step take from the data for each one they train on: 1 where they share it."""
    if cfg.draw == "shared":
        return 1
    return 3 if cfg.rule == "sandwich" else len(model.widths)


def add_gradients(
    engine: Engine,
    batches: Sequence[Batch],
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
    teacher_btd: Tensor | None = None
    for i, width in enumerate(widths):
        batch = batches[i % len(batches)]
        scale = torch.full((), width.weight / n_micro, device=batch.tokens_bt.device)
        inputs = PassInputs(batch.tokens_bt, batch.targets_bt, batch.seq_idx_bt, scale)
        if engine.graphs is not None:
            yield width, engine.graphs(width.layers, inputs)
            continue
        loss, hidden_btd = _pass(engine, width.layers, inputs, cfg, teacher_btd, last=last and i == len(widths) - 1)
        if cfg.nesting.distill_weight and i == 0:
            teacher_btd = hidden_btd.detach()
        yield width, loss


def _pass(
    engine: Engine,
    widths: LayerWidths,
    inputs: PassInputs,
    cfg: RunConfig,
    teacher_btd: Tensor | None = None,
    *,
    last: bool,
) -> tuple[Loss, Tensor]:
    """One forward and backward: the loss, detached, and the final hidden states."""
    hidden_btd = engine(inputs.tokens_bt, widths, seq_idx_bt=inputs.seq_idx_bt)
    loss = next_token_loss(
        engine.model,
        hidden_btd,
        inputs.targets_bt,
        teacher_btd=teacher_btd,
        distill_weight=cfg.nesting.distill_weight,
        temperature=cfg.nesting.distill_temperature,
    )
    engine.backward(loss.total * inputs.scale, last=last)
    return Loss(loss.total.detach(), loss.next_token), hidden_btd


def graphed(engine: Engine, cfg: RunConfig) -> GraphedPasses:
    """This engine's passes as CUDA graphs."""
    return GraphedPasses(lambda widths, inputs: _pass(engine, widths, inputs, cfg, last=False)[0])
