"""Causal depthwise convolution over time, then SiLU: what Mamba2 does to x, B and C before the scan.

Letters: b batch, t time, c channels, k taps. Tap k - 1 meets the present step, tap 0 the oldest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv_silu(
    x_btc: Tensor,
    weight_ck: Tensor,
    bias_c: Tensor,
    *,
    seq_idx_bt: Tensor | None = None,
    state_bkc: Tensor | None = None,
) -> Tensor:
    """silu(bias + sum over taps of weight * earlier steps), in x's dtype, shape b t c.

    `seq_idx_bt` (int32) numbers documents: a step sees no earlier step of another one. `state_bkc` holds the k - 1
    steps before the first, oldest first; None is zeros. The weight and bias are cast to x's dtype.
    """
    k = weight_ck.shape[1]
    before_bkc = x_btc.new_zeros(x_btc.shape[0], k - 1, x_btc.shape[2]) if state_bkc is None else state_bkc
    weight_ck, bias_c = weight_ck.to(x_btc.dtype), bias_c.to(x_btc.dtype)
    padded = torch.cat([before_bkc.to(x_btc.dtype), x_btc], dim=1)
    if seq_idx_bt is None:
        return F.silu(F.conv1d(padded.mT, weight_ck[:, None], bias_c, groups=weight_ck.shape[0]).mT)
    t = x_btc.shape[1]
    doc = torch.cat([seq_idx_bt[:, :1].expand(-1, k - 1), seq_idx_bt], dim=1)
    out = bias_c + weight_ck[:, k - 1] * x_btc
    for tap in range(k - 1):
        same = (doc[:, tap : tap + t] == seq_idx_bt)[..., None]
        out = out + weight_ck[:, tap] * torch.where(same, padded[:, tap : tap + t], 0)
    return F.silu(out)


def causal_conv_silu_ref(
    x_btc: Tensor, weight_ck: Tensor, bias_c: Tensor, *, seq_idx_bt: Tensor | None = None
) -> Tensor:
    """The definition, step by step and tap by tap, in float32, from a zero state."""
    x, weight_ck, bias_c = x_btc.float(), weight_ck.float(), bias_c.float()
    k = weight_ck.shape[1]
    steps = []
    for i in range(x.shape[1]):
        total = bias_c.expand(x.shape[0], -1)
        for tap in range(k):
            j = i - (k - 1 - tap)
            if j >= 0:
                seen = (
                    torch.ones(x.shape[0], 1, dtype=torch.bool)
                    if seq_idx_bt is None
                    else (seq_idx_bt[:, j] == seq_idx_bt[:, i])[:, None]
                )
                total = total + weight_ck[:, tap] * torch.where(seen.to(x.device), x[:, j], 0.0)
        steps.append(total * torch.sigmoid(total))
    return torch.stack(steps, dim=1).to(x_btc.dtype)
