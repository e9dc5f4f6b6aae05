"""Several tensors added to another, up to three in one pass: read once each, added in float32, rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
AT_ONCE = 3
"""Parts that one launch takes: what arrives from the others of four ranks."""


@triton.jit
def _add_all(total_ptr, a_ptr, b_ptr, c_ptr, n, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < n
    total = tl.load(total_ptr + place, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(a_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 1:
        total += tl.load(b_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 2:
        total += tl.load(c_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(total_ptr + place, total.to(total_ptr.dtype.element_ty), mask=mask)


def add_all_at_once(total: Tensor, parts: Sequence[Tensor]) -> None:
    """total += each of `parts`, all contiguous, of one shape and of one dtype no wider than float32."""
    assert all(part.is_contiguous() and part.shape == total.shape for part in (total, *parts))
    n = total.numel()
    for first in range(0, len(parts), AT_ONCE):
        some = list(parts[first : first + AT_ONCE])
        filled = some + [None] * (AT_ONCE - len(some))
        _add_all[(triton.cdiv(n, BLOCK),)](total, *filled, n, PARTS=len(some), BLOCK=BLOCK, num_warps=8)
