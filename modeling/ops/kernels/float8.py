"""Matrices in float8 e4m3 (4 bits of exponent, 3 of mantissa), each row scaled so that its largest number is the type's largest.

Letters: m rows, k columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)
SMALLEST = tl.constexpr(1e-30)
"""Of what a row's scale is taken from: a row of zeros has one too."""
TILE = 64
LONG, LONG_BLOCK = 4096, 2048
"""Rows of more than LONG numbers are read twice, LONG_BLOCK at a time. On an H200 16,384 rows of 8,512 take 128 us so, whole 183;
of 2,048 to 4,096 whole rows are within a quarter of copying them."""


@triton.jit
def _scale_of(largest):
    return tl.maximum(largest, SMALLEST) / LARGEST


@triton.jit
def _quantize_rows(
    x_ptr, x_stride, factor_ptr, out_ptr, scale_ptr, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if FACTOR:
        x *= tl.load(factor_ptr + column, mask=column < width, other=0.0)[None, :]
    # A NaN stays one, and an infinity becomes one: the row's others are zero times it.
    scale = _scale_of(tl.max(tl.abs(x), axis=1))
    out = (x * (1.0 / scale)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * width + column[None, :], out, mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def _part_of_row(row_ptr, factor_ptr, column, width, FACTOR: tl.constexpr):
    x = tl.load(row_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if FACTOR:
        x *= tl.load(factor_ptr + column, mask=column < width, other=0.0)
    return x


@triton.jit
def _quantize_long_rows(
    x_ptr, x_stride, factor_ptr, out_ptr, scale_ptr, width, BLOCK: tl.constexpr, FACTOR: tl.constexpr
):
    """A program a row, which it reads twice: the second time from the cache, where registers would be padded to twice of it."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = _part_of_row(x_ptr + row * x_stride, factor_ptr, column, width, FACTOR)
        largest = tl.maximum(largest, tl.abs(x))
    scale = _scale_of(tl.max(largest, axis=0))
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = _part_of_row(x_ptr + row * x_stride, factor_ptr, column, width, FACTOR)
        out = (x * (1.0 / scale)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * width + column, out, mask=column < width)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _transpose_bytes(in_ptr, out_ptr, ones_ptr, rows, width, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = (row < rows)[:, None] & (column < width)[None, :]
    tile = tl.load(in_ptr + row.to(tl.int64)[:, None] * width + column[None, :], mask=there, other=0)
    there = (column < width)[:, None] & (row < rows)[None, :]
    tl.store(out_ptr + column.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(tile), mask=there)
    if tl.program_id(0) == 0:
        tl.store(ones_ptr + column, 1.0, mask=column < width)


def quantize_rows(x_mk: Tensor, factor_k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x * factor in float8 (m k, contiguous) and the scale of each row (float32, m 1): their product is x * factor, rounded.

    `x_mk` is of any float type and, unless its rows are contiguous each, copied; `factor_k` is float32. A row that holds NaN or
    infinity comes out as one that holds NaN.
    """
    m, k = x_mk.shape
    if x_mk.stride(1) != 1:  # a gradient may be expanded or turned
        x_mk = x_mk.contiguous()
    values = torch.empty(m, k, dtype=FLOAT8, device=x_mk.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x_mk.device)
    args = (x_mk, x_mk.stride(0), factor_k, values, scale)
    if k > LONG:
        _quantize_long_rows[(m,)](*args, k, BLOCK=LONG_BLOCK, FACTOR=factor_k is not None, num_warps=8)
    else:
        block = triton.next_power_of_2(k)
        each = max(2, 1024 // block)
        programs = triton.cdiv(m, each)
        _quantize_rows[(programs,)](*args, m, k, ROWS=each, BLOCK=block, FACTOR=factor_k is not None, num_warps=4)
    return values, scale


def transposed(values_mk: Tensor) -> tuple[Tensor, Tensor]:
    """The contiguous matrix transposed in memory (k m), and ones (float32, 1 k), which are the scales of its rows."""
    m, k = values_mk.shape
    out = torch.empty(k, m, dtype=values_mk.dtype, device=values_mk.device)
    ones = torch.empty(1, k, dtype=torch.float32, device=values_mk.device)
    grid = (triton.cdiv(m, TILE), triton.cdiv(k, TILE))
    _transpose_bytes[grid](values_mk.view(torch.int8), out.view(torch.int8), ones, m, k, TILE=TILE)
    return out, ones
