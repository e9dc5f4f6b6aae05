"""Which collectives a step makes on one rank, how many and how large, from the config alone. Pure integers.

Letters: m tokens of a micro-batch, d model, n state, k conv taps. A pass is the forward and backward of one width over one
micro-batch: between ranks every width that is split by heads costs the same, since what crosses is d wide; the mixers of one
whose weights they gather (modeling.gathered_widths) send nothing. Votes of a few bytes between hosts (stop, save, a bad loss)
are not listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from modeling.config import LanguageConfig, VisionConfig
from modeling.flops import local_parameters
from modeling.loss import TOKENS_PER_PIECE
from pretrain.config import RunConfig

FLOAT = 4
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size, which nothing here changes: gradients are reduced in buckets of this many."""


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a rank's step."""

    what: str
    """What is sent, for people."""
    operation: str
    """all-reduce, all-gather or reduce-scatter."""
    over: str
    """tp or dp: the ranks that take part."""
    per_pass: int
    """Calls in a pass that makes any: mixers' in one of a width that is split by heads, a shared embedding's in a micro-batch's
    first or last. 0 where it is made once a step."""
    per_step: int
    """Calls in a step."""
    n_bytes: int
    """Of each: the whole tensor's, before a reduce-scatter and after an all-gather."""
    of_mixers: bool = False
    """Whether mixers make it under sequence parallelism: copies where the run has parallel.copies_between_peers."""

    @property
    def passes(self) -> int:
        """Passes of a step that make any; 0 where it is made once a step."""
        return self.per_step // self.per_pass if self.per_pass else 0

    @property
    def bytes_per_step(self) -> int:
        """All calls of a step together."""
        return self.per_step * self.n_bytes


def passes_per_step(cfg: RunConfig, world_size: int) -> int:
    """Widths that train in a step times its micro-batches on a rank."""
    return len(widths_of_a_step(cfg)) * cfg.grad_accum_steps(world_size)


def widths_of_a_step(cfg: RunConfig) -> tuple[int, ...]:
    """Heads of the widths that a step trains; a sandwich's drawn one as the widest that it can be."""
    widths = cfg.model.widths
    return (widths[0], widths[1], widths[-1]) if cfg.nesting.rule == "sandwich" else widths


def collectives(cfg: RunConfig, world_size: int, *, compute_bytes: int = 2) -> list[Collective]:
    """Every collective of a step, none where a group has one rank; activations are `compute_bytes` wide.

    Blocks that are done again in backward repeat what they receive and the norm's sum, not the sum of their outputs, which
    torch stops short of. Where ranks gather the weights of some widths (parallel.gathered_width), what a step sends depends on
    its draws: a mix counts as the width that it replaces, also where that is gathered and the mix's layers of the next wider
    one are split by heads; a sandwich's drawn width counts as the widest that it can be. Raises ConfigError where the layout
    does not fit the run.
    """
    tp, dp = cfg.parallel.tensor, cfg.data_parallel(world_size)
    found = _over_tp(cfg, world_size, compute_bytes) if tp > 1 else []
    return found + (_over_dp(cfg, world_size, tp) if dp > 1 else [])


def _over_tp(cfg: RunConfig, world_size: int, compute_bytes: int) -> list[Collective]:
    model, passes = cfg.model, passes_per_step(cfg, world_size)
    tokens, layers, d = cfg.tokens_per_pass, model.n_layers, model.d_model
    activation = tokens * d * compute_bytes
    again = 2 if cfg.parallel.activation_checkpointing == "block" else 1
    text = isinstance(model, LanguageConfig)
    head = 1 if text else 0  # a classifier's is on every rank, and its input is entered by none
    widths = widths_of_a_step(cfg)
    split = sum(n_heads > cfg.gathered_heads for n_heads in widths) * passes // len(widths)

    def of_a_pass(what: str, operation: str, count: int, n_bytes: int) -> Collective:
        return Collective(what, operation, "tp", count, count * passes, n_bytes)

    def of_mixers(what: str, operation: str, count: int, n_bytes: int, *, copied: bool = False) -> Collective:
        return Collective(what, operation, "tp", count, count * split, n_bytes, copied)

    def of_embedding(what: str, operation: str) -> Collective:
        """Once a micro-batch where its widths share what is embedded, else once a pass."""
        count = cfg.grad_accum_steps(world_size) if cfg.shares_embedding else passes
        return Collective(what, operation, "tp", 1, count, tokens * d * FLOAT)

    if cfg.parallel.sequence:
        rows = [
            of_mixers("inputs of mixers", "all-gather", again * layers, activation, copied=True),
            of_mixers("their gradients", "reduce-scatter", layers, activation, copied=True),
            of_mixers("outputs of mixers", "reduce-scatter", layers, activation, copied=True),
            of_mixers("their gradients", "all-gather", layers, activation, copied=True),
            of_a_pass("input of the head" if text else "features", "all-gather", 1, activation),
        ]
        if text:
            rows.append(of_a_pass("its gradient", "reduce-scatter", 1, activation))
            rows.append(of_embedding("embedded tokens, split", "reduce-scatter"))
            rows.append(of_embedding("their gradient", "all-gather"))
    else:
        rows = [
            of_a_pass("outputs of mixers", "all-reduce", layers, activation),
            of_a_pass("gradients of inputs of mixers" + ", head" * head, "all-reduce", layers + head, activation),
        ]
        if text:
            rows.append(of_embedding("embedded tokens", "all-reduce"))
    rows.append(of_mixers("gated norm, forward and backward", "all-reduce", (again + 1) * layers, tokens * FLOAT))
    if text:
        rows += _vocabulary(tokens, of_a_pass)
    if cfg.gathered_heads:
        rows += _of_gathered_weights(cfg, "gathered weights", "all-gather", cfg.gathered_heads)
        # As soon as no pass is left that adds to them: the widest's own heads first.
        gathered = [n_heads for n_heads in widths if n_heads <= cfg.gathered_heads]
        for n_heads, narrower in zip(gathered, [*gathered[1:], 0], strict=True):
            heads = f"heads {narrower} to {n_heads - 1}"
            rows += _of_gathered_weights(cfg, f"their gradients, {heads}", "reduce-scatter", n_heads - narrower)
    shared = _shared_weights(cfg)
    if not cfg.parallel.keeps_gradients:
        return rows + [of_a_pass(what, "all-reduce", count, math.prod(shape) * FLOAT) for what, count, shape in shared]
    for what, is_matrix in (("matrices", True), ("vectors", False)):
        numbers = sum(count * math.prod(shape) for _, count, shape in shared if (len(shape) > 1) is is_matrix)
        if numbers:
            rows.append(Collective(f"gradients of shared {what}", "all-reduce", "tp", 0, 1, numbers * FLOAT))
    return rows


def _shared_weights(cfg: RunConfig) -> list[tuple[str, int, tuple[int, ...]]]:
    """Of the weights whose gradients are partial over tp (tensor_parallel.is_partial): what, how many, the shape of each."""
    model, sequence = cfg.model, cfg.parallel.sequence
    layers, d, bc = model.n_layers, model.d_model, 2 * model.d_state
    found: list[tuple[str, int, tuple[int, ...]]] = [
        ("gradient of B/C projections", layers, (bc, d)),
        ("gradient of B/C taps", layers, (bc, model.d_conv)),
        ("gradient of B/C taps' bias", layers, (bc,)),
    ]
    if sequence:
        found.append(("gradients of norms", (layers + 1) * (2 if model.residual_norm == "layer" else 1), (d,)))
    if sequence and isinstance(model, VisionConfig):
        found += [
            ("gradient of patches", 1, (d, 3 * model.patch_size**2)),
            ("gradient of positions", 1, (model.n_tokens(model.image_size, model.image_size), d)),
            ("gradient of patches' bias", 1, (d,)),
        ]
        if model.pool == "cls":
            found.append(("gradient of the class token", 1, (1, d)))
    return found


def _of_gathered_weights(cfg: RunConfig, what: str, operation: str, n_heads: int) -> list[Collective]:
    """What a step sends of so many heads' weights over all layers: three parameters alone, the others together."""
    model = cfg.model
    heads = model.n_layers * n_heads
    # dt; taps, their bias and the norm; A, D, dt's bias
    others = model.d_model + model.headdim * (model.d_conv + 2) + 3
    matrices = heads * model.headdim * model.d_model
    return [
        Collective(f"{what}: z, x, out", operation, "tp", 0, 3, matrices * FLOAT),
        Collective(f"{what}: all else", operation, "tp", 0, 1, heads * others * FLOAT),
    ]


def _vocabulary(tokens: int, of_a_pass: Callable[[str, str, int, int], Collective]) -> list[Collective]:
    """What the loss over a vocabulary that is split sums, a piece of the tokens at a time."""
    rows = []
    for size in sorted({min(TOKENS_PER_PIECE, tokens), tokens % TOKENS_PER_PIECE or TOKENS_PER_PIECE}):
        pieces = sum(min(TOKENS_PER_PIECE, tokens - at) == size for at in range(0, tokens, TOKENS_PER_PIECE))
        if pieces:
            rows.append(of_a_pass("largest logits", "all-reduce", pieces, size * FLOAT))
            rows.append(of_a_pass("sums and targets' logits", "all-reduce", pieces, 2 * size * FLOAT))
    return rows


def _over_dp(cfg: RunConfig, world_size: int, tp: int) -> list[Collective]:
    parameters = local_parameters(cfg.model, tp)
    if cfg.parallel.keeps_gradients:
        # Two calls of each, for the matrices and, a thousandth of that, the vectors.
        return [
            Collective("gradients", "reduce-scatter", "dp", 0, 1, parameters * FLOAT),
            Collective("updated parameters", "all-gather", "dp", 0, 1, parameters * FLOAT),
        ]
    # Stage 2 keeps a shard of the gradients alone, so that each backward has to reduce its own.
    buckets = -(-parameters // BUCKET_ELEMENTS)
    passes = passes_per_step(cfg, world_size)
    n_bytes = parameters * FLOAT // buckets
    return [
        Collective("gradients", "all-reduce", "dp", buckets, buckets * passes, n_bytes),
        Collective("updated parameters", "all-gather", "dp", 0, buckets, n_bytes),
    ]
