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

from modeling.ops.kernels.scan_common import chunk_documents
from modeling.ops.kernels.tiles import CHUNK, Tiles, chunks_of, launch_of


@triton.jit
def _scan_forward(
    mixed_ptr, delta_ptr, decay_ptr, D_ptr, seq_ptr, y_ptr, states_ptr, T, H, n_chunks,
    N: tl.constexpr, CHUNK: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
    DOCS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * HEADS
    b = tl.program_id(1).to(tl.int64)
    place: tl.constexpr = COLUMNS // HEADS
    column = tl.arange(0, COLUMNS)
    slot = column // place
    head = first + slot
    live = (column % place < HEADDIM) & (head < H)
    channel = head * HEADDIM + column % place
    inner = H * HEADDIM
    row_width = inner + 2 * N
    l = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    D = tl.load(D_ptr + head, mask=live, other=0.0)
    state = tl.zeros([N, COLUMNS], tl.float32)
    for c in range(n_chunks):
        t = c * CHUNK + l
        inside = t < T
        row = mixed_ptr + (b * T + t)[:, None] * row_width
        x = tl.load(row + channel[None, :], mask=inside[:, None] & live[None, :], other=0.0)
        B = tl.load(row + inner + n[None, :], mask=inside[:, None], other=0.0)
        C = tl.load(row + inner + N + n[None, :], mask=inside[:, None], other=0.0)
        doc, from_before, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
        visible = (l[:, None] >= l[None, :]) & (doc[:, None] == doc[None, :])

        if KEEP:
            kept = states_ptr + (b * n_chunks + c) * H * N * HEADDIM + n[:, None] * HEADDIM
            kept += (head * N * HEADDIM + column % place)[None, :]
            tl.store(kept, state.to(states_ptr.dtype.element_ty), mask=(n >= 0)[:, None] & live[None, :])
        scores = tl.dot(C, tl.trans(B), input_precision="ieee")
        carried = tl.dot(C, state.to(C.dtype), input_precision="ieee")
        within = tl.zeros([CHUNK, COLUMNS], tl.float32)
        into = tl.zeros([CHUNK, COLUMNS], tl.float32)
        add = tl.zeros([CHUNK, COLUMNS], tl.float32)
        shrink = tl.zeros([COLUMNS], tl.float32)
        for g in tl.static_range(HEADS):
            # A place beyond the last head holds zeros and is never stored: any head's decay will do for it.
            steps = (b * H + tl.minimum(first + g, H - 1)) * (n_chunks * CHUNK) + c * CHUNK
            a = tl.load(decay_ptr + steps + l)
            delta = tl.load(delta_ptr + steps + l)
            a_end = tl.load(decay_ptr + steps + CHUNK - 1)
            gap = tl.where(visible, a[:, None] - a[None, :], float("-inf"))
            weights = (scores * tl.exp(gap) * delta[None, :]).to(x.dtype)
            mine = slot[None, :] == g
            xg = x if HEADS == 1 else tl.where(mine, x, tl.zeros_like(x))
            within = tl.dot(weights, xg, within, input_precision="ieee")
            into = tl.where(mine, (tl.exp(a) * from_before)[:, None], into)
            add = tl.where(mine, (tl.exp(a_end - a) * delta * to_end)[:, None], add)
            shrink = tl.where(slot == g, tl.exp(a_end) * keep, shrink)
        y = within + carried * into + D[None, :] * x.to(tl.float32)
        out = y_ptr + (b * T + t)[:, None] * inner + channel[None, :]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & live[None, :])
        state = state * shrink[None, :]
        state = tl.dot(tl.trans(B), (x.to(tl.float32) * add).to(x.dtype), state, input_precision="ieee")


def scan_forward(
    mixed_btc: Tensor,
    delta_bht: Tensor,
    decay_bht: Tensor,
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
    tiles, n_chunks = Tiles.of(headdim), chunks_of(t)
    y = torch.empty(b, t, inner, dtype=mixed_btc.dtype, device=mixed_btc.device)
    states = (
        torch.empty(b, n_chunks, h, n, headdim, dtype=mixed_btc.dtype, device=mixed_btc.device) if keep_states else None
    )
    _scan_forward[(tiles.count(h), b)](
        mixed_btc, delta_bht, decay_bht, D_h, seq_idx_bt, y, states, t, h, n_chunks,
        N=n, CHUNK=CHUNK, HEADDIM=headdim, COLUMNS=tiles.columns, HEADS=tiles.heads,
        DOCS=seq_idx_bt is not None, KEEP=keep_states,
        **launch_of("scan_forward", tiles.place, mixed_btc.dtype),
    )  # fmt: skip
    return y, states
