"""The scan's backward pass, in four kernels. Notation as in scan_forward: S is the state before a chunk, dS the loss's
gradient by the state after it; M = (C B^T) L with L_ls = e^(a_l - a_s), for s <= l, so that y = M (delta x) + ...

1. `_state_gradients` walks one sequence's chunks backwards for one tile of heads, dS in registers:
       dS <- e^(a_end) dS + sum over l of e^(a_l) C_l dy_l^T.
2. `_inputs_gradients` has a program a chunk and loops over heads, so that d(C B^T) is summed in registers:
       dM = dy (delta x)^T      d(C B^T) = sum over heads of dM L      d(delta x) = M^T dy + e^(a_end - a) B dS.
3. `_group_gradients`: B and C feed every head, so theirs is one long product over all channels:
       dC = (e^a dy) S^T + d(C B^T) B      dB = (e^(a_end - a) delta x) dS^T + d(C B^T)^T C.
4. `_rate_gradients`: what reaches the running sums a, and through them delta, dt, dt_bias and A:
       da = rowsum(dM M) - colsum(dM M) + e^a dy . C S - e^(a_end - a) delta x . B dS, and at the end e^(a_end) S . dS.
   The row and column sums are of one float32 matrix and cancel exactly in the running sum that follows.

No atomics: the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.kernels.scan_common import chunk_documents
from modeling.ops.kernels.tiles import CHUNK, Tiles, chunks_of, launch_of

PROGRAMS_WANTED = 132 * 12
"""Several waves of an H200's 132 multiprocessors; where there are fewer chunks, heads are shared out over programs."""


@triton.jit
def _state_gradients(
    mixed_ptr, decay_ptr, grad_y_ptr, states_ptr, seq_ptr, grad_states_ptr, reached_ptr, decayed_ptr, T, H, n_chunks,
    N: tl.constexpr, CHUNK: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
    DOCS: tl.constexpr,
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
    at_state = (head * N * HEADDIM + column % place)[None, :] + n[:, None] * HEADDIM
    state_mask = (n >= 0)[:, None] & live[None, :]
    grad_state = tl.zeros([N, COLUMNS], tl.float32)
    for i in range(n_chunks):
        c = n_chunks - 1 - i
        t = c * CHUNK + l
        inside = t < T
        kept = (b * n_chunks + c) * H * N * HEADDIM + at_state
        S = tl.load(states_ptr + kept, mask=state_mask, other=0.0)
        C = tl.load(
            mixed_ptr + (b * T + t)[:, None] * row_width + inner + N + n[None, :], mask=inside[:, None], other=0.0
        )
        dy = tl.load(
            grad_y_ptr + (b * T + t)[:, None] * inner + channel[None, :],
            mask=inside[:, None] & live[None, :],
            other=0.0,
        )
        tl.store(grad_states_ptr + kept, grad_state.to(grad_states_ptr.dtype.element_ty), mask=state_mask)
        both = tl.sum(S.to(tl.float32) * grad_state, axis=0)
        carried = tl.dot(C, S, input_precision="ieee")
        doc, from_before, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
        into = tl.zeros([CHUNK, COLUMNS], tl.float32)
        shrink = tl.zeros([COLUMNS], tl.float32)
        for g in tl.static_range(HEADS):
            # A place beyond the last head holds zeros and is never stored: any head's decay will do for it.
            steps = (b * H + tl.minimum(first + g, H - 1)) * (n_chunks * CHUNK) + c * CHUNK
            a = tl.load(decay_ptr + steps + l)
            a_end = tl.load(decay_ptr + steps + CHUNK - 1)
            into = tl.where(slot[None, :] == g, (tl.exp(a) * from_before)[:, None], into)
            shrink = tl.where(slot == g, tl.exp(a_end) * keep, shrink)
        dy_into = dy.to(tl.float32) * into
        carried = carried * dy_into
        both = both * shrink
        for g in tl.static_range(HEADS):
            steps = (b * H + first + g) * (n_chunks * CHUNK) + c * CHUNK
            owned = first + g < H
            reached = tl.sum(tl.where(slot[None, :] == g, carried, 0.0), axis=1)
            tl.store(reached_ptr + steps + l, reached, mask=first + g + l * 0 < H)
            decayed = tl.sum(tl.where(slot == g, both, 0.0))
            tl.store(decayed_ptr + (b * n_chunks + c) * H + first + g, decayed, mask=owned)
        grad_state = grad_state * shrink[None, :]
        grad_state = tl.dot(tl.trans(C), dy_into.to(dy.dtype), grad_state, input_precision="ieee")


@triton.jit
def _inputs_gradients(
    mixed_ptr, delta_ptr, decay_ptr, D_ptr, grad_y_ptr, grad_states_ptr, seq_ptr,
    grad_mixed_ptr, grad_scores_ptr, by_target_ptr, by_source_ptr, sent_ptr, skipped_ptr,
    T, H, n_chunks, heads_each,
    N: tl.constexpr, CHUNK: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    part = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    live = column < HEADDIM
    inner = H * HEADDIM
    row_width = inner + 2 * N
    l = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    t = c * CHUNK + l
    inside = t < T
    mask = inside[:, None] & live[None, :]
    row = mixed_ptr + (b * T + t)[:, None] * row_width
    B = tl.load(row + inner + n[None, :], mask=inside[:, None], other=0.0)
    C = tl.load(row + inner + N + n[None, :], mask=inside[:, None], other=0.0)
    doc, from_before, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
    scores = tl.dot(C, tl.trans(B), input_precision="ieee")
    grad_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for h in range(part * heads_each, tl.minimum((part + 1) * heads_each, H)):
        channel = h * HEADDIM + column
        steps = (b * H + h) * (n_chunks * CHUNK) + c * CHUNK
        kept = ((b * n_chunks + c) * H + h) * N * HEADDIM + n[:, None] * HEADDIM + column[None, :]
        dS = tl.load(grad_states_ptr + kept, mask=(n >= 0)[:, None] & live[None, :], other=0.0)
        dy = tl.load(grad_y_ptr + (b * T + t)[:, None] * inner + channel[None, :], mask=mask, other=0.0)
        x = tl.load(row + channel[None, :], mask=mask, other=0.0)
        a = tl.load(decay_ptr + steps + l)
        delta = tl.load(delta_ptr + steps + l)
        a_end = tl.load(decay_ptr + steps + CHUNK - 1)
        x32 = x.to(tl.float32)
        dy32 = dy.to(tl.float32)

        grad_x = tl.dot(B, dS, input_precision="ieee") * (tl.exp(a_end - a) * to_end)[:, None]
        tl.store(sent_ptr + steps + l, tl.sum(grad_x * x32, axis=1))
        tl.store(skipped_ptr + steps + l, tl.sum(dy32 * x32, axis=1))
        visible = (l[:, None] >= l[None, :]) & (doc[:, None] == doc[None, :])
        L = tl.exp(tl.where(visible, a[:, None] - a[None, :], float("-inf")))
        dM = tl.dot(dy, tl.trans(x), input_precision="ieee") * L  # without delta_s
        grad_scores += dM * delta[None, :]
        grad_x = tl.dot(tl.trans((scores * L).to(dy.dtype)), dy, grad_x, input_precision="ieee")
        dM = dM * scores
        tl.store(by_source_ptr + steps + l, tl.sum(dM, axis=0))
        tl.store(by_target_ptr + steps + l, tl.sum(dM * delta[None, :], axis=1))
        grad_x = grad_x * delta[:, None] + tl.load(D_ptr + h) * dy32
        tl.store(
            grad_mixed_ptr + (b * T + t)[:, None] * row_width + channel[None, :],
            grad_x.to(grad_mixed_ptr.dtype.element_ty),
            mask=mask,
        )
    out = grad_scores_ptr + ((b * n_chunks + c) * tl.num_programs(0) + part) * CHUNK * CHUNK
    tl.store(out + l[:, None] * CHUNK + l[None, :], grad_scores)


@triton.jit
def _group_gradients(
    mixed_ptr, delta_ptr, decay_ptr, grad_y_ptr, states_ptr, grad_states_ptr, seq_ptr, grad_scores_ptr, parts,
    grad_mixed_ptr, T, H, n_chunks,
    N: tl.constexpr, CHUNK: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, DOCS: tl.constexpr,
    FOR_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    live = column < HEADDIM
    inner = H * HEADDIM
    row_width = inner + 2 * N
    l = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    t = c * CHUNK + l
    inside = t < T
    mask = inside[:, None] & live[None, :]
    row = mixed_ptr + (b * T + t)[:, None] * row_width
    doc, from_before, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
    total = tl.zeros([CHUNK, N], tl.float32)
    for h in range(H):
        channel = h * HEADDIM + column
        steps = (b * H + h) * (n_chunks * CHUNK) + c * CHUNK
        # A state as rows of p and columns of n.
        kept = ((b * n_chunks + c) * H + h) * N * HEADDIM + n[None, :] * HEADDIM + column[:, None]
        a = tl.load(decay_ptr + steps + l)
        if FOR_C:
            state = tl.load(states_ptr + kept, mask=live[:, None] & (n >= 0)[None, :], other=0.0)
            rows = tl.load(grad_y_ptr + (b * T + t)[:, None] * inner + channel[None, :], mask=mask, other=0.0)
            weight = tl.exp(a) * from_before
        else:
            state = tl.load(grad_states_ptr + kept, mask=live[:, None] & (n >= 0)[None, :], other=0.0)
            rows = tl.load(row + channel[None, :], mask=mask, other=0.0)
            a_end = tl.load(decay_ptr + steps + CHUNK - 1)
            weight = tl.exp(a_end - a) * to_end * tl.load(delta_ptr + steps + l)
        total = tl.dot((rows.to(tl.float32) * weight[:, None]).to(rows.dtype), state, total, input_precision="ieee")
    grad_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for part in range(parts):
        at = grad_scores_ptr + ((b * n_chunks + c) * parts + part) * CHUNK * CHUNK
        grad_scores += tl.load(at + l[:, None] * CHUNK + l[None, :])
    if FOR_C:
        B = tl.load(row + inner + n[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(grad_scores.to(B.dtype), B, total, input_precision="ieee")
    else:
        C = tl.load(row + inner + N + n[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(tl.trans(grad_scores.to(C.dtype)), C, total, input_precision="ieee")
    out = grad_mixed_ptr + (b * T + t)[:, None] * row_width + inner + n[None, :]
    if FOR_C:
        out += N
    tl.store(out, total.to(grad_mixed_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _rate_gradients(
    delta_ptr, A_log_ptr, by_target_ptr, by_source_ptr, sent_ptr, reached_ptr, decayed_ptr, skipped_ptr,
    grad_dt_ptr, dt_stride, sums_ptr, T, H, n_chunks,
    CHUNK: tl.constexpr, HEADS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    h = tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    b = tl.program_id(2).to(tl.int64)
    owned = h < H
    t = c * CHUNK + tl.arange(0, CHUNK)
    place = (b * H + h)[None, :] * (n_chunks * CHUNK) + t[:, None]
    mask = (t >= 0)[:, None] & owned[None, :]
    delta = tl.load(delta_ptr + place, mask=mask, other=0.0)
    by_source = tl.load(by_source_ptr + place, mask=mask, other=0.0)
    sent = tl.load(sent_ptr + place, mask=mask, other=0.0)
    grad_a = tl.load(by_target_ptr + place, mask=mask, other=0.0) - delta * by_source
    grad_a += tl.load(reached_ptr + place, mask=mask, other=0.0) - delta * sent
    at = (b * n_chunks + c) * H + h
    grad_end = tl.load(decayed_ptr + at, mask=owned, other=0.0) + tl.sum(delta * sent, axis=0)
    # Every step's delta * A is in the running sums at and after it, the chunk's end included.
    grad_rate = tl.cumsum(grad_a, axis=0, reverse=True) + grad_end[None, :]
    # softplus' derivative is 1 - e^(-delta), which loses its digits where delta is small.
    series = delta * (1.0 - delta * 0.5 * (1.0 - delta * (1.0 / 3.0) * (1.0 - delta * 0.25)))
    slope = tl.where(delta < 0.05, series, 1.0 - tl.exp(-delta))
    A = -tl.exp(tl.load(A_log_ptr + h, mask=owned, other=0.0))
    grad_delta = grad_rate * A[None, :] + by_source + sent
    grad_dt = grad_delta * slope
    out = grad_dt_ptr + (b * T + t)[:, None] * dt_stride + h[None, :]
    tl.store(out, grad_dt.to(grad_dt_ptr.dtype.element_ty), mask=(t < T)[:, None] & owned[None, :])
    skipped = tl.load(skipped_ptr + place, mask=mask, other=0.0)
    out = sums_ptr + (b * n_chunks + c) * 3 * H + h
    tl.store(out, tl.sum(grad_rate * delta, axis=0) * A, mask=owned)
    tl.store(out + H, tl.sum(grad_dt, axis=0), mask=owned)
    tl.store(out + 2 * H, tl.sum(skipped, axis=0), mask=owned)


def scan_backward(
    grad_y_bti: Tensor,
    mixed_btc: Tensor,
    delta_bht: Tensor,
    decay_bht: Tensor,
    states: Tensor,
    A_log_h: Tensor,
    D_h: Tensor,
    grad_dt_bth: Tensor,
    *,
    heads: int,
    headdim: int,
    seq_idx_bt: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of [x | B | C] (contiguous, in its dtype), and of A_log, dt_bias and D (float32, `heads` of them).

    dt's gradient is written into `grad_dt_bth`, which may be a slice of wider rows. `grad_y_bti` is contiguous.
    """
    b, t, width = mixed_btc.shape
    h = heads
    n = (width - h * headdim) // 2
    tiles, n_chunks = Tiles.of(headdim), chunks_of(t)
    shape = {"N": n, "CHUNK": CHUNK, "HEADDIM": headdim, "DOCS": seq_idx_bt is not None}
    grad_states = torch.empty_like(states)
    by_target, by_source, sent, reached, skipped = torch.empty(
        5, *delta_bht.shape, dtype=torch.float32, device=mixed_btc.device
    ).unbind()
    decayed = torch.empty(b, n_chunks, h, dtype=torch.float32, device=mixed_btc.device)
    _state_gradients[(tiles.count(h), b)](
        mixed_btc, decay_bht, grad_y_bti, states, seq_idx_bt, grad_states, reached, decayed, t, h, n_chunks,
        **shape, COLUMNS=tiles.columns, HEADS=tiles.heads, **launch_of("state_gradients", tiles.place, mixed_btc.dtype),
    )  # fmt: skip
    grad_mixed = torch.empty_like(mixed_btc)
    heads_each = triton.cdiv(h, max(1, min(h, PROGRAMS_WANTED // (n_chunks * b))))
    parts = triton.cdiv(h, heads_each)
    grad_scores = torch.empty(b, n_chunks, parts, CHUNK, CHUNK, dtype=torch.float32, device=mixed_btc.device)
    _inputs_gradients[(parts, n_chunks, b)](
        mixed_btc, delta_bht, decay_bht, D_h, grad_y_bti, grad_states, seq_idx_bt,
        grad_mixed, grad_scores, by_target, by_source, sent, skipped, t, h, n_chunks, heads_each,
        **shape, COLUMNS=tiles.place, **launch_of("inputs_gradients", tiles.place, mixed_btc.dtype),
    )  # fmt: skip
    for for_c in (True, False):
        _group_gradients[(n_chunks, b)](
            mixed_btc, delta_bht, decay_bht, grad_y_bti, states, grad_states, seq_idx_bt, grad_scores, parts,
            grad_mixed, t, h, n_chunks, **shape, COLUMNS=tiles.place, FOR_C=for_c,
            **launch_of("group_gradients", tiles.place, mixed_btc.dtype),
        )  # fmt: skip
    sums = torch.empty(b, n_chunks, 3, h, dtype=torch.float32, device=mixed_btc.device)
    _rate_gradients[(n_chunks, triton.cdiv(h, 16), b)](
        delta_bht, A_log_h, by_target, by_source, sent, reached, decayed, skipped,
        grad_dt_bth, grad_dt_bth.stride(1), sums, t, h, n_chunks, CHUNK=CHUNK, HEADS_AT_ONCE=16, num_warps=4,
    )  # fmt: skip
    grad_A_log, grad_bias, grad_D = sums.sum((0, 1)).unbind()
    return grad_mixed, grad_A_log, grad_bias, grad_D
