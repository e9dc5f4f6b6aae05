"""The scan's forward pass, in two kernels. Per chunk, with a the running sum of delta * A, l and s places in the chunk, S the
state before it (n x p):

1. scan_walks.py walks the sequences and stores each chunk's S.
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
    chunk_documents,
    group_tiles,
    head_tiles,
    load_state,
    reach,
    scan_constants,
    state_tiles,
)
from modeling.ops.kernels.tiles import chunks_of, columns_of, heads_each, launch_of


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
    """y (b t inner, in mixed's dtype) of contiguous `mixed_btc` = [x | B | C] and the states of `scan_walks.scan_states`."""
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
