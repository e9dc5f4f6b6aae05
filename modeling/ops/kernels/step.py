"""A few steps of every sequence of a batch from its state: convolution, recurrence and gated norm, as decoding needs them.

Letters: b batch, t time (a few steps), c channels (B, C, then x), h heads, p headdim, n state. The projection's columns
are B and C (2 n), one dt for each head that the model holds, then x and z (p each) of head 0, of head 1, ...: any width's
are the first ones. Each program walks the steps one after another; states are stored as they are after the first
`absorb_b` steps of a row, and left alone where that is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 256
HEAD_ROWS = 16
"""Channels of a head in one program of the recurrence: at batch 1 more programs mean more of the state in flight."""


@triton.jit
def _conv_step(
    projected_ptr, row_stride, weight_ptr, bias_ptr, state_ptr, absorb_ptr, out_ptr, T, C, held, BC, P,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(1).to(tl.int64)
    live = channel < C
    i = channel - BC
    column = tl.where(channel < BC, channel, BC + held + (i // P) * 2 * P + i % P)
    absorb = tl.load(absorb_ptr + b)
    bias = tl.load(bias_ptr + channel, mask=live, other=0.0)
    w0 = tl.load(weight_ptr + channel * 4, mask=live, other=0.0)
    w1 = tl.load(weight_ptr + channel * 4 + 1, mask=live, other=0.0)
    w2 = tl.load(weight_ptr + channel * 4 + 2, mask=live, other=0.0)
    w3 = tl.load(weight_ptr + channel * 4 + 3, mask=live, other=0.0)
    state = state_ptr + b * 3 * C + channel
    x0 = tl.load(state, mask=live, other=0.0).to(tl.float32)
    x1 = tl.load(state + C, mask=live, other=0.0).to(tl.float32)
    x2 = tl.load(state + 2 * C, mask=live, other=0.0).to(tl.float32)
    for t in range(T):
        row = b * T + t
        x3 = tl.load(projected_ptr + row * row_stride + column, mask=live, other=0.0).to(tl.float32)
        total = bias + x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
        tl.store(out_ptr + row * C + channel, (total * tl.sigmoid(total)).to(out_ptr.dtype.element_ty), mask=live)
        if absorb == t + 1:
            tl.store(state, x1.to(state_ptr.dtype.element_ty), mask=live)
            tl.store(state + C, x2.to(state_ptr.dtype.element_ty), mask=live)
            tl.store(state + 2 * C, x3.to(state_ptr.dtype.element_ty), mask=live)
        x0, x1, x2 = x1, x2, x3


@triton.jit
def _scan_step(
    projected_ptr, row_stride, mixed_ptr, A_ptr, D_ptr, dt_bias_ptr, state_ptr, absorb_ptr, u_ptr, T, C, heads, held,
    N: tl.constexpr, P: tl.constexpr, STATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, STATE)
    in_head = p < P
    in_state = n < N
    mask = in_head[:, None] & in_state[None, :]
    place = state_ptr + ((b * heads + h) * P + p)[:, None] * N + n[None, :]
    state = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    absorb = tl.load(absorb_ptr + b)
    A = tl.load(A_ptr + h)
    D = tl.load(D_ptr + h)
    dt_bias = tl.load(dt_bias_ptr + h)
    for t in range(T):
        row = b * T + t
        projected = projected_ptr + row * row_stride + 2 * N
        mixed = mixed_ptr + row * C
        dt = tl.load(projected + h).to(tl.float32) + dt_bias
        # log(1 + e^v) without overflow, and without losing a small e^v beside the 1, as in scan_common.
        small = tl.exp(-tl.abs(dt))
        one = 1.0 + small
        log1p = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0)))
        delta = tl.maximum(dt, 0.0) + log1p
        B = tl.load(mixed + n, mask=in_state, other=0.0).to(tl.float32)
        C_n = tl.load(mixed + N + n, mask=in_state, other=0.0).to(tl.float32)
        x = tl.load(mixed + 2 * N + h * P + p, mask=in_head, other=0.0).to(tl.float32)
        z = tl.load(projected + held + h * 2 * P + P + p, mask=in_head, other=0.0).to(tl.float32)
        state = tl.exp(delta * A) * state + (delta * x)[:, None] * B[None, :]
        y = tl.sum(state * C_n[None, :], axis=1) + D * x
        # The scan's output has the compute dtype before it is gated, here as in the chunked path.
        y = y.to(mixed_ptr.dtype.element_ty).to(tl.float32)
        tl.store(u_ptr + (row * heads + h) * P + p, y * z * tl.sigmoid(z), mask=in_head)
        if absorb == t + 1:
            tl.store(place, state.to(state_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_step(u_ptr, weight_ptr, out_ptr, eps, INNER, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    live = i < INNER
    u = tl.load(u_ptr + row * INNER + i, mask=live, other=0.0)
    scale = 1.0 / tl.sqrt(tl.sum(u * u, axis=0) / INNER + eps)
    out = u * scale * tl.load(weight_ptr + i, mask=live, other=0.0)
    tl.store(out_ptr + row * INNER + i, out.to(out_ptr.dtype.element_ty), mask=live)


def step(
    projected_btr: Tensor,
    conv_ck: Tensor,
    conv_bias_c: Tensor,
    A_h: Tensor,
    D_h: Tensor,
    dt_bias_h: Tensor,
    norm_i: Tensor,
    conv_state_bkc: Tensor,
    ssm_state_bhpn: Tensor,
    absorb_b: Tensor,
    *,
    held: int,
    eps: float,
) -> Tensor:
    """The mixer between its projections, at the heads that `ssm_state_bhpn` has; see modeling.ops.step.mixer_step."""
    b, t, _ = projected_btr.shape
    heads, p, n = ssm_state_bhpn.shape[1:]
    channels, inner = 2 * n + heads * p, heads * p
    mixed = projected_btr.new_empty(b, t, channels)
    u = torch.empty(b, t, inner, dtype=torch.float32, device=projected_btr.device)
    out = projected_btr.new_empty(b, t, inner)
    row_stride = projected_btr.stride(1)
    _conv_step[(triton.cdiv(channels, CHANNELS), b)](
        projected_btr, row_stride, conv_ck, conv_bias_c, conv_state_bkc, absorb_b, mixed, t, channels, held, 2 * n, p,
        CHANNELS=CHANNELS,
    )  # fmt: skip
    _scan_step[(triton.cdiv(p, HEAD_ROWS), heads, b)](
        projected_btr, row_stride, mixed, A_h, D_h, dt_bias_h, ssm_state_bhpn, absorb_b, u, t, channels, heads, held,
        N=n, P=p, STATE=triton.next_power_of_2(n), ROWS=HEAD_ROWS,
    )  # fmt: skip
    _norm_step[(b * t,)](u, norm_i, out, eps, inner, BLOCK=triton.next_power_of_2(inner), num_warps=8)
    return out
