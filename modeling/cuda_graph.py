"""Steps of decoding replayed as CUDA graphs: a step has hundreds of kernels, each shorter than launching it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modeling.inference import State

WARM_UPS = 2


def graphed(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], states: Sequence[State]
) -> Callable[..., Tensor]:
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
