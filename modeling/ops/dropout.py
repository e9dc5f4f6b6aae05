"""Dropout whose masks depend on nothing but what they fall on: a key, the token, and the channel in the whole model.

No generator has a state here. The same entry is dropped whichever rank, micro-batch or kernel holds it, in forward, in
backward and when an activation is computed again. An entry's 32 random bits are a keyed integer hash of its place: the
multiplications and shifts of Wellons' `lowbias32` (hash-prospector, 16 21f0aaad 15 735a2d97 15), with 64 bits of key per
image mixed in, half of them before and half between its two rounds.

Letters: b images, m tokens (image and place flattened), c channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN, SECOND, FIRST_ROUND, SECOND_ROUND = 0x9E3779B9, 0x85EBCA6B, 0x21F0AAAD, 0x735A2D97


class Drop(NamedTuple):
    """Which entries of a tensor of tokens are dropped, and what the others are multiplied by."""

    key_b: Tensor
    """int64, one an image."""
    scale_b: Tensor
    """float32, one an image: 1 / (share that is kept), or 0 where all of the image's entries are dropped."""
    threshold: int
    """Entries whose 32 random bits are below this are dropped: a share of threshold / 2^32."""
    n_tokens: int
    """Tokens of an image."""
    first_row: int = 0
    """Row m = 0 is this token of the batch: not 0 where a rank holds a share of the tokens."""


def threshold_of(rate: float) -> int:
    """The threshold that drops `rate` of the entries, to the nearest 2^-32. Raises ValueError outside [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop rate {rate}: must be at least 0 and below 1")
    return min(round(rate * 2**32), 2**32 - 1)


def dropped(x_mc: Tensor, drop: Drop, channel_c: Tensor | None = None) -> Tensor:
    """`x_mc` with entries dropped and the others scaled, in its dtype. `channel_c` (int32) numbers the channels in the
    whole model; None: 0, 1, 2, ..."""
    keep_mc, scale_m1 = _keep(x_mc, drop, channel_c)
    return torch.where(keep_mc, x_mc * scale_m1, 0).to(x_mc.dtype)


def dropped_float(x_mc: Tensor, drop: Drop) -> Tensor:
    """As `dropped`, in float32 and not rounded to x's dtype."""
    if drop.threshold == 0:  # whole images alone are dropped
        row_m = torch.arange(drop.first_row, drop.first_row + len(x_mc), device=x_mc.device)
        return x_mc.float() * drop.scale_b[row_m // drop.n_tokens][:, None]
    keep_mc, scale_m1 = _keep(x_mc, drop, None)
    return torch.where(keep_mc, x_mc.float() * scale_m1, 0)


def _keep(x_mc: Tensor, drop: Drop, channel_c: Tensor | None) -> tuple[Tensor, Tensor]:
    m, c = x_mc.shape
    if channel_c is None:
        channel_c = torch.arange(c, dtype=torch.int32, device=x_mc.device)
    row_m = torch.arange(drop.first_row, drop.first_row + m, device=x_mc.device)
    image_m, token_m = row_m // drop.n_tokens, row_m % drop.n_tokens
    bits_mc = random_bits(drop.key_b[image_m], token_m.int(), channel_c)
    # Both sides moved down by 2^31: torch compares signed integers.
    keep_mc = (bits_mc ^ -(2**31)) >= drop.threshold - 2**31
    return keep_mc, drop.scale_b[image_m][:, None]


def random_bits(key_m: Tensor, token_m: Tensor, channel_c: Tensor) -> Tensor:
    """32 random bits (int32) of each token's each channel; keys are int64, tokens and channels int32."""
    low_m, high_m = key_m.view(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
    row_m = _mix(low_m + token_m * _signed(GOLDEN))
    x_mc = row_m[:, None] + channel_c * _signed(GOLDEN)
    x_mc = _first_round(x_mc) + (high_m ^ (token_m * SECOND_SIGNED))[:, None]
    return _second_round(x_mc)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


SECOND_SIGNED = _signed(SECOND)


def _mix(x: Tensor) -> Tensor:
    return _second_round(_first_round(x))


def _first_round(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 16)) * FIRST_ROUND
    return x ^ _shift(x, 15)


def _second_round(x: Tensor) -> Tensor:
    x = x * SECOND_ROUND
    return x ^ _shift(x, 15)


def _shift(x: Tensor, by: int) -> Tensor:
    """To the right, filled up with zeros."""
    return (x >> by) & (2 ** (32 - by) - 1)


def split_mix(x: Tensor) -> Tensor:
    """A bijective hash of int64 numbers (SplitMix64's output function, arithmetic modulo 2^64): keys out of counters."""
    x = x + _signed64(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed64(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed64(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
