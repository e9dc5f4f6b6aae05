"""Gate and RMSNorm in one pass over y and z, forward and backward.

u = y silu(z);  out = u w / sqrt(total / channels + eps), where total is the sum of u^2 over all channels of the width,
those of other tensor-parallel ranks included. Where one rank holds them all the same kernel takes the sum itself; else
`square_sums` and `row_dots` give this rank's share, and the caller adds the others' before going on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.kernels.dropout import ChannelDrop, drop_arguments, dropped
from modeling.ops.kernels.fast_math import sigmoid
from modeling.ops.kernels.rows import THREADS, row_tiles, stages_of


@triton.jit
def _gate(
    y_ptr, z_ptr, z_stride, row, column, mask, rows, I, key_ptr, drop_scale_ptr, number,
    DROP: tl.constexpr, THRESHOLD: tl.constexpr, N_TOKENS: tl.constexpr,
):  # fmt: skip
    y = tl.load(y_ptr + row[:, None] * I + column[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row[:, None] * z_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if DROP:
        z = dropped(z, key_ptr, drop_scale_ptr, N_TOKENS, row, number, row < rows, THRESHOLD)
    return y, z, sigmoid(z)


@triton.jit
def _numbers(channel_ptr, column, I, DROP: tl.constexpr):
    """The channels' numbers in the whole model, where something is dropped."""
    if DROP:
        return tl.load(channel_ptr + column, mask=column < I, other=0)
    else:
        return column


@triton.jit
def _gated_square_sums(
    y_ptr, z_ptr, z_stride, sums_ptr, rows, I, key_ptr, drop_scale_ptr, channel_ptr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DROP: tl.constexpr, THRESHOLD: tl.constexpr, N_TOKENS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < I)[None, :]
    number = _numbers(channel_ptr, column, I, DROP)
    y, z, sigma = _gate(
        y_ptr, z_ptr, z_stride, row, column, mask, rows, I, key_ptr, drop_scale_ptr, number, DROP, THRESHOLD, N_TOKENS
    )  # fmt: skip
    u = y * z * sigma
    tl.store(sums_ptr + row, tl.sum(u * u, axis=1), mask=row < rows)


@triton.jit
def _gated_forward(
    y_ptr, z_ptr, z_stride, weight_ptr, sums_ptr, out_ptr, rows, I, channels, eps,
    key_ptr, drop_scale_ptr, channel_ptr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, OWN_SUM: tl.constexpr, DROP: tl.constexpr,
    THRESHOLD: tl.constexpr, N_TOKENS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < I)[None, :]
    number = _numbers(channel_ptr, column, I, DROP)
    y, z, sigma = _gate(
        y_ptr, z_ptr, z_stride, row, column, mask, rows, I, key_ptr, drop_scale_ptr, number, DROP, THRESHOLD, N_TOKENS
    )  # fmt: skip
    u = y * z * sigma
    if OWN_SUM:
        total = tl.sum(u * u, axis=1)
        tl.store(sums_ptr + row, total, mask=row < rows)
    else:
        total = tl.load(sums_ptr + row, mask=row < rows, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < I, other=0.0)
    out = u * (1.0 / tl.sqrt(total / channels + eps))[:, None] * weight[None, :]
    tl.store(out_ptr + row[:, None] * I + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_row_dots(
    grad_ptr, y_ptr, z_ptr, z_stride, weight_ptr, dots_ptr, rows, I, key_ptr, drop_scale_ptr, channel_ptr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DROP: tl.constexpr, THRESHOLD: tl.constexpr, N_TOKENS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < I)[None, :]
    number = _numbers(channel_ptr, column, I, DROP)
    y, z, sigma = _gate(
        y_ptr, z_ptr, z_stride, row, column, mask, rows, I, key_ptr, drop_scale_ptr, number, DROP, THRESHOLD, N_TOKENS
    )  # fmt: skip
    grad = tl.load(grad_ptr + row[:, None] * I + column[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < I, other=0.0)
    tl.store(dots_ptr + row, tl.sum(grad * weight[None, :] * y * z * sigma, axis=1), mask=row < rows)


@triton.jit
def _gated_backward(
    grad_ptr, y_ptr, z_ptr, z_stride, weight_ptr, sums_ptr, dots_ptr, grad_y_ptr, grad_z_ptr, grad_z_stride,
    grad_weight_ptr, rows, I, channels, eps, key_ptr, drop_scale_ptr, channel_ptr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, OWN_SUM: tl.constexpr, DROP: tl.constexpr,
    THRESHOLD: tl.constexpr, N_TOKENS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < I, other=0.0)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    number = _numbers(channel_ptr, column, I, DROP)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < I)[None, :]
        y, z, sigma = _gate(
            y_ptr, z_ptr, z_stride, row, column, mask, rows, I, key_ptr, drop_scale_ptr, number, DROP, THRESHOLD, N_TOKENS
        )  # fmt: skip
        grad = tl.load(grad_ptr + row[:, None] * I + column[None, :], mask=mask, other=0.0).to(tl.float32)
        silu = z * sigma
        u = y * silu
        r = (1.0 / tl.sqrt(tl.load(sums_ptr + row, mask=row < rows, other=0.0) / channels + eps))[:, None]
        grad_weight += tl.sum(grad * u * r, axis=0)
        grad = grad * weight[None, :]
        if OWN_SUM:
            dot = tl.sum(grad * u, axis=1)
        else:
            dot = tl.load(dots_ptr + row, mask=row < rows, other=0.0)
        grad_u = grad * r - u * (r * r * r * (dot / channels)[:, None])
        grad_y = grad_u * silu
        grad_z = grad_u * y * sigma * (1.0 + z * (1.0 - sigma))
        if DROP:  # the compiler makes one mask of this and z's
            grad_z = dropped(grad_z, key_ptr, drop_scale_ptr, N_TOKENS, row, number, row < rows, THRESHOLD)
        tl.store(grad_y_ptr + row[:, None] * I + column[None, :], grad_y.to(grad_y_ptr.dtype.element_ty), mask=mask)
        place = row[:, None] * grad_z_stride + column[None, :]
        tl.store(grad_z_ptr + place, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_weight_ptr + tl.program_id(0) * I + column, grad_weight, mask=column < I)


def square_sums(y_bti: Tensor, z_bti: Tensor, drop: ChannelDrop | None = None) -> Tensor:
    """Sum of u^2 over the local channels, float32, shape b t. `y_bti` is contiguous, `z_bti` may be a slice. `drop` says here
    as below which entries of z are dropped."""
    b, t, i = y_bti.shape
    sums = torch.empty(b, t, dtype=torch.float32, device=y_bti.device)
    programs, shape = row_tiles(b * t, i)
    pointers, flags = drop_arguments(drop)
    _gated_square_sums[(programs,)](y_bti, z_bti, z_bti.stride(1), sums, b * t, i, *pointers, **shape, **flags)
    return sums


def gated_norm_forward(
    y_bti: Tensor,
    z_bti: Tensor,
    weight_i: Tensor,
    total_bt: Tensor | None,
    *,
    n_channels: int,
    eps: float,
    drop: ChannelDrop | None = None,
) -> tuple[Tensor, Tensor]:
    """The normed output in y's dtype and the square sums used: `total_bt`, or the local channels' own where it is None."""
    b, t, i = y_bti.shape
    out = torch.empty_like(y_bti)
    sums = torch.empty(b, t, dtype=torch.float32, device=y_bti.device) if total_bt is None else total_bt
    programs, shape = row_tiles(b * t, i)
    pointers, flags = drop_arguments(drop)
    _gated_forward[(programs,)](
        y_bti, z_bti, z_bti.stride(1), weight_i, sums, out, b * t, i, n_channels, eps, *pointers,
        **shape, OWN_SUM=total_bt is None, **flags,
    )  # fmt: skip
    return out, sums


def row_dots(
    grad_bti: Tensor, y_bti: Tensor, z_bti: Tensor, weight_i: Tensor, drop: ChannelDrop | None = None
) -> Tensor:
    """Sum over the local channels of grad w u, float32, shape b t."""
    b, t, i = y_bti.shape
    dots = torch.empty(b, t, dtype=torch.float32, device=y_bti.device)
    programs, shape = row_tiles(b * t, i)
    pointers, flags = drop_arguments(drop)
    _gated_row_dots[(programs,)](
        grad_bti, y_bti, z_bti, z_bti.stride(1), weight_i, dots, b * t, i, *pointers, **shape, **flags
    )  # fmt: skip
    return dots


def gated_norm_backward(
    grad_bti: Tensor,
    y_bti: Tensor,
    z_bti: Tensor,
    weight_i: Tensor,
    sums_bt: Tensor,
    dots_bt: Tensor | None,
    grad_z_bti: Tensor,
    *,
    n_channels: int,
    eps: float,
    drop: ChannelDrop | None = None,
) -> tuple[Tensor, Tensor]:
    """Write z's gradient into `grad_z_bti` (a slice is fine), with the entries dropped that z's are; return y's (y's dtype) and
    each program's part of the weight's (r i, float32).

    `dots_bt` is `row_dots` summed over ranks, or None where this rank holds every channel.
    """
    b, t, i = y_bti.shape
    grad_y = torch.empty_like(y_bti)
    blocks, shape = row_tiles(b * t, i)
    # As many as run at once: each walks over rows and keeps the weight's gradient.
    programs = min(blocks, THREADS // (32 * shape["num_warps"]))
    stages = stages_of(3 * shape["BLOCK"] * y_bti.element_size(), most=4)
    grad_weight = torch.empty(programs, i, dtype=torch.float32, device=y_bti.device)
    pointers, flags = drop_arguments(drop)
    # The mask takes 145 registers where there are none too many with 128, of which a multiprocessor has enough for 16 warps.
    limit = {"maxnreg": 128} if drop is not None and shape["BLOCK"] <= 2048 else {}
    _gated_backward[(programs,)](
        grad_bti, y_bti, z_bti, z_bti.stride(1), weight_i, sums_bt, dots_bt, grad_y, grad_z_bti, grad_z_bti.stride(1),
        grad_weight, b * t, i, n_channels, eps, *pointers, **shape, STAGES=stages, OWN_SUM=dots_bt is None, **flags, **limit,
    )  # fmt: skip
    return grad_y, grad_weight
