"""Steps of decoding replayed as CUDA graphs: a step has hundreds of kernels, each shorter than launching it takes."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UPS = 2
Step = Callable[..., Tensor]


class InPlace(Protocol):
    """What steps update in place: modeling.inference.State."""

    waiting: list[Tensor] | None

    @property
    def n_bytes(self) -> int: ...

    def clone(self) -> Any: ...

    def copy_(self, other: Any) -> None: ...


def graphed(function: Step, inputs: Sequence[Tensor], states: Sequence[InPlace]) -> Step:
    """`function` as one CUDA graph, for inputs of the shapes of `inputs`; on a CPU, `function` itself.

    `states` are what it updates in place: warming up leaves them as they were. A call overwrites the tensor that the call
    before it returned. Capturing takes about four runs of `function`.
    """
    if not inputs[0].is_cuda:
        return function
    fixed = [tensor.clone() for tensor in inputs]
    before = [(state.clone(), state.waiting) for state in states]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            function(*fixed)
            for state, (_, waiting) in zip(states, before, strict=True):
                state.waiting = waiting
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = function(*fixed)
    for state, (copy, _) in zip(states, before, strict=True):
        waiting = state.waiting
        state.copy_(copy)
        state.waiting = waiting

    def replay(*new: Tensor) -> Tensor:
        for mine, given in zip(fixed, new, strict=True):
            mine.copy_(given)
        graph.replay()
        return out

    return replay


@dataclass
class Captured:
    """Steps and the states that they move on: a graph knows its states by address, so they stay together."""

    states: tuple[Any, ...]
    steps: tuple[Step, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the states; what the graphs themselves hold beside them is one step's activations."""
        return sum(state.n_bytes for state in self.states)


class KeptSteps:
    """Captured steps of one model, kept for the next request of the same shape; those not used for longest go first."""

    def __init__(self, *, max_kept: int = 8, max_bytes: int = 4 << 30) -> None:
        """At most `max_kept` are kept, and at most `max_bytes` of their states."""
        self._max_kept, self._max_bytes = max_kept, max_bytes
        self._kept: OrderedDict[Hashable, Captured] = OrderedDict()

    @contextlib.contextmanager
    def borrow(self, key: Hashable, make: Callable[[], Captured]) -> Iterator[Captured]:
        """What is kept under `key`, or what `make` returns, for the borrower alone. Its states hold what the last one left.

        A second borrower of the same key at the same time gets one of its own.
        """
        captured = self._kept.pop(key, None) or make()
        try:
            yield captured
        finally:
            if captured.n_bytes <= self._max_bytes:
                self._kept[key] = captured
            while len(self._kept) > self._max_kept or self.n_bytes > self._max_bytes:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        """Let go of all that is not borrowed."""
        self._kept.clear()

    @property
    def n_kept(self) -> int:
        """How many are kept and not borrowed."""
        return len(self._kept)

    @property
    def n_bytes(self) -> int:
        """Bytes of the states of all that are kept."""
        return sum(captured.n_bytes for captured in self._kept.values())
