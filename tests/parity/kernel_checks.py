"""What tests of our Triton kernels share: where they run, in which precision, how near they must be, and poisoned memory."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.ops.dropout import Drop, split_mix, threshold_of

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LOW = torch.bfloat16 if GPU else torch.float16

# Relative errors; one head alone has no gradient of D, since the norm undoes any scale. Float32: rounding of sums in another
# order; a per-head gradient adds thousands of terms of both signs.
# bfloat16 keeps 8 bits: each tensor between two kernels is rounded at 2^-9 = 2e-3. float16 keeps three bits more. With two
# heads B's and C's gradients have few terms for these to average out in: 1.1e-2 was seen on an H100, before and after 2026-11.
PER_HEAD = ("A_log", "D", "dt_bias")
GROUP = ("in_bc", "conv_bc", "conv_bc_bias")
BOUNDS = {
    torch.float32: {"per head": 5e-5, "B and C": 1e-5, "all else": 1e-5},
    torch.float16: {"per head": 2e-2, "B and C": 4e-3, "all else": 4e-3},
    torch.bfloat16: {"per head": 3e-2, "B and C": 1.5e-2, "all else": 1e-2},
}


def poison() -> None:
    """Leave NaN in the memory that the next allocations will take."""
    held = [torch.full((size,), float("nan"), device=DEVICE) for size in (2**24 if GPU else 2**18, 2**14, 2**10)]
    del held


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert torch.isfinite(got).all(), f"{name}: not finite"
        assert got.shape == want.shape, f"{name}: {got.shape} for {want.shape}"
        error = float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-3))
        kind = "per head" if name in PER_HEAD else "B and C" if name in GROUP else "all else"
        assert error < BOUNDS[dtype][kind], f"{name}: relative error {error:.1e}"


def some_drop(images: int, n_tokens: int, rate: float, first_row: int = 0) -> Drop:
    """Drops of random keys; the second image is dropped as a whole."""
    key_b = split_mix(torch.arange(images)).to(DEVICE)
    scale_b = torch.tensor([1.5, 0.0, 1.25, 2.0])[:images].to(DEVICE)
    return Drop(key_b, scale_b, threshold_of(rate), n_tokens, first_row)
