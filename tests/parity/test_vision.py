"""The image classifier against the public model's arithmetic with the same weights, its widths, sizes and drops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.classification import classification_loss
from modeling.config import VisionConfig
from modeling.convert import cut, cut_mix, from_matmamba_vision, to_matmamba_vision
from modeling.noise import Noise
from modeling.ops import upstream
from modeling.ops.kernels import tiles
from modeling.vision import VisionModel, resized_positions
from tests.parity import oracles

CFG = VisionConfig(
    n_layers=2, d_model=48, headdim=12, widths=(8, 4, 2, 1), d_state=16, chunk_size=16, n_classes=10, image_size=32,
    patch_size=8,
)  # fmt: skip
VARIANTS = [CFG, replace(CFG, pool="avg"), replace(CFG, norm="rms")]
TOLERANCE = 1e-5
"""Float32 rounds at 6e-8; two layers of sums over up to 192 terms in another order cost a few tens of them."""


def model_of(cfg: VisionConfig = CFG, seed: int = 0, **options: object) -> VisionModel:
    """A model whose norms, biases and class token are not all alike, so that a mix-up of them shows."""
    model = VisionModel(cfg, **options)  # type: ignore[arg-type]
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * (0.1 + parameter.abs()) * torch.rand(parameter.shape, generator=generator))
    return model


def some_images(batch: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("heads", [(8, 8), (4, 4), (2, 2), (1, 1), (8, 2)], ids=str)
@pytest.mark.parametrize("cfg", VARIANTS, ids=["cls", "avg", "rms"])
def test_every_width_equals_the_public_model_forward_and_every_gradient(
    cfg: VisionConfig, heads: tuple[int, ...]
) -> None:
    model, images_bchw = model_of(cfg), some_images()
    labels_b = torch.tensor([1, 7, 2])
    logits = model.logits(model(images_bchw, heads))
    F.cross_entropy(logits, labels_b).backward()
    # The oracle runs in float64: in float32 its masked exponentials overflow in backward and give NaN at some seeds.
    leaves = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    expected = oracles.matmamba_vision_logits(to_matmamba_vision(leaves, cfg), cfg, images_bchw.double(), heads)
    F.cross_entropy(expected, labels_b).backward()
    assert relative(logits.detach(), expected.detach()) < TOLERANCE
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        want = leaves[name].grad
        assert want is not None, f"{name} is not used there"
        # One head alone has no gradient of D but rounding: the gated norm undoes any scale.
        bound = 1e-4 if name.endswith(("A_log", "dt_bias", ".D")) else TOLERANCE
        error = float((parameter.grad - want).norm() / want.norm().clamp(min=1e-3 * float(leaves[name].norm())))
        assert error < bound, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("cfg", VARIANTS, ids=["cls", "avg", "rms"])
def test_the_public_models_weights_go_there_and_back(cfg: VisionConfig) -> None:
    state = {name: p.detach() for name, p in model_of(cfg).named_parameters()}
    theirs = to_matmamba_vision(state, cfg)
    assert theirs["pos_embed"].shape == (1, 17, 48)
    assert theirs["patch_embed.proj.weight"].shape == (48, 3, 8, 8)
    assert theirs["layers.1.mixer.in_proj.weight"].shape == (2 * 96 + 2 * 16 + 8, 48)
    again = from_matmamba_vision(theirs, cfg)
    assert list(again) == list(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_weights_of_another_size_are_refused_by_name() -> None:
    theirs = to_matmamba_vision({name: p.detach() for name, p in model_of().named_parameters()}, CFG)
    with pytest.raises(ValueError, match=r"pos_embed: shape \(1, 17, 48\).*\(1, 65, 48\)"):
        from_matmamba_vision(theirs, replace(CFG, image_size=64))
    del theirs["layers.0.norm.bias"]
    with pytest.raises(ValueError, match=r"layers.0.norm.bias: shape absent"):
        from_matmamba_vision(theirs, CFG)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
def test_a_width_that_is_cut_out_computes_what_it_does_in_place(heads: tuple[int, ...]) -> None:
    model, images_bchw = model_of(), some_images()
    state = {name: p.detach() for name, p in model.named_parameters()}
    small = VisionModel(CFG, held=heads)
    small.load_state_dict(cut_mix(state, CFG, heads))
    expected = model(images_bchw, heads)
    assert torch.equal(small(images_bchw, heads), expected)
    if len(set(heads)) == 1:
        part, cfg = cut(state, CFG, heads[0])
        alone = VisionModel(cfg)
        alone.load_state_dict(part)
        assert torch.equal(alone(images_bchw, heads), expected)
    with pytest.raises(ValueError, match="was cut to"):
        small(images_bchw, (8, 8))


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputing_with_drops_changes_no_bit(recompute: str) -> None:
    cfg = replace(CFG, dropout=0.2, drop_path=0.4)
    noise = Noise(3, torch.tensor([4, 9, 2]))
    grads = []
    for mode in ("none", recompute):
        model = model_of(cfg, recompute=mode)
        model.logits(model(some_images(), (4, 4), noise=noise)).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])  # type: ignore[arg-type]


def test_an_images_drops_do_not_depend_on_its_batch() -> None:
    model, images_bchw = model_of(replace(CFG, dropout=0.2, drop_path=0.4)), some_images()
    number_b = torch.tensor([4, 9, 2])
    together = model(images_bchw, (4, 4), noise=Noise(3, number_b))
    apart = torch.cat([model(images_bchw[i : i + 1], (4, 4), noise=Noise(3, number_b[i : i + 1])) for i in range(3)])
    assert relative(together, apart) < TOLERANCE
    assert relative(together, model(images_bchw, (4, 4), noise=Noise(3, number_b + 1))) > 0.05
    assert relative(together, model(images_bchw, (4, 4))) > 0.05
    plain = model_of()
    assert torch.equal(plain(images_bchw, (4, 4), noise=Noise(3, number_b)), plain(images_bchw, (4, 4))), "no rates"


def test_drops_leave_the_mean_of_the_residual_stream() -> None:
    """The first block's output, averaged over many draws, is the one without drops: 4 standard errors of 4000 draws."""
    model = model_of(replace(CFG, n_layers=1, dropout=0.3, drop_path=0.5))
    block = model.blocks[0]
    x_md = torch.randn(2, 48)
    images = 4000
    noise = Noise(0, torch.arange(images))
    drops = noise.layers((8,), dropout=0.3, drop_path=0.0, n_tokens=2, first_row=0)
    assert drops is not None
    branch_md = torch.randn(2, 48).repeat(images, 1)
    added, _ = block(x_md.repeat(images, 1), branch_md, 8, images, None, None, drops[1]._replace(projection=None))
    mean_md = added.view(images, 2, 48).mean(0)
    error = branch_md[:2].abs() * (0.3 / 0.7 / images) ** 0.5
    assert ((mean_md - x_md - branch_md[:2]).abs() < 4.5 * error).all()


def test_other_sizes_and_shapes_run_on_interpolated_positions() -> None:
    model = model_of()
    for height, width in ((48, 48), (64, 32), (16, 8)):
        assert model(some_images(2, height, width), (4, 4)).shape == (2, 48)
    grid_td = torch.randn(16, 5)
    assert resized_positions(grid_td, 4, 4) is grid_td
    twice = resized_positions(grid_td, 8, 8).view(8, 8, 5)
    transposed = resized_positions(grid_td.view(4, 4, 5).transpose(0, 1).reshape(16, 5), 8, 8).view(8, 8, 5)
    torch.testing.assert_close(transposed, twice.transpose(0, 1))
    flat = resized_positions(torch.ones(16, 2), 7, 3)
    torch.testing.assert_close(flat, torch.ones(21, 2))
    # A plane stays one, inside: cubic weights reproduce what is linear.
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    plane = resized_positions((rows + 10 * columns).reshape(16, 1), 8, 8).view(8, 8)[3:5, 3:5]
    torch.testing.assert_close(plane, torch.tensor([[13.75, 18.75], [14.25, 19.25]]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 3, 30, 32), "multiple of model.patch_size=8"), ((2, 1, 32, 32), "batch x 3"), ((3, 32, 32), "batch x 3")],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of()(torch.zeros(shape), (4, 4))


def test_the_loss_is_soft_cross_entropy_and_distillation_by_hand() -> None:
    model, features_bd = model_of(), torch.randn(3, 48, requires_grad=True)
    target_bk, teacher_bk = torch.softmax(torch.randn(3, 10), -1), torch.randn(3, 10, requires_grad=True)
    loss, logits_bk = classification_loss(
        model, features_bd, target_bk, teacher_bk=teacher_bk, distill_weight=0.7, temperature=2.0
    )
    by_hand = logits_bk.double() - torch.logsumexp(logits_bk.double(), -1, keepdim=True)
    cross_entropy = -(target_bk * by_hand).sum() / 3
    student, teacher = (torch.softmax(x.double() / 2, -1) for x in (logits_bk, teacher_bk))
    divergence = (teacher * (teacher / student).log()).sum() / 3
    assert float(loss.cross_entropy) == pytest.approx(float(cross_entropy), rel=1e-6)
    assert float(loss.total) == pytest.approx(float(cross_entropy + 0.7 * 4 * divergence), rel=1e-6)
    loss.total.backward()
    assert teacher_bk.grad is None, "the teacher learns nothing"
    assert features_bd.grad is not None
    plain, _ = classification_loss(model, features_bd, target_bk)
    assert plain.total == plain.cross_entropy


def test_fresh_logits_have_a_sigmoid_of_one_over_the_classes() -> None:
    model = VisionModel(CFG)
    model.init_weights(0)
    torch.testing.assert_close(torch.sigmoid(model.head_bias), torch.full((10,), 1 / 11), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("d_model", "millions"), [(512, 35.9), (1024, 134.7)])
def test_the_papers_models_have_their_size(d_model: int, millions: float) -> None:
    cfg = VisionConfig(n_layers=20, d_model=d_model, widths=(64, 32, 16, 8), n_classes=1000)
    total = sum(torch.Size(shape).numel() for shape in VisionModel.logical_shapes(cfg).values())
    assert round(total / 1e6, 1) == millions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_model", [512, 1024])
def test_the_gpus_kernels_equal_plain_pytorch_with_drops(
    d_model: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "chunk_scan", lambda: None)  # in float32 the plain scan runs: ours, not mamba-ssm's
    monkeypatch.setattr(tiles, "WALKS_WANTED", 8)
    assert tiles.sequences_joined(4, 197, 8) == 4, "the scan sees all four images as one sequence"
    cfg = VisionConfig(
        n_layers=2, d_model=d_model, widths=(64, 32, 16, 8), n_classes=10, dropout=0.1, drop_path=0.5
    )  # fmt: skip
    images_bchw, number_b = some_images(4, 224, 224), torch.tensor([4, 9, 2, 7])
    for n_heads in (64, 8):
        found = []
        for device, compute in (("cpu", torch.float32), ("cuda", dtype)):
            model = model_of(cfg, dtype=compute).to(device)
            noise = Noise(3, number_b.to(device))
            logits = model.logits(model(images_bchw.to(device), cfg.layer_widths(n_heads), noise=noise))
            F.cross_entropy(logits, torch.tensor([1, 7, 2, 2], device=device)).backward()
            found.append(
                {name: p.grad.cpu() for name, p in model.named_parameters()} | {"logits": logits.detach().cpu()}
            )
        # bfloat16 rounds each activation at 2^-9; a per-head gradient adds thousands of terms of both signs.
        bound = 1e-4 if dtype == torch.float32 else 4e-2
        for name, expected in found[0].items():
            if not expected.any():  # at width 8 the second block is dropped for all four images
                assert not found[1][name].any(), f"{name}: not zero"
                continue
            error = relative(found[1][name], expected)
            assert error < bound * (4 if name.endswith(("A_log", ".D", "dt_bias")) else 1), f"{name}: {error:.1e}"
