"""The model made for decoding computes what the trained one does: all at once, in pieces, step by step, at every width."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling import nesting
from modeling.config import LanguageConfig
from modeling.convert import cut_mix
from modeling.decode import Conversation, generate, prefill
from modeling.inference import InferenceModel, State, carry
from modeling.language import LanguageModel
from modeling.ops.kernels import step_products
from modeling.ops.kernels.step import finish_step, mix_step, shift_groups
from modeling.ops.norm import add_norm, rms_norm
from modeling.ops.step import mixer_step
from modeling.sampling import Sampling

CFG = LanguageConfig(n_layers=3, d_model=64, headdim=16, widths=(8, 4, 2, 1), d_state=16, chunk_size=8, vocab_size=100)
WIDTHS = [*map(CFG.layer_widths, CFG.widths), (8, 2, 4), (1, 8, 3)]
TOLERANCE = 1e-5
LENGTHS = (1, 2, 23, 9)


@pytest.fixture(scope="module")
def model(trained: LanguageModel) -> InferenceModel:
    return InferenceModel(trained)


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 100, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def reference(trained: LanguageModel, ids: Sequence[int], widths: nesting.LayerWidths) -> Tensor:
    """Scores after every token of one sequence, by the trained model in one pass without states."""
    return trained.logits(trained(torch.tensor([ids]), widths))[0, :, : CFG.vocab_size]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("widths", WIDTHS)
def test_one_pass_equals_the_trained_model(
    trained: LanguageModel, model: InferenceModel, widths: nesting.LayerWidths
) -> None:
    ids = prompts([37])
    logits = model.logits(model.forward(torch.tensor(ids), model.empty_state(1, widths)))
    assert relative(logits[0], reference(trained, ids[0], widths)) < TOLERANCE


@pytest.mark.parametrize("widths", WIDTHS)
def test_unequal_prompts_and_steps_equal_the_full_forward(
    trained: LanguageModel, model: InferenceModel, widths: nesting.LayerWidths
) -> None:
    rows, state = prompts(), model.empty_state(len(LENGTHS), widths)
    logits_bv = model.logits(prefill(model, rows, state))
    for i in range(6):
        for b, row in enumerate(rows):
            assert relative(logits_bv[b], reference(trained, row, widths)[-1]) < TOLERANCE
        new = [(7 * i + b) % 100 for b in range(len(rows))]
        rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
        logits_bv = model.logits(model.forward(torch.tensor(new)[:, None], state)[:, 0])


def test_long_prompts_are_read_in_pieces(
    trained: LanguageModel, model: InferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling.decode.PREFILL_TOKENS", 20)  # five tokens of each of the four rows
    rows, widths = prompts(), CFG.layer_widths(4)
    logits_bv = model.logits(prefill(model, rows, model.empty_state(4, widths)))
    for b, row in enumerate(rows):
        assert relative(logits_bv[b], reference(trained, row, widths)[-1]) < TOLERANCE


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 2, 4)])
def test_tokens_looked_at_are_taken_in_as_far_as_asked(model: InferenceModel, widths: nesting.LayerWidths) -> None:
    rows, tokens_bt = prompts(), torch.tensor(prompts([5] * 4, seed=1))
    state = model.empty_state(4, widths)
    prefill(model, rows, state)
    untouched = state.clone()
    seen = model.logits(model.peek(tokens_bt, state))
    for mine, theirs in zip((*state.conv, *state.ssm), (*untouched.conv, *untouched.ssm), strict=True):
        assert torch.equal(mine, theirs)
    counts = [0, 2, 5, 1]
    model.take(state, torch.tensor(counts, dtype=torch.int32))
    for b, count in enumerate(counts):
        expected = model.empty_state(1, widths)
        prefill(model, [rows[b] + tokens_bt[b, :count].tolist()], expected)
        for mine, theirs in zip((*state.conv, *state.ssm), (*expected.conv, *expected.ssm), strict=True):
            assert relative(mine[b], theirs[0]) < TOLERANCE
    alone = untouched.clone()
    assert relative(model.logits(model.forward(tokens_bt, alone)), seen) < TOLERANCE
    with pytest.raises(ValueError, match="peek first"):
        model.take(state, torch.tensor(counts, dtype=torch.int32))


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_only_tokens_looked_at_keep_their_projections(
    model: InferenceModel, monkeypatch: pytest.MonkeyPatch, n_tokens: int
) -> None:
    """Of a long prompt, all layers' projections together would take more memory than its states."""
    living: list[weakref.ref[Tensor]] = []
    most, project = 0, InferenceModel._project

    def watched(self: InferenceModel, i: int, normed_btd: Tensor, state: State) -> Tensor:
        nonlocal most
        projected_btr = project(self, i, normed_btd, state)
        living.append(weakref.ref(projected_btr))
        most = max(most, sum(ref() is not None for ref in living))
        return projected_btr

    monkeypatch.setattr(InferenceModel, "_project", watched)
    tokens_bt, state = torch.zeros(2, n_tokens, dtype=torch.int64), model.empty_state(2, (8, 8, 8))
    model.forward(tokens_bt, state)
    assert len(living) == CFG.n_layers
    assert most <= 2, "one layer's, and the one before it until that is replaced"
    model.peek(tokens_bt, state)
    assert most == CFG.n_layers


def test_a_state_is_carried_only_where_it_is_exact(model: InferenceModel) -> None:
    row, start = prompts([30]), (8, 8, 4)
    state = model.empty_state(1, start)
    prefill(model, row, state)
    for widths in [(8, 8, 4), (8, 8, 2), (8, 8, 1)]:
        carried, fresh = carry(state, widths), model.empty_state(1, widths)
        assert carried is not None
        prefill(model, row, fresh)
        for mine, theirs in zip((*carried.conv, *carried.ssm), (*fresh.conv, *fresh.ssm), strict=True):
            assert relative(mine, theirs) < TOLERANCE
    for widths in [(8, 8, 8), (8, 4, 4), (4, 8, 4)]:
        assert carry(state, widths) is None


def test_turns_at_other_widths_equal_fresh_starts(model: InferenceModel) -> None:
    conversation = Conversation(model, [])
    for turn, widths in enumerate([(8, 8, 8), (8, 8, 8), (8, 8, 2), (2, 2, 2), (8, 8, 8)]):
        new = prompts([4], seed=turn)[0] if turn != 1 else []  # without words of its own the second goes on
        before = [*conversation.ids, *new]
        said = list(conversation.turn(new, widths, max_new_tokens=5))
        fresh = [int(token) for token in generate(model, [before], widths, max_new_tokens=5)]
        assert said == fresh
        assert conversation.ids == before + said


def test_a_mix_that_was_cut_out_decodes_as_in_place(trained: LanguageModel, model: InferenceModel) -> None:
    widths = (8, 2, 4)
    state = {name: p.detach() for name, p in trained.named_parameters()}
    small = LanguageModel(CFG, held=widths)
    small.load_state_dict(cut_mix(state, CFG, widths))
    cut = InferenceModel(small)
    assert cut.n_weight_bytes < model.n_weight_bytes
    rows = prompts()
    for narrower in [widths, (4, 1, 4)]:
        ours, theirs = (list(generate(m, rows, narrower, max_new_tokens=4)) for m in (cut, model))
        assert torch.equal(torch.stack(ours), torch.stack(theirs))
    with pytest.raises(ValueError, match=r"layer 1: width 3, but this model was cut to 2 heads"):
        cut.empty_state(1, (8, 3, 4))


def test_bfloat16_stays_near_float32(trained: LanguageModel, model: InferenceModel) -> None:
    half = InferenceModel(trained, dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    ids, widths = prompts([23]), CFG.layer_widths(4)
    exact = model.logits(prefill(model, ids, model.empty_state(1, widths)))
    state = half.empty_state(1, widths)
    rough = half.logits(prefill(half, ids, state))
    assert 1e-6 < relative(rough, exact) < 3e-2
    assert state.n_bytes * 2 == model.empty_state(1, widths).n_bytes
    assert half.state_bytes(widths) == state.n_bytes
    assert 3 * model.state_bytes((8, 2, 4)) == model.empty_state(3, (8, 2, 4)).n_bytes


@pytest.mark.parametrize("bad", [[], [[]], [[1], []], [[100]], [[5, -1]]])
def test_prompts_that_do_not_fit_are_refused(model: InferenceModel, bad: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="prompt"):
        next(generate(model, bad, CFG.layer_widths(8), max_new_tokens=1))


def test_a_state_of_another_width_is_refused(model: InferenceModel) -> None:
    state = model.empty_state(1, CFG.layer_widths(4))
    with pytest.raises(ValueError, match="the state is of 1 sequences at widths"):
        next(generate(model, [[1]], CFG.layer_widths(8), max_new_tokens=1, state=state))


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_senseless_sampling_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "held", "p", "n"), [(3, 5, 24, 16), (1, 1, 8, 12), (2, 2, 64, 128)])
def test_the_fused_step_equals_the_plain_one(heads: int, held: int, p: int, n: int, dtype: torch.dtype) -> None:
    """On a GPU the compiled kernel, elsewhere Triton's interpreter; rows take in none, some and all of five steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    b, t, channels = 4, 5, 2 * n + heads * p
    absorb_b = torch.tensor([0, 2, 5, 4], dtype=torch.int32, device=device)
    # Columns past those in use, as a wider projection would leave them, must not matter.
    projected_btr = normal(b, t, 2 * n + held + 2 * heads * p + 7, dtype=dtype)[..., :-7]
    weights = (
        normal(channels, 4).to(dtype).float(),
        normal(channels).to(dtype).float(),
        -normal(heads).exp(),
        normal(heads),
        normal(heads),
        normal(heads * p),
    )
    conv, ssm = normal(b, 3, channels, dtype=dtype), normal(b, heads, p, n)
    plain_conv, plain_ssm = conv.clone(), ssm.clone()
    gated, squares = mix_step(projected_btr, *weights, conv, ssm, absorb_b, held=held)
    scale = torch.rsqrt(squares.sum(-1, keepdim=True) / (heads * p) + 1e-5)
    out = gated.float() * scale
    # The residual stream and the next norm; and what B and C saw, moved on here or by itself.
    x_btd, branch_btd, next_norm_d = normal(b, t, 24), normal(b, t, 24, dtype=dtype), normal(24)
    alone = conv.clone()
    shift_groups(alone, projected_btr, absorb_b, inner=heads * p)
    total, normed = finish_step(
        x_btd, branch_btd, squares, next_norm_d, conv, projected_btr, absorb_b, inner=heads * p, eps=1e-5, dtype=dtype
    )
    assert torch.equal(conv, alone)
    torch.testing.assert_close(total, x_btd + branch_btd.float() * scale, rtol=1e-5, atol=1e-5)
    expected = add_norm(total.cpu(), None, next_norm_d.cpu(), eps=1e-5, dtype=dtype)[1]
    assert relative(normed.cpu().float(), expected.float()) < (TOLERANCE if dtype == torch.float32 else 2e-2)
    cpu = [v.cpu() for v in (projected_btr, *weights)]
    plain_states = plain_conv.cpu(), plain_ssm.cpu()
    plain = mixer_step(*cpu, *plain_states, absorb_b.cpu(), held=held, chunk_size=8, eps=1e-5)
    tolerance = TOLERANCE if dtype == torch.float32 else 2e-2
    for row, count in enumerate(absorb_b.tolist()):
        end = count or t
        assert relative(out[row, :end].cpu().float(), plain[row, :end].float()) < tolerance
    assert torch.equal(conv.cpu(), plain_states[0])
    assert relative(ssm.cpu(), plain_states[1]) < tolerance
    assert torch.equal(ssm[0].cpu(), plain_ssm[0].cpu())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was not written is NaN, not by chance what it should be."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def filled(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *shape, **how: filled(empty(*shape, **how)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *shape, **how: filled(new_empty(*shape, **how)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (2, 1), (1, 2)])
def test_the_path_of_few_tokens_equals_the_plain_one(
    model: InferenceModel, monkeypatch: pytest.MonkeyPatch, widths: nesting.LayerWidths, batch: int, steps: int
) -> None:
    """Triton's interpreter runs here what `forward`, `peek` and `take` run on a GPU."""
    monkeypatch.setattr(step_products, "PROGRAMS", 4)  # it takes a program at a time
    state = model.empty_state(batch, widths)
    prefill(model, prompts([7, 2][:batch]), state)
    fused, tokens_bt = state.clone(), torch.tensor(prompts([steps] * batch, seed=2))
    expected = [model.logits(model.forward(tokens_bt, state)) for _ in range(2)]
    monkeypatch.setattr("modeling.inference.is_few", lambda *_: True)
    monkeypatch.setattr(model, "_run_few", None)  # it must not be the path of more tokens
    found = [model.logits(model.forward(tokens_bt, fused))]
    before = fused.clone()
    found.append(model.logits(model.peek(tokens_bt, fused)))
    for mine, theirs in zip((*fused.conv, *fused.ssm), (*before.conv, *before.ssm), strict=True):
        assert torch.equal(mine, theirs)
    model.take(fused, torch.full((batch,), steps, dtype=torch.int32))
    for mine, theirs in zip((*found, *fused.conv, *fused.ssm), (*expected, *state.conv, *state.ssm), strict=True):
        assert relative(mine, theirs) < TOLERANCE


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("programs", [1, 3, 20])
@pytest.mark.parametrize(("d", "inner", "rows"), [(40, 24, 29), (48, 72, 64), (16, 7, 3)])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 1), (1, 2)])
def test_products_of_few_tokens_equal_torchs(
    monkeypatch: pytest.MonkeyPatch, b: int, t: int, d: int, inner: int, rows: int, programs: int, dtype: torch.dtype
) -> None:
    """Many rows in a program, or one; what lies beside the parts in use is NaN and must not matter."""
    monkeypatch.setattr(step_products, "PROGRAMS", programs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    # Norm and branch are rounded to bfloat16 by torch's products alone.
    tolerance, how = (TOLERANCE if dtype == torch.float32 else 5e-3), {"eps": 1e-5, "dtype": torch.float32}
    x_btd, norm_d, into_rd = normal(b, t, d), normal(d), normal(rows + 5, d, dtype=dtype)
    into_rd[rows:] = float("nan")
    projected = step_products.project(x_btd, norm_d, into_rd[:rows], eps=1e-5)
    assert projected.dtype == dtype
    assert relative(projected.float(), F.linear(rms_norm(x_btd, norm_d, **how), into_rd[:rows].float())) < tolerance
    n, gated, squares = 6, normal(b, t, inner, dtype=dtype), normal(b, t, 5).square()
    out_di, projected = normal(d, inner + 9, dtype=dtype), normal(b, t, 2 * n + 20, dtype=dtype)
    out_di[:, inner:] = float("nan")
    out_di, conv = out_di[:, :inner], normal(b, 3, 2 * n + inner, dtype=dtype)
    absorb_b = torch.ones(b, dtype=torch.int32, device=device)
    shifted = conv.clone()
    shift_groups(shifted, projected, absorb_b, inner=inner)
    branch = F.linear(gated.float(), out_di.float()) / torch.sqrt(squares.sum(-1, keepdim=True) / inner + 1e-5)
    expected = x_btd + branch
    step_products.add_branch(x_btd, gated, squares, out_di, conv, projected, absorb_b, eps=1e-5)
    assert relative(x_btd, expected) < TOLERANCE
    assert torch.equal(conv, shifted)
    assert torch.equal(conv[:, -1, : 2 * n], projected[:, 0, : 2 * n])
