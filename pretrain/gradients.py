"""Where a step's gradients add up: one float32 buffer, at addresses that stay the same for the whole run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class GradientBuffer:
    """Every parameter's `.grad` as a part of one float32 buffer."""

    ALIGN = 64
    """Parts start at multiples of this many numbers: 256 bytes, what a matrix product writes fastest."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        sizes = [-(-p.numel() // self.ALIGN) * self.ALIGN for p in self._parameters]
        device = self._parameters[0].device
        self._flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        parts = zip(self._flat.split(sizes), self._parameters, strict=True)
        self._views = [part[: p.numel()].view_as(p) for part, p in parts]
        self.clear()

    def clear(self) -> None:
        """Zero, and in its place again: DeepSpeed takes `.grad` away at each step."""
        self._flat.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
