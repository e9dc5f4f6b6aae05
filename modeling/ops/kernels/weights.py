"""The input projection's weight at a width: the first rows of its four parts, cast and laid one after another.

Letters: e rows of the projection (z, x, B and C, dt), d model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
ROW_STEP = 8
"""The product's rows are a multiple of this many numbers: 16 bytes in bfloat16, without which cuBLAS takes a kernel that is
three times slower."""


@triton.jit
def _gather_projection(z_ptr, x_ptr, bc_ptr, dt_ptr, out_ptr, inner, bc, heads, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < width
    after_x = row - 2 * inner
    of_z = live & (row + column * 0 < inner)
    of_x = live & (row + column * 0 >= inner) & (after_x + column * 0 < 0)
    of_bc = live & (after_x + column * 0 >= 0) & (after_x + column * 0 < bc)
    of_dt = live & (after_x + column * 0 >= bc) & (after_x + column * 0 < bc + heads)
    value = tl.load(z_ptr + row.to(tl.int64) * width + column, mask=of_z, other=0.0)
    value += tl.load(x_ptr + (row - inner).to(tl.int64) * width + column, mask=of_x, other=0.0)
    value += tl.load(bc_ptr + after_x.to(tl.int64) * width + column, mask=of_bc, other=0.0)
    value += tl.load(dt_ptr + (after_x - bc).to(tl.int64) * width + column, mask=of_dt, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * width + column, value.to(out_ptr.dtype.element_ty), mask=live)


def gather_projection(
    z_id: Tensor,
    x_id: Tensor,
    bc_cd: Tensor,
    dt_hd: Tensor,
    *,
    heads: int,
    headdim: int,
    dtype: torch.dtype,
    row_step: int = ROW_STEP,
) -> Tensor:
    """[z | x | B C | dt] of the first `heads` heads, shape e d, in `dtype`; zeros fill e up to a multiple of
    `row_step`."""
    inner, bc, width = heads * headdim, bc_cd.shape[0], z_id.shape[1]
    rows = triton.cdiv(2 * inner + bc + heads, row_step) * row_step
    out = torch.empty(rows, width, dtype=dtype, device=z_id.device)
    grid = (rows, triton.cdiv(width, BLOCK))
    _gather_projection[grid](z_id, x_id, bc_cd, dt_hd, out, inner, bc, heads, width, BLOCK=BLOCK)
    return out
