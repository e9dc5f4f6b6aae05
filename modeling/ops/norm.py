"""RMSNorm and LayerNorm of the residual stream, and the gated RMSNorm of a mixer. Statistics are float32 whatever the
input; the result has the dtype that is asked for.

The gated norm covers all channels of the width in use, which tensor parallelism spreads over ranks: the caller sums
`square_sum` over them and hands the total to `scale`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.ops.dropout import Drop, dropped_float
from modeling.ops.kernels.residual_norm import residual_norm_backward, residual_norm_forward


def rms_norm(x_btd: Tensor, weight_d: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last dim, computed in float32, returned in `dtype`."""
    return F.rms_norm(x_btd.float(), weight_d.shape, weight_d.float(), eps).to(dtype)


def layer_norm(x_btd: Tensor, weight_d: Tensor, bias_d: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """(x - mean) / deviation * weight + bias over the last dim, computed in float32, returned in `dtype`."""
    return F.layer_norm(x_btd.float(), weight_d.shape, weight_d.float(), bias_d.float(), eps).to(dtype)


def add_norm(
    x_md: Tensor,
    branch_md: Tensor | None,
    weight_d: Tensor,
    bias_d: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype,
    drop: Drop | None = None,
) -> tuple[Tensor, Tensor]:
    """x + branch (float32), and its norm in `dtype`: LayerNorm with a bias, RMSNorm without. One pass over memory on a GPU.

    `x_md` is float32, `branch_md` of any dtype, None adds nothing; m counts tokens. `drop` drops entries of the branch.
    """
    if x_md.is_cuda:
        return add_norm_fused(x_md, branch_md, weight_d, bias_d, eps=eps, dtype=dtype, drop=drop)
    total_md = x_md if branch_md is None else x_md + (branch_md if drop is None else dropped_float(branch_md, drop))
    if bias_d is None:
        return total_md, rms_norm(total_md, weight_d, eps=eps, dtype=dtype)
    return total_md, layer_norm(total_md, weight_d, bias_d, eps=eps, dtype=dtype)


def add_norm_fused(
    x_md: Tensor,
    branch_md: Tensor | None,
    weight_d: Tensor,
    bias_d: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype,
    drop: Drop | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_norm` by our Triton kernels."""
    total_md, normed_md = _AddNorm.apply(x_md, branch_md, weight_d, bias_d, eps, dtype, drop)
    return total_md, normed_md


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        drop: Drop | None,
    ) -> tuple[Tensor, Tensor]:
        branch = None if branch is None else branch.contiguous()
        total, out, mean, scale = residual_norm_forward(
            x.contiguous(), branch, weight, bias, eps=eps, dtype=dtype, drop=drop
        )
        ctx.save_for_backward(out if bias is None else total, weight, mean, scale)
        ctx.branch_dtype, ctx.drop = None if branch is None else branch.dtype, drop
        ctx.set_materialize_grads(False)
        return (total.view_as(total) if branch is None else total), out

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, mean, scale = ctx.saved_tensors
        grad_total = None if grad_total is None else grad_total.contiguous()
        grads = residual_norm_backward(
            grad_out.contiguous(), grad_total, kept, weight, mean, scale, ctx.branch_dtype, ctx.drop
        )
        return (*grads, None, None, None)


def gate(y_bti: Tensor, z_bti: Tensor) -> Tensor:
    """y * silu(z) in float32."""
    return y_bti.float() * F.silu(z_bti.float())


def square_sum(u_bti: Tensor) -> Tensor:
    """Sum of squares over the local channels, float32, shape b t 1."""
    return u_bti.square().sum(-1, keepdim=True)


def scale(
    u_bti: Tensor, square_sum_bt1: Tensor, weight_i: Tensor, *, n_channels: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """u / sqrt(square_sum / n_channels + eps) * weight, in `dtype`; `n_channels` counts the channels of all ranks."""
    return (u_bti * torch.rsqrt(square_sum_bt1 / n_channels + eps) * weight_i).to(dtype)


def gated_norm_ref(y_bti: Tensor, z_bti: Tensor, weight_i: Tensor, *, eps: float) -> Tensor:
    """Gate, then RMS-normalise over all channels, in float32 (mamba-ssm's RMSNormGated, norm_before_gate=False)."""
    y, z = y_bti.float(), z_bti.float()
    u = y * (z * torch.sigmoid(z))
    return (u / torch.sqrt((u * u).mean(-1, keepdim=True) + eps) * weight_i).to(y_bti.dtype)
