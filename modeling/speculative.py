"""Self-speculative decoding: a narrow width of the model drafts, a wider one verifies, and the output is the wider one's.

A round: from the last token, the draft proposes k tokens one by one; the target reads all of them in one pass and keeps
the longest run it agrees with, in the sense of Leviathan et al. (arXiv 2211.17192): a drafted token x is accepted with
probability min(1, p(x) / q(x)), and the first rejected one is drawn again from max(p - q, 0). So every token has the
target's distribution p exactly; at temperature 0 it is the target's likeliest token. Then both states take in what was
accepted and nothing else: the target's from the projections that it still has, the draft's by reading it again.

The draft reads the first heads of the same weights: it costs a state, no weights.

Letters: b batch, k drafted tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from modeling.cuda_graph import Captured, graphed
from modeling.decode import check_prompts, prefill
from modeling.inference import InferenceModel
from modeling.nesting import LayerWidths
from modeling.sampling import Sampling, choose, probabilities

DRAFT_TOKENS = 4
"""How far ahead a draft is, unless told otherwise."""


@dataclass
class Speculation:
    """What came out, and how well the draft did."""

    ids: list[list[int]] = field(default_factory=list)
    """New tokens of each sequence."""
    rounds: int = 0
    """Passes of the target after the prompt."""
    drafted: int = 0
    """Tokens that were proposed for sequences not yet complete."""
    accepted: int = 0
    """Those of them that the target kept."""

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that was kept; 0 before the first round."""
        return self.accepted / self.drafted if self.drafted else 0.0


def generate_speculatively(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    target: LayerWidths,
    draft: LayerWidths,
    *,
    max_new_tokens: int,
    draft_tokens: int = DRAFT_TOKENS,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> Speculation:
    """Exactly `max_new_tokens` new tokens of each prompt, distributed as `target`'s. Raises as `speculate` does."""
    *_, result = speculate(
        model,
        prompts,
        target,
        draft,
        max_new_tokens=max_new_tokens,
        draft_tokens=draft_tokens,
        sampling=sampling,
        generator=generator,
    )
    return result


@torch.no_grad()
def speculate(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    target: LayerWidths,
    draft: LayerWidths,
    *,
    max_new_tokens: int,
    draft_tokens: int = DRAFT_TOKENS,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Speculation]:
    """Yield the result so far, the same object each time: after the prompt's first token and after each round.

    `draft` must be no wider than `target` in any layer. Raises ValueError where it is, or a prompt or width does not fit.
    """
    sampling = sampling or Sampling()
    model.check_widths(target)
    model.check_widths(draft)
    if any(narrow > wide for narrow, wide in zip(draft, target, strict=True)):
        raise ValueError(f"draft {draft} is wider than target {target} in some layer: draft with a narrower width")
    if draft_tokens < 1 or max_new_tokens < 1:
        raise ValueError(f"draft_tokens={draft_tokens}, max_new_tokens={max_new_tokens}: both must be at least 1")
    check_prompts(prompts, model.cfg.vocab_size)
    make = partial(_steps, model, len(prompts), target, draft, draft_tokens)
    with model.kept_steps.borrow((len(prompts), target, draft, draft_tokens), make) as captured:
        yield from _rounds(model, prompts, captured, max_new_tokens, draft_tokens, sampling, generator)


def _steps(model: InferenceModel, batch: int, target: LayerWidths, draft: LayerWidths, k: int) -> Captured:
    """States of the target, of the draft, and of the draft's trials; steps: propose, verify, take, catch up."""
    target_state, draft_state = model.empty_state(batch, target), model.empty_state(batch, draft)
    trial_state = model.empty_state(batch, draft)

    def propose(token_b: Tensor) -> Tensor:
        return model.logits(model.forward(token_b[:, None], trial_state)[:, 0])

    def verify(tokens_bt: Tensor) -> Tensor:
        return model.logits(model.peek(tokens_bt, target_state))

    def take(count_b: Tensor) -> Tensor:
        model.take(target_state, count_b)
        return count_b

    def catch_up(tokens_bt: Tensor, count_b: Tensor) -> Tensor:
        return model.forward(tokens_bt, draft_state, count_b)

    tokens_bt = torch.zeros(batch, k + 1, dtype=torch.int64, device=model.device)
    count_b = torch.ones(batch, dtype=torch.int32, device=model.device)
    steps = (
        graphed(propose, [tokens_bt[:, 0]], [trial_state]),
        graphed(verify, [tokens_bt], [target_state]),
        graphed(take, [count_b], [target_state]),
        graphed(catch_up, [tokens_bt, count_b], [draft_state]),
    )
    return Captured((target_state, draft_state, trial_state), steps)


def _rounds(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    captured: Captured,
    max_new_tokens: int,
    k: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[Speculation]:
    target_state, draft_state, trial_state = captured.states
    propose, verify, take, catch_up = captured.steps
    target_state.zero_()
    draft_state.zero_()
    last_b = choose(model.logits(prefill(model, prompts, target_state)), sampling, generator)
    prefill(model, prompts, draft_state)
    result = Speculation([[int(token)] for token in last_b])
    yield result
    while min(len(ids) for ids in result.ids) < max_new_tokens:
        trial_state.copy_(draft_state)
        drafted, q = [last_b], []
        for _ in range(k):
            q_bv = probabilities(propose(drafted[-1]), sampling)
            q.append(q_bv)
            drafted.append(_draw(q_bv, sampling, generator))
        tokens_bt = torch.stack(drafted, dim=1)
        p_btv = probabilities(verify(tokens_bt), sampling)
        accepted_b, last_b = accept(p_btv, torch.stack(q, dim=1), tokens_bt[:, 1:], generator)
        count_b = (accepted_b + 1).int()
        take(count_b)
        catch_up(tokens_bt, count_b)
        result.rounds += 1
        rows = zip(result.ids, accepted_b.tolist(), tokens_bt[:, 1:].tolist(), last_b.tolist(), strict=True)
        for ids, accepted, proposed, token in rows:
            room = max_new_tokens - len(ids)
            if room:
                result.drafted += k
                result.accepted += accepted
                ids.extend([*proposed[:accepted], token][:room])
        yield result


def accept(
    p_btv: Tensor, q_bkv: Tensor, drafted_bk: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens each row keeps (int64, 0 to k), and the token after them (int64).

    `q_bkv` are the distributions that `drafted_bk` was drawn from, `p_btv` the target's at the same places and at one more.
    """
    k = drafted_bk.shape[1]
    p_bk, q_bk = (v[:, :k].gather(-1, drafted_bk[..., None])[..., 0] for v in (p_btv, q_bkv))
    uniform_bk = torch.rand(p_bk.shape, generator=generator, device=p_bk.device)
    # u q < p is u < p / q without the division; u < 1 keeps every token with p >= q.
    kept_bk = uniform_bk * q_bk < p_bk
    accepted_b = kept_bk.long().cumprod(dim=1).sum(dim=1)
    q_btv = torch.cat([q_bkv, torch.zeros_like(p_btv[:, :1])], dim=1)  # past the draft there is nothing to subtract
    place_b1v = accepted_b[:, None, None].expand(-1, 1, p_btv.shape[-1])
    p_bv, q_bv = p_btv.gather(1, place_b1v)[:, 0], q_btv.gather(1, place_b1v)[:, 0]
    rest_bv = (p_bv - q_bv).clamp(min=0)
    # Where p and q are equal up to rounding nothing may be left of p - q: such a row draws from p.
    rest_bv = torch.where(rest_bv.sum(-1, keepdim=True) > 0, rest_bv, p_bv)
    return accepted_b, torch.multinomial(rest_bv, 1, generator=generator)[:, 0]


def _draw(q_bv: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    if sampling.temperature == 0:
        return q_bv.argmax(-1)
    return torch.multinomial(q_bv, 1, generator=generator)[:, 0]
