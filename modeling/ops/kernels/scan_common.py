"""What the scan's kernels share: time steps after bias and softplus, and how far each step's state reaches.

Letters: b batch, t time, h heads. Per chunk, `decay` is the running sum of delta * A from the chunk's first step on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.kernels.tiles import CHUNK, chunks_of

HEADS_AT_ONCE = 16


@triton.jit
def _time_steps(
    dt_ptr, row_stride, bias_ptr, A_log_ptr, delta_ptr, decay_ptr, T, H, padded,
    CHUNK: tl.constexpr, HEADS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    h = tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    b = tl.program_id(2).to(tl.int64)
    live = h < H
    mask = (t < T)[:, None] & live[None, :]
    raw = tl.load(dt_ptr + (b * T + t)[:, None] * row_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
    raw += tl.load(bias_ptr + h, mask=live, other=0.0)[None, :]
    # log(1 + e^v) without overflow, and without losing a small e^v beside the 1.
    small = tl.exp(-tl.abs(raw))
    u = 1.0 + small
    log1p = tl.where(u == 1.0, small, tl.log(u) * (small / tl.where(u == 1.0, 1.0, u - 1.0)))
    delta = tl.where(mask, tl.maximum(raw, 0.0) + log1p, 0.0)
    decay = tl.cumsum(delta * -tl.exp(tl.load(A_log_ptr + h, mask=live, other=0.0))[None, :], axis=0)
    place = (b * H + h)[None, :] * padded + t[:, None]
    tl.store(delta_ptr + place, delta, mask=live[None, :] & (t >= 0)[:, None])
    tl.store(decay_ptr + place, decay, mask=live[None, :] & (t >= 0)[:, None])


@triton.jit
def chunk_documents(seq_ptr, b, c, T, CHUNK: tl.constexpr, DOCS: tl.constexpr):
    """Of chunk `c`: each step's document, whether the state before the chunk reaches it, whether it reaches the
    chunk's end, and whether the state before the chunk reaches that end; the last three as float32 0 or 1."""
    l = tl.arange(0, CHUNK)
    if DOCS:
        t = tl.minimum(c * CHUNK + l, T - 1)
        doc = tl.load(seq_ptr + b * T + t)
        doc_end = tl.load(seq_ptr + b * T + tl.minimum(c * CHUNK + CHUNK - 1, T - 1))
        doc_before = tl.load(seq_ptr + b * T + tl.maximum(c * CHUNK - 1, 0))
        from_before = (doc == doc_before).to(tl.float32)
        to_end = (doc == doc_end).to(tl.float32)
        keep = (doc_before == doc_end).to(tl.float32)
    else:
        doc = l * 0
        from_before = l.to(tl.float32) * 0.0 + 1.0
        to_end = from_before
        keep = 1.0
    return doc, from_before, to_end, keep


def time_steps(dt_bth: Tensor, dt_bias_h: Tensor, A_log_h: Tensor) -> tuple[Tensor, Tensor]:
    """delta = softplus(dt + bias) and its running sum with A in each chunk: float32, shape b h t, t filled up to whole
    chunks with delta = 0. `dt_bth` may be a slice of wider rows; bias and A_log may have more heads than it."""
    b, t, h = dt_bth.shape
    padded = chunks_of(t) * CHUNK
    delta, decay = torch.empty(2, b, h, padded, dtype=torch.float32, device=dt_bth.device).unbind()
    grid = (chunks_of(t), triton.cdiv(h, HEADS_AT_ONCE), b)
    _time_steps[grid](
        dt_bth, dt_bth.stride(1), dt_bias_h, A_log_h, delta, decay, t, h, padded,
        CHUNK=CHUNK, HEADS_AT_ONCE=HEADS_AT_ONCE, num_warps=4,
    )  # fmt: skip
    return delta, decay
