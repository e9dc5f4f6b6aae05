"""Passes as CUDA graphs, and gradients that are added in place, against plain autograd."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch

from modeling.config import LanguageConfig, VisionConfig
from modeling.language import LanguageModel
from modeling.loss import Loss
from modeling.nesting import LayerWidths
from modeling.vision import VisionModel
from pretrain.config_io import config_from_dict
from pretrain.config_sections import ConfigError
from pretrain.gradients import GradientBuffer
from pretrain.passes import GraphedPasses, Pass, PassInputs, why_launched
from pretrain.shared_embedding import SharedEmbedding
from pretrain.vision_task import VisionInputs
from tests.passes import classifier_pass, language_pass

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="waits for a CUDA GPU")
CFG = LanguageConfig(n_layers=3, d_model=192, headdim=24, widths=(16, 8, 4, 2), d_state=128, vocab_size=1000)


def model_and_pass(*, in_place: bool) -> tuple[LanguageModel, Pass]:
    model = LanguageModel(CFG, dtype=torch.bfloat16 if GPU else torch.float32, in_place_gradients=in_place)
    model.init_weights(0)
    model.to("cuda" if GPU else "cpu")
    if in_place:
        GradientBuffer(model.parameters())
    return model, language_pass(model)


def inputs_of(seed: int, *, documents: bool) -> PassInputs:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, CFG.vocab_size, (3, 131), generator=generator)
    seq_idx = (torch.arange(130) >= 40 + seed).int().expand(3, -1).contiguous() if documents else None
    scale = torch.tensor(0.25 + seed)
    device = "cuda" if GPU else "cpu"
    moved = [
        None if x is None else x.to(device) for x in (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), seq_idx, scale)
    ]
    return PassInputs(*moved)  # type: ignore[arg-type]


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_in_place_are_those_of_autograd() -> None:
    found = {}
    for in_place in (False, True):
        model, run = model_and_pass(in_place=in_place)
        for seed, n_heads in enumerate(CFG.widths):
            run(CFG.layer_widths(n_heads), inputs_of(seed, documents=seed == 2))
        found[in_place] = gradients(model)
    for name, expected in found[False].items():
        # The same products; in place they are added to the sum before it is rounded to float32, and not after.
        error = (found[True][name] - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_replayed_passes_are_the_launched_ones_bit_for_bit(documents: bool, shared: bool) -> None:
    (launched_model, launched), (replayed_model, run) = model_and_pass(in_place=True), model_and_pass(in_place=True)
    replayed = GraphedPasses(run)
    embeddings = [SharedEmbedding(model) for model in (launched_model, replayed_model)] if shared else []
    mix = (16, 4, 8)
    for seed in range(4):  # launched, captured, replayed, replayed
        inputs = inputs_of(seed, documents=documents)
        leaves = [embedding.begin(inputs.tokens_bt) for embedding in embeddings] or [None, None]
        for widths in (*map(CFG.layer_widths, CFG.widths), mix):
            expected, found = (
                each(widths, inputs._replace(embedded_md=leaf))
                for each, leaf in zip((launched, replayed), leaves, strict=True)
            )
            assert torch.equal(expected.total, found.total), (seed, widths)
            assert torch.equal(expected.cross_entropy, found.cross_entropy), (seed, widths)
        for embedding in embeddings:
            embedding.end(inputs.tokens_bt)
        for name, gradient in gradients(launched_model).items():
            assert torch.equal(gradient, gradients(replayed_model)[name]), (seed, name)


VISION = VisionConfig(
    n_layers=3, d_model=192, headdim=24, widths=(16, 8, 4, 2), d_state=128, n_classes=50, image_size=64, patch_size=8,
    dropout=0.1, drop_path=0.3,
)  # fmt: skip


def vision_model_and_pass() -> tuple[VisionModel, Pass]:
    model = VisionModel(VISION, dtype=torch.bfloat16, in_place_gradients=True)
    model.init_weights(0)
    model.to("cuda")
    GradientBuffer(model.parameters())
    return model, classifier_pass(model, seed=3)


@pytest.mark.gpu
@needs_gpu
def test_replayed_passes_of_a_classifier_drop_what_launched_ones_do() -> None:
    (launched_model, launched), (replayed_model, run) = vision_model_and_pass(), vision_model_and_pass()
    replayed = GraphedPasses(run)
    losses = []
    for seed in range(4):  # launched, captured, replayed, replayed; other images' numbers each time
        generator = torch.Generator().manual_seed(0)
        images, targets = torch.randn(6, 3, 64, 64, generator=generator), torch.rand(6, 50, generator=generator)
        numbers = torch.arange(6) + 100 * seed
        moved = (
            x.cuda() for x in (images.bfloat16(), targets / targets.sum(-1, keepdim=True), numbers, torch.ones(()))
        )
        inputs = VisionInputs(*moved)
        for widths in map(VISION.layer_widths, VISION.widths):
            expected, found = launched(widths, inputs), replayed(widths, inputs)
            assert torch.equal(expected.total, found.total), (seed, widths)
        losses.append(float(found.total))
        for (name, a), (_, b) in zip(launched_model.named_parameters(), replayed_model.named_parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), (seed, name)  # type: ignore[arg-type]
    assert len(set(losses)) == 4, "the numbers are read, and not what they were at capture"


def test_a_pass_that_cannot_be_captured_is_launched_and_said_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model, run = model_and_pass(in_place=True)
    calls: list[LayerWidths] = []

    def counted(widths: LayerWidths, inputs: PassInputs) -> Loss:
        calls.append(widths)
        return run(widths, inputs)

    passes = GraphedPasses(counted)

    class Graph:
        def replay(self) -> None: ...

    class Capture(contextlib.nullcontext[None]):
        """The second one is refused."""

        n = 0

        def __enter__(self) -> None:
            Capture.n += 1
            if Capture.n == 2:
                raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Capture())
    inputs = inputs_of(0, documents=False)
    wide, narrow = CFG.layer_widths(8), CFG.layer_widths(4)
    for _ in range(2):
        passes(wide, inputs)
    captured = weakref.ref(next(iter(passes._captured.values()))[0])
    assert captured() is not None
    calls.clear()
    for widths in (narrow, narrow, wide, narrow, wide):
        passes(widths, inputs)
    assert calls == [narrow, narrow, wide, narrow, wide], "each pass ran once, also those that had been captured"
    assert captured() is None, "a graph that is not used any more keeps no memory"
    assert sum("not permitted" in record.message for record in caplog.records) == 1
    assert gradients(model)["blocks.0.mixer.D"].any()


def test_a_rank_that_could_capture_launches_where_another_could_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NCCL wants a collective in the graphs of all of its ranks or of none."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    _, run = model_and_pass(in_place=True)
    votes: list[bool] = []

    def another_refuses(mine: bool) -> bool:
        votes.append(mine)
        return True

    passes, inputs = GraphedPasses(run, another_refuses), inputs_of(0, documents=False)
    for _ in range(3):
        assert torch.isfinite(passes(CFG.layer_widths(8), inputs).total)
    assert votes == [False], "asked once, of a capture that had worked"
    assert not passes._captured
    assert sum("on another rank" in record.message for record in caplog.records) == 1


RAW = {
    "run_dir": "runs/test",
    "model": {"n_layers": 2, "d_model": 32, "headdim": 4, "widths": [16, 8], "vocab_size": 64},
    "data": {"path": "shards", "seq_len": 32, "tokens_per_step": 256},
    "optim": {"lr": 1e-3, "steps": 50, "warmup_steps": 5},
}


@pytest.mark.parametrize(
    ("section", "values", "why"),
    [
        ("", {}, None),
        ("", {"cuda_graphs": "never"}, "cuda_graphs=never"),
        ("parallel", {"zero_stage": 2}, "ZeRO 2"),
        ("parallel", {"tensor": 2}, None),
        ("nesting", {"distill_weight": 0.5}, "teacher"),
        ("nesting", {"mix_rate": 0.5}, "mixes"),
    ],
)
def test_what_cannot_be_captured_is_launched_and_says_why(
    section: str, values: dict[str, object], why: str | None
) -> None:
    cfg = config_from_dict({**RAW, **({section: values} if section else values)})
    said = why_launched(cfg, torch.device("cuda"))
    assert (said is None) if why is None else (said is not None and why in said)
    assert why_launched(cfg, torch.device("cpu")) == "no GPU"


def test_another_word_for_graphs_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs"):
        config_from_dict({**RAW, "cuda_graphs": "on"})


def test_a_gradient_buffer_takes_its_place_again() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(70))]
    buffer = GradientBuffer(parameters)
    held = [p.grad for p in parameters]
    assert all(grad is not None and grad.data_ptr() % 256 == held[0].data_ptr() % 256 for grad in held)  # type: ignore[union-attr]
    for p in parameters:
        p.grad.fill_(3.0)  # type: ignore[union-attr]
        p.grad = None
    buffer.clear()
    assert all(p.grad is h for p, h in zip(parameters, held, strict=True))
    assert all(not p.grad.any() for p in parameters)  # type: ignore[union-attr]
