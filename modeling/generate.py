"""Text from any submodel: prefill by the chunked scan, then one token a step with a state of constant size.

Letters: b batch, t time, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.language import LanguageModel
from modeling.nesting import LayerWidths


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; else scores are divided by this before sampling."""
    top_p: float = 1.0
    """Sample among the likeliest tokens whose probabilities reach this sum."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must lie in (0, 1]")


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_bt: Tensor,
    widths: LayerWidths,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of each sequence, int64 of shape b, up to `max_new_tokens` times.

    `prompt_bt` holds int64 ids, at least one a sequence, all prompts equally long. `widths` picks the submodel; the
    state belongs to it, so another width needs a new call. Raises ValueError for a model split over tp ranks.
    """
    if model.tp.size != 1:
        raise ValueError(f"generate needs a whole model, this one is split over tp={model.tp.size}: load it at tp=1")
    if prompt_bt.dim() != 2 or prompt_bt.shape[1] == 0:
        raise ValueError(f"prompt has shape {tuple(prompt_bt.shape)}: it must be (batch, time) with at least one token")
    sampling = sampling or Sampling()
    states = model.empty_states(prompt_bt.shape[0], widths)
    piece_bt = prompt_bt
    for _ in range(max_new_tokens):
        hidden_btd = model(piece_bt, widths, states=states)
        # Rows past vocab_size only pad the embedding: no tokenizer knows them.
        logits_bv = model.logits(hidden_btd[:, -1:])[:, 0, : model.cfg.vocab_size]
        next_b = choose(logits_bv, sampling, generator)
        yield next_b
        piece_bt = next_b[:, None]


def choose(logits_bv: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token id (int64, shape b) for each row of scores."""
    if sampling.temperature == 0:
        return logits_bv.argmax(-1)
    probabilities_bv = torch.softmax(logits_bv.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        sorted_bv, order_bv = probabilities_bv.sort(dim=-1, descending=True)
        # A token stays while the sum before it is below top_p: at least one always does.
        beyond_bv = sorted_bv.cumsum(-1) - sorted_bv >= sampling.top_p
        probabilities_bv = torch.zeros_like(sorted_bv).scatter(-1, order_bv, sorted_bv.masked_fill(beyond_bv, 0))
    return torch.multinomial(probabilities_bv, 1, generator=generator)[:, 0]
