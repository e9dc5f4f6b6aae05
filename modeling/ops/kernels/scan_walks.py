"""The scan's walks over the chunks of a sequence: the state S before each, and backwards dS, the loss's gradient by the state
after it. One tile of heads a program, the state in registers (n x p); a the running sum of delta * A in a chunk:

       S <- e^(a_end) S + sum over s of e^(a_end - a_s) B_s (delta_s x_s)^T
       dS <- e^(a_end) dS + sum over l of e^(a_l) C_l dy_l^T.

A chunk's product waits for the one before it, so a walk takes as long as it has chunks, however few programs there are: an
eighth of a model's heads on a few long sequences leaves most of a GPU idle. Then walks are cut into segments: all but the last
of them are walked from nothing, for what they leave at their end; then all are walked at once, each from what those
before it left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.kernels.scan_common import (
    SIZES,
    TimeSteps,
    chunk_decays,
    chunk_documents,
    group_tiles,
    head_tiles,
    new_states,
    scan_constants,
    state_tiles,
    store_state,
)
from modeling.ops.kernels.tiles import chunks_of, columns_of, segment_chunks, walk_of


@triton.jit
def _step(row_tiles, state_tiles, b, c, head, H, n_chunks, group, state, weight, kept,
          N: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr, STORED: tl.constexpr):  # fmt: skip
    """Store one head's state at chunk `c`; returns the one a chunk further, of which `kept` is there already."""
    rows = row_tiles.load([b, c * CHUNK, head, 0]).reshape(CHUNK, COLUMNS)
    if STORED:
        store_state(state_tiles, (b * n_chunks + c) * H + head, state.to(rows.dtype), N, COLUMNS, TURNED)
    weighted = (rows.to(tl.float32) * weight[:, None]).to(rows.dtype)
    return tl.dot(tl.trans(group), weighted, state * kept, input_precision="ieee")


@triton.jit
def _chunk_at(i, n_chunks, BACKWARDS: tl.constexpr):
    """The chunk that is walked as number `i`."""
    return n_chunks - 1 - i if BACKWARDS else i


@triton.jit(do_not_specialize=SIZES)
def _walk(
    row_tiles, group_tiles, state_tiles, weight_ptr, decay_ptr, seq_ptr, ends_ptr, remains_ptr, T, H, n_chunks, chunks_each,
    N: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr, HEADS: tl.constexpr,
    DOCS: tl.constexpr, BACKWARDS: tl.constexpr, CUT: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) * HEADS
    b = tl.program_id(1)
    second = tl.minimum(head + 1, H - 1)  # of an odd number the last head is walked twice, to the same states
    steps = (b.to(tl.int64) * H + head) * n_chunks * CHUNK
    second_steps = (b.to(tl.int64) * H + second) * n_chunks * CHUNK
    state = tl.zeros([N, COLUMNS], tl.float32)
    other = state
    first = 0
    last = n_chunks
    place = tl.arange(0, N)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if CUT:
        first = tl.program_id(2) * chunks_each
        last = tl.minimum(first + chunks_each, n_chunks)
        row = (b.to(tl.int64) * H + head) * tl.cdiv(n_chunks, chunks_each)
        if STORED:
            for segment in range(tl.program_id(2)):
                state = state * tl.load(remains_ptr + row + segment)
                state += tl.load(ends_ptr + (row + segment) * (N * COLUMNS) + place)
    remains = 1.0
    # What decays is loaded a chunk early: the walk waits for it otherwise, and the compiler runs ahead with tiles alone.
    start = _chunk_at(first, n_chunks, BACKWARDS) * CHUNK
    next_weight, next_end = chunk_decays(weight_ptr, decay_ptr, steps + start, CHUNK)
    if HEADS == 2:
        others_weight, others_end = chunk_decays(weight_ptr, decay_ptr, second_steps + start, CHUNK)
    for i in range(first, last):
        c = _chunk_at(i, n_chunks, BACKWARDS)
        following = _chunk_at(tl.minimum(i + 1, n_chunks - 1), n_chunks, BACKWARDS) * CHUNK
        group = group_tiles.load([b, c * CHUNK, N if BACKWARDS else 0]).reshape(CHUNK, N)
        _, from_before, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
        seen = from_before if BACKWARDS else to_end
        weight, end = next_weight, next_end
        next_weight, next_end = chunk_decays(weight_ptr, decay_ptr, steps + following, CHUNK)
        kept = tl.exp2(end) * keep
        if CUT and not STORED:
            remains *= kept
        state = _step(
            row_tiles, state_tiles, b, c, head, H, n_chunks, group, state, (tl.exp2(weight) if BACKWARDS else weight) * seen,
            kept, N, CHUNK, COLUMNS, TURNED, STORED,
        )  # fmt: skip
        if HEADS == 2:
            weight, end = others_weight, others_end
            others_weight, others_end = chunk_decays(weight_ptr, decay_ptr, second_steps + following, CHUNK)
            other = _step(
                row_tiles, state_tiles, b, c, second, H, n_chunks, group, other,
                (tl.exp2(weight) if BACKWARDS else weight) * seen, tl.exp2(end) * keep, N, CHUNK, COLUMNS, TURNED, STORED,
            )  # fmt: skip
    if CUT and not STORED:
        tl.store(ends_ptr + (row + tl.program_id(2)) * (N * COLUMNS) + place, state)
        tl.store(remains_ptr + row + tl.program_id(2), remains)


def scan_states(mixed_btc: Tensor, steps: TimeSteps, *, heads: int, headdim: int, seq_idx_bt: Tensor | None) -> Tensor:
    """The state before each chunk, as `new_states` shapes it, in mixed's dtype, of contiguous `mixed_btc` = [x | B | C]."""
    return _states("states", mixed_btc, mixed_btc, steps.sending, steps.decay, heads, headdim, seq_idx_bt)


def state_gradients(
    grad_y_bti: Tensor, mixed_btc: Tensor, steps: TimeSteps, *, heads: int, headdim: int, seq_idx_bt: Tensor | None
) -> Tensor:
    """The loss's gradient by the state after each chunk, shaped as the states; `grad_y_bti` is contiguous."""
    return _states("state_gradients", grad_y_bti, mixed_btc, steps.decay, steps.decay, heads, headdim, seq_idx_bt)


def _states(
    kernel: str,
    rows_bti: Tensor,
    mixed_btc: Tensor,
    weight: Tensor,
    decay: Tensor,
    heads: int,
    headdim: int,
    seq_idx_bt: Tensor | None,
) -> Tensor:
    b, t, width = mixed_btc.shape
    n, n_chunks, columns = (width - heads * headdim) // 2, chunks_of(t), columns_of(headdim)
    states = new_states(b, n_chunks, heads, n, headdim, like=mixed_btc)
    launch = walk_of(kernel, columns, mixed_btc.dtype, heads, b)
    each = segment_chunks(heads * b, n_chunks, columns)
    segments = triton.cdiv(n_chunks, each)
    ends = remains = None
    if segments > 1:
        assert launch["HEADS"] == 1, "what is cut has fewer walks than a GPU has room for"
        ends = torch.empty(b, heads, segments, n, columns, dtype=torch.float32, device=states.device)
        remains = ends.new_empty(b, heads, segments)

    def start(n_segments: int, *, stored: bool) -> None:
        _walk[(triton.cdiv(heads, launch["HEADS"]), b, n_segments)](
            head_tiles(rows_bti, heads, headdim), group_tiles(mixed_btc, n), state_tiles(states, headdim),
            weight, decay, seq_idx_bt, ends, remains, t, heads, n_chunks, each,
            **scan_constants(n, headdim, states.dtype, seq_idx_bt), **launch,
            BACKWARDS=kernel == "state_gradients", CUT=segments > 1, STORED=stored,
        )  # fmt: skip

    if segments > 1:
        start(segments - 1, stored=False)
    start(segments, stored=True)
    return states
