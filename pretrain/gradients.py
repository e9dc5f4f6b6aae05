"""Where a step's gradients add up: one float32 buffer, at addresses that stay the same for the whole run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

ALIGN = 64
"""Parts start at multiples of this many numbers: 256 bytes, what a matrix product writes fastest."""


def padded(n: int) -> int:
    """Numbers that a part of `n` takes."""
    return -(-n // ALIGN) * ALIGN


class GradientBuffer:
    """Every parameter's `.grad` as a part of one float32 buffer, those of `first` before all others."""

    def __init__(self, parameters: Iterable[nn.Parameter], first: Iterable[nn.Parameter] = ()) -> None:
        leading = list(first)
        known = {id(p) for p in leading}
        self._parameters = leading + [p for p in parameters if id(p) not in known]
        sizes = [padded(p.numel()) for p in self._parameters]
        device = self._parameters[0].device
        self._flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.leading = self._flat[: sum(sizes[: len(leading)])]
        """The gradients of `first`, and what lies between them: zeros."""
        parts = zip(self._flat.split(sizes), self._parameters, strict=True)
        self._views = [part[: p.numel()].view_as(p) for part, p in parts]
        self.clear()

    def clear(self) -> None:
        """Zero, and in its place again: DeepSpeed takes `.grad` away at each step."""
        self._flat.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
