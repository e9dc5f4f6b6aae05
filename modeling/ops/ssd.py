"""The state-space scan of Mamba2 (SSD, arXiv 2405.21060), one B/C group.

For each head h with state S in R^(p x n), at time t, with delta = softplus(dt + dt_bias):

    S_t = exp(delta_t A) S_(t-1) + delta_t x_t B_t^T        y_t = S_t C_t + D x_t

Letters: b batch, t time, h heads, p headdim, g groups (1), n state, c chunks, l and s places in a chunk.
`ssd_ref` is the specification, `ssd_chunked` the same in matrix products, `ssd` what the mixer calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from modeling.ops import upstream


def ssd(
    x_bthp: Tensor,
    dt_bth: Tensor,
    A_h: Tensor,
    B_btgn: Tensor,
    C_btgn: Tensor,
    D_h: Tensor,
    dt_bias_h: Tensor,
    *,
    chunk_size: int,
    seq_idx_bt: Tensor | None = None,
    state_bhpn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan all heads over time: mamba-ssm's Triton kernels on a GPU, `ssd_chunked` elsewhere.

    `x_bthp`, `dt_bth` (before bias and softplus), `B_btgn`, `C_btgn` are in the compute dtype; `A_h` (negative),
    `D_h`, `dt_bias_h` float32. `seq_idx_bt` (int32, never falling) numbers the documents of a row: the state is zeroed
    where it changes. `state_bhpn` is the state before the first step, of the same document as it; None is zero.

    Returns y in x's dtype, shape b t h p, and the state after the last step, float32, shape b h p n.
    """
    fused = upstream.chunk_scan() if x_bthp.is_cuda else None
    if fused is None:
        return ssd_chunked(
            x_bthp,
            dt_bth,
            A_h,
            B_btgn,
            C_btgn,
            D_h,
            dt_bias_h,
            chunk_size=chunk_size,
            seq_idx_bt=seq_idx_bt,
            state_bhpn=state_bhpn,
        )
    y_bthp, last_bhpn = fused(
        x_bthp,
        dt_bth,
        A_h,
        B_btgn,
        C_btgn,
        chunk_size,
        D=D_h,
        dt_bias=dt_bias_h,
        dt_softplus=True,
        seq_idx=seq_idx_bt,
        initial_states=state_bhpn,
        return_final_states=True,
    )
    return y_bthp, last_bhpn


def ssd_ref(
    x_bthp: Tensor,
    dt_bth: Tensor,
    A_h: Tensor,
    B_btgn: Tensor,
    C_btgn: Tensor,
    D_h: Tensor,
    dt_bias_h: Tensor,
    *,
    seq_idx_bt: Tensor | None = None,
    state_bhpn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as written above, one step after another, in float32. Arguments and results as in `ssd`."""
    x, dt, B, C = (v.float() for v in (x_bthp, dt_bth, B_btgn[:, :, 0], C_btgn[:, :, 0]))
    delta_bth = F.softplus(dt + dt_bias_h)
    b, t, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1]) if state_bhpn is None else state_bhpn.float()
    steps = []
    for i in range(t):
        if seq_idx_bt is not None and i > 0:
            same_b = seq_idx_bt[:, i] == seq_idx_bt[:, i - 1]
            state = torch.where(same_b[:, None, None, None], state, 0.0)
        decay_bh = torch.exp(delta_bth[:, i] * A_h)
        state = decay_bh[..., None, None] * state + torch.einsum("bh,bhp,bn->bhpn", delta_bth[:, i], x[:, i], B[:, i])
        steps.append(torch.einsum("bhpn,bn->bhp", state, C[:, i]) + D_h[:, None] * x[:, i])
    return torch.stack(steps, dim=1).to(x_bthp.dtype), state


def ssd_chunked(
    x_bthp: Tensor,
    dt_bth: Tensor,
    A_h: Tensor,
    B_btgn: Tensor,
    C_btgn: Tensor,
    D_h: Tensor,
    dt_bias_h: Tensor,
    *,
    chunk_size: int,
    seq_idx_bt: Tensor | None = None,
    state_bhpn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan as matrix products within chunks and a recurrence over them, in float32 (arXiv 2405.21060, section 6).

    Runs on every device; memory grows with `chunk_size` squared per head. Arguments and results as in `ssd`.
    """
    t = x_bthp.shape[1]
    chunk = min(chunk_size, t)
    pad = -t % chunk
    if seq_idx_bt is None:
        seq_idx_bt = x_bthp.new_zeros(x_bthp.shape[:2], dtype=torch.int32)
    # Padded steps belong to the last document and have delta = 0: they change neither state nor output.
    doc_bcl = rearrange(
        F.pad(seq_idx_bt[:, None].float(), (0, pad), mode="replicate")[:, 0], "b (c l) -> b c l", l=chunk
    )
    delta_bth = F.pad(F.softplus(dt_bth.float() + dt_bias_h), (0, 0, 0, pad))
    x, B, C = (F.pad(v.float(), (0, 0, 0, 0, 0, pad)) for v in (x_bthp, B_btgn, C_btgn))
    delta_bchl = rearrange(delta_bth, "b (c l) h -> b c h l", l=chunk)
    x_bclhp = rearrange(x, "b (c l) h p -> b c l h p", l=chunk)
    B_bcln, C_bcln = (rearrange(v, "b (c l) 1 n -> b c l n", l=chunk) for v in (B, C))

    log_decay_bchl = torch.cumsum(delta_bchl * A_h[:, None], dim=-1)
    xd_bclhp = x_bclhp * rearrange(delta_bchl, "b c h l -> b c l h 1")

    # Within a chunk: y_l += sum over s <= l of (C_l . B_s) exp(log_decay_l - log_decay_s) delta_s x_s.
    causal_ls = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    visible_bcls = causal_ls & (doc_bcl[..., :, None] == doc_bcl[..., None, :])
    gap_bchls = log_decay_bchl[..., :, None] - log_decay_bchl[..., None, :]
    gap_bchls = gap_bchls.masked_fill(~visible_bcls[:, :, None], -torch.inf)
    scores_bcls = C_bcln @ B_bcln.mT
    y_bclhp = torch.einsum("bcls,bchls,bcshp->bclhp", scores_bcls, torch.exp(gap_bchls), xd_bclhp)

    # What each chunk adds to the state by its end, from the document that its last step belongs to.
    to_end_bchl = torch.exp(log_decay_bchl[..., -1:] - log_decay_bchl)
    to_end_bchl = to_end_bchl * (doc_bcl == doc_bcl[..., -1:])[:, :, None]
    added_bchpn = torch.einsum("bchl,bclhp,bcln->bchpn", to_end_bchl, xd_bclhp, B_bcln)

    # Over chunks: the state carried in reaches only the steps of its own document.
    b, _, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1]) if state_bhpn is None else state_bhpn.float()
    doc_b = doc_bcl[:, 0, 0]
    carried = []
    for c in range(doc_bcl.shape[1]):
        reach_bl = (doc_bcl[:, c] == doc_b[:, None]).to(x.dtype)
        into_bhl = torch.exp(log_decay_bchl[:, c]) * reach_bl[:, None]
        carried.append(torch.einsum("bhl,bhpn,bln->blhp", into_bhl, state, C_bcln[:, c]))
        state = state * into_bhl[..., -1, None, None] + added_bchpn[:, c]
        doc_b = doc_bcl[:, c, -1]
    y_bclhp = y_bclhp + torch.stack(carried, dim=1) + repeat(D_h, "h -> h 1") * x_bclhp
    y_bthp = rearrange(y_bclhp, "b c l h p -> b (c l) h p")[:, :t]
    return y_bthp.to(x_bthp.dtype), state
