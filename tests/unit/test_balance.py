"""Every tensor-parallel rank does the same work at every width; a contiguous split, tried here too, does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modeling import nesting
from modeling.config import BackboneConfig
from modeling.mixer import Mixer
from modeling.tensor_parallel import TensorParallel

N_HEADS, WIDTHS = 16, (16, 8, 4)
Owned = Callable[[int, int], range]
"""The heads that a rank of so many owns."""


def strided(tp: int, rank: int) -> range:
    return nesting.rank_heads(N_HEADS, tp, rank)


def contiguous(tp: int, rank: int) -> range:
    each = N_HEADS // tp
    return range(rank * each, (rank + 1) * each)


class Unheard(TensorParallel):
    """A rank of a real size whose collectives, which multiply nothing, are left out."""

    def total(self, x: Tensor) -> Tensor:
        return x

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x

    def share(self, weight: Tensor) -> Tensor:
        return weight


def counted_flops(n_heads: int, tp: int = 1, rank: int = 0) -> int:
    """FLOPs that torch counts in a forward and backward pass of a rank's mixer at a width of this many heads."""
    if n_heads == 0:
        return 0
    cfg = BackboneConfig(n_layers=1, d_model=32, headdim=4, n_heads=N_HEADS, widths=WIDTHS, d_state=8, chunk_size=8)
    mixer = Mixer(cfg, Unheard(tp, rank), torch.float32)
    for parameter in mixer.parameters():
        torch.nn.init.uniform_(parameter, 0.0, 0.1)
    with FlopCounterMode(display=False) as counter:
        mixer(torch.randn(16, 32, requires_grad=True), n_heads, 1).sum().backward()
    return counter.get_total_flops()


def heads_of(owned: Owned, tp: int, width: int) -> list[int]:
    """How many of the first `width` heads each rank owns."""
    return [sum(head < width for head in owned(tp, rank)) for rank in range(tp)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_share_every_width_equally(tp: int, width: int) -> None:
    assert set(heads_of(strided, tp, width)) == {nesting.local_heads(width, tp)}
    # B and C are done on every rank; the rest is divided, so that a rank costs what a model of its heads alone would.
    assert {counted_flops(width, tp, rank) for rank in range(tp)} == {counted_flops(width // tp)}


@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_contiguous_split_leaves_ranks_idle_at_narrow_widths(tp: int, width: int) -> None:
    heads = heads_of(contiguous, tp, width)
    flops = [counted_flops(n) for n in heads]
    assert min(heads) == 0 < max(heads)
    assert min(flops) == 0 < max(flops)


def test_work_falls_with_the_width() -> None:
    flops = [counted_flops(width) for width in WIDTHS]
    assert flops == sorted(flops, reverse=True)
    assert len(set(flops)) == len(flops)
