"""Narrow widths whose weights all tensor-parallel ranks gather, each to run its own sequences through all of their heads.

What a mixer sends is d_model wide at every width: split by heads, an eighth of the width sends as much as all of it and
multiplies an eighth. Its weights are an eighth as well. Under sequence parallelism, where a rank holds its share of the
tokens between mixers anyway, ranks send those instead: each gathers the heads that it lacks once a step, mixes whole
sequences without sending anything, and returns the gradients once a step. Wider widths stay split by heads.

r: ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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
    full width does, which needs none of them, gradients while narrower widths do, which add nothing to them.
    """

    def __init__(self, blocks: Sequence[Block], tp: TensorParallel, n_heads: int) -> None:
        """From here on training passes run `n_heads` heads and fewer of `blocks` on this rank's own sequences.

        The blocks' parameters, and the `.grad` that this rank's own heads add up in, stay at their addresses.
        """
        mixers = [block.mixer for block in blocks]
        self._tp, self._n_heads, self._unreturned = tp, n_heads, n_heads
        on_gpu = mixers[0].in_z.is_cuda
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._fetched = torch.cuda.Event() if on_gpu else None
        # Connections of their own: CUDA graphs hold collectives of tp's group.
        self._group: Any = dist.new_group(dist.get_process_group_ranks(tp.group), use_local_synchronization=True)
        copies = [_empty_copy(mixer) for mixer in mixers]
        self._parts = []
        for name in dict(mixers[0].named_parameters()):
            owned = [mixer.get_parameter(name) for mixer in mixers]
            layout = layout_of(name)
            if layout.is_sharded:
                self._parts.append(_Part(layout, owned, local_heads(mixers[0].cfg.n_heads, tp.size), n_heads, tp.size))
                owned = self._parts[-1].parameters
            # else B's or C's, on every rank: its part of their gradient is summed over tp, of heads or of sequences
            for copy, parameter in zip(copies, owned, strict=True):
                setattr(copy, name, parameter)
        large = max(part.gradients[0].numel() for part in self._parts)
        self._letters = [[part] for part in self._parts if part.gradients[0].numel() == large]
        self._letters.append([part for part in self._parts if part.gradients[0].numel() < large])
        for block, copy in zip(blocks, copies, strict=True):
            block.gathered = Gathered(n_heads, copy)
        self.start_fetch()

    def start_fetch(self) -> None:
        """Start to take over what the ranks' weights are now. Before `wait_fetched` no pass may run that needs them, and the
        weights must not change, unless they are fetched again after that."""
        self._start(self._fetch)

    def start_return(self, above: int = 0) -> None:
        """Start to add the gradients of all ranks' sequences to those of the heads' owners: of the heads from number `above`
        on that have not been returned yet. Before `wait` no pass may run that adds to them, here or there."""
        if above < self._unreturned:
            self._start(partial(self._return, above, self._unreturned))
            self._unreturned = above

    def start_clear(self) -> None:
        """Start to forget the gradients, for another step's."""
        self._start(self._clear)
        self._unreturned = self._n_heads

    def wait(self) -> None:
        """What follows on this stream is after all that was started."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def wait_fetched(self) -> None:
        """What follows on this stream is after the weights have come in; gradients may still be on their way."""
        if self._fetched is not None:
            torch.cuda.current_stream().wait_event(self._fetched)

    def runs(self, widths: LayerWidths) -> bool:
        """Whether a pass of these layers' widths needs what was fetched."""
        return min(widths) <= self._n_heads

    def _start(self, work: Callable[[], None]) -> None:
        """Do `work` after what is on this stream by now, and on a GPU beside what follows."""
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()

    @torch.no_grad()
    def _fetch(self) -> None:
        for parts in self._letters:
            self._fetch_letter(parts)
        if self._fetched is not None:
            self._fetched.record()

    @torch.no_grad()
    def _return(self, low: int, high: int) -> None:
        for parts in self._letters:
            self._return_letter(parts, low, high)

    def _clear(self) -> None:
        for part in self._parts:
            part.gradients.zero_()

    # A letter at a time: each is as large as a parameter of all layers, and gone before the next one is made.

    def _fetch_letter(self, parts: Sequence[_Part]) -> None:
        mine, whole_r, of_parts = self._letter(parts, 0, self._n_heads)
        for part, (of_mine, _) in zip(parts, of_parts, strict=True):
            torch._foreach_copy_(list(of_mine), part.of_layers(part.owned_weights, 0, of_mine))
        dist.all_gather_into_tensor(whole_r.flatten(), mine, group=self._group)
        for part, (_, of_whole) in zip(parts, of_parts, strict=True):
            part.weights_r.copy_(of_whole)

    def _return_letter(self, parts: Sequence[_Part], low: int, high: int) -> None:
        mine, whole_r, of_parts = self._letter(parts, low, high)
        for part, (_, of_whole) in zip(parts, of_parts, strict=True):
            of_whole.copy_(part.ranks_heads(part.gradients_r, low, high))
        dist.reduce_scatter_tensor(mine, whole_r.flatten(), group=self._group)
        first = local_heads(low, self._tp.size)
        for part, (of_mine, _) in zip(parts, of_parts, strict=True):
            torch._foreach_add_(part.of_layers(part.owned_gradients, first, of_mine), list(of_mine))

    def _letter(
        self, parts: Sequence[_Part], low: int, high: int
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Room for this rank's entries of the heads `low` .. `high`, for all ranks' one after another, and each part's of both."""
        shapes = [part.ranks_heads(part.gradients_r, low, high).shape for part in parts]
        sizes = [shape.numel() // self._tp.size for shape in shapes]
        mine = parts[0].gradients.new_empty(sum(sizes))
        whole_r = mine.new_empty(self._tp.size, sum(sizes))
        split = zip(mine.split(sizes), whole_r.split(sizes, dim=1), shapes, strict=True)
        return mine, whole_r, [(of_mine.view(shape[1:]), of_whole.view(shape)) for of_mine, of_whole, shape in split]


def _empty_copy(mixer: Mixer) -> Mixer:
    """A mixer of one rank, whose parameters are yet to be set."""
    with torch.device("meta"):
        return Mixer(
            mixer.cfg,  # all heads: they number the channels that are dropped
            TensorParallel(),
            mixer.dtype,
            recompute=mixer.recompute,
            in_place_gradients=mixer.in_place_gradients,
            float8=mixer.float8,
        )


class _Part:
    """One sharded parameter of all layers, stacked so that a copy takes all of them at once."""

    def __init__(self, layout: Layout, owned: list[nn.Parameter], n_held: int, n_heads: int, tp: int) -> None:
        """`owned` are this rank's parts, one a layer, of `n_held` heads each; of the width's `n_heads` it has some."""
        gradients = [parameter.grad for parameter in owned if parameter.grad is not None]
        assert len(gradients) == len(owned), "the owners' gradients have no place to add up in"
        # Views of memory that stays where it is, made once: a step has hundreds.
        self.owned_weights = [split_heads(parameter.detach(), layout, n_held) for parameter in owned]
        self.owned_gradients = [split_heads(gradient, layout, n_held) for gradient in gradients]
        self._dim = dim = layout.sharded_dim
        shape = list(owned[0].shape)
        shape[dim] = shape[dim] // n_held * n_heads
        weights, self.gradients = (owned[0].new_zeros(len(owned), *shape) for _ in range(2))
        self.parameters = [nn.Parameter(weight) for weight in weights]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.weights_r, self.gradients_r = (by_rank(whole, layout, n_heads, tp) for whole in (weights, self.gradients))

    def ranks_heads(self, whole_r: Tensor, low: int, high: int) -> Tensor:
        """Of `weights_r` or `gradients_r` the model's heads `low` .. `high`."""
        first, last = (local_heads(n, len(whole_r)) for n in (low, high))
        return whole_r.narrow(2 + self._dim, first, last - first)

    def of_layers(self, owned: Sequence[Tensor], first: int, like: Tensor) -> list[Tensor]:
        """Of `owned_weights` or `owned_gradients` as many heads as `like` has, from this rank's own number `first` on."""
        return [part.narrow(self._dim, first, like.shape[1 + self._dim]) for part in owned]
