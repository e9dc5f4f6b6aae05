"""Our model against three independent ones with the same weights, and its widths against models cut out of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.config import LanguageConfig
from modeling.convert import cut, from_mamba_ssm, to_mamba_ssm
from modeling.decode import generate
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.loss import next_token_loss
from modeling.sampling import Sampling, choose
from tests.parity import oracles

CFG = LanguageConfig(
    n_layers=2, d_model=48, headdim=12, widths=(8, 4, 2, 1), d_state=16, chunk_size=16, vocab_size=100, norm_eps=1e-5
)
T = 45
"""Not a multiple of the chunk."""
TOLERANCE = 1e-5
"""Float32 rounds at 6e-8; two layers of sums over up to 96 terms in another order cost a few tens of them."""


def model_of(cfg: LanguageConfig = CFG, seed: int = 0) -> LanguageModel:
    """A model whose norms and D are not all ones, so that a mix-up of them shows."""
    model = LanguageModel(cfg)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def some_tokens(batch: int = 2, t: int = T, seed: int = 0) -> Tensor:
    return torch.randint(0, CFG.vocab_size, (batch, t), generator=torch.Generator().manual_seed(seed))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def gradients_in_place(model: LanguageModel, n_heads: int, tokens_bt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every gradient of a loss at a width, cut down to the width's own entries."""
    model.zero_grad()
    logits = model.logits(model(tokens_bt[:, :-1], model.cfg.layer_widths(n_heads)))
    F.cross_entropy(logits.flatten(0, 1), tokens_bt[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return logits.detach(), cut(gradients, model.cfg, n_heads)[0]


@pytest.mark.parametrize("n_heads", CFG.widths)
def test_every_width_equals_mamba_ssm_ref_forward_and_every_gradient(n_heads: int) -> None:
    model, tokens_bt = model_of(), some_tokens()
    logits, gradients = gradients_in_place(model, n_heads, tokens_bt)
    small, small_cfg = cut(dict(model.named_parameters()), CFG, n_heads)
    # The oracle runs in float64: in float32 its masked exponentials overflow in backward and give NaN at some seeds.
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in small.items()}
    expected = oracles.mamba_ssm_ref_logits(to_mamba_ssm(leaves, small_cfg), small_cfg, tokens_bt[:, :-1])
    F.cross_entropy(expected.flatten(0, 1), tokens_bt[:, 1:].flatten()).backward()
    assert relative(logits, expected.detach()) < TOLERANCE
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        # The gradient of a head's D, A_log or dt_bias sums thousands of terms of both signs to almost nothing: where a
        # width has few heads, rounding of the terms shows in the sum. (D of a single head, 1.8e-5 in all: off by 3.5e-5 of
        # itself on one processor, 1.6e-4 on another, where BLAS adds in another order.)
        tolerance = TOLERANCE if leaf.numel() >= 8 else 50 * TOLERANCE
        assert relative(gradients[name], leaf.grad) < tolerance, name


@pytest.mark.parametrize("n_heads", CFG.widths)
def test_every_width_equals_transformers(n_heads: int) -> None:
    model, tokens_bt = model_of(), some_tokens()
    small, small_cfg = cut(dict(model.named_parameters()), CFG, n_heads)
    theirs = oracles.transformers_model({k: v.detach() for k, v in to_mamba_ssm(small, small_cfg).items()}, small_cfg)
    with torch.no_grad():
        expected = theirs(tokens_bt).logits
        actual = model.logits(model(tokens_bt, CFG.layer_widths(n_heads)))
    assert relative(actual, expected) < TOLERANCE


@pytest.mark.parametrize("n_heads", CFG.widths)
def test_in_place_equals_cut_out(n_heads: int) -> None:
    model, tokens_bt = model_of(), some_tokens()
    small, small_cfg = cut(dict(model.named_parameters()), CFG, n_heads)
    alone = LanguageModel(small_cfg)
    alone.load_state_dict(small)
    with torch.no_grad():
        actual = alone(tokens_bt, small_cfg.layer_widths(n_heads))
        expected = model(tokens_bt, CFG.layer_widths(n_heads))
    assert relative(actual, expected) < 1e-6  # the same sums; BLAS may block another shape differently


def test_recomputing_blocks_changes_no_bit_of_a_gradient() -> None:
    kept, again = model_of(), model_of()
    again.recompute = "block"
    for n_heads in CFG.widths:
        expected, actual = (gradients_in_place(model, n_heads, some_tokens())[1] for model in (kept, again))
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_mixed_widths_use_each_layers_own_heads() -> None:
    model, tokens_bt = model_of(), some_tokens()
    with torch.no_grad():
        for layer, n_heads in ((0, 8), (1, 2)):
            mixer = model.blocks[layer].mixer
            mixer.out[:, n_heads * CFG.headdim :].fill_(torch.nan)  # a read beyond the width would show
        assert torch.isfinite(model(tokens_bt, (8, 2))).all()
        assert not torch.isfinite(model(tokens_bt, (8, 4))).all()


def test_state_dicts_survive_the_round_trip_bit_for_bit() -> None:
    state = {name: p.detach() for name, p in model_of().named_parameters()}
    back = from_mamba_ssm(to_mamba_ssm(state, CFG), CFG)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_foreign_state_dict_is_refused_by_name() -> None:
    state = to_mamba_ssm({name: p.detach() for name, p in model_of().named_parameters()}, CFG)
    state["backbone.layers.1.mixer.in_proj.weight"] = torch.zeros(3, 48)
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.in_proj\.weight: shape \(3, 48\)"):
        from_mamba_ssm(state, CFG)
    del state["backbone.layers.0.mixer.D"]
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.D: shape absent"):
        from_mamba_ssm(state, CFG)


def test_an_untied_head_is_refused() -> None:
    theirs = to_mamba_ssm(dict(model_of().named_parameters()), CFG)
    theirs["lm_head.weight"] = theirs["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="tie_embeddings=True"):
        from_mamba_ssm(theirs, CFG)


def test_documents_do_not_leak_into_each_other() -> None:
    model = model_of()
    tokens_bt = some_tokens(batch=1)
    seq_idx_bt = (torch.arange(T)[None] >= 20).int()
    other = tokens_bt.clone()
    other[:, :20] = some_tokens(batch=1, t=20, seed=1)
    with torch.no_grad():
        first = model(tokens_bt, CFG.layer_widths(4), seq_idx_bt=seq_idx_bt)
        second = model(other, CFG.layer_widths(4), seq_idx_bt=seq_idx_bt)
        alone = model(tokens_bt[:, 20:], CFG.layer_widths(4))
        leaky = model(other, CFG.layer_widths(4))
    # The running sum of log decays starts in the first document, so its rounding, and nothing else, gets across.
    assert relative(first[:, 20:], second[:, 20:]) < TOLERANCE
    assert relative(first[:, 20:], alone) < TOLERANCE
    assert relative(leaky[:, 20:], alone) > 1e-3, "without seq_idx the state does carry over"


@pytest.mark.parametrize("widths", [(8, 8), (1, 1), (8, 2)])
def test_decoding_token_by_token_equals_the_full_forward(widths: tuple[int, ...]) -> None:
    model, prompt_bt = model_of(), some_tokens(batch=3, t=21)
    generated = torch.stack(list(generate(InferenceModel(model), prompt_bt.tolist(), widths, max_new_tokens=8)), dim=1)
    ids_bt = prompt_bt
    for step in range(8):
        with torch.no_grad():
            logits = model.logits(model(ids_bt, widths))[:, -1, : CFG.vocab_size]
        assert torch.equal(logits.argmax(-1), generated[:, step])
        ids_bt = torch.cat([ids_bt, logits.argmax(-1, keepdim=True)], dim=1)


def test_top_p_keeps_the_likeliest_tokens_and_at_least_one() -> None:
    logits_bv = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits_bv, Sampling(temperature=1.0, top_p=0.7), generator)
    counts = torch.bincount(drawn, minlength=4) / 4000
    assert counts[2:].sum() == 0
    assert abs(float(counts[0]) - 0.5 / 0.8) < 0.03  # five standard errors of 4000 draws
    assert (choose(logits_bv, Sampling(temperature=1.0, top_p=1e-6), generator) == 0).all()


def test_loss_in_pieces_equals_cross_entropy_of_the_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling.loss.TOKENS_PER_PIECE", 7)
    model, tokens_bt = model_of(), some_tokens()
    hidden = model(tokens_bt[:, :-1], CFG.layer_widths(4)).detach().requires_grad_()
    loss = next_token_loss(model, hidden, tokens_bt[:, 1:])
    (3 * loss.total).backward()
    expected_hidden = hidden.detach().requires_grad_()
    head = model.embedding.detach().requires_grad_()
    expected = F.cross_entropy(F.linear(expected_hidden, head).flatten(0, 1), tokens_bt[:, 1:].flatten())
    (3 * expected).backward()
    assert abs(loss.total - expected) < 1e-6
    assert loss.cross_entropy == loss.total
    assert hidden.grad is not None
    assert expected_hidden.grad is not None
    assert model.embedding.grad is not None
    assert head.grad is not None
    assert relative(hidden.grad, expected_hidden.grad) < TOLERANCE
    assert relative(model.embedding.grad, head.grad) < TOLERANCE


def test_distillation_equals_torchs_kl() -> None:
    model, tokens_bt = model_of(), some_tokens()
    with torch.no_grad():
        teacher = model(tokens_bt[:, :-1], CFG.layer_widths(8))
    student = model(tokens_bt[:, :-1], CFG.layer_widths(2)).detach().requires_grad_()
    loss = next_token_loss(model, student, tokens_bt[:, 1:], teacher_btd=teacher, distill_weight=0.7, temperature=2.0)
    loss.total.backward()
    again = student.detach().requires_grad_()
    head = model.embedding.detach()
    student_logits, teacher_logits = F.linear(again, head).flatten(0, 1), F.linear(teacher, head).flatten(0, 1)
    ce = F.cross_entropy(student_logits, tokens_bt[:, 1:].flatten())
    soft = F.log_softmax(student_logits / 2, -1), F.log_softmax(teacher_logits / 2, -1)
    expected = ce + 0.7 * 4 * F.kl_div(*soft, log_target=True, reduction="batchmean")
    expected.backward()
    assert abs(loss.total - expected) < 1e-5
    assert abs(loss.cross_entropy - ce) < 1e-6
    assert student.grad is not None
    assert again.grad is not None
    assert relative(student.grad, again.grad) < TOLERANCE


def test_the_1b4_model_is_built_on_meta() -> None:
    cfg = LanguageConfig(n_layers=48, d_model=2048, widths=(64, 32, 16, 8), vocab_size=50257)
    with torch.device("meta"):
        model = LanguageModel(cfg, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 1_343_790_080
