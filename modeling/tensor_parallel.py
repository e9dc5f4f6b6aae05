"""The whole tensor-parallel story: what is sharded, what is replicated, where the collectives are.

| Parameter                                                   | Layout over tp                  | Gradient               |
|---|---|---|
| in_z, in_x, in_dt rows; conv_x; A_log, D, dt_bias; norm     | by head, strided (HEAD_ROWS)    | local                  |
| out columns                                                 | by head, strided (HEAD_COLUMNS) | local                  |
| in_bc, conv_bc: B and C, one group that feeds every head    | replicated (SHARED)             | partial: summed over tp, once |
| embedding, which is also the head                           | by vocabulary (VOCAB_ROWS)      | local                  |
| norms of the residual stream                                | replicated (BETWEEN)            | identical on each rank; with sequence parallelism partial: summed over tp, once |
| vision: patch embedding, positions, class token             | replicated (BETWEEN)            | as the norms'          |
| vision: head                                                | replicated (REPLICATED)         | identical on each rank: all classify the same features |

Partial gradients are summed where backward reaches the weight, or with `sums_later` by whoever takes the step, once for
all its passes (`is_partial` says which).

With sequence parallelism each rank holds its share of a micro-batch's tokens between the mixers, so that norms, additions
and what they keep for backward are done once and not tp times: the all-reduce after a mixer becomes a reduce-scatter, and
an all-gather before the next one. Tokens are flattened (batch, then time), so any micro-batch whose tokens tp divides fits.

What a mixer sends runs beside its matrix products on a GPU (`beside`): its inputs come in while this rank's own tokens are
multiplied, its outputs go out in halves, and its input's gradient is summed while those of the weights are computed. The
last is Megatron-LM's LinearWithGradAccumulationAndAsyncCommunication. Here they are collectives; modeling/peer_exchange.py
does the same with copies between GPUs that see each other's memory. Narrow widths can do without: modeling/gathered_widths.py.

`tp = 1` runs the same code; a collective over one rank is the identity, inside the collective.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from modeling import nesting
from modeling.ops.products import Weight, add_product, times

with warnings.catch_warnings():
    # On import megatron-core warns, four times, of optional libraries that nothing here uses.
    warnings.simplefilter("ignore")
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )


LEAST_SPLIT = 4096
"""Tokens that this rank goes on with from which on a mixer's outputs are sent in halves: a smaller product takes little
longer than starting to send."""


class Layout(Enum):
    """How a parameter lies over tensor-parallel ranks."""

    HEAD_ROWS = "head_rows"
    HEAD_COLUMNS = "head_columns"
    VOCAB_ROWS = "vocab_rows"
    SHARED = "shared"
    BETWEEN = "between"
    REPLICATED = "replicated"

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of its own."""
        return self in (Layout.HEAD_ROWS, Layout.HEAD_COLUMNS, Layout.VOCAB_ROWS)

    @property
    def sharded_dim(self) -> int:
        """The dim of which each rank holds a part, where it does."""
        return 1 if self is Layout.HEAD_COLUMNS else 0


LAYOUTS = {
    "in_z": Layout.HEAD_ROWS,
    "in_x": Layout.HEAD_ROWS,
    "in_dt": Layout.HEAD_ROWS,
    "in_bc": Layout.SHARED,
    "conv_x": Layout.HEAD_ROWS,
    "conv_x_bias": Layout.HEAD_ROWS,
    "conv_bc": Layout.SHARED,
    "conv_bc_bias": Layout.SHARED,
    "A_log": Layout.HEAD_ROWS,
    "D": Layout.HEAD_ROWS,
    "dt_bias": Layout.HEAD_ROWS,
    "gated_norm": Layout.HEAD_ROWS,
    "out": Layout.HEAD_COLUMNS,
    "embedding": Layout.VOCAB_ROWS,
    "norm": Layout.BETWEEN,
    "norm_bias": Layout.BETWEEN,
    "final_norm": Layout.BETWEEN,
    "final_norm_bias": Layout.BETWEEN,
    "patch": Layout.BETWEEN,
    "patch_bias": Layout.BETWEEN,
    "positions": Layout.BETWEEN,
    "cls": Layout.BETWEEN,
    "head": Layout.REPLICATED,
    "head_bias": Layout.REPLICATED,
}
"""Layout of every parameter, by the last part of its name."""


def layout_of(name: str) -> Layout:
    """The layout of the parameter with this full name ("blocks.3.mixer.in_z")."""
    return LAYOUTS[name.rpartition(".")[2]]


def is_partial(name: str, *, sequence: bool) -> bool:
    """Whether each of several tensor-parallel ranks has but a part of the gradient of the parameter with this full name."""
    layout = layout_of(name)
    return layout is Layout.SHARED or (sequence and layout is Layout.BETWEEN)


class Pending(NamedTuple):
    """A collective under way."""

    result: Tensor
    """Where its result will be."""
    work: Any
    """What to wait for; None where nothing is sent."""
    given: Tensor | None = None
    """What must live until then."""

    def wait(self) -> Tensor:
        """The result. What follows on this stream sees it."""
        if self.work is not None:
            self.work.wait()
        return self.result


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the ranks that hold one replica. Methods that communicate must be called by all of them."""

    size: int = 1
    """Ranks that share a replica."""
    rank: int = 0
    """This rank's number among them."""
    group: Any = None
    """Their process group; None only where size is 1."""
    sequence: bool = False
    """Sequence parallelism: between mixers this rank holds only its share of the tokens."""
    sums_later: bool = False
    """Gradients of weights that ranks share are left partial in backward: whoever takes the step sums them."""
    peers: Any = None
    """A modeling.peer_exchange.PeerExchange, where the ranks write into each other's memory."""

    @property
    def beside(self) -> Any:
        """What has `gather_times`, `gather_times_adding`, `times_leave` and `start_times_sum`: copies between peers, or these."""
        return self.peers or self

    def enter(self, x: Tensor) -> Tensor:
        """Into a sharded layer: all tokens (dim 0) on every rank; the ranks' gradients are summed backward."""
        if self.size == 1:
            return x
        return _Gather.apply(x, self) if self.sequence else copy_to_tensor_model_parallel_region(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Out of a sharded layer: the ranks' parts summed; with sequence parallelism each keeps its share of the tokens."""
        if self.size == 1:
            return x
        return _Scatter.apply(x, self) if self.sequence else self.sum(x)

    def gather_times(self, x_md: Tensor, weight_ed: Weight) -> tuple[Tensor, Tensor]:
        """All tokens of `enter`'s result, and its product with `weight_ed` transposed (m e). Outside autograd.

        This rank's own tokens are multiplied while the others' are on their way.
        """
        if self.size == 1 or not self.sequence:
            return x_md, times(x_md, weight_ed)
        n = x_md.shape[0]
        product_me = x_md.new_empty(n * self.size, weight_ed.shape[0])
        arriving = _gather(x_md, self, beside=True)
        before, after = n * self.rank, n * (self.rank + 1)
        times(x_md, weight_ed, product_me[before:after])
        whole_md = arriving.wait()
        for rows in (slice(0, before), slice(after, n * self.size)):
            if rows.stop > rows.start:
                times(whole_md[rows], weight_ed, product_me[rows])
        return whole_md, product_me

    def gather_times_adding(self, grad_md: Tensor, weight_ed: Weight, total_dk: Tensor, x_mk: Tensor) -> Tensor:
        """`gather_times`' product alone (m e); adds the gathered tokens transposed times `x_mk` to `total_dk` (float32)."""
        grad_md, product_me = self.gather_times(grad_md, weight_ed)
        add_product(total_dk, grad_md.T, x_mk)
        return product_me

    def times_leave(self, x_mi: Tensor, weight_di: Weight) -> Tensor:
        """`leave` of the product of `x_mi` with `weight_di` transposed. Outside autograd.

        The first half of the tokens is sent while the second is multiplied.
        """
        if self.size == 1:
            return times(x_mi, weight_di)
        n, d = tokens_each(x_mi, self.size) if self.sequence else x_mi.shape[0], weight_di.shape[0]
        total_md, sent = x_mi.new_empty(n, d), []
        for rows in halves(n):
            if self.sequence:
                part = x_mi.new_empty(self.size, rows.stop - rows.start, d)
                for rank in range(self.size):
                    times(x_mi[rank * n : (rank + 1) * n][rows], weight_di, part[rank])
                work = dist.reduce_scatter_tensor(total_md[rows], part.flatten(0, 1), group=self.group, async_op=True)
            else:
                part = times(x_mi[rows], weight_di, total_md[rows])
                work = dist.all_reduce(part, group=self.group, async_op=True)
            sent.append(Pending(total_md, work, part))
        for half in sent:
            half.wait()
        return total_md

    def start_times_sum(self, grad_me: Tensor, weight_de: Weight) -> Pending:
        """Start what `enter` does to its result's gradient: `grad_me` times `weight_de` transposed. Outside autograd."""
        grad_md = times(grad_me, weight_de)
        if self.size == 1:
            return Pending(grad_md, None)
        if self.sequence:
            return _scatter(grad_md, self, beside=True)
        return Pending(grad_md, dist.all_reduce(grad_md, group=self.group, async_op=True))

    def share(self, weight: Tensor) -> Tensor:
        """A replicated weight that each rank uses for its own heads: its partial gradients are summed over tp, here or later."""
        return weight if self.size == 1 or self.sums_later else copy_to_tensor_model_parallel_region(weight, self.group)

    def replicate(self, weight: Tensor) -> Tensor:
        """A replicated weight that works on the tokens between mixers: which are this rank's own under sequence parallelism."""
        return self.share(weight) if self.sequence else weight

    def own(self, n_sequences: int) -> slice:
        """The sequences that this rank's share of the tokens is made of. Raises ValueError where it is not of whole ones."""
        each, rest = divmod(n_sequences, self.size)
        if rest:
            raise ValueError(f"{n_sequences} sequences do not divide into tp={self.size} parts of whole ones")
        return slice(self.rank * each, (self.rank + 1) * each)

    def part(self, x: Tensor) -> Tensor:
        """Of tokens (dim 0) that every rank has computed alike, those it goes on with: under sequence parallelism its share."""
        return _share(x, self) if self.sequence else x

    def collect(self, x: Tensor) -> Tensor:
        """All tokens (dim 0) on every rank, for what all of them do alike: each keeps its own tokens' gradient, unsummed."""
        return _Collect.apply(x, self) if self.sequence else x

    def sum(self, x: Tensor) -> Tensor:
        """Summed over tp forward, identity backward: for what every rank goes on with alike."""
        # Megatron's mapping returns a non-contiguous tensor unreduced, and writes into a contiguous one.
        return x if self.size == 1 else reduce_from_tensor_model_parallel_region(x.contiguous().clone(), self.group)

    def total(self, x: Tensor) -> Tensor:
        """A statistic over all ranks, used by each for its own part: summed over tp forward and backward."""
        return x if self.size == 1 else _SumBothWays.apply(x, self.group)

    def maximum(self, x: Tensor) -> Tensor:
        """Element-wise maximum over tp; carries no gradient."""
        x = x.detach().clone()
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x


class _SumBothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Gather(torch.autograd.Function):
    """Megatron's mapping of this kind, and the next one, ask for a CUDA device even where there is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _gather(x, tp).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter(grad, ctx.tp).wait(), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _scatter(x, tp).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.tp).wait(), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _gather(x, tp).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _share(grad, ctx.tp), None


def _gather(x: Tensor, tp: TensorParallel, *, beside: bool = False) -> Pending:
    """All ranks' tokens. With `beside` what follows on this stream runs meanwhile, until it is waited for."""
    x = x.contiguous()
    whole = x.new_empty(x.shape[0] * tp.size, *x.shape[1:])
    return Pending(whole, dist.all_gather_into_tensor(whole, x, group=tp.group, async_op=beside), x)


def _scatter(x: Tensor, tp: TensorParallel, *, beside: bool = False) -> Pending:
    """This rank's tokens of the ranks' sum. `beside` as for `_gather`."""
    x = x.contiguous()
    part = x.new_empty(tokens_each(x, tp.size), *x.shape[1:])
    return Pending(part, dist.reduce_scatter_tensor(part, x, group=tp.group, async_op=beside), x)


def _share(x: Tensor, tp: TensorParallel) -> Tensor:
    n = tokens_each(x, tp.size)
    return x[tp.rank * n : (tp.rank + 1) * n]


def tokens_each(x: Tensor, tp: int) -> int:
    """Tokens (dim 0) that each of `tp` ranks goes on with. Raises ValueError where they do not divide."""
    if x.shape[0] % tp:
        raise ValueError(
            f"sequence parallelism: {x.shape[0]} tokens (batch x time) do not divide into tp={tp} parts: choose another "
            "micro-batch or length, or parallel.sequence=false"
        )
    return x.shape[0] // tp


def filled_up(x: Tensor, multiple: int) -> Tensor:
    """`x` with its first row again and again at the end, up to a multiple of rows (dim 0)."""
    missing = -x.shape[0] % multiple
    return torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x


def halves(n_tokens: int) -> list[slice]:
    """Rows of the two halves that are sent apart; all in one where a half would not be worth a message of its own."""
    if n_tokens < LEAST_SPLIT:
        return [slice(0, n_tokens)]
    return [slice(0, n_tokens // 2), slice(n_tokens // 2, n_tokens)]


def local_shape(shape: tuple[int, ...], layout: Layout, tp: int) -> tuple[int, ...]:
    """Shape of one rank's part of a parameter of logical `shape`. Raises ValueError where tp does not divide it."""
    if not layout.is_sharded:
        return shape
    dim = layout.sharded_dim
    if shape[dim] % tp:
        raise ValueError(f"a parameter of shape {shape} laid out by {layout.value}: tp={tp} does not divide dim {dim}")
    return (*shape[:dim], shape[dim] // tp, *shape[dim + 1 :])


def local_part(full: Tensor, layout: Layout, n_heads: int, tp: int, rank: int) -> Tensor:
    """The entries of a logical parameter that `rank` holds, in its local order; `n_heads` is the full width."""
    return full[local_index(tuple(full.shape), layout, n_heads, tp, rank)]


def local_index(shape: tuple[int, ...], layout: Layout, n_heads: int, tp: int, rank: int) -> tuple[Any, ...]:
    """What to index a logical parameter with to read or write the entries that `rank` holds."""
    if not layout.is_sharded:
        return (Ellipsis,)
    if layout is Layout.VOCAB_ROWS:
        rows = nesting.vocab_rows(shape[0], tp, rank)
        return (slice(rows.start, rows.stop),)
    dim = layout.sharded_dim
    channels = nesting.rank_channels(n_heads, shape[dim] // n_heads, tp, rank)
    return (*([slice(None)] * dim), torch.tensor(channels))


def split_heads(part: Tensor, layout: Layout, n_heads: int) -> Tensor:
    """A view of a parameter by head, whose dim of `n_heads` heads' entries is split in two."""
    return part.unflatten(layout.sharded_dim, (n_heads, -1))


def by_rank(stacked: Tensor, layout: Layout, n_heads: int, tp: int) -> Tensor:
    """A view of whole parameters of `n_heads` heads, stacked over layers: in dim 0 the ranks, in dim 1 the layers, then as each
    rank's own part is after `split_heads`."""
    dim = 1 + layout.sharded_dim
    return stacked.unflatten(dim, (nesting.local_heads(n_heads, tp), tp, -1)).movedim(dim + 1, 0)
