"""Causal depthwise convolution of four taps and SiLU, forward and backward; see modeling/ops/conv.py for the definition.

Letters: b batch, t time, c channels. Weights are float32, one row of four taps and one bias a channel; tap 3 meets the
present step. Backward computes the convolution again instead of storing what SiLU saw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.kernels.dropout import ChannelDrop, drop_arguments, entry_bits, token_words
from modeling.ops.kernels.fast_math import sigmoid

CHANNELS = 256
UNROLL = tl.constexpr(4)
STAGES = tl.constexpr(3)
"""How far loads run ahead, in steps unrolled: the kernels wait for memory, not for arithmetic."""
MOST_REGISTERS = 128
"""Of backward: with more, which the compiler takes for documents without need (190), a multiprocessor holds one program."""
SEGMENTS = 4
"""Stretches of the sequence that one program walks side by side, one step of each at a time: the last inputs stay in
registers, so that each is read once."""
Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""x's taps (channel, tap) and bias, at the full width; B's and C's taps and bias."""
STRETCH = 64
"""Steps of a stretch. Three more are read before it (backward: also after it). Of thirty combinations of all these tried on
an H200 this was the fastest: 1.2 times the floor forward, 1.5 times backward."""


@triton.jit
def _image(key_ptr, drop_scale_ptr, channel_ptr, b, channel, live, DROP: tl.constexpr):
    """What decides which entries of sequence `b` are dropped: the halves of its key, the scale of the others, and the channels'
    numbers."""
    if DROP:
        numbers = tl.load(channel_ptr + channel, mask=live, other=0)
        return tl.load(key_ptr + 2 * b), tl.load(key_ptr + 2 * b + 1), tl.load(drop_scale_ptr + b), numbers
    else:
        return 0, 0, 1.0, channel


@triton.jit
def _step(
    x_ptr, row_stride, seq_ptr, b, t, T, channel, live, image,
    DOCS: tl.constexpr, DROP: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """x at one step of each stretch, zero outside the sequence, float32; the steps' documents; and which entries are kept."""
    inside = (t >= 0) & (t < T)
    kept = inside[:, None] & live[None, :]
    x = tl.load(x_ptr + (b * T + t)[:, None] * row_stride + channel[None, :], mask=kept, other=0.0).to(tl.float32)
    if DROP:
        low, high, scale, number = image
        word, second = token_words(low, high, t)
        kept = entry_bits(word[:, None], second[:, None], number[None, :]) >= THRESHOLD
        x = tl.where(kept, x * scale, 0.0)
    doc = tl.load(seq_ptr + b * T + t, mask=inside, other=-1) if DOCS else t
    return x, doc, kept


@triton.jit
def _gradient(grad_ptr, b, t, T, C, channel, live):
    """The output's gradient at one step of each stretch, zero outside the sequence, float32."""
    mask = (t < T)[:, None] & live[None, :]
    return tl.load(grad_ptr + (b * T + t)[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _same(x, doc, other, DOCS: tl.constexpr):
    """x where its step is of the other's document, else 0."""
    if DOCS:
        x = tl.where((doc == other)[:, None], x, 0.0)
    return x


@triton.jit
def _weights(x_weight_ptr, x_bias_ptr, bc_weight_ptr, bc_bias_ptr, channel, inner, live):
    """Bias and four taps of each channel: x's for the first `inner`, B's and C's for the rest."""
    of_x = live & (channel < inner)
    of_bc = live & (channel >= inner)
    rest = channel - inner
    bias = tl.load(x_bias_ptr + channel, mask=of_x, other=0.0) + tl.load(bc_bias_ptr + rest, mask=of_bc, other=0.0)
    x_tap = x_weight_ptr + channel * 4
    bc_tap = bc_weight_ptr + rest * 4
    w0 = tl.load(x_tap, mask=of_x, other=0.0) + tl.load(bc_tap, mask=of_bc, other=0.0)
    w1 = tl.load(x_tap + 1, mask=of_x, other=0.0) + tl.load(bc_tap + 1, mask=of_bc, other=0.0)
    w2 = tl.load(x_tap + 2, mask=of_x, other=0.0) + tl.load(bc_tap + 2, mask=of_bc, other=0.0)
    w3 = tl.load(x_tap + 3, mask=of_x, other=0.0) + tl.load(bc_tap + 3, mask=of_bc, other=0.0)
    return bias[None, :], w0[None, :], w1[None, :], w2[None, :], w3[None, :]


@triton.jit
def _conv_forward(
    x_ptr, row_stride, xw_ptr, xb_ptr, bcw_ptr, bcb_ptr, seq_ptr, out_ptr, T, C, inner,
    key_ptr, drop_scale_ptr, channel_ptr,
    SEGMENTS: tl.constexpr, STRETCH: tl.constexpr, CHANNELS: tl.constexpr, DOCS: tl.constexpr, DROP: tl.constexpr,
    THRESHOLD: tl.constexpr, N_TOKENS: tl.constexpr,
):  # fmt: skip
    first = (tl.program_id(1) * SEGMENTS + tl.arange(0, SEGMENTS)) * STRETCH
    b = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < C
    bias, w0, w1, w2, w3 = _weights(xw_ptr, xb_ptr, bcw_ptr, bcb_ptr, channel, inner, live)
    image = _image(key_ptr, drop_scale_ptr, channel_ptr, b, channel, live, DROP)
    x0, d0, _ = _step(x_ptr, row_stride, seq_ptr, b, first - 3, T, channel, live, image, DOCS, DROP, THRESHOLD)
    x1, d1, _ = _step(x_ptr, row_stride, seq_ptr, b, first - 2, T, channel, live, image, DOCS, DROP, THRESHOLD)
    x2, d2, _ = _step(x_ptr, row_stride, seq_ptr, b, first - 1, T, channel, live, image, DOCS, DROP, THRESHOLD)
    # Each step's load is issued a step early: its latency passes behind the arithmetic.
    next_x, next_d, _ = _step(x_ptr, row_stride, seq_ptr, b, first, T, channel, live, image, DOCS, DROP, THRESHOLD)
    for i in tl.range(STRETCH, num_stages=STAGES, loop_unroll_factor=UNROLL):
        t = first + i
        x3, d3 = next_x, next_d
        next_x, next_d, _ = _step(x_ptr, row_stride, seq_ptr, b, t + 1, T, channel, live, image, DOCS, DROP, THRESHOLD)
        total = (
            bias + _same(x0, d0, d3, DOCS) * w0 + _same(x1, d1, d3, DOCS) * w1 + _same(x2, d2, d3, DOCS) * w2 + x3 * w3
        )
        out = total * sigmoid(total)
        mask = (t < T)[:, None] & live[None, :]
        tl.store(out_ptr + (b * T + t)[:, None] * C + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
        x0, x1, x2 = x1, x2, x3
        d0, d1, d2 = d1, d2, d3


@triton.jit
def _conv_backward(
    x_ptr, row_stride, xw_ptr, xb_ptr, bcw_ptr, bcb_ptr, seq_ptr, grad_ptr, grad_x_ptr, grad_row_stride, sums_ptr,
    T, C, inner, key_ptr, drop_scale_ptr, channel_ptr,
    SEGMENTS: tl.constexpr, STRETCH: tl.constexpr, CHANNELS: tl.constexpr, DOCS: tl.constexpr, DROP: tl.constexpr,
    THRESHOLD: tl.constexpr, N_TOKENS: tl.constexpr,
):  # fmt: skip
    first = (tl.program_id(1) * SEGMENTS + tl.arange(0, SEGMENTS)) * STRETCH
    b = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < C
    bias, w0, w1, w2, w3 = _weights(xw_ptr, xb_ptr, bcw_ptr, bcb_ptr, channel, inner, live)
    zero = tl.zeros([SEGMENTS, CHANNELS], tl.float32)
    sum0, sum1, sum2, sum3, sum_bias = zero, zero, zero, zero, zero
    # g0 to g2: the gradients at what SiLU saw, three, two and one steps ago. Nothing that is stored depends on these
    # first values, but they must differ: Triton 3.6 merges a rotation's variables into one where they start equal.
    g0, g1, g2 = zero + 1.0, zero + 2.0, zero + 3.0
    image = _image(key_ptr, drop_scale_ptr, channel_ptr, b, channel, live, DROP)
    x0, d0, k0 = _step(x_ptr, row_stride, seq_ptr, b, first - 3, T, channel, live, image, DOCS, DROP, THRESHOLD)
    x1, d1, k1 = _step(x_ptr, row_stride, seq_ptr, b, first - 2, T, channel, live, image, DOCS, DROP, THRESHOLD)
    x2, d2, k2 = _step(x_ptr, row_stride, seq_ptr, b, first - 1, T, channel, live, image, DOCS, DROP, THRESHOLD)
    next_x, next_d, next_k = _step(x_ptr, row_stride, seq_ptr, b, first, T, channel, live, image, DOCS, DROP, THRESHOLD)
    next_g = _gradient(grad_ptr, b, first, T, C, channel, live)
    # Three steps beyond the stretch finish the gradients of its last inputs; one more makes whole rounds.
    for i in tl.range(STRETCH + UNROLL, num_stages=STAGES, loop_unroll_factor=UNROLL):
        t = first + i
        x3, d3, k3, g3 = next_x, next_d, next_k, next_g
        next_x, next_d, next_k = _step(
            x_ptr, row_stride, seq_ptr, b, t + 1, T, channel, live, image, DOCS, DROP, THRESHOLD
        )
        next_g = _gradient(grad_ptr, b, t + 1, T, C, channel, live)
        s0, s1, s2 = _same(x0, d0, d3, DOCS), _same(x1, d1, d3, DOCS), _same(x2, d2, d3, DOCS)
        total = bias + s0 * w0 + s1 * w1 + s2 * w2 + x3 * w3
        sigma = sigmoid(total)
        g3 = g3 * sigma * (1.0 + total * (1.0 - sigma))
        if i < STRETCH:
            sum0 += g3 * s0
            sum1 += g3 * s1
            sum2 += g3 * s2
            sum3 += g3 * x3
            sum_bias += g3
        # The input three steps ago was seen by it through tap 3, and now through tap 0.
        grad_x = g0 * w3 + _same(g1, d1, d0, DOCS) * w2 + _same(g2, d2, d0, DOCS) * w1 + _same(g3, d3, d0, DOCS) * w0
        done = (i >= 3) & (i < STRETCH + 3) & (t - 3 < T)
        mask = done[:, None] & live[None, :]
        if DROP:
            grad_x = tl.where(k0, grad_x * image[2], 0.0)
        place = (b * T + t - 3)[:, None] * grad_row_stride + channel[None, :]
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        x0, x1, x2 = x1, x2, x3
        k0, k1, k2 = k1, k2, k3
        d0, d1, d2 = d1, d2, d3
        g0, g1, g2 = g1, g2, g3
    out = sums_ptr + ((b * tl.num_programs(1) + tl.program_id(1)) * 5) * C + channel
    tl.store(out, tl.sum(sum0, axis=0), mask=live)
    tl.store(out + C, tl.sum(sum1, axis=0), mask=live)
    tl.store(out + 2 * C, tl.sum(sum2, axis=0), mask=live)
    tl.store(out + 3 * C, tl.sum(sum3, axis=0), mask=live)
    tl.store(out + 4 * C, tl.sum(sum_bias, axis=0), mask=live)


def _launch(t: int, c: int, batch: int, seq_idx_bt: Tensor | None) -> tuple[tuple[int, int, int], dict[str, int]]:
    grid = (triton.cdiv(c, CHANNELS), triton.cdiv(t, SEGMENTS * STRETCH), batch)
    docs = seq_idx_bt is not None
    return grid, {
        "SEGMENTS": SEGMENTS,
        "STRETCH": STRETCH,
        "CHANNELS": CHANNELS,
        "DOCS": docs,
        "num_warps": 8,
    }


def _drop_arguments(drop: ChannelDrop | None, t: int) -> tuple[list[Tensor | None], dict[str, int | bool]]:
    assert drop is None or drop[0].n_tokens == t, "each sequence is an image"
    return drop_arguments(drop)


def conv_forward(x_btc: Tensor, weights: Weights, seq_idx_bt: Tensor | None, drop: ChannelDrop | None = None) -> Tensor:
    """silu(convolution), contiguous, in x's dtype, of `x_btc` = [x | B | C] with entries dropped as `drop` says. It may be a
    slice of wider rows."""
    b, t, c = x_btc.shape
    out = torch.empty(b, t, c, dtype=x_btc.dtype, device=x_btc.device)
    grid, shape = _launch(t, c, b, seq_idx_bt)
    inner = c - len(weights[2])
    pointers, flags = _drop_arguments(drop, t)
    _conv_forward[grid](
        x_btc, x_btc.stride(1), *weights, seq_idx_bt, out, t, c, inner, *pointers, **shape, **flags
    )  # fmt: skip
    return out


def conv_backward(
    grad_btc: Tensor,
    x_btc: Tensor,
    weights: Weights,
    seq_idx_bt: Tensor | None,
    grad_x_btc: Tensor,
    drop: ChannelDrop | None = None,
) -> Tensor:
    """Write x's gradient into `grad_x_btc` (a slice of wider rows is fine), with the entries dropped that forward dropped;
    return each program's part of those of the four taps and the bias of the channels in use, shape r 5 c, float32."""
    b, t, c = x_btc.shape
    grid, shape = _launch(t, c, b, seq_idx_bt)
    sums = torch.empty(b, grid[1], 5, c, dtype=torch.float32, device=x_btc.device)
    pointers, flags = _drop_arguments(drop, t)
    inner = c - len(weights[2])
    _conv_backward[grid](
        x_btc, x_btc.stride(1), *weights, seq_idx_bt, grad_btc, grad_x_btc, grad_x_btc.stride(1), sums, t, c, inner,
        *pointers, **shape, **flags, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return sums.flatten(0, 1)
