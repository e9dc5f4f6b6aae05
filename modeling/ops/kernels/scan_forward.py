"""The scan's forward pass, in two kernels. Per chunk, with a the running sum of delta * A, l and s places in the chunk, S the
state before it (n x p):

1. `_states` walks one sequence's chunks for one tile of heads, the state in registers, and stores each chunk's S:
       S <- e^(a_end) S + sum over s of e^(a_end - a_s) B_s (delta_s x_s)^T.
2. `_outputs` has a program a chunk and loops over heads, which share C B^T:
       y_l = e^(a_l) C_l S + sum over s <= l of (C_l . B_s) e^(a_l - a_s) delta_s x_s  +  D x_l.

One kernel that does both moves a third fewer bytes, but its chain of products from chunk to chunk leaves the GPU waiting:
it took half as long again. Backward needs the S of each chunk, in the compute dtype.
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
    load_state,
    new_states,
    reach,
    scan_constants,
    state_tiles,
    store_state,
)
from modeling.ops.kernels.tiles import chunks_of, columns_of, heads_each, launch_of, walk_of


@triton.jit
def _next_state(x_tiles, state_tiles, b, c, head, H, n_chunks, B, state, sending, kept,
                N: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Store one head's state before chunk `c`; returns the one after it, of which `kept` is there already."""
    x = x_tiles.load([b, c * CHUNK, head, 0]).reshape(CHUNK, COLUMNS)
    store_state(state_tiles, (b * n_chunks + c) * H + head, state.to(x.dtype), N, COLUMNS, TURNED)
    sent = (x.to(tl.float32) * sending[:, None]).to(x.dtype)
    return tl.dot(tl.trans(B), sent, state * kept, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def _states(
    x_tiles, group_tiles, state_tiles, decay_ptr, sending_ptr, seq_ptr, T, H, n_chunks,
    N: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr, HEADS: tl.constexpr,
    DOCS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) * HEADS
    b = tl.program_id(1)
    second = tl.minimum(head + 1, H - 1)  # of an odd number the last head is walked twice, to the same states
    steps = (b.to(tl.int64) * H + head) * n_chunks * CHUNK
    second_steps = (b.to(tl.int64) * H + second) * n_chunks * CHUNK
    state = tl.zeros([N, COLUMNS], tl.float32)
    other = state
    # What decays is loaded a chunk early: the walk waits for it otherwise, and the compiler runs ahead with tiles alone.
    next_sending, next_end = chunk_decays(sending_ptr, decay_ptr, steps, CHUNK)
    if HEADS == 2:
        others_sending, others_end = chunk_decays(sending_ptr, decay_ptr, second_steps, CHUNK)
    for c in range(n_chunks):
        following = tl.minimum(c + 1, n_chunks - 1) * CHUNK
        B = group_tiles.load([b, c * CHUNK, 0]).reshape(CHUNK, N)
        _, _, to_end, keep = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
        sending, end = next_sending, next_end
        next_sending, next_end = chunk_decays(sending_ptr, decay_ptr, steps + following, CHUNK)
        state = _next_state(
            x_tiles, state_tiles, b, c, head, H, n_chunks, B, state, sending * to_end, tl.exp2(end) * keep,
            N, CHUNK, COLUMNS, TURNED,
        )  # fmt: skip
        if HEADS == 2:
            sending, end = others_sending, others_end
            others_sending, others_end = chunk_decays(sending_ptr, decay_ptr, second_steps + following, CHUNK)
            other = _next_state(
                x_tiles, state_tiles, b, c, second, H, n_chunks, B, other, sending * to_end, tl.exp2(end) * keep,
                N, CHUNK, COLUMNS, TURNED,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _outputs(
    x_tiles, group_tiles, state_tiles, y_tiles, decay_ptr, source_ptr, D_ptr, seq_ptr, T, H, n_chunks, heads_each,
    N: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr, DOCS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * heads_each
    c = tl.program_id(1)
    b = tl.program_id(2)
    l = tl.arange(0, CHUNK)
    t = c * CHUNK
    B = group_tiles.load([b, t, 0]).reshape(CHUNK, N)
    C = group_tiles.load([b, t, N]).reshape(CHUNK, N)
    doc, from_before, _, _ = chunk_documents(seq_ptr, b, c, T, CHUNK, DOCS)
    visible = (l[:, None] >= l[None, :]) & (doc[:, None] == doc[None, :])
    scores = tl.where(visible, tl.dot(C, tl.trans(B), input_precision="ieee"), 0.0)
    for h in tl.range(first, tl.minimum(first + heads_each, H), num_stages=STAGES):
        steps = (b.to(tl.int64) * H + h) * (n_chunks * CHUNK) + t
        S = load_state(state_tiles, (b * n_chunks + c) * H + h, N, COLUMNS, TURNED)
        x = x_tiles.load([b, t, h, 0]).reshape(CHUNK, COLUMNS)
        decay = tl.load(decay_ptr + steps + l)
        source = tl.load(source_ptr + steps + l)
        out = tl.dot(C, S, input_precision="ieee") * (tl.exp2(decay) * from_before)[:, None]
        out = tl.dot((scores * reach(decay, source)).to(x.dtype), x, out, input_precision="ieee")
        out += tl.load(D_ptr + h) * x.to(tl.float32)
        y_tiles.store([b, t, h, 0], out.to(x.dtype).reshape(1, CHUNK, 1, COLUMNS))


def scan_states(mixed_btc: Tensor, steps: TimeSteps, *, heads: int, headdim: int, seq_idx_bt: Tensor | None) -> Tensor:
    """The state before each chunk, as `new_states` shapes it, in mixed's dtype, of contiguous `mixed_btc` = [x | B | C]."""
    b, t, width = mixed_btc.shape
    n = (width - heads * headdim) // 2
    states = new_states(b, chunks_of(t), heads, n, headdim, like=mixed_btc)
    launch = walk_of("states", columns_of(headdim), mixed_btc.dtype, heads, b)
    _states[(triton.cdiv(heads, launch["HEADS"]), b)](
        head_tiles(mixed_btc, heads, headdim), group_tiles(mixed_btc, n), state_tiles(states, headdim),
        steps.decay, steps.sending, seq_idx_bt, t, heads, chunks_of(t),
        **scan_constants(n, headdim, states.dtype, seq_idx_bt), **launch,
    )  # fmt: skip
    return states


def scan_outputs(
    mixed_btc: Tensor,
    steps: TimeSteps,
    states: Tensor,
    D_h: Tensor,
    *,
    heads: int,
    headdim: int,
    seq_idx_bt: Tensor | None,
) -> Tensor:
    """y (b t inner, in mixed's dtype) of contiguous `mixed_btc` = [x | B | C] and the states of `scan_states`."""
    b, t, width = mixed_btc.shape
    n = (width - heads * headdim) // 2
    y = torch.empty(b, t, heads * headdim, dtype=mixed_btc.dtype, device=mixed_btc.device)
    each = heads_each(heads, chunks_of(t) * b)
    launch = launch_of("outputs", columns_of(headdim), mixed_btc.dtype)
    _outputs[(triton.cdiv(heads, each), chunks_of(t), b)](
        head_tiles(mixed_btc, heads, headdim), group_tiles(mixed_btc, n), state_tiles(states, headdim),
        head_tiles(y, heads, headdim), steps.decay, steps.source, D_h, seq_idx_bt, t, heads, chunks_of(t), each,
        **scan_constants(n, headdim, states.dtype, seq_idx_bt), STAGES=launch["num_stages"], **launch,
    )  # fmt: skip
    return y
