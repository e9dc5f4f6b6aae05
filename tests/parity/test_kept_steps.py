"""What is captured for one request serves the next of its shape, and no two at once; memory stays bounded."""

from __future__ import annotations

import gc

import pytest
import torch

from modeling import decode, speculative
from modeling.config import LanguageConfig
from modeling.cuda_graph import Captured, KeptSteps
from modeling.decode import Conversation, generate
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.speculative import generate_speculatively

CFG = LanguageConfig(n_layers=2, d_model=64, headdim=16, widths=(8, 4, 1), d_state=8, vocab_size=100, chunk_size=16)
FULL, HALF = CFG.layer_widths(8), CFG.layer_widths(4)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
N = decode.GRAPH_FROM


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each capture, which on a CPU captures nothing."""
    made: list[int] = []

    def counted(function: object, *_: object) -> object:
        made.append(1)
        return function

    monkeypatch.setattr(decode, "graphed", counted)
    monkeypatch.setattr(speculative, "graphed", counted)
    return made


def greedy(model: InferenceModel, prompts: list[list[int]], widths: tuple[int, ...], n: int = N) -> list[list[int]]:
    return torch.stack(list(generate(model, prompts, widths, max_new_tokens=n)), dim=1).tolist()


def test_a_second_request_of_the_shape_captures_nothing_and_remembers_nothing(
    trained: LanguageModel, captures: list[int]
) -> None:
    model = InferenceModel(trained)
    other = [[9, 9], [8]]
    first = greedy(model, PROMPTS, FULL)
    assert len(captures) == 1
    found = [greedy(model, other, FULL), greedy(model, PROMPTS, FULL)]
    assert len(captures) == 1
    assert found == [greedy(InferenceModel(trained), other, FULL), first]
    greedy(model, PROMPTS, HALF)
    greedy(model, PROMPTS[:1], FULL)
    greedy(model, PROMPTS, FULL, n=N - 1)  # too short to be worth it
    assert model.kept_steps.n_kept == 3


def test_two_at_once_do_not_share(trained: LanguageModel, captures: list[int]) -> None:
    model, expected = InferenceModel(trained), greedy(InferenceModel(trained), PROMPTS, FULL)
    captures.clear()
    both = zip(*(generate(model, prompts, FULL, max_new_tokens=N) for prompts in (PROMPTS, PROMPTS[::-1])), strict=True)
    columns = list(both)
    assert len(captures) == 2
    assert torch.stack([first for first, _ in columns], dim=1).tolist() == expected
    assert torch.stack([second for _, second in columns], dim=1).tolist() == expected[::-1]
    assert model.kept_steps.n_kept == 1


def test_a_request_that_is_given_up_gives_its_steps_back(trained: LanguageModel, captures: list[int]) -> None:
    model = InferenceModel(trained)
    steps = generate(model, PROMPTS, FULL, max_new_tokens=N)
    next(steps)
    assert model.kept_steps.n_kept == 0
    del steps
    gc.collect()
    assert model.kept_steps.n_kept == 1
    assert greedy(model, PROMPTS, FULL) == greedy(InferenceModel(trained), PROMPTS, FULL)


@pytest.mark.parametrize("taken", [1, 5, N])
def test_a_given_state_is_right_whenever_one_looks_and_stays_its_owners(
    trained: LanguageModel, captures: list[int], taken: int
) -> None:
    model = InferenceModel(trained)
    state = model.empty_state(2, FULL)
    steps = generate(model, PROMPTS, FULL, max_new_tokens=N, state=state)
    tokens = [next(steps).tolist() for _ in range(taken)]
    expected = model.empty_state(2, FULL)
    decode.prefill(model, [[*prompt, *(t[i] for t in tokens[:-1])] for i, prompt in enumerate(PROMPTS)], expected)

    def difference() -> float:
        pairs = zip((*state.conv, *state.ssm), (*expected.conv, *expected.ssm), strict=True)
        return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)

    assert difference() < 1e-5
    del steps
    greedy(model, [[7], [7]], FULL)  # the next borrower of the same steps
    assert difference() < 1e-5


def test_turns_and_speculation_keep_theirs_too(trained: LanguageModel, captures: list[int]) -> None:
    model, alone = InferenceModel(trained), InferenceModel(trained)
    conversation = Conversation(model, [])
    said = list(conversation.turn(PROMPTS[0], FULL, max_new_tokens=N))
    said += conversation.turn([5], FULL, max_new_tokens=N)
    assert len(captures) == 1
    again = greedy(alone, [[*PROMPTS[0], *said[:N], 5]], FULL)
    assert said[N:] == again[0]
    captures.clear()
    results = [generate_speculatively(model, PROMPTS, FULL, HALF, max_new_tokens=20).ids for _ in range(2)]
    assert len(captures) == 4
    assert results[0] == results[1] == greedy(alone, PROMPTS, FULL, n=20)


def test_what_is_kept_is_bounded_in_number_and_bytes(trained: LanguageModel) -> None:
    model = InferenceModel(trained)
    one = model.empty_state(1, FULL).n_bytes
    kept = KeptSteps(max_kept=3, max_bytes=4 * one)

    def use(key: str, batch: int) -> None:
        with kept.borrow(key, lambda: Captured((model.empty_state(batch, FULL),), ())):
            pass

    for key in "abcd":
        use(key, 1)
    assert (kept.n_kept, kept.n_bytes) == (3, 3 * one)
    with kept.borrow("b", lambda: pytest.fail("b was kept")):
        pass
    with pytest.raises(KeyError), kept.borrow("a", lambda: {}["a was let go"]):
        pass
    use("large", 3)  # the two that were not used for longest make room for it
    assert (kept.n_kept, kept.n_bytes) == (2, 4 * one)
    use("too large", 5)
    assert (kept.n_kept, kept.n_bytes) == (2, 4 * one)
