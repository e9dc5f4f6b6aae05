"""Matrix products: those with a weight, and those that add into a float32 sum, which gradients of weights are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.ops.float8 import Float8Weight, float8_times

Weight = Tensor | Float8Weight


def times(x_mk: Tensor, weight_nk: Weight, out: Tensor | None = None) -> Tensor:
    """x @ weight transposed (m n), in x's dtype, written to `out` where it is given."""
    if isinstance(weight_nk, Float8Weight):
        return float8_times(x_mk, weight_nk, out)
    return torch.mm(x_mk, weight_nk.T, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total (m n) is float32 and a (m k), b (k n) may be narrower: summed and added unrounded.

    `total` may be a block of a larger matrix: some of its first rows, or of its first columns.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, unrounded, where a (m k) and b (k n) may be narrower."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
