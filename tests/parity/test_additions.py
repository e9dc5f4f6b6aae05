"""Several tensors added to one in one pass, against torch in float64."""

from __future__ import annotations

import pytest
import torch

from modeling.ops.kernels.additions import BLOCK, add_all_at_once
from tests.parity.kernel_checks import DEVICE, LOW


@pytest.mark.parametrize("n_parts", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, BLOCK // 8 + 1])
@pytest.mark.parametrize("dtype", [LOW, torch.float32])
def test_all_parts_are_added_to_the_total_and_nothing_else(n_parts: int, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n_parts)
    whole = torch.randn(rows + 2, 13, generator=generator).to(DEVICE, dtype)
    parts = [torch.randn(rows, 13, generator=generator).to(DEVICE, dtype) for _ in range(n_parts)]
    before, given = whole.double(), [part.clone() for part in parts]
    add_all_at_once(whole[1:-1], parts)

    expected = before.clone()
    expected[1:-1] += sum(part.double() for part in parts)
    # Three parts are rounded once: half a unit in the last place.
    launches = -(-n_parts // 3)
    bound = (
        launches * torch.finfo(dtype).eps / 2 * (before.abs().max() + sum(part.abs().max().double() for part in parts))
    )
    assert (whole.double() - expected).abs().max() <= bound * (1.01 if dtype == LOW else 3)
    assert torch.equal(whole[[0, -1]].double(), before[[0, -1]])
    assert all(torch.equal(part, was) for part, was in zip(parts, given, strict=True))
