"""Decoding at any width: prefill by the chunked scan, then one token a step with a state of constant size.

Letters: b batch, t time, d model, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from modeling.cuda_graph import Captured, graphed
from modeling.inference import InferenceModel, State, carry
from modeling.nesting import LayerWidths
from modeling.sampling import Sampling, choose

GRAPH_FROM = 32
"""New tokens from which on capturing a CUDA graph pays; it is kept for the next call of the same batch and widths."""
PREFILL_TOKENS = 8192
"""Prompts are read this many tokens of the batch at a time, so that memory does not grow with their length."""


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ValueError unless there is a prompt, each has a token, and every token is in the vocabulary."""
    if len(prompts) == 0:
        raise ValueError("no prompt: give at least one")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} has no token: give at least one, the end-of-text id for instance")
        worst = max(prompt) if min(prompt) >= 0 else min(prompt)
        if not 0 <= worst < vocab_size:
            raise ValueError(
                f"prompt {i} has token id {worst}, the model's vocabulary is 0 to {vocab_size - 1}: use its own tokenizer"
            )


def prefill(model: InferenceModel, prompts: Sequence[Sequence[int]], state: State) -> Tensor:
    """Read token ids of unequal number into `state`, one sequence each; returns the hidden states at their ends, b d.

    Raises ValueError for an empty prompt or an id outside the vocabulary.
    """
    check_prompts(prompts, model.cfg.vocab_size)
    lengths = [len(prompt) for prompt in prompts]
    # Rows that end early stay in the batch: a row with nothing to take in leaves its state alone.
    piece = max(1, PREFILL_TOKENS // len(prompts))
    ends: list[Tensor | None] = [None] * len(prompts)
    for start in range(0, max(lengths), piece):
        rows = [list(prompt[start : start + piece]) for prompt in prompts]
        t = max(len(row) for row in rows)
        tokens_bt = torch.tensor([row + [0] * (t - len(row)) for row in rows], device=model.device)
        count_b = torch.tensor([len(row) for row in rows], dtype=torch.int32, device=model.device)
        hidden_btd = model.forward(tokens_bt, state, count_b)
        for i, row in enumerate(rows):
            if row:
                ends[i] = hidden_btd[i, len(row) - 1]
    return torch.stack([end for end in ends if end is not None])


def generate(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    widths: LayerWidths,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    state: State | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of each sequence, int64 of shape b, up to `max_new_tokens` times.

    Prompts may differ in length. `widths` picks the submodel. `state`, where given, is of these widths, holds what came
    before the prompts, and moves on: after n tokens were taken from the iterator, it knows the prompts and the first
    n - 1 of them. Raises ValueError where the widths, the state or a prompt do not fit the model.
    """
    sampling = sampling or Sampling()
    model.check_widths(widths)
    check_prompts(prompts, model.cfg.vocab_size)
    if state is not None and (state.widths != widths or state.batch != len(prompts)):
        raise ValueError(
            f"the state is of {state.batch} sequences at widths {state.widths}, asked are {len(prompts)} at {widths}: "
            "start from empty_state, or carry() it"
        )
    if max_new_tokens < 1:
        return
    if max_new_tokens < GRAPH_FROM:
        captured = _steps(model, len(prompts), widths, state)
        yield from _decode(model, prompts, captured, max_new_tokens, sampling, generator)
        return
    make = partial(_steps, model, len(prompts), widths, None, graph=True)
    with model.kept_steps.borrow((len(prompts), widths), make) as captured:
        own = captured.states[0]
        if state is None:
            own.zero_()
        else:
            own.copy_(state)
            state.conv, state.ssm, state.waiting = own.conv, own.ssm, None
        try:
            yield from _decode(model, prompts, captured, max_new_tokens, sampling, generator)
        finally:
            if state is not None:  # the next borrower overwrites what it looked at so far
                copy = own.clone()
                state.conv, state.ssm = copy.conv, copy.ssm


def _steps(
    model: InferenceModel, batch: int, widths: LayerWidths, state: State | None, *, graph: bool = False
) -> Captured:
    """One step of decoding on `state`, or on an empty one."""
    held = state or model.empty_state(batch, widths)

    def step(token_b: Tensor) -> Tensor:
        return model.logits(model.forward(token_b[:, None], held)[:, 0])

    token_b = torch.zeros(batch, dtype=torch.int64, device=model.device)
    return Captured((held,), (graphed(step, [token_b], [held]) if graph else step,))


def _decode(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    captured: Captured,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    (state,), (step,) = captured.states, captured.steps
    next_b = choose(model.logits(prefill(model, prompts, state)), sampling, generator)
    yield next_b
    for _ in range(max_new_tokens - 1):
        next_b = choose(step(next_b), sampling, generator)
        yield next_b


@dataclass
class Conversation:
    """One sequence continued in turns, each at any width.

    A state belongs to its width. In a turn at the same width only the new tokens are read; where `carry` knows the new
    width's state exactly, it is carried over; otherwise everything said so far is read again at the new width. The result
    is always that of the new width alone over the whole text.
    """

    model: InferenceModel
    ids: list[int]
    """All tokens so far."""
    state: State | None = None
    """State after the first `n_read` of them."""
    n_read: int = 0

    def turn(
        self,
        new_ids: Sequence[int],
        widths: LayerWidths,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """Add `new_ids`, then yield and add up to `max_new_tokens` tokens of the submodel `widths`. Raises ValueError."""
        self.ids += new_ids
        kept = None if self.state is None or self.n_read >= len(self.ids) else carry(self.state, widths)
        if kept is None:
            kept, self.n_read = self.model.empty_state(1, widths), 0
        unread, self.state = self.ids[self.n_read :], kept
        steps = generate(
            self.model,
            [unread],
            widths,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            generator=generator,
            state=kept,
        )
        for token_b in steps:
            self.n_read = len(self.ids)
            self.ids.append(int(token_b))
            yield self.ids[-1]
