"""Narrow widths whose weights all tensor-parallel ranks gather, each to run its own sequences through all of their heads.

What a mixer sends is d_model wide at every width: split by heads, an eighth of the width sends as much as all of it and
multiplies an eighth. Its weights are an eighth as well. Under sequence parallelism, where a rank holds its share of the
tokens between mixers anyway, ranks send those instead: each gathers the heads that it lacks once a step, mixes whole
sequences without sending anything, and returns the gradients once a step. Wider widths stay split by heads.

r: ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modeling.backbone import Block, Gathered
from modeling.mixer import Mixer
from modeling.nesting import LayerWidths, local_heads
from modeling.tensor_parallel import Layout, TensorParallel, by_rank, layout_of, split_heads


class GatheredWidths:
    """The heads up to one width of every block's mixer, on each of `tp`'s ranks. All of them must make and call it alike.

    On a GPU weights and gradients travel on a stream and in a group of their own, beside what else runs: weights while the
    full width does, which needs none of them, gradients while narrower widths do, which add none to them.
    """

    def __init__(self, blocks: Sequence[Block], tp: TensorParallel, n_heads: int) -> None:
        """From here on training passes run `n_heads` heads and fewer of `blocks` on this rank's own sequences.

        The blocks' parameters have the `.grad` that this rank's own heads add up in, at addresses that stay as they are.
        """
        mixers = [block.mixer for block in blocks]
        self._n_heads = self._unreturned = n_heads
        self._stream = torch.cuda.Stream() if mixers[0].in_z.is_cuda else None
        ranks = dist.get_process_group_ranks(tp.group)
        among = Among(
            tp, dist.new_group(ranks, use_local_synchronization=True), local_heads(mixers[0].cfg.n_heads, tp.size)
        )
        copies = [_empty_copy(mixer) for mixer in mixers]
        self._parts = []
        for name in dict(mixers[0].named_parameters()):
            if layout_of(name).is_sharded:
                part = _Part(layout_of(name), [mixer.get_parameter(name) for mixer in mixers], n_heads, among)
                self._parts.append(part)
                whole: Sequence[nn.Parameter] = part.parameters
            else:  # B's and C's are on every rank: its part of their gradient is summed over tp, of heads or of sequences
                whole = [mixer.get_parameter(name) for mixer in mixers]
            for copy, copied in zip(copies, whole, strict=True):
                setattr(copy, name, copied)
        for block, copy in zip(blocks, copies, strict=True):
            block.gathered = Gathered(n_heads, copy)
        self.start_fetch()

    def start_fetch(self) -> None:
        """Start to take over what the ranks' weights are now. Before `wait` the weights must not change, nor passes run that
        need them."""
        with self._beside():
            for part in self._parts:
                part.fetch()

    def start_return(self, above: int = 0) -> None:
        """Start to add the gradients of all ranks' sequences to those of the heads' owners: of the heads from number `above`
        on that have not been returned yet. Before `wait` no pass may run that adds to them, here or there."""
        if above < self._unreturned:
            with self._beside():
                for part in self._parts:
                    part.return_gradients(above, self._unreturned)
            self._unreturned = above

    def start_clear(self) -> None:
        """Start to forget the gradients, for another step's."""
        with self._beside():
            for part in self._parts:
                part.gradients.zero_()
        self._unreturned = self._n_heads

    def wait(self) -> None:
        """What follows on this stream is after all that was started."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def runs(self, widths: LayerWidths) -> bool:
        """Whether a pass of these layers' widths needs what was fetched."""
        return min(widths) <= self._n_heads

    @contextmanager
    def _beside(self) -> Iterator[None]:
        if self._stream is None:
            with torch.no_grad():
                yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(self._stream):
            yield


class Among(NamedTuple):
    """Whom parts are exchanged with."""

    tp: TensorParallel
    group: Any
    """tp's ranks, over connections of their own: CUDA graphs hold collectives of tp's own group."""
    n_held: int
    """Heads of each rank."""


def _empty_copy(mixer: Mixer) -> Mixer:
    """A mixer of one rank, whose parameters are yet to be set."""
    with torch.device("meta"):
        return Mixer(
            mixer.cfg,  # all heads: they number the channels that are dropped
            TensorParallel(),
            mixer.dtype,
            recompute=mixer.recompute,
            in_place_gradients=mixer.in_place_gradients,
        )


class _Part:
    """One sharded parameter of all layers, stacked so that a copy or collective takes all of them at once."""

    def __init__(self, layout: Layout, owned: list[nn.Parameter], n_heads: int, among: Among) -> None:
        """`owned` are this rank's parts, one a layer."""
        self._layout, self._owned, self._among = layout, owned, among
        dim = layout.sharded_dim
        shape = list(owned[0].shape)
        shape[dim] = shape[dim] // among.n_held * n_heads
        weights, self.gradients = (owned[0].new_zeros(len(owned), *shape) for _ in range(2))
        self.parameters = [nn.Parameter(weight) for weight in weights]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self._weights_r, self._gradients_r = (
            by_rank(stacked, layout, n_heads, among.tp.size) for stacked in (weights, self.gradients)
        )

    def fetch(self) -> None:
        arriving_r = torch.empty_like(self._weights_r, memory_format=torch.contiguous_format)
        mine = torch.empty_like(arriving_r[0])
        torch._foreach_copy_(list(mine), [self._heads(parameter, 0, mine) for parameter in self._owned])
        dist.all_gather_into_tensor(arriving_r.flatten(0, 1), mine, group=self._among.group)
        self._weights_r.copy_(arriving_r)

    def return_gradients(self, low: int, high: int) -> None:
        """Of the model's heads `low` .. `high`."""
        first, last = (local_heads(n, self._among.tp.size) for n in (low, high))
        leaving_r = self._gradients_r.narrow(2 + self._layout.sharded_dim, first, last - first).contiguous()
        mine = torch.empty_like(leaving_r[0])
        dist.reduce_scatter_tensor(mine, leaving_r.flatten(0, 1), group=self._among.group)
        gradients = [parameter.grad for parameter in self._owned if parameter.grad is not None]
        torch._foreach_add_([self._heads(gradient, first, mine) for gradient in gradients], list(mine))

    def _heads(self, owned: Tensor, first: int, like: Tensor) -> Tensor:
        """Of this rank's part of one layer as many heads as `like` has, from its own number `first` on."""
        heads = split_heads(owned[None], self._layout, self._among.n_held)
        dim = 1 + self._layout.sharded_dim
        return heads.narrow(dim, first, like.shape[dim])[0]
