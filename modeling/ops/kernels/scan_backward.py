"""The scan's backward pass, in four kernels. Notation as in scan_forward: S is the state before a chunk, dS the loss's
gradient by the state after it; M = (C B^T) L with L_ls = delta_s e^(a_l - a_s), for s <= l, so that y = M x + ...

1. scan_walks.py walks the sequences backwards and stores each chunk's dS.
2. `_inputs_gradients` has a program a chunk and loops over heads, so that d(C B^T) is summed in registers:
       dM = dy x^T      d(C B^T) = sum over heads of dM L      dx = M^T dy + delta e^(a_end - a) B dS + D dy.
3. `_group_gradients`: B and C feed every head, so theirs is one long product over all channels:
       dC = (e^a dy) S^T + d(C B^T) B      dB = (e^(a_end - a) delta x) dS^T + d(C B^T)^T C.
   A chunk has a program for either: sums of both leave a multiprocessor registers for two programs, which wait for their
   barriers, and those of one for three or four. The S that both read comes from memory once and from the cache once.
   Where there are fewer chunks than multiprocessors, heads are shared out over programs, and `_add_shares` adds up.
4. `_rate_gradients`: what reaches the running sums a, and through them delta, dt, dt_bias and A:
       da = rowsum(dM M) - colsum(dM M) + e^a dy . C S - delta e^(a_end - a) x . B dS, and at the end e^(a_end) S . dS.
   In the running sum that follows, the row and column sums of the pairs inside it must cancel. The two subtracted terms
   are taken as x . (M^T dy + delta e^(a_end - a) B dS), one sum over channels, not over a column that lies in all warps;
   both sums come from one M, as rounded for the product, so they differ by float32's rounding alone. Both terms have a
   factor delta, so what reaches it past a is their sum / delta.

No atomics: the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.kernels.dropout import ChannelDrop, drop_arguments, dropped
from modeling.ops.kernels.fast_math import exp, rounded
from modeling.ops.kernels.scan_common import (
    SIZES,
    TimeSteps,
    chunk_documents,
    group_tiles,
    head_tiles,
    load_state,
    reach,
    scan_constants,
    state_tiles,
)
from modeling.ops.kernels.scan_walks import state_gradients
from modeling.ops.kernels.tiles import CHUNK, chunks_of, columns_of, heads_each, heads_shared, launch_of


@triton.jit(do_not_specialize=SIZES)
def _inputs_gradients(
    x_tiles, group_tiles, dy_tiles, grad_state_tiles, grad_x_tiles, decay_ptr, source_ptr, sending_ptr, D_ptr, seq_ptr,
    grad_scores_ptr, rows_ptr, T, H, n_chunks, heads_each,
    N: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    c = tl.program_id(1)
    b = tl.program_id(2)
    l = tl.arange(0, CHUNK)
    t = c * CHUNK
    B = group_tiles.load([b, t, 0]).reshape(CHUNK, N)
    C = group_tiles.load([b, t, N]).reshape(CHUNK, N)
    doc, _, to_end, _ = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
    visible = (l[:, None] >= l[None, :]) & (doc[:, None] == doc[None, :])
    scores = tl.where(visible, tl.dot(C, tl.trans(B), input_precision="ieee"), 0.0)
    if DOCS:
        # From here on B only meets what reaches the end of the chunk: masked once, it costs the loop no register.
        B = tl.where(to_end[:, None] > 0.0, B, 0.0).to(B.dtype)
    grad_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    first = part * heads_each
    last = tl.minimum(first + heads_each, H)
    head_steps = b.to(tl.int64) * H * (n_chunks * CHUNK) + t
    # A head early: the compiler runs ahead with tiles, and with `source`, which would take registers, but not with these.
    next_decay = tl.load(decay_ptr + head_steps + first * (n_chunks * CHUNK) + l)
    next_sending = tl.load(sending_ptr + head_steps + first * (n_chunks * CHUNK) + l)
    next_D = tl.load(D_ptr + first)
    for h in range(first, last):
        decay, sending, D = next_decay, next_sending, next_D
        following = tl.minimum(h + 1, last - 1)
        next_decay = tl.load(decay_ptr + head_steps + following * (n_chunks * CHUNK) + l)
        next_sending = tl.load(sending_ptr + head_steps + following * (n_chunks * CHUNK) + l)
        next_D = tl.load(D_ptr + following)
        steps = head_steps + h * (n_chunks * CHUNK)
        dS = load_state(grad_state_tiles, (b * n_chunks + c) * H + h, N, COLUMNS, TURNED)
        dy = dy_tiles.load([b, t, h, 0]).reshape(CHUNK, COLUMNS)
        x = x_tiles.load([b, t, h, 0]).reshape(CHUNK, COLUMNS)

        weights = reach(decay, tl.load(source_ptr + steps + l))
        dM = tl.dot(dy, tl.trans(x), input_precision="ieee")
        grad_scores += dM * weights
        M = rounded(scores * weights, dy.dtype)
        by_target = tl.sum(dM * M, axis=1)
        # Squares are done with before the first of x's shape is made: both at once do not fit in the registers.
        from_targets = tl.trans(M.to(dy.dtype))
        grad_x = tl.dot(B, dS, input_precision="ieee") * sending[:, None]
        x32 = x.to(tl.float32)
        sent = tl.sum(grad_x * x32, axis=1)
        grad_x = tl.dot(from_targets, dy, grad_x, input_precision="ieee")
        dy32 = dy.to(tl.float32)
        skipped = tl.sum(dy32 * x32, axis=1)
        by_source = tl.sum(grad_x * x32, axis=1)
        # All four in one store: each of its own would cost an exchange of layouts.
        rows = tl.permute(tl.join(tl.join(by_target, by_source), tl.join(sent, skipped)), (0, 2, 1))
        pair = tl.arange(0, 2)
        tl.store(rows_ptr + (steps + l)[:, None, None] * 4 + pair[None, :, None] * 2 + pair[None, None, :], rows)
        grad_x += D * dy32
        grad_x_tiles.store([b, t, h, 0], grad_x.to(dy.dtype).reshape(1, CHUNK, 1, COLUMNS))
    out = grad_scores_ptr + ((b.to(tl.int64) * n_chunks + c) * tl.num_programs(0) + part) * (CHUNK * CHUNK)
    tl.store(out + l[:, None] * CHUNK + l[None, :], tl.where(visible, grad_scores, 0.0))


@triton.jit
def _scores_gradient(grad_scores_ptr, chunk, parts, CHUNK: tl.constexpr):
    """d(C B^T) of a chunk: the sum of what each part of the heads left. Programs that share the heads share the parts as well."""
    l = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK, CHUNK], tl.float32)
    for part in range(tl.program_id(2), parts, tl.num_programs(2)):
        total += tl.load(grad_scores_ptr + (chunk * parts + part) * (CHUNK * CHUNK) + l[:, None] * CHUNK + l[None, :])
    return total


@triton.jit
def _store_group(grad_group_tiles, shares_ptr, grad, b, t, chunk, place: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
                 SHARED: tl.constexpr):  # fmt: skip
    """Store B's or C's gradient of a chunk, whose rows' entries begin at `place`; where heads are shared, this program's part."""
    if SHARED:
        rows = shares_ptr + (chunk * tl.num_programs(2) + tl.program_id(2)) * (CHUNK * 2 * N) + place
        tl.store(rows + tl.arange(0, CHUNK)[:, None] * (2 * N) + tl.arange(0, N)[None, :], grad)
    else:
        grad_group_tiles.store([b, t, place], grad.to(grad_group_tiles.dtype).reshape(1, CHUNK, N))


@triton.jit(do_not_specialize=SIZES)
def _group_gradients(
    group_tiles, x_tiles, dy_tiles, state_tiles, grad_state_tiles, grad_group_tiles, decay_ptr, sending_ptr, seq_ptr,
    grad_scores_ptr, parts, reached_ptr, decayed_ptr, shares_ptr, T, H, n_chunks, heads_each,
    N: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr, DOCS: tl.constexpr,
    SHARED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    of_C = tl.program_id(0) % 2 == 0
    c = tl.program_id(0) // 2
    b = tl.program_id(1)
    share = tl.program_id(2)
    l = tl.arange(0, CHUNK)
    t = c * CHUNK
    chunk = b.to(tl.int64) * n_chunks + c
    head_steps = b.to(tl.int64) * H * (n_chunks * CHUNK) + t
    last = tl.minimum((share + 1) * heads_each, H)
    _, from_before, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
    grad = tl.zeros([CHUNK, N], tl.float32)
    if of_C:
        C = group_tiles.load([b, t, N]).reshape(CHUNK, N)
        if DOCS:
            # What the state before the chunk does not reach: masked here and after the loop, which has no register left.
            C = tl.where(from_before[:, None] > 0.0, C, 0.0).to(C.dtype)
        for h in tl.range(share * heads_each, last, num_stages=STAGES):
            steps = head_steps + h * (n_chunks * CHUNK)
            S = load_state(state_tiles, (b * n_chunks + c) * H + h, N, COLUMNS, TURNED)
            dy = dy_tiles.load([b, t, h, 0]).reshape(CHUNK, COLUMNS)
            dy_into = dy.to(tl.float32) * tl.exp2(tl.load(decay_ptr + steps + l))[:, None]
            carried = tl.dot(C, S, input_precision="ieee")
            tl.store(reached_ptr + steps + l, tl.sum(carried * dy_into, axis=1))
            grad = tl.dot(dy_into.to(dy.dtype), tl.trans(S), grad, input_precision="ieee")
        if DOCS:
            grad = tl.where(from_before[:, None] > 0.0, grad, 0.0)
        B = group_tiles.load([b, t, 0]).reshape(CHUNK, N)
        grad = tl.dot(
            _scores_gradient(grad_scores_ptr, chunk, parts, CHUNK).to(B.dtype), B, grad, input_precision="ieee"
        )
        _store_group(grad_group_tiles, shares_ptr, grad, b, t, chunk, N, N, CHUNK, SHARED)
    else:
        # Left to itself the compiler runs ahead with what a product takes, not with S, which none does here.
        for h in tl.range(share * heads_each, last, num_stages=STAGES):
            row = (b * n_chunks + c) * H + h
            steps = head_steps + h * (n_chunks * CHUNK)
            S = load_state(state_tiles, row, N, COLUMNS, TURNED)
            dS = load_state(grad_state_tiles, row, N, COLUMNS, TURNED)
            decayed = tl.sum(S.to(tl.float32) * dS.to(tl.float32))
            tl.store(decayed_ptr + row, decayed * tl.exp2(tl.load(decay_ptr + steps + CHUNK - 1)) * keep)
            x = x_tiles.load([b, t, h, 0]).reshape(CHUNK, COLUMNS)
            sent = (x.to(tl.float32) * tl.load(sending_ptr + steps + l)[:, None]).to(x.dtype)
            grad = tl.dot(sent, tl.trans(dS), grad, input_precision="ieee")
        if DOCS:
            grad = tl.where(to_end[:, None] > 0.0, grad, 0.0)
        C = group_tiles.load([b, t, N]).reshape(CHUNK, N)
        low = _scores_gradient(grad_scores_ptr, chunk, parts, CHUNK).to(C.dtype)
        grad = tl.dot(tl.trans(low), C, grad, input_precision="ieee")
        _store_group(grad_group_tiles, shares_ptr, grad, b, t, chunk, 0, N, CHUNK, SHARED)


@triton.jit
def _add_shares(shares_ptr, shares, grad_group_tiles, n_chunks, N: tl.constexpr, CHUNK: tl.constexpr):
    """Add up what the programs that share a chunk's heads left of dB, or of dC."""
    c = tl.program_id(0)
    b = tl.program_id(1)
    first = tl.program_id(2) * N
    place = tl.arange(0, CHUNK)[:, None] * (2 * N) + first + tl.arange(0, N)[None, :]
    total = tl.zeros([CHUNK, N], tl.float32)
    for share in range(shares):
        total += tl.load(shares_ptr + ((b.to(tl.int64) * n_chunks + c) * shares + share) * (CHUNK * 2 * N) + place)
    grad_group_tiles.store([b, c * CHUNK, first], total.to(grad_group_tiles.dtype).reshape(1, CHUNK, N))


@triton.jit
def _rate_gradients(
    delta_ptr, A_log_ptr, rows_ptr, reached_ptr, decayed_ptr,
    grad_dt_ptr, dt_stride, sums_ptr, T, H, n_chunks, key_ptr, drop_scale_ptr, channel_ptr,
    CHUNK: tl.constexpr, HEADS_AT_ONCE: tl.constexpr, DROP: tl.constexpr,
    THRESHOLD: tl.constexpr, N_TOKENS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    h = tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    b = tl.program_id(2).to(tl.int64)
    owned = h < H
    t = c * CHUNK + tl.arange(0, CHUNK)
    place = (b * H + h)[None, :] * (n_chunks * CHUNK) + t[:, None]
    mask = (t >= 0)[:, None] & owned[None, :]
    delta = tl.load(delta_ptr + place, mask=mask, other=0.0)
    by_source = tl.load(rows_ptr + place * 4 + 1, mask=mask, other=0.0)
    grad_a = tl.load(rows_ptr + place * 4, mask=mask, other=0.0) - by_source
    grad_a += tl.load(reached_ptr + place, mask=mask, other=0.0)
    at = (b * n_chunks + c) * H + h
    grad_end = tl.load(decayed_ptr + at, mask=owned, other=0.0) + tl.sum(
        tl.load(rows_ptr + place * 4 + 2, mask=mask, other=0.0), axis=0
    )
    # Every step's delta * A is in the running sums at and after it, the chunk's end included.
    grad_rate = tl.cumsum(grad_a, axis=0, reverse=True) + grad_end[None, :]
    # softplus' derivative is 1 - e^(-delta), which loses its digits where delta is small.
    series = delta * (1.0 - delta * 0.5 * (1.0 - delta * (1.0 / 3.0) * (1.0 - delta * 0.25)))
    slope = tl.where(delta < 0.05, series, 1.0 - exp(-delta))
    A = -exp(tl.load(A_log_ptr + h, mask=owned, other=0.0))
    grad_delta = grad_rate * A[None, :] + tl.where(delta > 0.0, by_source / tl.where(delta > 0.0, delta, 1.0), 0.0)
    grad_dt = grad_delta * slope
    stored = grad_dt
    if DROP:
        number = tl.load(channel_ptr + h, mask=owned, other=0)
        stored = dropped(stored, key_ptr, drop_scale_ptr, N_TOKENS, b * T + t, number, t < T, THRESHOLD)
    out = grad_dt_ptr + (b * T + t)[:, None] * dt_stride + h[None, :]
    tl.store(out, stored.to(grad_dt_ptr.dtype.element_ty), mask=(t < T)[:, None] & owned[None, :])
    skipped = tl.load(rows_ptr + place * 4 + 3, mask=mask, other=0.0)
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
    drop: ChannelDrop | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of [x | B | C] (contiguous, in its dtype), and each chunk's part of those of A_log, dt_bias and D (r 3 h,
    float32).

    dt's gradient is written into `grad_dt_bth`, which may be a slice of wider rows, with entries dropped as `drop` says.
    `grad_y_bti` is contiguous.
    """
    b, t, width = mixed_btc.shape
    h, n_chunks, columns, dtype = heads, chunks_of(t), columns_of(headdim), mixed_btc.dtype
    n = (width - h * headdim) // 2
    shape = scan_constants(n, headdim, dtype, seq_idx_bt)
    grad_mixed = torch.empty_like(mixed_btc)
    grad_states = state_gradients(grad_y_bti, mixed_btc, steps, heads=h, headdim=headdim, seq_idx_bt=seq_idx_bt)
    x, group, dy = head_tiles(mixed_btc, h, headdim), group_tiles(mixed_btc, n), head_tiles(grad_y_bti, h, headdim)
    S, dS, grad_group = state_tiles(states, headdim), state_tiles(grad_states, headdim), group_tiles(grad_mixed, n)
    # Of each step and head: rowsum(dM M), colsum(dM M) with what it sends to the end, that alone, dy . x.
    rows = torch.empty(*steps.delta.shape, 4, dtype=torch.float32, device=mixed_btc.device)
    reached = torch.empty_like(steps.delta)
    decayed = torch.empty(b, n_chunks, h, dtype=torch.float32, device=mixed_btc.device)
    each = heads_each(h, n_chunks * b)
    parts = triton.cdiv(h, each)
    grad_scores = torch.empty(b, n_chunks, parts, CHUNK, CHUNK, dtype=torch.float32, device=mixed_btc.device)
    _inputs_gradients[(parts, n_chunks, b)](
        x, group, dy, dS, head_tiles(grad_mixed, h, headdim), steps.decay, steps.source, steps.sending, D_h,
        seq_idx_bt, grad_scores, rows, t, h, n_chunks, each,
        **shape, **launch_of("inputs_gradients", columns, dtype),
    )  # fmt: skip
    each = heads_shared(h, n_chunks * b)
    shares = triton.cdiv(h, each)
    launch = launch_of("group_gradients", columns, dtype)
    added = grad_scores.new_empty(b, n_chunks, shares, CHUNK, 2 * n) if shares > 1 else None
    _group_gradients[(2 * n_chunks, b, shares)](
        group, x, dy, S, dS, grad_group, steps.decay, steps.sending, seq_idx_bt, grad_scores, parts, reached, decayed, added,
        t, h, n_chunks, each, **shape, SHARED=shares > 1, STAGES=launch["num_stages"], **launch,
    )  # fmt: skip
    if added is not None:
        _add_shares[(n_chunks, b, 2)](added, shares, grad_group, n_chunks, N=n, CHUNK=CHUNK, num_warps=8)
    sums = torch.empty(b, n_chunks, 3, h, dtype=torch.float32, device=mixed_btc.device)
    pointers, flags = drop_arguments(drop)
    _rate_gradients[(n_chunks, triton.cdiv(h, 16), b)](
        steps.delta, A_log_h, rows, reached, decayed, grad_dt_bth, grad_dt_bth.stride(1), sums, t, h, n_chunks, *pointers,
        CHUNK=CHUNK, HEADS_AT_ONCE=16, **flags, num_warps=4,
    )  # fmt: skip
    return grad_mixed, sums.flatten(0, 1)
