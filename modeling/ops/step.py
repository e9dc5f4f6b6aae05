"""The mixer between its projections for any number of steps from a state, as decoding needs it: no gradients.

On a GPU a few steps are `modeling.ops.kernels.step`'s; this is its specification, and what reads prompts.

Letters: b batch, t time, r rows of the packed projection, c channels (B, C, then x), h heads of the width in use, p
headdim, n state, k conv taps, i inner (h x p).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from modeling.ops import norm
from modeling.ops.conv import causal_conv_silu
from modeling.ops.ssd import ssd

FEW_STEPS = 16
"""Up to this many steps the recurrence, step by step, is faster on a GPU than chunks."""
NO_STEP = -1e4
"""A dt this low gives softplus(dt + bias) = 0 exactly: the step changes no state."""


def is_few(n_steps: int, d_conv: int, device: torch.device) -> bool:
    """Whether the kernels for a few steps run; they are launched in a way that ROCm does not know."""
    return device.type == "cuda" and torch.version.hip is None and n_steps <= FEW_STEPS and d_conv == 4


def mixer_step(
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
    chunk_size: int,
    eps: float,
) -> Tensor:
    """What the output projection is given, in the compute dtype, shape b t i; both states move on in place.

    `projected_btr` (compute dtype) holds B and C (2 n columns), a dt for each of the `held` heads, then x and z of head 0,
    x and z of head 1, ...: the columns of any width come first. `ssm_state_bhpn` (float32 or bfloat16) says how many heads
    are in use; `conv_state_bkc` holds the last k - 1 inputs of the convolution. Of row b the states take in the first
    absorb_b steps (int32, 0 to t), and outputs are those of all steps before that, or of all t where absorb_b is 0.
    """
    heads, p, n = ssm_state_bhpn.shape[1:]
    t = projected_btr.shape[1]
    bc_btc, dt_bth, xz_bti = projected_btr.split([2 * n, held, 2 * heads * p], dim=-1)
    x_bthp, z_bthp = rearrange(xz_bti, "b t (h two p) -> two b t h p", two=2, p=p)
    raw_btc = torch.cat([bc_btc, rearrange(x_bthp, "b t h p -> b t (h p)")], dim=-1)
    mixed_btc = causal_conv_silu(raw_btc, conv_ck, conv_bias_c, state_bkc=conv_state_bkc)
    B_btn, C_btn, x_bti = mixed_btc.split([n, n, heads * p], dim=-1)
    # Steps past the absorbed ones must not move the state; where none is absorbed all outputs are wanted and the new
    # state is thrown away.
    kept_b1 = absorb_b[:, None] > 0
    idle_bt = kept_b1 & (torch.arange(t, device=absorb_b.device) >= absorb_b[:, None])
    y_bthp, last_bhpn = ssd(
        rearrange(x_bti, "b t (h p) -> b t h p", p=p),
        dt_bth[..., :heads].masked_fill(idle_bt[..., None], NO_STEP),
        A_h,
        rearrange(B_btn, "b t n -> b t 1 n"),
        rearrange(C_btn, "b t n -> b t 1 n"),
        D_h,
        dt_bias_h,
        chunk_size=chunk_size,
        state_bhpn=ssm_state_bhpn.float(),
    )
    ssm_state_bhpn.copy_(torch.where(kept_b1[..., None, None], last_bhpn, ssm_state_bhpn.float()))
    taps = torch.arange(conv_ck.shape[1] - 1, device=absorb_b.device)
    recent_bkc = (absorb_b[:, None] + taps)[..., None].long().expand(-1, -1, raw_btc.shape[-1])
    conv_state_bkc.copy_(torch.cat([conv_state_bkc.to(raw_btc.dtype), raw_btc], dim=1).gather(1, recent_bkc))
    u_bti = rearrange(norm.gate(y_bthp, z_bthp), "b t h p -> b t (h p)")
    return norm.scale(u_bti, norm.square_sum(u_bti), norm_i, n_channels=heads * p, eps=eps, dtype=projected_btr.dtype)
