"""Where a step's gradients add up: float32 buffers, at addresses that stay the same for the whole run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

ALIGN = 64
"""Parts start at multiples of this many numbers: 256 bytes, what a matrix product writes fastest."""


class GradientBuffer:
    """Every parameter's `.grad` as a part of a flat buffer: of one, or of one for each buffer that parameters lie in."""

    def __init__(self, parameters: Iterable[nn.Parameter], flats: Sequence[Tensor] = ()) -> None:
        """Where parameters are parts of `flats`, gradients lie in `self.flats` as they do."""
        self._parameters = list(parameters)
        if flats:
            self.flats = [torch.zeros_like(flat, dtype=torch.float32) for flat in flats]
            self._views = [self._mirrored(parameter, flats) for parameter in self._parameters]
        else:
            sizes = [-(-p.numel() // ALIGN) * ALIGN for p in self._parameters]
            self.flats = [torch.zeros(sum(sizes), dtype=torch.float32, device=self._parameters[0].device)]
            parts = zip(self.flats[0].split(sizes), self._parameters, strict=True)
            self._views = [part[: p.numel()].view_as(p) for part, p in parts]
        self.clear()

    def clear(self) -> None:
        """Zero, and in its place again, should somebody have taken `.grad` away."""
        for flat in self.flats:
            flat.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def _mirrored(self, parameter: nn.Parameter, flats: Sequence[Tensor]) -> Tensor:
        which, start = place_in(parameter, flats)
        return self.flats[which][start : start + parameter.numel()].view_as(parameter)


def place_in(part: Tensor, flats: Sequence[Tensor]) -> tuple[int, int]:
    """Which of `flats` the contiguous `part` lies in, and at which number it starts there."""
    for which, flat in enumerate(flats):
        start, rest = divmod(part.data_ptr() - flat.data_ptr(), flat.element_size())
        if not rest and 0 <= start <= flat.numel() - part.numel():
            return which, start
    raise AssertionError("a parameter outside DeepSpeed's flat groups")
