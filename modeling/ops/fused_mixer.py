"""A whole mixer as one operation on our Triton kernels, with one backward pass of its own.

What it saves beside the plain path: each activation is read and written once by each of convolution, scan, gate and
norm; backward writes every part of the projection's gradient in place, and adds the weights' gradients to float32 sums
that all widths share, at the rows that this width uses; and a width costs a few launches, not a hundred small ones for
slices, casts and their gradients.

Letters: b batch, t time, d model, i inner (the width's channels), h heads, c channels of the convolution, n state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from modeling.ops import float8
from modeling.ops.kernels import tiles
from modeling.ops.kernels.conv import conv_backward, conv_forward
from modeling.ops.kernels.dropout import ChannelDrop
from modeling.ops.kernels.gated_norm import gated_norm_backward, gated_norm_forward, row_dots, square_sums
from modeling.ops.kernels.row_sums import ConvSums, ProjectionSums, RateSums, add_row_sums
from modeling.ops.kernels.scan_backward import scan_backward
from modeling.ops.kernels.scan_common import TimeSteps, time_steps
from modeling.ops.kernels.scan_forward import scan_outputs
from modeling.ops.kernels.scan_walks import scan_states
from modeling.ops.kernels.weights import ROW_STEP, gather_projection
from modeling.ops.products import Weight, add_product, product


class MixerWeights(NamedTuple):
    """All parameters of a mixer at its full width (this rank's part), float32, named as in modeling.mixer.Mixer."""

    in_z: Tensor
    in_x: Tensor
    in_bc: Tensor
    in_dt: Tensor
    conv_x: Tensor
    conv_x_bias: Tensor
    conv_bc: Tensor
    conv_bc_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    gated_norm: Tensor
    out: Tensor


Recompute = Literal["none", "states", "inside"]


class Shape(NamedTuple):
    """Which part of the weights runs, and the norm's constants."""

    heads: int
    """Heads of the width on this rank."""
    headdim: int
    n_channels: int
    """Channels that the gated norm averages over: those of all ranks."""
    eps: float
    recompute: Recompute = "none"
    """What backward computes again instead of keeping it. states: the scan's states, an eighth of what a mixer keeps and a
    fiftieth of its time. inside: all that follows the projection, up to the output projection; no matrix product but the
    scan's is done twice, and the step needs less than half the memory."""
    float8: bool = False
    """Multiply the projections in float8 (modeling.ops.float8)."""


Total = Callable[[Tensor], Tensor]
"""Sums a statistic over the ranks that share the channels."""
Sums = tuple[Tensor | None, ...]
"""A float32 sum for each of MixerWeights that backward adds the weight's gradient to; None: autograd gets it instead."""
NO_SUMS: Sums = (None,) * len(MixerWeights._fields)


class Sent(Protocol):
    """What is under way."""

    def wait(self) -> Tensor: ...


class Exchange(Protocol):
    """What is sent between the ranks that share the heads, beside which product: modeling.tensor_parallel.TensorParallel, or
    modeling.peer_exchange.PeerExchange."""

    def gather_times(self, x_md: Tensor, weight_ed: Weight) -> tuple[Tensor, Tensor]: ...

    def gather_times_adding(self, grad_md: Tensor, weight_ed: Weight, total_dk: Tensor, x_mk: Tensor) -> Tensor: ...

    def times_leave(self, x_mi: Tensor, weight_di: Weight) -> Tensor: ...

    def start_times_sum(self, grad_me: Tensor, weight_de: Weight) -> Sent: ...


def fused_mixer(
    x_md: Tensor,
    weights: MixerWeights,
    shape: Shape,
    exchange: Exchange,
    *,
    batch: int,
    seq_idx_bt: Tensor | None = None,
    total: Total | None = None,
    sums: Sums = NO_SUMS,
    dropping: ChannelDrop | None = None,
) -> Tensor:
    """The mixer's output (x's shape and dtype) on `batch` sequences, from a zero state; autograd goes through it.

    Equal to the plain mixer but for rounding: chunks of the scan are the kernels' own. Without `total` this rank holds
    every channel; with it all ranks must call. `dropping` is of the input projection's entries. Needs what
    `modeling.ops.kernels.usable` checks.
    """
    out: Tensor = _FusedMixer.apply(x_md, *weights, shape, exchange, batch, seq_idx_bt, total, sums, dropping)
    return out


class _FusedMixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_md: Tensor, *args: Any) -> Tensor:
        weights, (shape, exchange, batch, seq_idx, total, sums, dropping) = MixerWeights(*args[:13]), args[13:]
        heads, headdim = shape.heads, shape.headdim
        inner, bc = heads * headdim, weights.in_bc.shape[0]
        row_step = float8.STEP if shape.float8 else ROW_STEP
        projection = gather_projection(*weights[:4], heads=heads, headdim=headdim, dtype=x_md.dtype, row_step=row_step)
        into, back_from = _both_ways(projection, shape)
        x_md, projected_me = exchange.gather_times(x_md, into)
        if seq_idx is None:
            n_sequences, seq_idx = _joined(batch, len(projected_me) // batch, heads, x_md.device)
        else:
            n_sequences = batch
        projected = projected_me.unflatten(0, (n_sequences, -1))
        parts = [inner, inner + bc, heads, _filling(projected, inner, bc, heads)]
        z, xbc, dt, _ = projected.split(parts, dim=-1)
        # Dropped by each kernel that reads them, and in backward by each that writes their gradients.
        drop_z, drop_xbc, drop_dt = _drops_of(dropping, parts)
        steps = time_steps(dt, weights.dt_bias, weights.A_log, drop_dt)
        mixed, y, states = _scan(xbc, steps, weights, shape, batch, seq_idx, drop_xbc)
        squares = None if total is None else total(square_sums(y, z, drop_z))
        normed, squares = gated_norm_forward(
            y, z, weights.gated_norm, squares, n_channels=shape.n_channels, eps=shape.eps, drop=drop_z
        )
        out_weight, back_into = _both_ways(weights.out[:, :inner].to(x_md.dtype), shape)
        kept = {"none": (mixed, y, normed, states), "states": (mixed, y, normed, None), "inside": (None,) * 4}
        ctx.save_for_backward(
            x_md,
            *weights,
            *_tensors(back_from),
            *_tensors(back_into),
            projected,
            *steps,
            squares,
            seq_idx,
            *kept[shape.recompute],
        )
        ctx.shape, ctx.batch, ctx.exchange, ctx.total = shape, batch, exchange, total
        ctx.sums, ctx.dropping = sums, dropping
        out: Tensor = exchange.times_leave(normed.flatten(0, 1), out_weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: under torch.utils.checkpoint a second reading finds the tensors already given away.
        saved = ctx.saved_tensors
        x_md, weights = saved[0], MixerWeights(*saved[1:14])
        back_from, back_into = _weight_of(*saved[14:17]), _weight_of(*saved[17:20])
        projected, *steps = saved[20:25]
        squares, seq_idx, mixed, y, normed, states = saved[25:]
        steps = TimeSteps(*steps)
        shape, total = ctx.shape, ctx.total
        heads, headdim = shape.heads, shape.headdim
        inner, bc = heads * headdim, weights.in_bc.shape[0]
        filling = _filling(projected, inner, bc, heads)
        parts = [inner, inner + bc, heads, filling]
        z, xbc, _, _ = projected.split(parts, dim=-1)
        drop_z, drop_xbc, drop_dt = _drops_of(ctx.dropping, parts)
        if shape.recompute == "inside":
            mixed, y, states = _scan(xbc, steps, weights, shape, ctx.batch, seq_idx, drop_xbc)
            normed, _ = gated_norm_forward(
                y, z, weights.gated_norm, squares, n_channels=shape.n_channels, eps=shape.eps, drop=drop_z
            )
        elif states is None:
            states = scan_states(mixed, steps, heads=heads, headdim=headdim, seq_idx_bt=seq_idx)
        sums = MixerWeights(
            *(torch.zeros_like(w) if held is None else held for w, held in zip(weights, ctx.sums, strict=True))
        )
        grad_normed = ctx.exchange.gather_times_adding(
            grad, back_into, sums.out[:, :inner], normed.flatten(0, 1)
        ).view_as(normed)

        grad_projected = torch.empty_like(projected)
        grad_z, grad_xbc, grad_dt, grad_filling = grad_projected.split(parts, dim=-1)
        grad_filling.zero_()  # it meets rows of zeros, which a NaN would survive
        dots = None if total is None else total(row_dots(grad_normed, y, z, weights.gated_norm, drop_z))
        grad_y, norm_parts = gated_norm_backward(
            grad_normed, y, z, weights.gated_norm, squares, dots, grad_z,
            n_channels=shape.n_channels, eps=shape.eps, drop=drop_z,
        )  # fmt: skip
        grad_mixed, rate_parts = scan_backward(
            grad_y,
            mixed,
            steps,
            states,
            weights.A_log,
            weights.D,
            grad_dt,
            heads=heads,
            headdim=headdim,
            seq_idx_bt=seq_idx,
            drop=drop_dt,
        )
        given, conv_seq_idx = _as_given(xbc, ctx.batch, seq_idx)
        grad_given, _ = _as_given(grad_xbc, ctx.batch, None)
        tap_parts = conv_backward(grad_mixed, given, _taps(weights), conv_seq_idx, grad_given, drop_xbc)
        grad_projected_me = grad_projected.flatten(0, 1)
        grad_x = ctx.exchange.start_times_sum(grad_projected_me, back_from)
        # z's and x's rows are large enough for a product each; B's, C's and dt's share one.
        add_product(sums.in_z[:inner], grad_projected_me[:, :inner].T, x_md)
        add_product(sums.in_x[:inner], grad_projected_me[:, inner : 2 * inner].T, x_md)
        grad_bc_dt = product(grad_projected_me[:, 2 * inner :].T, x_md)
        conv_sums = ConvSums(sums.conv_x, sums.conv_x_bias, sums.conv_bc, sums.conv_bc_bias)
        rate_sums = RateSums(sums.A_log, sums.dt_bias, sums.D)
        add_row_sums(
            tap_parts, conv_sums, norm_parts, sums.gated_norm, rate_parts, rate_sums,
            grad_bc_dt, ProjectionSums(sums.in_bc, sums.in_dt),
        )  # fmt: skip
        returned = (mine if held is None else None for mine, held in zip(sums, ctx.sums, strict=True))
        return (grad_x.wait(), *returned, *(None,) * 7)


def _scan(
    xbc: Tensor,
    steps: TimeSteps,
    weights: MixerWeights,
    shape: Shape,
    batch: int,
    seq_idx: Tensor | None,
    drop: ChannelDrop | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolved channels, the scan's output, and the states before each chunk."""
    given, conv_seq_idx = _as_given(xbc, batch, seq_idx)
    mixed = conv_forward(given, _taps(weights), conv_seq_idx, drop).view_as(xbc)
    heads, headdim = shape.heads, shape.headdim
    states = scan_states(mixed, steps, heads=heads, headdim=headdim, seq_idx_bt=seq_idx)
    y = scan_outputs(mixed, steps, states, weights.D, heads=heads, headdim=headdim, seq_idx_bt=seq_idx)
    return mixed, y, states


def _joined(batch: int, t: int, heads: int, device: torch.device) -> tuple[int, Tensor | None]:
    """How many sequences the scan sees, and their documents (int32): short ones are laid end to end, see sequences_joined."""
    joined = tiles.sequences_joined(batch, t, heads)
    if joined == 1:
        return batch, None
    document_k = torch.arange(joined, dtype=torch.int32, device=device)
    return batch // joined, document_k[None, :, None].expand(batch // joined, -1, t).flatten(1).contiguous()


def _as_given(x_btc: Tensor, batch: int, seq_idx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The convolution's view of sequences that are joined for the scan: apart, where it has no documents to tell apart."""
    if len(x_btc) == batch:
        return x_btc, seq_idx
    t, row = x_btc.shape[0] * x_btc.shape[1] // batch, x_btc.stride(1)
    return x_btc.as_strided((batch, t, x_btc.shape[2]), (t * row, row, 1)), None  # a view forgets `row` where t is 1


def _both_ways(weight_nk: Tensor, shape: Shape) -> tuple[Weight, Weight]:
    """What forward multiplies by, and what backward does."""
    return float8.float8_weights(weight_nk) if shape.float8 else (weight_nk, weight_nk.T)


def _tensors(weight: Weight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """For autograd to keep, which knows of tensors alone."""
    return weight if isinstance(weight, float8.Float8Weight) else (weight, None, None)


def _weight_of(values: Tensor, scale: Tensor | None, factor: Tensor | None) -> Weight:
    return values if scale is None else float8.Float8Weight(values, scale, factor)


def _filling(projected: Tensor, inner: int, bc: int, heads: int) -> int:
    """Columns of zeros at the projection's end."""
    return int(projected.shape[-1]) - (2 * inner + bc + heads)


def _drops_of(dropping: ChannelDrop | None, parts: list[int]) -> list[ChannelDrop | None]:
    """What is dropped of each part of the input projection but its filling."""
    if dropping is None:
        return [None] * 3
    drop, channel_c = dropping
    return [(drop, part_c) for part_c in channel_c.split(parts[:3])]


def _taps(weights: MixerWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return weights.conv_x, weights.conv_x_bias, weights.conv_bc, weights.conv_bc_bias
