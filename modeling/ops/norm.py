"""RMSNorm, plain and gated. Statistics are float32 whatever the input; the result has the dtype that is asked for.

The gated norm covers all channels of the width in use, which tensor parallelism spreads over ranks: the caller sums
`square_sum` over them and hands the total to `scale`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_btd: Tensor, weight_d: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last dim, computed in float32, returned in `dtype`."""
    return F.rms_norm(x_btd.float(), weight_d.shape, weight_d.float(), eps).to(dtype)


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
