"""Dropout within other kernels, and the hash that decides it; see modeling/ops/dropout.py for the definition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.dropout import Drop

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


def drop_arguments(drop: ChannelDrop | None) -> tuple[list[Tensor | None], dict[str, int | bool]]:
    """For a kernel that drops what it reads or stores: key_ptr, drop_scale_ptr, channel_ptr; and DROP, THRESHOLD, N_TOKENS,
    which is constant since a division by it in every row is not free."""
    if drop is None:
        return [None, None, None], {"DROP": False, "THRESHOLD": 0, "N_TOKENS": 1}
    entries, channel_c = drop
    pointers: list[Tensor | None] = [entries.key_b.view(torch.int32), entries.scale_b, channel_c]
    return pointers, {"DROP": True, "THRESHOLD": entries.threshold, "N_TOKENS": entries.n_tokens}
