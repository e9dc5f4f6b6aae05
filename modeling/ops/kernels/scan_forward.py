"""The scan's forward pass: one program walks one sequence's chunks for one tile of heads, the state in registers.

Per chunk, with a the running sum of delta * A, l and s places in the chunk, S the state before it (n x p):

    y_l = e^(a_l) C_l S + sum over s <= l of (C_l . B_s) e^(a_l - a_s) delta_s x_s + D x_l
    S <- e^(a_end) S + sum over s of e^(a_end - a_s) B_s (delta_s x_s)^T

Training keeps each chunk's S in the compute dtype for backward: shape b, chunk, h, n, p.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.kernels.scan_common import TimeSteps, chunk_documents, reach
from modeling.ops.kernels.tiles import CHUNK, chunks_of, columns_of, launch_of


@triton.jit
def _one_head(
    mixed, decays, sources, D_ptr, y, states, head, H, row_width, B, C, scores, state, inside, from_before, to_end, keep,
    padded,
    N: tl.constexpr, CHUNK: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Write one head's part of a chunk; the pointers are to the chunk's first step. Returns the state after it."""
    l = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    p = tl.arange(0, COLUMNS)
    live = p < tl.where(head < H, HEADDIM, 0)
    mask = inside[:, None] & live[None, :]
    x = tl.load(mixed + head * HEADDIM + l[:, None] * row_width + p[None, :], mask=mask, other=0.0)
    # Beyond the last head everything is zero and nothing is stored: any head's decay will do for it.
    owned = tl.minimum(head, H - 1)
    steps = owned * padded
    decay = tl.load(decays + steps + l)
    source = tl.load(sources + steps + l)
    end = tl.load(decays + steps + CHUNK - 1)
    low = state.to(x.dtype)
    if KEEP:
        kept = states + head * (N * HEADDIM) + n[:, None] * HEADDIM + p[None, :]
        tl.store(kept, low, mask=(n >= 0)[:, None] & live[None, :])
    out = tl.dot(C, low, input_precision="ieee") * (tl.exp2(decay) * from_before)[:, None]
    out = tl.dot((scores * reach(decay, source)).to(x.dtype), x, out, input_precision="ieee")
    x32 = x.to(tl.float32)
    out += tl.load(D_ptr + owned) * x32
    tl.store(y + head * HEADDIM + l[:, None] * (H * HEADDIM) + p[None, :], out.to(y.dtype.element_ty), mask=mask)
    sent = (x32 * (tl.exp2(end - source) * to_end)[:, None]).to(x.dtype)
    return tl.dot(tl.trans(B), sent, state * (tl.exp2(end) * keep), input_precision="ieee")


@triton.jit
def _scan_forward(
    mixed_ptr, decay_ptr, source_ptr, D_ptr, seq_ptr, y_ptr, states_ptr, T, H, n_chunks,
    N: tl.constexpr, CHUNK: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
    DOCS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) * HEADS
    b = tl.program_id(1).to(tl.int64)
    inner = H * HEADDIM
    row_width = inner + 2 * N
    padded = n_chunks * CHUNK
    l = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    state = tl.zeros([N, COLUMNS], tl.float32)
    other = state
    decay_ptr += b * H * padded
    source_ptr += b * H * padded
    for c in range(n_chunks):
        first = b * T + c * CHUNK
        mixed = mixed_ptr + first * row_width
        y = y_ptr + first * inner
        # Where no state is kept none is written: any pointer will do.
        states = states_ptr + (b * n_chunks + c) * H * (N * HEADDIM) if KEEP else y
        decays = decay_ptr + c * CHUNK
        sources = source_ptr + c * CHUNK
        inside = l < T - c * CHUNK
        row = mixed + inner + l[:, None] * row_width + n[None, :]
        B = tl.load(row, mask=inside[:, None], other=0.0)
        C = tl.load(row + N, mask=inside[:, None], other=0.0)
        doc, from_before, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
        visible = (l[:, None] >= l[None, :]) & (doc[:, None] == doc[None, :])
        scores = tl.where(visible, tl.dot(C, tl.trans(B), input_precision="ieee"), 0.0)
        state = _one_head(
            mixed, decays, sources, D_ptr, y, states, head, H, row_width, B, C, scores, state, inside,
            from_before, to_end, keep, padded, N, CHUNK, HEADDIM, COLUMNS, KEEP,
        )  # fmt: skip
        if HEADS == 2:
            other = _one_head(
                mixed, decays, sources, D_ptr, y, states, head + 1, H, row_width, B, C, scores, other, inside,
                from_before, to_end, keep, padded, N, CHUNK, HEADDIM, COLUMNS, KEEP,
            )  # fmt: skip


def scan_forward(
    mixed_btc: Tensor,
    steps: TimeSteps,
    D_h: Tensor,
    *,
    heads: int,
    headdim: int,
    seq_idx_bt: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """y (b t inner, in mixed's dtype) of `mixed_btc` = [x | B | C], contiguous; and the states before each chunk
    (b, chunk, h, n, p), or None unless `keep_states`."""
    b, t, width = mixed_btc.shape
    h, inner = heads, heads * headdim
    n = (width - inner) // 2
    columns, n_chunks = columns_of(headdim), chunks_of(t)
    y = torch.empty(b, t, inner, dtype=mixed_btc.dtype, device=mixed_btc.device)
    states = (
        torch.empty(b, n_chunks, h, n, headdim, dtype=mixed_btc.dtype, device=mixed_btc.device) if keep_states else None
    )
    launch = launch_of("scan_forward", columns, mixed_btc.dtype)
    _scan_forward[(triton.cdiv(h, launch["HEADS"]), b)](
        mixed_btc, steps.decay, steps.source, D_h, seq_idx_bt, y, states, t, h, n_chunks,
        N=n, CHUNK=CHUNK, HEADDIM=headdim, COLUMNS=columns,
        DOCS=seq_idx_bt is not None, KEEP=keep_states,
        **launch,
    )  # fmt: skip
    return y, states
