"""What a mixer sends beside its matrix products, against the same products and collectives one after another, in float64."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from modeling import peer_exchange, tensor_parallel
from modeling.ops.float8 import float8_weights
from modeling.ops.products import times
from modeling.peer_exchange import PeerExchange
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
    out = out.clone().requires_grad_()
    left = tp.leave(between @ out.T)
    (left * grad).sum().backward()
    assert leaf.grad is not None
    assert out.grad is not None
    return [entered.detach(), between.detach(), left.detach(), leaf.grad, out.grad]


def beside_products(tp: TensorParallel, x: Tensor, into: Tensor, out: Tensor, grad: Tensor) -> list[Tensor]:
    """The same in the order in which the fused mixer does it."""
    beside = tp.beside
    entered, between = beside.gather_times(x, into)
    left = beside.times_leave(between, out)
    grad_out = torch.zeros_like(out)
    grad_between = beside.gather_times_adding(grad, out.T, grad_out, between)
    return [entered, between, left, beside.start_times_sum(grad_between, into.T).wait(), grad_out]


class FileMail:
    """Trays in files that all ranks map: a letter overwrites the last one as soon as it is sent, read or not."""

    def __init__(self, tp: TensorParallel, folder: Path) -> None:
        self.size, self.rank, self.group = tp.size, tp.rank, tp.group
        self.trays = [
            torch.from_file(str(folder / str(rank)), True, ROOM, dtype=torch.float64) for rank in range(tp.size)
        ]
        self.sending: list[dist.Work] = []
        self.postponed: list[Callable[[], object]] = []

    def place(self, owner: int, tray: int, sender: int, like: Tensor) -> Tensor:
        start = (tray * self.size + sender) * TOKENS * MODEL
        return self.trays[owner][start : start + like.numel()].view_as(like)

    def send(self, tray: int, to: int, x: Tensor) -> None:
        self.place(to, tray, self.rank, x).copy_(x)
        self.sending.append(dist.isend(torch.zeros(1), to, group=self.group, tag=tray))  # type: ignore[arg-type]

    def receive(self, tray: int, sender: int, like: Tensor) -> Tensor:
        dist.recv(torch.zeros(1), sender, group=self.group, tag=tray)
        return self.place(self.rank, tray, sender, like)

    def aside(self, work: Callable[[], object]) -> None:
        self.postponed.append(work)

    def finish(self) -> None:
        time.sleep(random.Random(f"{self.rank}:{len(self.sending)}").random() / 200)  # ranks take their time
        for work in self.postponed:
            work()
        for handle in self.sending:
            handle.wait()
        self.postponed.clear()
        self.sending.clear()


ROOM = len(peer_exchange.TRAYS) * 4 * TOKENS * MODEL


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


def compare_float8(sequence: bool) -> None:
    """Rows are rounded each with a scale of its own, so it is the same whichever of them are multiplied together."""
    tensor_parallel.LEAST_SPLIT = 2
    tp = init_ranks(2, sequence=sequence).tp
    n = TOKENS // 2
    rows = slice(tp.rank * n, (tp.rank + 1) * n) if sequence else slice(None)
    x, grad = randn(0, TOKENS, 32)[rows].float(), randn(1, TOKENS, 32)[rows].float()
    into, into_back = float8_weights(randn(2 + tp.rank, 48, 32).float())
    out, out_back = float8_weights(randn(9 + tp.rank, 32, 48).float())
    entered = tp.enter(x)
    between = times(entered, into)
    whole_grad = tp.enter(grad)
    grad_between = times(whole_grad, out_back)
    expected = [entered, between, tp.leave(times(between, out)), grad_between, tp.leave(times(grad_between, into_back))]
    grad_out = torch.zeros(32, 48)
    found = [*tp.gather_times(x, into), tp.times_leave(between, out)]
    found += [
        tp.gather_times_adding(grad, out_back, grad_out, between),
        tp.start_times_sum(grad_between, into_back).wait(),
    ]
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(grad_out, whole_grad.T @ between)  # of what was not rounded


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
def test_float8_products_are_sent_as_others_are(sequence: bool) -> None:
    run_ranks(2, compare_float8, sequence)


def compare_copies(tensor: int, split: int, folder: Path, rounds: int = 8) -> None:
    """Round after round through the same trays, of other numbers each time."""
    tensor_parallel.LEAST_SPLIT = split
    tp = init_ranks(tensor, sequence=True).tp
    tp = replace(tp, peers=PeerExchange(FileMail(tp, folder)))
    n = TOKENS // tensor
    for turn in range(rounds):
        rows = slice(tp.rank * n, (tp.rank + 1) * n)
        x, grad = randn(100 * turn, TOKENS, MODEL)[rows], randn(100 * turn + 1, TOKENS, MODEL)[rows]
        into, out = randn(100 * turn + 2 + tp.rank, INNER, MODEL), randn(100 * turn + 9 + tp.rank, MODEL, INNER)
        found = beside_products(tp, x, into, out, grad)
        expected = one_after_another(tp, x, into, out, grad)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", [2, 10**6], ids=["in halves", "at once"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_writing_into_each_others_memory_changes_nothing(tensor: int, split: int, tmp_path: Path) -> None:
    run_ranks(tensor, compare_copies, tensor, split, tmp_path)


def _compare_in_one_tray(folder: Path) -> None:
    peer_exchange.SUMMED = peer_exchange.GATHERED
    compare_copies(2, 10**6, folder, rounds=40)


def test_trays_that_are_not_filled_in_turns_are_noticed(tmp_path: Path) -> None:
    """Where what is summed shares the tray of what is gathered, a letter is overwritten before it was read."""
    with pytest.raises(RankFailedError, match="not close"):
        run_ranks(2, _compare_in_one_tray, tmp_path)


def _halves_that_leave_out_the_last(n_tokens: int) -> list[slice]:
    return [slice(0, n_tokens // 2), slice(n_tokens // 2, n_tokens - 1)]


def _compare_with_wrong_halves(sequence: bool) -> None:
    tensor_parallel.halves = _halves_that_leave_out_the_last
    tensor_parallel.torch.Tensor.new_empty = _new_poisoned  # type: ignore[method-assign, assignment]
    compare_exchanges(2, sequence, 2)


def _new_poisoned(self: Tensor, *shape: Any) -> Tensor:
    return self.new_full(shape, float("nan"))


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
def test_tokens_that_are_not_sent_are_noticed(sequence: bool) -> None:
    with pytest.raises(RankFailedError, match="not close"):
        run_ranks(2, _compare_with_wrong_halves, sequence)
