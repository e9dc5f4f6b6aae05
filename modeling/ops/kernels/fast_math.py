"""Exponentials the GPU has an instruction for: it raises two to a power, and takes a reciprocal square root.

Triton's own `exp` and `sigmoid` spend three to four times the instructions on results below 2^-126, which no kernel here
needs; these are within 2^-21 of them elsewhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def sigmoid(x):
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x, float32, rounded to what `dtype` can hold. To bfloat16 by hand: Hopper converts single numbers at an eighth of the
    rate at which it converts the pairs of a later, exact `.to`."""
    if dtype == tl.bfloat16:
        return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)
