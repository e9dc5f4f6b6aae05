"""The kernels of the vocabulary's cross-entropy against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modeling.ops.kernels.cross_entropy import softmax_statistics, write_gradient
from tests.parity.kernel_checks import DEVICE


@pytest.mark.parametrize(("m", "v"), [(3, 5), (4, 4096), (2, 10000)])
def test_cross_entropy_equals_torch(m: int, v: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(m, v, generator=generator) * 5).to(DEVICE)
    targets = torch.randint(0, v, (m,), generator=generator).to(DEVICE)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, targets, reduction="none")
    (expected.sum() * 0.25).backward()
    peak, total, picked = softmax_statistics(logits, targets)
    torch.testing.assert_close(torch.log(total) + peak - picked, expected.detach(), rtol=1e-5, atol=1e-5)
    write_gradient(logits, targets, peak, total, 0.25)
    assert leaf.grad is not None
    torch.testing.assert_close(logits, leaf.grad, rtol=1e-5, atol=1e-7)


def test_a_target_of_another_rank_is_picked_nowhere() -> None:
    logits = torch.randn(2, 10).to(DEVICE)
    targets = torch.tensor([-3, 12]).to(DEVICE)
    _, _, picked = softmax_statistics(logits, targets)
    assert picked.tolist() == [0, 0]
    peak, total, _ = softmax_statistics(logits, targets)
    expected = torch.softmax(logits, -1)
    write_gradient(logits, targets, peak, total, 1.0)
    torch.testing.assert_close(logits, expected)
