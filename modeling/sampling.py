"""How the next token is chosen from scores.

Letters: b batch, v vocabulary; any further leading dims may stand for b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-6
"""Above 0. Scores divided by much less overflow float32."""
LEAST_TOP_P = 1e-6
"""Already the likeliest token alone; far below it float32 rounds to 0, which would leave no token."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; else, from LEAST_TEMPERATURE on, scores are divided by this before sampling."""
    top_p: float = 1.0
    """Sample among the likeliest tokens whose probabilities reach this sum, from LEAST_TOP_P on."""

    def __post_init__(self) -> None:
        is_greedy = self.temperature == 0
        if not is_greedy and not (math.isfinite(self.temperature) and self.temperature >= LEAST_TEMPERATURE):
            raise ValueError(
                f"temperature={self.temperature}: must be 0, the likeliest token, or a number of at least "
                f"{LEAST_TEMPERATURE:g}"
            )
        if not LEAST_TOP_P <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must lie in {LEAST_TOP_P:g} to 1")


def probabilities(logits_bv: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that the next token is drawn from, float32, shape b v; at temperature 0 all on the likeliest."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits_bv, dtype=torch.float32).scatter(-1, logits_bv.argmax(-1, keepdim=True), 1.0)
    probabilities_bv = torch.softmax(logits_bv.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        sorted_bv, order_bv = probabilities_bv.sort(dim=-1, descending=True)
        # A token stays while the sum before it is below top_p: at least one always does.
        beyond_bv = sorted_bv.cumsum(-1) - sorted_bv >= sampling.top_p
        probabilities_bv = torch.zeros_like(sorted_bv).scatter(-1, order_bv, sorted_bv.masked_fill(beyond_bv, 0))
        probabilities_bv = probabilities_bv / probabilities_bv.sum(-1, keepdim=True)
    return probabilities_bv


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` that starts from `seed`. Raises ValueError where that has more than torch's 64 bits."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed}: must lie in {-(2**63)} to {2**64 - 1}, the numbers of 64 bits")
    return torch.Generator(device).manual_seed(seed)


def choose(logits_bv: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token id (int64, shape b) for each row of scores."""
    if sampling.temperature == 0:
        return logits_bv.argmax(-1)
    return torch.multinomial(probabilities(logits_bv, sampling), 1, generator=generator)[:, 0]
