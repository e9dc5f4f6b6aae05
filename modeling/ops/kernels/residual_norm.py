"""Residual addition and a norm in one pass: x = x + branch, in float32; out = x w / sqrt(mean(x^2) + eps), or the LayerNorm
(x - mean) w / sqrt(variance + eps) + bias. Of the branch entries may be dropped on the way, which costs no memory traffic.

Backward of the RMSNorm takes x / rms from `out`, which the layer after it keeps anyway, as out / w: half the bytes of x, and
x itself need not be kept. A weight of exactly zero hides its channel, and gets a gradient of zero. The LayerNorm's bias may
leave too few digits of x in `out`: it keeps x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.kernels.dropout import dropped
from modeling.ops.kernels.row_sums import sum_rows
from modeling.ops.kernels.rows import THREADS, row_tiles, stages_of

SMALLEST = tl.constexpr(1e-30)
BranchDrop = tuple[Tensor, Tensor, int, int, int]
"""key_b, scale_b, threshold, n_tokens, first_row of modeling.ops.dropout.Drop."""


@triton.jit
def _residual_forward(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, mean_ptr, scale_ptr, rows, width, eps,
    key_ptr, drop_scale_ptr, n_tokens, first_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BRANCH: tl.constexpr, LAYER: tl.constexpr, DROP: tl.constexpr,
    THRESHOLD: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    if BRANCH:
        branch = tl.load(branch_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if DROP:
            token = row + first_row
            branch = dropped(branch, key_ptr, drop_scale_ptr, n_tokens, token, column, row < rows, THRESHOLD)
        x += branch
        tl.store(sum_ptr + place, x, mask=mask)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
    if LAYER:
        mean = tl.sum(x, axis=1) / width
        tl.store(mean_ptr + row, mean, mask=row < rows)
        x = tl.where(mask, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    out = x * scale[:, None] * weight[None, :]
    if LAYER:
        out += tl.load(bias_ptr + column, mask=column < width, other=0.0)[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def _residual_backward(
    grad_ptr, grad_sum_ptr, kept_ptr, weight_ptr, mean_ptr, scale_ptr, grad_x_ptr, grad_branch_ptr, grad_weight_ptr,
    grad_bias_ptr, rows, width, key_ptr, drop_scale_ptr, n_tokens, first_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BRANCH: tl.constexpr, ONWARD: tl.constexpr, LAYER: tl.constexpr,
    DROP: tl.constexpr, THRESHOLD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
    inverse = tl.where(tl.abs(weight) < SMALLEST, 0.0, 1.0 / tl.where(tl.abs(weight) < SMALLEST, 1.0, weight))
    grad_weight = tl.zeros([BLOCK], tl.float32)
    grad_bias = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        scaled = tl.load(kept_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if LAYER:
            scaled = tl.where(mask, scaled - tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None], 0.0) * scale
        else:
            scaled *= inverse[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad_weight += tl.sum(grad * scaled, axis=0)
        if LAYER:
            grad_bias += tl.sum(grad, axis=0)
        grad = grad * weight[None, :]
        grad_x = grad - scaled * (tl.sum(grad * scaled, axis=1) / width)[:, None]
        if LAYER:
            grad_x -= (tl.sum(grad, axis=1) / width)[:, None]
        grad_x = grad_x * scale
        if ONWARD:
            grad_x += tl.load(grad_sum_ptr + place, mask=mask, other=0.0)
        tl.store(grad_x_ptr + place, grad_x, mask=mask)
        if BRANCH:
            if DROP:
                token = row + first_row
                grad_x = dropped(grad_x, key_ptr, drop_scale_ptr, n_tokens, token, column, row < rows, THRESHOLD)
            tl.store(grad_branch_ptr + place, grad_x.to(grad_branch_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_weight_ptr + tl.program_id(0) * width + column, grad_weight, mask=column < width)
    if LAYER:
        tl.store(grad_bias_ptr + tl.program_id(0) * width + column, grad_bias, mask=column < width)


def _drop_arguments(drop: BranchDrop | None) -> tuple[list[Tensor | int | None], dict[str, int | bool]]:
    if drop is None:
        return [None, None, 1, 0], {"DROP": False, "THRESHOLD": 0}
    key_b, scale_b, threshold, n_tokens, first_row = drop
    return [key_b.view(torch.int32), scale_b, n_tokens, first_row], {"DROP": True, "THRESHOLD": threshold}


def residual_norm_forward(
    x_md: Tensor,
    branch_md: Tensor | None,
    weight_d: Tensor,
    bias_d: Tensor | None,
    *,
    eps: float,
    dtype: torch.dtype,
    drop: BranchDrop | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x + branch (float32; x itself where there is no branch), its norm in `dtype`, and what backward wants of the rows:
    their mean (None without a bias, which is what makes it a LayerNorm) and 1 / deviation, float32, shape m."""
    d = x_md.shape[-1]
    n_tokens = x_md.numel() // d
    total = x_md if branch_md is None else torch.empty_like(x_md)
    out = torch.empty(x_md.shape, dtype=dtype, device=x_md.device)
    scale = torch.empty(x_md.shape[:-1], dtype=torch.float32, device=x_md.device)
    mean = None if bias_d is None else torch.empty_like(scale)
    programs, shape = row_tiles(n_tokens, d)
    pointers, flags = _drop_arguments(drop)
    _residual_forward[(programs,)](
        x_md, branch_md, weight_d, bias_d, total, out, mean, scale, n_tokens, d, eps, *pointers,
        **shape, BRANCH=branch_md is not None, LAYER=bias_d is not None, **flags,
    )  # fmt: skip
    return total, out, mean, scale


def residual_norm_backward(
    grad_md: Tensor,
    grad_sum_md: Tensor | None,
    kept_md: Tensor,
    weight_d: Tensor,
    mean_m: Tensor | None,
    scale_m: Tensor,
    branch_dtype: torch.dtype | None,
    drop: BranchDrop | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of x (float32), of the branch (its dtype; None without one), of the weight and of the bias (float32; None
    without one, where `mean_m` is None).

    `kept_md` is forward's normed output, or for a LayerNorm its x; `grad_sum_md` the gradient of that x from later blocks,
    float32.
    """
    d = kept_md.shape[-1]
    n_tokens = kept_md.numel() // d
    grad_x = torch.empty(kept_md.shape, dtype=torch.float32, device=kept_md.device)
    grad_branch = (
        None if branch_dtype is None else torch.empty(kept_md.shape, dtype=branch_dtype, device=kept_md.device)
    )
    blocks, shape = row_tiles(n_tokens, d)
    shape["num_warps"] = min(16, 2 * shape["num_warps"])
    # Half of what runs at once: each walks over rows and keeps the weight's gradient. It waits for all its warps twice a row,
    # and memory would wait with it if other rows were not under way.
    programs = min(blocks, THREADS // (2 * 32 * shape["num_warps"]))
    number_bytes = grad_md.element_size() + kept_md.element_size() + grad_x.element_size()
    stages = stages_of(shape["ROWS"] * shape["BLOCK"] * number_bytes, most=3)
    grad_weight = torch.empty(programs, d, dtype=torch.float32, device=kept_md.device)
    grad_bias = None if mean_m is None else torch.empty_like(grad_weight)
    pointers, flags = _drop_arguments(drop)
    _residual_backward[(programs,)](
        grad_md, grad_sum_md, kept_md, weight_d, mean_m, scale_m, grad_x, grad_branch, grad_weight, grad_bias,
        n_tokens, d, *pointers,
        **shape, BRANCH=branch_dtype is not None, ONWARD=grad_sum_md is not None, LAYER=mean_m is not None, **flags,
        STAGES=stages,
    )  # fmt: skip
    return grad_x, grad_branch, sum_rows(grad_weight), None if grad_bias is None else sum_rows(grad_bias)
