"""Dropout in place, and the hash that decides it, for other kernels too; see modeling/ops/dropout.py for the definition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.dropout import Drop

BLOCK = 1024
ChannelDrop = tuple[Drop, Tensor]
"""What is dropped of rows of channels, and the number in the whole model of each channel (int32)."""
GOLDEN = tl.constexpr(0x9E3779B9)
SECOND = tl.constexpr(0x85EBCA6B)
FIRST_ROUND = tl.constexpr(0x21F0AAAD)
SECOND_ROUND = tl.constexpr(0x735A2D97)


@triton.jit
def _first_round(x):
    x = (x ^ (x >> 16)) * tl.cast(FIRST_ROUND, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def _second_round(x):
    x = x * tl.cast(SECOND_ROUND, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def row_words(key_ptr, image, token, live):
    """The two words of each row (a tensor of tokens) that its entries' bits are made of."""
    low = tl.load(key_ptr + 2 * image, mask=live, other=0)
    high = tl.load(key_ptr + 2 * image + 1, mask=live, other=0)
    return token_words(low, high, token)


@triton.jit
def token_words(low, high, token):
    """`row_words` of tokens whose images' keys are these halves."""
    low, high = low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)
    token = token.to(tl.uint32)
    row = _second_round(_first_round(low + token * tl.cast(GOLDEN, tl.uint32)))
    return row, high ^ (token * tl.cast(SECOND, tl.uint32))


@triton.jit
def entry_bits(row, second, channel):
    """32 random bits (uint32) of each entry; the words and the channels broadcast against each other."""
    x = row + channel.to(tl.uint32) * tl.cast(GOLDEN, tl.uint32)
    return _second_round(_first_round(x) + second)


@triton.jit
def dropped(x, key_ptr, scale_ptr, n_tokens, row, channel, live, THRESHOLD: tl.constexpr):
    """`x` (float32) with entries dropped and the others scaled: rows are tokens, counted from token 0 of image 0 on, columns
    the channels of these numbers. Masked where a row is not live."""
    row = row.to(tl.int32)  # a division of 64 bits takes three times as long
    image = row // n_tokens
    x = x * tl.load(scale_ptr + image, mask=live, other=0.0)[:, None]
    if THRESHOLD > 0:  # else whole images alone are dropped
        first, second = row_words(key_ptr, image, row % n_tokens, live)
        x = tl.where(entry_bits(first[:, None], second[:, None], channel[None, :]) >= THRESHOLD, x, 0.0)
    return x


@triton.jit
def _drop_rows(
    x_ptr, key_ptr, scale_ptr, channel_ptr, n_tokens, width, channels, rows,
    THRESHOLD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    channel = tl.load(channel_ptr + column, mask=column < channels, other=0)
    mask = live[:, None] & (column < channels)[None, :]
    place = x_ptr + row[:, None] * width + column[None, :]
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    x = dropped(x, key_ptr, scale_ptr, n_tokens, row, channel, live, THRESHOLD)
    tl.store(place, x.to(x_ptr.dtype.element_ty), mask=mask)


def drop_arguments(drop: ChannelDrop | None) -> tuple[list[Tensor | int | None], dict[str, int | bool]]:
    """For a kernel that drops what it stores: key_ptr, drop_scale_ptr, channel_ptr, n_tokens; and DROP and THRESHOLD."""
    if drop is None:
        return [None, None, None, 1], {"DROP": False, "THRESHOLD": 0}
    entries, channel_c = drop
    pointers: list[Tensor | int | None] = [
        entries.key_b.view(torch.int32),
        entries.scale_b,
        channel_c,
        entries.n_tokens,
    ]
    return pointers, {"DROP": True, "THRESHOLD": entries.threshold}


def drop_rows(x_mc: Tensor, drop: ChannelDrop) -> None:
    """Drop and scale the entries of `x_mc` (contiguous, m from token 0 of image 0 on) in place.

    Its rows may be longer than the drop's channels.
    """
    rows, width = x_mc.shape
    entries, channel_c = drop
    channels, each = channel_c.numel(), 4
    grid = (triton.cdiv(rows, each), triton.cdiv(channels, BLOCK))
    _drop_rows[grid](
        x_mc, entries.key_b.view(torch.int32), entries.scale_b, channel_c, entries.n_tokens, width, channels, rows,
        THRESHOLD=entries.threshold, ROWS=each, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
