"""What the scan's kernels share: time steps after bias and softplus, and how far each step's state reaches.

Letters: b batch, t time, h heads. Exponents are in units of log 2. Per chunk, `decay` is the running sum of delta * A from
the chunk's first step on, and `source` is decay - log2(delta): a step s reaches step l times delta_s as
2^(decay_l - source_s), and the chunk's end as `sending`_s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from modeling.ops.kernels.dropout import ChannelDrop, drop_arguments, dropped
from modeling.ops.kernels.fast_math import LOG2_E, exp
from modeling.ops.kernels.tiles import CHUNK, chunks_of, columns_of, states_turned

HEADS_AT_ONCE = 16
SIZES = ["T", "H", "n_chunks", "heads_each", "parts", "chunks_each"]
"""Arguments whose values the kernels that multiply are not compiled anew for. Each width would have binaries of its own, and in
that for one head a program ptxas (of Triton 3.6) filled the upper half of dS's descriptor with its address, for tiles of 16 and
32 channels."""
SMALLEST = tl.constexpr(2.0**-126)
REACH = tl.constexpr(24.0)
"""Bound of log2(delta) and of how far a step reaches: it keeps the exponents of steps that must not meet finite, whose
products are masked away afterwards."""


class TimeSteps(NamedTuple):
    """Float32, shape b h t, with t filled up to whole chunks by steps of delta = 0."""

    delta: Tensor
    """softplus(dt + bias)."""
    decay: Tensor
    """Running sum of delta A / log 2 from each chunk's first step on."""
    source: Tensor
    """decay - log2(delta), of at least the smallest normal delta."""
    sending: Tensor
    """delta times what decays until the chunk's end: 2^(its last decay - source)."""


@triton.jit
def _time_steps(
    dt_ptr, row_stride, bias_ptr, A_log_ptr, delta_ptr, decay_ptr, source_ptr, sending_ptr, T, H, padded,
    key_ptr, drop_scale_ptr, channel_ptr,
    CHUNK: tl.constexpr, HEADS_AT_ONCE: tl.constexpr, DROP: tl.constexpr,
    THRESHOLD: tl.constexpr, N_TOKENS: tl.constexpr,
):  # fmt: skip
    l = tl.arange(0, CHUNK)
    t = tl.program_id(0) * CHUNK + l
    h = tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    b = tl.program_id(2).to(tl.int64)
    live = h < H
    mask = (t < T)[:, None] & live[None, :]
    raw = tl.load(dt_ptr + (b * T + t)[:, None] * row_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
    if DROP:
        number = tl.load(channel_ptr + h, mask=live, other=0)
        raw = dropped(raw, key_ptr, drop_scale_ptr, N_TOKENS, b * T + t, number, t < T, THRESHOLD)
    raw += tl.load(bias_ptr + h, mask=live, other=0.0)[None, :]
    # log(1 + e^v) without overflow, and without losing a small e^v beside the 1.
    small = tl.exp(-tl.abs(raw))
    u = 1.0 + small
    log1p = tl.where(u == 1.0, small, tl.log(u) * (small / tl.where(u == 1.0, 1.0, u - 1.0)))
    delta = tl.where(mask, tl.maximum(raw, 0.0) + log1p, 0.0)
    rate = -LOG2_E * exp(tl.load(A_log_ptr + h, mask=live, other=0.0))
    decay = tl.cumsum(delta * rate[None, :], axis=0)
    end = tl.sum(tl.where((l == CHUNK - 1)[:, None], decay, 0.0), axis=0)
    source = decay - tl.log2(tl.maximum(delta, SMALLEST))
    place = (b * H + h)[None, :] * padded + t[:, None]
    tl.store(delta_ptr + place, delta, mask=live[None, :] & (t >= 0)[:, None])
    tl.store(decay_ptr + place, decay, mask=live[None, :] & (t >= 0)[:, None])
    tl.store(source_ptr + place, source, mask=live[None, :] & (t >= 0)[:, None])
    tl.store(sending_ptr + place, tl.exp2(end[None, :] - source), mask=live[None, :] & (t >= 0)[:, None])


@triton.jit
def reach(decay_l, source_s):
    """delta_s e^(a_l - a_s) of every two steps of a chunk; finite but meaningless where s is after l."""
    return tl.exp2(tl.minimum(decay_l[:, None] - source_s[None, :], REACH))


@triton.jit
def chunk_decays(row_ptr, decay_ptr, steps, CHUNK: tl.constexpr):
    """Of the chunk and head whose first step is at `steps`: what `row_ptr` has of each step, and the chunk's last decay."""
    return tl.load(row_ptr + steps + tl.arange(0, CHUNK)), tl.load(decay_ptr + steps + CHUNK - 1)


@triton.jit
def load_state(state_tiles, row, N: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):
    """One head's state of a chunk, n x p."""
    if TURNED:
        return tl.trans(state_tiles.load([row, 0, 0]).reshape(COLUMNS, N))
    else:
        return state_tiles.load([row, 0, 0]).reshape(N, COLUMNS)


@triton.jit
def store_state(state_tiles, row, state, N: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):
    if TURNED:
        state_tiles.store([row, 0, 0], tl.trans(state).reshape(1, COLUMNS, N))
    else:
        state_tiles.store([row, 0, 0], state.reshape(1, N, COLUMNS))


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
        from_before = tl.full([CHUNK], 1.0, tl.float32)
        to_end = from_before
        keep = 1.0
    return doc, from_before, to_end, keep


def head_tiles(x_btc: Tensor, heads: int, headdim: int) -> TensorDescriptor:
    """The first heads * headdim channels of `x_btc` as b t h p; a tile is a chunk of one head. What lies beyond a head's
    channels or the sequence's end is read as zero and never written, so kernels need no masks."""
    b, t, _ = x_btc.shape
    strides = [x_btc.stride(0), x_btc.stride(1), headdim, 1]
    return TensorDescriptor(x_btc, [b, t, heads, headdim], strides, [1, CHUNK, 1, columns_of(headdim)])


def group_tiles(mixed_btc: Tensor, n: int) -> TensorDescriptor:
    """B and C, the last 2 n channels of `mixed_btc`, as b t 2n; a tile is a chunk of one of them."""
    group = mixed_btc[..., -2 * n :]
    return TensorDescriptor(group, list(group.shape), list(group.stride()), [1, CHUNK, n])


def new_states(b: int, n_chunks: int, heads: int, n: int, headdim: int, *, like: Tensor) -> Tensor:
    """Room for a state a chunk and head: shape b, chunk, h, n, p, or b, chunk, h, p, n where `tiles.states_turned` says so."""
    state = (headdim, n) if states_turned(headdim, like.dtype) else (n, headdim)
    return like.new_empty(b, n_chunks, heads, *state)


def state_tiles(states: Tensor, headdim: int) -> TensorDescriptor:
    """What `new_states` made, batch, chunk and head in one dim; a tile is one head's."""
    rows = states.flatten(0, 2)
    n, columns = states[0, 0, 0].numel() // headdim, columns_of(headdim)
    tile = [columns, n] if states_turned(headdim, states.dtype) else [n, columns]
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [1, *tile])


def scan_constants(n: int, headdim: int, dtype: torch.dtype, seq_idx_bt: Tensor | None) -> dict[str, int | bool]:
    """What all kernels that multiply are compiled for."""
    return {
        "N": n,
        "CHUNK": CHUNK,
        "COLUMNS": columns_of(headdim),
        "TURNED": states_turned(headdim, dtype),
        "DOCS": seq_idx_bt is not None,
    }


def time_steps(dt_bth: Tensor, dt_bias_h: Tensor, A_log_h: Tensor, drop: ChannelDrop | None = None) -> TimeSteps:
    """Of `dt_bth` with entries dropped as `drop` says. It may be a slice of wider rows; bias and A_log may have more heads."""
    b, t, h = dt_bth.shape
    padded = chunks_of(t) * CHUNK
    steps = TimeSteps(*torch.empty(4, b, h, padded, dtype=torch.float32, device=dt_bth.device).unbind())
    grid = (chunks_of(t), triton.cdiv(h, HEADS_AT_ONCE), b)
    pointers, flags = drop_arguments(drop)
    _time_steps[grid](
        dt_bth, dt_bth.stride(1), dt_bias_h, A_log_h, *steps, t, h, padded, *pointers,
        CHUNK=CHUNK, HEADS_AT_ONCE=HEADS_AT_ONCE, **flags, num_warps=4,
    )  # fmt: skip
    return steps
