"""Residual addition and RMSNorm in one pass: x = x + branch; out = x w / sqrt(mean(x^2) + eps). x stays float32.

Backward takes x / rms from `out`, which the layer after it keeps anyway, as out / w: half the bytes of x, and x itself need
not be kept. A weight of exactly zero hides its channel, and gets a gradient of zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST = tl.constexpr(1e-30)
THREADS = 132 * 2048
"""What an H200 holds at once. Backward starts as many, each program walks over rows and keeps the weight's gradient."""


@triton.jit
def _residual_forward(
    x_ptr, branch_ptr, weight_ptr, sum_ptr, out_ptr, scale_ptr, rows, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    if BRANCH:
        x += tl.load(branch_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(sum_ptr + place, x, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
    tl.store(out_ptr + place, (x * scale[:, None] * weight[None, :]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def _residual_backward(
    grad_ptr, grad_sum_ptr, out_ptr, weight_ptr, scale_ptr, grad_x_ptr, grad_branch_ptr, grad_weight_ptr, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BRANCH: tl.constexpr, ONWARD: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
    inverse = tl.where(tl.abs(weight) < SMALLEST, 0.0, 1.0 / tl.where(tl.abs(weight) < SMALLEST, 1.0, weight))
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        scaled = tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32) * inverse[None, :]
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad_weight += tl.sum(grad * scaled, axis=0)
        grad = grad * weight[None, :]
        grad_x = (grad - scaled * (tl.sum(grad * scaled, axis=1) / width)[:, None]) * scale
        if ONWARD:
            grad_x += tl.load(grad_sum_ptr + place, mask=mask, other=0.0)
        tl.store(grad_x_ptr + place, grad_x, mask=mask)
        if BRANCH:
            tl.store(grad_branch_ptr + place, grad_x.to(grad_branch_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_weight_ptr + tl.program_id(0) * width + column, grad_weight, mask=column < width)


def _shape(rows: int, width: int) -> tuple[int, dict[str, int]]:
    block = triton.next_power_of_2(width)
    each = max(1, 256 // block)
    return triton.cdiv(rows, each), {"ROWS": each, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def residual_norm_forward(
    x_md: Tensor, branch_md: Tensor | None, weight_d: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x + branch (float32; x itself where there is no branch), its norm in `dtype`, and 1 / rms (float32, shape m)."""
    d = x_md.shape[-1]
    n_tokens = x_md.numel() // d
    total = x_md if branch_md is None else torch.empty_like(x_md)
    out = torch.empty(x_md.shape, dtype=dtype, device=x_md.device)
    scale = torch.empty(x_md.shape[:-1], dtype=torch.float32, device=x_md.device)
    programs, shape = _shape(n_tokens, d)
    _residual_forward[(programs,)](
        x_md, branch_md, weight_d, total, out, scale, n_tokens, d, eps, **shape, BRANCH=branch_md is not None
    )
    return total, out, scale


def residual_norm_backward(
    grad_md: Tensor,
    grad_sum_md: Tensor | None,
    out_md: Tensor,
    weight_d: Tensor,
    scale_m: Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x (float32), of the branch (its dtype; None without one) and of the weight (float32).

    `out_md` is what forward returned, `grad_sum_md` the gradient of its x from later blocks, float32.
    """
    d = out_md.shape[-1]
    n_tokens = out_md.numel() // d
    grad_x = torch.empty(out_md.shape, dtype=torch.float32, device=out_md.device)
    grad_branch = None if branch_dtype is None else torch.empty(out_md.shape, dtype=branch_dtype, device=out_md.device)
    blocks, shape = _shape(n_tokens, d)
    programs = min(blocks, THREADS // (32 * shape["num_warps"]))
    grad_weight = torch.empty(programs, d, dtype=torch.float32, device=out_md.device)
    _residual_backward[(programs,)](
        grad_md, grad_sum_md, out_md, weight_d, scale_m, grad_x, grad_branch, grad_weight, n_tokens, d,
        **shape, BRANCH=branch_dtype is not None, ONWARD=grad_sum_md is not None,
    )  # fmt: skip
    return grad_x, grad_branch, grad_weight.sum(0)
