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

from modeling.ops.kernels.fast_math import exp, rounded
from modeling.ops.kernels.scan_common import TimeSteps, chunk_documents, reach
from modeling.ops.kernels.tiles import CHUNK, chunks_of, columns_of, launch_of

PROGRAMS_WANTED = 132 * 12
"""Several waves of an H200's 132 multiprocessors; where there are fewer chunks, heads are shared out over programs."""


@triton.jit
def _state_gradients(
    mixed_ptr, decay_ptr, grad_y_ptr, states_ptr, seq_ptr, grad_states_ptr, reached_ptr, decayed_ptr, T, H, n_chunks,
    N: tl.constexpr, CHUNK: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    l = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    p = tl.arange(0, COLUMNS)
    live = p < HEADDIM
    inner = H * HEADDIM
    row_width = inner + 2 * N
    at_state = n[:, None] * HEADDIM + p[None, :]
    state_mask = (n >= 0)[:, None] & live[None, :]
    at_C = l[:, None] * row_width + n[None, :]
    at_y = l[:, None] * inner + p[None, :]
    steps = (b * H + h) * (n_chunks * CHUNK)
    grad_state = tl.zeros([N, COLUMNS], tl.float32)
    for i in range(n_chunks):
        c = n_chunks - 1 - i
        first = b * T + c * CHUNK
        inside = l < T - c * CHUNK
        kept = ((b * n_chunks + c) * H + h) * (N * HEADDIM)
        S = tl.load(states_ptr + kept + at_state, mask=state_mask, other=0.0)
        C = tl.load(mixed_ptr + first * row_width + inner + N + at_C, mask=inside[:, None], other=0.0)
        dy = tl.load(grad_y_ptr + first * inner + h * HEADDIM + at_y, mask=inside[:, None] & live[None, :], other=0.0)
        a = tl.load(decay_ptr + steps + c * CHUNK + l)
        end = tl.load(decay_ptr + steps + c * CHUNK + CHUNK - 1)
        doc, from_before, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
        low = grad_state.to(grad_states_ptr.dtype.element_ty)
        tl.store(grad_states_ptr + kept + at_state, low, mask=state_mask)
        shrink = tl.exp2(end) * keep
        dy_into = dy.to(tl.float32) * (tl.exp2(a) * from_before)[:, None]
        carried = tl.dot(C, S, input_precision="ieee")
        tl.store(reached_ptr + steps + c * CHUNK + l, tl.sum(carried * dy_into, axis=1))
        decayed = tl.sum(S.to(tl.float32) * grad_state) * shrink
        tl.store(decayed_ptr + (b * n_chunks + c) * H + h, decayed)
        grad_state = tl.dot(tl.trans(C), dy_into.to(dy.dtype), grad_state * shrink, input_precision="ieee")


@triton.jit
def _inputs_gradients(
    mixed_ptr, decay_ptr, source_ptr, D_ptr, grad_y_ptr, grad_states_ptr, seq_ptr,
    grad_mixed_ptr, grad_scores_ptr, by_target_ptr, by_source_ptr, sent_ptr, skipped_ptr,
    T, H, n_chunks, heads_each,
    N: tl.constexpr, CHUNK: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    c = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    l = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    p = tl.arange(0, COLUMNS)
    live = p < HEADDIM
    inner = H * HEADDIM
    row_width = inner + 2 * N
    inside = l < T - c * CHUNK
    mask = inside[:, None] & live[None, :]
    first = b * T + c * CHUNK
    mixed_ptr += first * row_width
    grad_mixed_ptr += first * row_width
    grad_y_ptr += first * inner
    grad_states_ptr += (b * n_chunks + c) * H * (N * HEADDIM)
    at_x = l[:, None] * row_width + p[None, :]
    at_y = l[:, None] * inner + p[None, :]
    at_state = n[:, None] * HEADDIM + p[None, :]
    at_B = mixed_ptr + inner + l[:, None] * row_width + n[None, :]
    B = tl.load(at_B, mask=inside[:, None], other=0.0)
    C = tl.load(at_B + N, mask=inside[:, None], other=0.0)
    doc, from_before, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
    visible = (l[:, None] >= l[None, :]) & (doc[:, None] == doc[None, :])
    scores = tl.where(visible, tl.dot(C, tl.trans(B), input_precision="ieee"), 0.0)
    grad_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for h in range(part * heads_each, tl.minimum((part + 1) * heads_each, H)):
        steps = (b * H + h) * (n_chunks * CHUNK) + c * CHUNK
        state_mask = (n >= 0)[:, None] & live[None, :]
        dS = tl.load(grad_states_ptr + h * (N * HEADDIM) + at_state, mask=state_mask, other=0.0)
        dy = tl.load(grad_y_ptr + h * HEADDIM + at_y, mask=mask, other=0.0)
        x = tl.load(mixed_ptr + h * HEADDIM + at_x, mask=mask, other=0.0)
        decay = tl.load(decay_ptr + steps + l)
        source = tl.load(source_ptr + steps + l)
        end = tl.load(decay_ptr + steps + CHUNK - 1)
        x32 = x.to(tl.float32)
        dy32 = dy.to(tl.float32)

        grad_x = tl.dot(B, dS, input_precision="ieee") * (tl.exp2(end - source) * to_end)[:, None]
        tl.store(sent_ptr + steps + l, tl.sum(grad_x * x32, axis=1))
        tl.store(skipped_ptr + steps + l, tl.sum(dy32 * x32, axis=1))
        weights = reach(decay, source)
        dM = tl.dot(dy, tl.trans(x), input_precision="ieee")
        grad_scores += dM * weights
        M = rounded(scores * weights, dy.dtype)
        tl.store(by_target_ptr + steps + l, tl.sum(dM * M, axis=1))
        grad_x = tl.dot(tl.trans(M.to(dy.dtype)), dy, grad_x, input_precision="ieee")
        tl.store(by_source_ptr + steps + l, tl.sum(grad_x * x32, axis=1))
        grad_x += tl.load(D_ptr + h) * dy32
        tl.store(grad_mixed_ptr + h * HEADDIM + at_x, grad_x.to(grad_mixed_ptr.dtype.element_ty), mask=mask)
    out = grad_scores_ptr + ((b * n_chunks + c) * tl.num_programs(0) + part) * (CHUNK * CHUNK)
    tl.store(out + l[:, None] * CHUNK + l[None, :], tl.where(visible, grad_scores, 0.0))


@triton.jit
def _group_gradients(
    mixed_ptr, decay_ptr, source_ptr, grad_y_ptr, states_ptr, grad_states_ptr, seq_ptr, grad_scores_ptr, parts,
    grad_mixed_ptr, T, H, n_chunks,
    N: tl.constexpr, CHUNK: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, DOCS: tl.constexpr,
    FOR_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    l = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    p = tl.arange(0, COLUMNS)
    live = p < HEADDIM
    inner = H * HEADDIM
    row_width = inner + 2 * N
    inside = l < T - c * CHUNK
    mask = inside[:, None] & live[None, :]
    first = b * T + c * CHUNK
    mixed_ptr += first * row_width
    grad_mixed_ptr += first * row_width
    grad_y_ptr += first * inner
    # A state as rows of p and columns of n.
    at_state = (b * n_chunks + c) * H * (N * HEADDIM)
    states_ptr += at_state
    grad_states_ptr += at_state
    at_state = n[None, :] * HEADDIM + p[:, None]
    state_mask = live[:, None] & (n >= 0)[None, :]
    at_x = l[:, None] * row_width + p[None, :]
    at_y = l[:, None] * inner + p[None, :]
    doc, from_before, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
    total = tl.zeros([CHUNK, N], tl.float32)
    for h in range(H):
        steps = (b * H + h) * (n_chunks * CHUNK) + c * CHUNK
        if FOR_C:
            state = tl.load(states_ptr + h * (N * HEADDIM) + at_state, mask=state_mask, other=0.0)
            rows = tl.load(grad_y_ptr + h * HEADDIM + at_y, mask=mask, other=0.0)
            weight = tl.exp2(tl.load(decay_ptr + steps + l)) * from_before
        else:
            state = tl.load(grad_states_ptr + h * (N * HEADDIM) + at_state, mask=state_mask, other=0.0)
            rows = tl.load(mixed_ptr + h * HEADDIM + at_x, mask=mask, other=0.0)
            weight = tl.exp2(tl.load(decay_ptr + steps + CHUNK - 1) - tl.load(source_ptr + steps + l)) * to_end
        total = tl.dot((rows.to(tl.float32) * weight[:, None]).to(rows.dtype), state, total, input_precision="ieee")
    grad_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for part in range(parts):
        at = grad_scores_ptr + ((b * n_chunks + c) * parts + part) * (CHUNK * CHUNK)
        grad_scores += tl.load(at + l[:, None] * CHUNK + l[None, :])
    at_B = inner + l[:, None] * row_width + n[None, :]
    if FOR_C:
        B = tl.load(mixed_ptr + at_B, mask=inside[:, None], other=0.0)
        total = tl.dot(grad_scores.to(B.dtype), B, total, input_precision="ieee")
        at_B += N
    else:
        C = tl.load(mixed_ptr + at_B + N, mask=inside[:, None], other=0.0)
        total = tl.dot(tl.trans(grad_scores.to(C.dtype)), C, total, input_precision="ieee")
    tl.store(grad_mixed_ptr + at_B, total.to(grad_mixed_ptr.dtype.element_ty), mask=inside[:, None])


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
    grad_a = tl.load(by_target_ptr + place, mask=mask, other=0.0) - by_source
    grad_a += tl.load(reached_ptr + place, mask=mask, other=0.0)
    at = (b * n_chunks + c) * H + h
    grad_end = tl.load(decayed_ptr + at, mask=owned, other=0.0) + tl.sum(
        tl.load(sent_ptr + place, mask=mask, other=0.0), axis=0
    )
    # Every step's delta * A is in the running sums at and after it, the chunk's end included.
    grad_rate = tl.cumsum(grad_a, axis=0, reverse=True) + grad_end[None, :]
    # softplus' derivative is 1 - e^(-delta), which loses its digits where delta is small.
    series = delta * (1.0 - delta * 0.5 * (1.0 - delta * (1.0 / 3.0) * (1.0 - delta * 0.25)))
    slope = tl.where(delta < 0.05, series, 1.0 - exp(-delta))
    A = -exp(tl.load(A_log_ptr + h, mask=owned, other=0.0))
    grad_delta = grad_rate * A[None, :] + tl.where(delta > 0.0, by_source / tl.where(delta > 0.0, delta, 1.0), 0.0)
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
    steps: TimeSteps,
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
    columns, n_chunks = columns_of(headdim), chunks_of(t)
    shape = {"N": n, "CHUNK": CHUNK, "HEADDIM": headdim, "COLUMNS": columns, "DOCS": seq_idx_bt is not None}
    grad_states = torch.empty_like(states)
    by_target, by_source, sent, reached, skipped = torch.empty(
        5, *steps.delta.shape, dtype=torch.float32, device=mixed_btc.device
    ).unbind()
    decayed = torch.empty(b, n_chunks, h, dtype=torch.float32, device=mixed_btc.device)
    _state_gradients[(h, b)](
        mixed_btc, steps.decay, grad_y_bti, states, seq_idx_bt, grad_states, reached, decayed, t, h, n_chunks,
        **shape, **launch_of("state_gradients", columns, mixed_btc.dtype),
    )  # fmt: skip
    grad_mixed = torch.empty_like(mixed_btc)
    heads_each = triton.cdiv(h, max(1, min(h, PROGRAMS_WANTED // (n_chunks * b))))
    parts = triton.cdiv(h, heads_each)
    grad_scores = torch.empty(b, n_chunks, parts, CHUNK, CHUNK, dtype=torch.float32, device=mixed_btc.device)
    _inputs_gradients[(parts, n_chunks, b)](
        mixed_btc, steps.decay, steps.source, D_h, grad_y_bti, grad_states, seq_idx_bt,
        grad_mixed, grad_scores, by_target, by_source, sent, skipped, t, h, n_chunks, heads_each,
        **shape, **launch_of("inputs_gradients", columns, mixed_btc.dtype),
    )  # fmt: skip
    for for_c in (True, False):
        _group_gradients[(n_chunks, b)](
            mixed_btc, steps.decay, steps.source, grad_y_bti, states, grad_states, seq_idx_bt, grad_scores, parts,
            grad_mixed, t, h, n_chunks, **shape, FOR_C=for_c,
            **launch_of("group_gradients", columns, mixed_btc.dtype),
        )  # fmt: skip
    sums = torch.empty(b, n_chunks, 3, h, dtype=torch.float32, device=mixed_btc.device)
    _rate_gradients[(n_chunks, triton.cdiv(h, 16), b)](
        steps.delta, A_log_h, by_target, by_source, sent, reached, decayed, skipped,
        grad_dt_bth, grad_dt_bth.stride(1), sums, t, h, n_chunks, CHUNK=CHUNK, HEADS_AT_ONCE=16, num_warps=4,
    )  # fmt: skip
    grad_A_log, grad_bias, grad_D = sums.sum((0, 1)).unbind()
    return grad_mixed, grad_A_log, grad_bias, grad_D
