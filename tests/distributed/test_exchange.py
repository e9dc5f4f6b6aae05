"""What a mixer sends beside its matrix products, against the same products and collectives one after another, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modeling import tensor_parallel
from modeling.tensor_parallel import TensorParallel
from pretrain.distributed import init_ranks
from tests.distributed.harness import RankFailedError, run_ranks

TOKENS, MODEL, INNER = 24, 5, 7


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_after_another(tp: TensorParallel, x: Tensor, into: Tensor, out: Tensor, grad: Tensor) -> list[Tensor]:
    """A mixer without an inside: enter, two products, leave; then its input's gradient."""
    leaf = x.clone().requires_grad_()
    entered = tp.enter(leaf)
    between = entered @ into.T
    left = tp.leave(between @ out.T)
    (left * grad).sum().backward()
    assert leaf.grad is not None
    return [entered.detach(), between.detach(), left.detach(), leaf.grad]


def beside_products(tp: TensorParallel, x: Tensor, into: Tensor, out: Tensor, grad: Tensor) -> list[Tensor]:
    """The same in the order in which the fused mixer does it."""
    entered, between = tp.gather_times(x, into)
    left = tp.times_leave(between, out)
    _, grad_between = tp.gather_times(grad, out.T)
    return [entered, between, left, tp.start_sum(grad_between @ into).wait()]


def compare_exchanges(tensor: int, sequence: bool, split: int) -> None:
    tensor_parallel.LEAST_SPLIT = split
    tp = init_ranks(tensor, sequence=sequence).tp
    rows = slice(None)
    if sequence:
        n = TOKENS // tensor
        rows = slice(tp.rank * n, (tp.rank + 1) * n)
    x, grad = randn(0, TOKENS, MODEL)[rows], randn(1, TOKENS, MODEL)[rows]
    into, out = randn(2 + tp.rank, INNER, MODEL), randn(9 + tp.rank, MODEL, INNER)
    given = [t.clone() for t in (x, into, out, grad)]
    expected = one_after_another(tp, x, into, out, grad)
    for mine, theirs in zip(beside_products(tp, x, into, out, grad), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for before, after in zip(given, (x, into, out, grad), strict=True):
        assert torch.equal(before, after), "an input was written to"


@pytest.mark.parametrize("split", [2, 10**6], ids=["in halves", "at once"])
@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_sending_beside_products_changes_nothing(tensor: int, sequence: bool, split: int) -> None:
    run_ranks(tensor, compare_exchanges, tensor, sequence, split)


def _halves_that_leave_out_the_last(n_tokens: int) -> list[slice]:
    return [slice(0, n_tokens // 2), slice(n_tokens // 2, n_tokens - 1)]


def _compare_with_wrong_halves(sequence: bool) -> None:
    tensor_parallel._halves = _halves_that_leave_out_the_last
    tensor_parallel.torch.Tensor.new_empty = _new_poisoned  # type: ignore[method-assign, assignment]
    compare_exchanges(2, sequence, 2)


def _new_poisoned(self: Tensor, *shape: Any) -> Tensor:
    return self.new_full(shape, float("nan"))


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
def test_tokens_that_are_not_sent_are_noticed(sequence: bool) -> None:
    with pytest.raises(RankFailedError, match="not close"):
        run_ranks(2, _compare_with_wrong_halves, sequence)
