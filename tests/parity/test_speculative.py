"""Speculation changes the speed and nothing else: greedy text is the target's, sampled text has its distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from modeling.config import LanguageConfig
from modeling.decode import generate
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.sampling import Sampling, probabilities
from modeling.speculative import accept, generate_speculatively

CFG = LanguageConfig(n_layers=2, d_model=32, headdim=8, widths=(8, 4, 2, 1), d_state=8, chunk_size=8, vocab_size=7)
FULL = CFG.layer_widths(8)


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    trained = LanguageModel(CFG)
    trained.init_weights(3)
    with torch.no_grad():
        trained.embedding.mul_(15)
        for block in trained.blocks:
            block.mixer.out.mul_(3)
    return InferenceModel(trained)


@pytest.mark.parametrize("draft", [(8, 8), (4, 4), (1, 1), (8, 1)])
@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_greedy_text_is_the_targets(model: InferenceModel, draft: tuple[int, ...], draft_tokens: int) -> None:
    prompts = [[1], [2, 3, 4, 5, 6], [0, 6, 3]]
    plain = torch.stack(list(generate(model, prompts, FULL, max_new_tokens=40)), dim=1).tolist()
    result = generate_speculatively(model, prompts, FULL, draft, max_new_tokens=40, draft_tokens=draft_tokens)
    assert result.ids == plain
    assert result.drafted > 0
    if draft == FULL:  # the draft is the target: all is accepted, each round brings all that it can
        assert result.acceptance == 1
        assert result.rounds == -(-39 // (draft_tokens + 1))


def test_a_narrow_draft_is_sometimes_wrong(model: InferenceModel) -> None:
    """Else the tests here would not see what happens after a rejection."""
    result = generate_speculatively(model, [[1], [2], [3]], FULL, (1, 1), max_new_tokens=40)
    assert 0 < result.acceptance < 1


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_p=0.8)])
def test_sampled_text_has_the_targets_distribution(model: InferenceModel, sampling: Sampling) -> None:
    """Chi-square of three-token continuations against their exact probabilities under the target."""
    n, prompt = 4000, [1, 5]
    generator = torch.Generator().manual_seed(0)
    result = generate_speculatively(
        model, [prompt] * n, FULL, (1, 1), max_new_tokens=3, draft_tokens=2, sampling=sampling, generator=generator
    )
    assert 0.05 < result.acceptance < 0.95
    exact = continuation_probabilities(model, prompt, 3, sampling)
    counts = dict.fromkeys(exact, 0)
    for ids in result.ids:
        counts[tuple(ids)] += 1
    assert chi_square_z(counts, exact, n) < 4
    # The same test sees the draft's own distribution for what it is.
    wrong = continuation_probabilities(model, prompt, 3, sampling, (1, 1))
    assert chi_square_z(counts, wrong, n) > 10


def continuation_probabilities(
    model: InferenceModel, prompt: list[int], length: int, sampling: Sampling, widths: tuple[int, ...] = FULL
) -> dict[tuple[int, ...], float]:
    every = list(itertools.product(range(CFG.vocab_size), repeat=length))
    ids = torch.tensor([[*prompt, *one] for one in every])
    logits = model.logits(model.forward(ids, model.empty_state(len(every), widths)))
    p = probabilities(logits[:, len(prompt) - 1 : -1], sampling).double()
    joint = p.gather(-1, ids[:, len(prompt) :, None])[..., 0].prod(dim=1)
    assert abs(float(joint.sum()) - 1) < 1e-5
    return dict(zip(every, joint.tolist(), strict=True))


def chi_square_z(counts: dict[tuple[int, ...], int], exact: dict[tuple[int, ...], float], n: int) -> float:
    """Standard deviations by which chi-square exceeds its mean; cells that expect fewer than five are pooled."""
    large = [one for one in exact if exact[one] * n >= 5]
    cells = [(counts[one], exact[one] * n) for one in large]
    pooled = n - sum(seen for seen, _ in cells), n - sum(expected for _, expected in cells)
    if pooled[1] > 1e-6:
        cells.append((pooled[0], max(pooled[1], 1e-6)))
    degrees = len(cells) - 1
    chi_square = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    return float((chi_square - degrees) / (2 * degrees) ** 0.5)


def test_acceptance_gives_the_targets_first_token() -> None:
    """One drafted token, p and q by hand: kept with min(1, p/q), else drawn from what p has more."""
    n = 20_000
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    generator = torch.Generator().manual_seed(1)
    drafted = torch.multinomial(q.expand(n, -1), 1, generator=generator)
    p_btv: Tensor = p.expand(n, 2, -1)
    accepted, after = accept(p_btv, q.expand(n, 1, -1), drafted, generator)
    first = torch.where(accepted == 1, drafted[:, 0], after)
    shares = torch.bincount(first, minlength=3) / n
    assert float((shares - p).abs().max()) < 0.015  # over four standard errors
    assert abs(float(accepted.float().mean()) - 0.6) < 0.015  # sum of min(p, q)
    assert (after[accepted == 0] == 0).all(), "p exceeds q for token 0 alone"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": (8, 8), "target": (4, 8)}, "wider than target"),
        ({"draft_tokens": 0}, "at least 1"),
        ({"prompts": [[9]]}, "token id 9"),
        ({"draft": (1,)}, "1 widths for 2 layers"),
    ],
)
def test_bad_requests_are_refused(model: InferenceModel, changes: dict[str, object], message: str) -> None:
    asked = {"prompts": [[1]], "target": FULL, "draft": (1, 1), "max_new_tokens": 4, **changes}
    with pytest.raises(ValueError, match=message):
        generate_speculatively(model, **asked)  # type: ignore[arg-type]
