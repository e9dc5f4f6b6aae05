"""Weights of projections in float8, for training: forward and in the gradient of what the projection reads.

Both operands are rounded to e4m3 (arXiv 2209.05433) and every row of either has a scale of its own; sums are the matrix units'
own, of fewer bits than float32's on Hopper (fast accumulation), results as wide as what went in. The gradient of what was read is
the incoming one times the weight transposed, whose scales lie along the sum there: they are multiplied into the incoming gradient
before that is rounded, and one rounding of the weight serves both. Incoming gradients are e4m3 as well: with a scale a row they
are twice as near as in e5m2. Gradients of weights, sums over all tokens, stay products of what was not rounded.

Letters: m tokens, n and k rows and columns of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modeling.ops.kernels.float8 import quantize_rows, transposed

STEP = 16
"""Rows and columns of a weight are multiples of this many: what the product reads at once."""


class Float8Weight(NamedTuple):
    """A weight that what it meets is rounded for."""

    values_nk: Tensor
    scale_1n: Tensor
    """float32."""
    factor_k: Tensor | None = None
    """float32; multiplied into the columns of what the weight meets. None: ones."""

    @property
    def shape(self) -> torch.Size:
        """n, k."""
        return self.values_nk.shape


def float8_weights(weight_nk: Tensor) -> tuple[Float8Weight, Float8Weight]:
    """The weight for x times it transposed (m n), and for that product's gradient times it (m k)."""
    values_nk, scale_n1 = quantize_rows(weight_nk)
    values_kn, ones_1k = transposed(values_nk)
    return Float8Weight(values_nk, scale_n1.T), Float8Weight(values_kn, ones_1k, scale_n1.squeeze(1))


def float8_times(x_mk: Tensor, weight: Float8Weight, out: Tensor | None = None) -> Tensor:
    """x times the weight transposed (m n), in x's dtype, written to `out` where it is given."""
    values_mk, scale_m1 = quantize_rows(x_mk, weight.factor_k)
    return torch._scaled_mm(
        values_mk, weight.values_nk.T, scale_m1, weight.scale_1n, out_dtype=x_mk.dtype, use_fast_accum=True, out=out
    )
