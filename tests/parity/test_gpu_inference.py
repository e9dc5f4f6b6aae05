"""On a GPU: decoding through the fused step, CUDA graphs and bfloat16 against the CPU's float32."""

from __future__ import annotations

import pytest
import torch

from modeling.config import LanguageConfig
from modeling.cuda_graph import graphed
from modeling.decode import generate, prefill
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.nesting import LayerWidths
from modeling.ops.kernels.step import begins_early
from modeling.ops.kernels.step_products import FEW_TOKENS
from modeling.speculative import generate_speculatively

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU"),
    pytest.mark.timeout(900),  # mamba-ssm's kernels tune themselves for minutes at first use
]

CFG = LanguageConfig(n_layers=3, d_model=192, headdim=24, widths=(16, 8, 4, 2), d_state=128, vocab_size=1000)
WIDTHS = [*map(CFG.layer_widths, CFG.widths), (16, 2, 8)]
LENGTHS = (1, 2, 300, 40)
# The chunked scan's products are TF32 on a GPU, and bfloat16 has three digits.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}


def prompts(batch: int = len(LENGTHS)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, CFG.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS[-batch:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("batch", [1, FEW_TOKENS, len(LENGTHS)])
def test_unequal_prompts_and_steps_equal_the_cpu(
    trained: LanguageModel, batch: int, widths: LayerWidths, dtype: torch.dtype
) -> None:
    models = InferenceModel(trained), InferenceModel(trained, dtype=dtype, device="cuda")
    states = [model.empty_state(batch, widths) for model in models]
    expected, found = (m.logits(prefill(m, prompts(batch), s)) for m, s in zip(models, states, strict=True))
    for i in range(5):
        for row, reference in zip(found.cpu(), expected, strict=True):
            assert float((row - reference).norm() / reference.norm()) < TOLERANCE[dtype]
        new = torch.tensor([[7 * i + b] for b in range(batch)])
        expected, found = (m.logits(m.forward(new.to(m.device), s)[:, 0]) for m, s in zip(models, states, strict=True))


@pytest.mark.parametrize("batch", [1, FEW_TOKENS, len(LENGTHS)])
def test_a_graph_does_what_launching_does(trained: LanguageModel, batch: int) -> None:
    model = InferenceModel(trained, dtype=torch.bfloat16, device="cuda")
    plain = model.empty_state(batch, CFG.layer_widths(8))
    prefill(model, prompts(batch), plain)
    replayed = plain.clone()
    tokens_b = torch.arange(batch, device="cuda")
    step = graphed(lambda t_b: model.logits(model.forward(t_b[:, None], replayed)[:, 0]), [tokens_b], [replayed])
    for _ in range(5):
        expected = model.logits(model.forward(tokens_b[:, None], plain)[:, 0])
        found = step(tokens_b)
        assert torch.equal(found, expected)
        tokens_b = expected.argmax(-1)
    for mine, theirs in zip((*plain.conv, *plain.ssm), (*replayed.conv, *replayed.ssm), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_begin_early_do_what_others_do(
    trained: LanguageModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Token for token, over enough steps for a kernel that reads before it may to be caught."""
    if not begins_early(torch.device("cuda")):
        pytest.skip("waits for a GPU of compute capability 9.0 or more")
    model, rows = InferenceModel(trained, dtype=dtype, device="cuda"), prompts(1)

    def greedy() -> list[torch.Tensor]:
        return list(generate(model, rows, CFG.layer_widths(16), max_new_tokens=200))

    def told() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Scores of 50 given tokens, one at a time, and the state after them."""
        state = model.empty_state(1, CFG.layer_widths(16))
        scores = [model.logits(model.forward(t_bt, state)) for t_bt in torch.arange(50, device="cuda").view(50, 1, 1)]
        return scores, [*state.conv, *state.ssm]

    early, (early_scores, early_state) = greedy(), told()
    model.kept_steps.clear()
    monkeypatch.setattr("modeling.inference.begins_early", lambda _: False)
    monkeypatch.setattr("modeling.ops.kernels.step_products.begins_early", lambda _: False)
    assert torch.equal(torch.stack(early), torch.stack(greedy()))
    scores, state = told()
    for mine, theirs in zip((*early_scores, *early_state), (*scores, *state), strict=True):
        # The same sums in the same order; only what the compiler fuses may differ.
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("draft", [(16, 16, 16), (2, 2, 2)])
def test_speculation_is_greedy_decoding(trained: LanguageModel, draft: LayerWidths) -> None:
    """In float32, where the size of a batch moves scores by less than the gap between the likeliest two."""
    model, full = InferenceModel(trained, device="cuda"), CFG.layer_widths(16)
    plain = torch.stack(list(generate(model, prompts(), full, max_new_tokens=48)), dim=1).tolist()
    result = generate_speculatively(model, prompts(), full, draft, max_new_tokens=48)
    assert result.ids == plain
    if draft == full:
        assert result.acceptance == 1


def test_a_second_request_replays_the_graph_of_the_first(
    trained: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, widths = InferenceModel(trained, device="cuda"), CFG.layer_widths(8)
    captured: list[int] = []
    begin = torch.cuda.CUDAGraph.capture_begin

    def counted(*arguments: object, **named: object) -> None:
        captured.append(1)
        begin(*arguments, **named)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", counted)

    def greedy(on: InferenceModel, given: list[list[int]]) -> list[list[int]]:
        return torch.stack(list(generate(on, given, widths, max_new_tokens=48)), dim=1).tolist()

    first = greedy(model, prompts())
    assert len(captured) == 1
    turned = greedy(model, prompts()[::-1])
    assert len(captured) == 1
    assert greedy(model, prompts()) == first, "nothing of the request between is left in the states"
    assert turned == greedy(InferenceModel(trained, device="cuda"), prompts()[::-1])
    speculated = [
        generate_speculatively(model, prompts(), widths, CFG.layer_widths(2), max_new_tokens=48).ids for _ in "ab"
    ]
    assert len(captured) == 2 + 4
    assert speculated == [first, first]
