"""Softmax statistics of a matrix of logits, and the cross-entropy's gradient written over it. Rows m, vocabulary v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.kernels.fast_math import LOG2_E, exp

BLOCK = 4096
GROUP = tl.constexpr(8)
LOWEST = tl.constexpr(-1e38)
"""Peak of a group that has seen no logit. Finite: the difference of two infinities would be NaN."""


@triton.jit
def _softmax_statistics(logits_ptr, target_ptr, peak_ptr, sum_ptr, picked_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # A thread's eight neighbours share their largest logit, in units of log 2: one power of two a logit and one a group.
    group = tl.arange(0, BLOCK // GROUP)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    peak = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // GROUP], tl.float32)
    for start in range(0, V, BLOCK):
        logits = tl.load(logits_ptr + row * V + start + column, mask=start + column < V, other=float("-inf"))
        logits = logits.to(tl.float32) * LOG2_E
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), axis=1)
        peak = higher
    best = tl.max(peak, axis=0)
    tl.store(peak_ptr + row, best / LOG2_E)
    tl.store(sum_ptr + row, tl.sum(total * tl.exp2(peak - best), axis=0))
    target = tl.load(target_ptr + row)
    mine = (target >= 0) & (target < V)
    tl.store(picked_ptr + row, tl.load(logits_ptr + row * V + target, mask=mine, other=0.0).to(tl.float32))


@triton.jit
def _softmax_gradient(logits_ptr, target_ptr, peak_ptr, sum_ptr, scale, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    peak = tl.load(peak_ptr + row)
    share = scale / tl.load(sum_ptr + row)
    target = tl.load(target_ptr + row)
    place = logits_ptr + row * V + column
    logits = tl.load(place, mask=column < V, other=float("-inf")).to(tl.float32)
    gradient = exp(logits - peak) * share - tl.where(column == target, scale, 0.0)
    tl.store(place, gradient.to(logits_ptr.dtype.element_ty), mask=column < V)


def softmax_statistics(logits_mv: Tensor, local_targets_m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's largest logit, its sum of exp(logit - largest), and its target's logit (0 where the target lies
    outside these columns): float32, shape m. Targets count from the first column."""
    m, v = logits_mv.shape
    peak, total, picked = torch.empty(3, m, dtype=torch.float32, device=logits_mv.device).unbind()
    _softmax_statistics[(m,)](logits_mv, local_targets_m, peak, total, picked, v, BLOCK=BLOCK, num_warps=8)
    return peak, total, picked


def write_gradient(logits_mv: Tensor, local_targets_m: Tensor, peak_m: Tensor, sum_m: Tensor, scale: float) -> None:
    """Overwrite the logits with scale * (softmax - one_hot(target)); `sum_m` is over all ranks' columns, about `peak_m`."""
    m, v = logits_mv.shape
    grid = (m, triton.cdiv(v, BLOCK))
    _softmax_gradient[grid](logits_mv, local_targets_m, peak_m, sum_m, scale, v, BLOCK=BLOCK, num_warps=8)
