"""Products in float8 against the same rounded numbers multiplied in float32, and a mixer that has them against one in float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modeling.ops import float8
from modeling.ops.kernels.float8 import FLOAT8, quantize_rows, transposed
from modeling.ops.products import times
from pretrain.config import FLOAT8_STEP
from tests.parity.kernel_checks import DEVICE, GPU, LOW, PER_HEAD, poison, some_drop
from tests.parity.test_kernels import LARGE, SMALL, Case, documents, mixer_of, results

pytestmark = pytest.mark.usefixtures("plain_scan")

LARGEST = 448.0
# e4m3 keeps three bits and rounds the rest away: two operands are 2^-4 / sqrt(3) off each at most, 2.6% by root mean square.
PRODUCT = 0.06
# The interpreter forgets the carry of what is rounded up to a power of two, which halves it.
PRODUCT_INTERPRETED = 0.12


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Of sizes that differ from row to row by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** torch.randint(-6, 4, (shape[0], 1), generator=generator).float()
    return (torch.randn(*shape, generator=generator) * spread).to(DEVICE)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Worst row's error."""
    return float(((actual.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)).max())


def sizes(*small: tuple[int, ...]) -> list[object]:
    large = [(1023, 2048), (777, 8512), (4099, 192)]
    return [*small, *(pytest.param(size, marks=pytest.mark.gpu) for size in large)]


@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("size", sizes((1, 16), (63, 48), (37, 400), (2, 4208)), ids=str)
def test_rows_are_scaled_to_the_types_largest_number(
    size: tuple[int, int], dtype: torch.dtype, with_factor: bool
) -> None:
    if size[0] * size[1] > 2**15 and not GPU:
        pytest.skip("a real shape: waits for a CUDA GPU")
    m, k = size
    wide = numbers(m, k + 16).clamp(-6e4, 6e4).to(dtype)
    x = wide[:, :k]  # rows that do not follow each other, as the first columns of an output projection do not
    factor = 10 ** torch.linspace(-1, 1, k, device=DEVICE) if with_factor else None
    poison()
    values, scale = quantize_rows(x, factor)
    whole = x.float() if factor is None else x.float() * factor
    expected_scale = whole.abs().amax(1, keepdim=True) / LARGEST
    assert values.dtype == FLOAT8
    assert values.is_contiguous()
    assert torch.allclose(scale, expected_scale, rtol=1e-6, atol=0)
    exact = whole / scale
    spacing = torch.exp2(exact.abs().clamp(min=2**-6).log2().floor() - 3)
    good = (values.float() - exact).abs() <= spacing * (0.5 + 1e-4)
    if not GPU:  # see PRODUCT_INTERPRETED; and it cuts the smallest numbers off
        good |= (exact.to(FLOAT8).float().abs().log2() % 1 == 0) | (exact.abs() < 2**-5)
    assert good.all(), (exact[~good], values[~good])


def test_a_row_of_zeros_stays_one_and_nothing_hides_what_is_not_finite() -> None:
    x = numbers(4, 32)
    x[0] = 0
    x[1, 5], x[2, 7] = math.nan, math.inf
    weight = numbers(16, 32, seed=1)
    product = times(x.to(LOW), float8.float8_weights(weight)[0])
    assert (product[0] == 0).all()
    assert torch.isfinite(product[3]).all()
    if GPU:  # the interpreter's conversion knows no NaN
        assert not torch.isfinite(product[1:3]).any()


@pytest.mark.parametrize("with_factor", [False, True])
def test_the_smallest_and_largest_numbers_have_a_scale_too(with_factor: bool) -> None:
    """Rows of float32's whole range: none is infinite, and below 1e-30 they end in zero."""
    size_m1 = torch.tensor([1e-44, 1e-38, 1e-29, 1e-20, 1e20, 3e38]).to(DEVICE)[:, None]
    row_k = torch.linspace(-1, 1, 32, device=DEVICE)
    factor = torch.full((32,), 0.5, device=DEVICE) if with_factor else None
    values, scale = quantize_rows(row_k * size_m1, factor)
    back = values.float() * scale
    assert torch.isfinite(back).all()
    assert (back[:2].abs() <= 1e-38).all()
    whole = row_k * (0.5 if with_factor else 1.0)
    assert relative(back[2:] / size_m1[2:], whole.expand(4, -1)) < (PRODUCT if GPU else PRODUCT_INTERPRETED)


@pytest.mark.parametrize("layout", ["expanded", "turned"])
def test_rows_that_are_not_contiguous_are_read_as_they_are(layout: str) -> None:
    """A sum's gradient is one number in all places, and a product's may lie turned."""
    x = numbers(1, 1).expand(16, 32) if layout == "expanded" else numbers(32, 16).T
    for factor in (None, torch.linspace(0.5, 2, 32, device=DEVICE)):
        found, expected = quantize_rows(x, factor), quantize_rows(x.contiguous(), factor)
        assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("size", sizes((16, 16), (48, 80), (130, 32)), ids=str)
def test_bytes_are_transposed(size: tuple[int, int]) -> None:
    if size[0] * size[1] > 2**15 and not GPU:
        pytest.skip("a real shape: waits for a CUDA GPU")
    values = numbers(*size).clamp(-LARGEST, LARGEST).to(FLOAT8)
    poison()
    turned, ones = transposed(values)
    assert turned.is_contiguous()
    assert torch.equal(turned.view(torch.uint8), values.view(torch.uint8).T)
    assert torch.equal(ones, torch.ones(1, size[1], device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, LOW] if not GPU else [LOW], ids=str)
@pytest.mark.parametrize("size", [(1, 32, 16), (63, 48, 80), (130, 16, 48)], ids=str)
def test_products_are_those_of_the_rounded_numbers(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """x times the weight transposed, and the gradient of that: each row within rounding of the exact one, too."""
    m, n, k = size
    x, grad = numbers(m, k).clamp(-1e2, 1e2).to(dtype), numbers(m, n, seed=1).clamp(-1e2, 1e2).to(dtype)
    weight = numbers(n, k, seed=2) * 1e-2
    forward, backward = float8.float8_weights(weight)
    assert forward.shape == (n, k)
    assert backward.shape == (k, n)
    for given, of, exact in ((x, forward, x.float() @ weight.T), (grad, backward, grad.float() @ weight)):
        values, scale = quantize_rows(given, of.factor_k)
        expected = (values.float() * scale) @ (of.values_nk.float() * of.scale_1n.T).T
        product = times(given, of)
        assert product.dtype == dtype
        assert relative(product, expected) < 2e-2  # what is small is subnormal in float16
        typical = (product.float() - exact).norm() / exact.norm()
        assert typical < (PRODUCT if GPU else PRODUCT_INTERPRETED)
        out = torch.full_like(product, math.nan)
        assert times(given, of, out) is out
        assert torch.equal(out, product)


# The interpreter is slow.
CASES = [Case(heads=3, headdim=16, d_state=16, t=20, width=2)]
LARGER = [next(case for case in SMALL if case.ranks > 1), *LARGE[:6]]


@pytest.mark.parametrize("case", CASES + [pytest.param(case, marks=pytest.mark.gpu) for case in LARGER], ids=str)
def test_a_mixer_differs_by_rounding_in_training_and_by_nothing_without_gradients(case: Case) -> None:
    if case in LARGER and not GPU:
        pytest.skip("a real shape: waits for a CUDA GPU")
    x_btd = torch.randn(2, case.t, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    seq_idx_bt = documents(2, case.t).to(DEVICE) if case.documents else None
    n_heads = case.width * case.ranks
    expected = results(mixer_of(case, torch.float32), "plain", x_btd.to(LOW).float(), n_heads, seq_idx_bt)
    mixer = mixer_of(case, LOW)
    wide = results(mixer, "fused", x_btd, n_heads, seq_idx_bt)
    mixer.float8 = True
    actual = results(mixer, "fused", x_btd, n_heads, seq_idx_bt)
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        if want.norm() < 1e-2 * wide["x"].norm():
            continue  # one head alone has no gradient of D: what there is of it is rounding
        error = float((actual[name].float() - want.float()).norm() / want.float().norm())
        # A gradient a head adds thousands of terms of both signs. 0.154 was seen, of dt_bias.
        bound = 0.3 if name in PER_HEAD or not GPU else 0.15
        assert error < bound, f"{name}: relative error {error:.2f}"
    assert not torch.equal(actual["output"], wide["output"]), "float8 was not used"
    for recompute, run in [("none", "block fused"), ("inside", "fused"), ("states", "fused")][: 3 if GPU else 1]:
        mixer.recompute = recompute
        again = results(mixer, run, x_btd, n_heads, seq_idx_bt)
        assert all(torch.equal(again[name], actual[name]) for name in actual), (recompute, run)
    with torch.no_grad():
        x_md = x_btd.to(LOW).flatten(0, 1)
        without_gradients = mixer._fused(x_md, n_heads, 2, seq_idx_bt)
    assert torch.equal(without_gradients.unflatten(0, (2, -1)), wide["output"])


def test_what_a_classifier_drops_is_dropped_in_float8_too() -> None:
    """Entries of the projection are dropped by number, which its wider filling must not shift."""
    case = CASES[0]
    x_btd = torch.randn(2, case.t, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    drop = some_drop(2, case.t, 0.2)._replace(scale_b=torch.tensor([1.25, 1.25]).to(DEVICE))
    expected = results(mixer_of(case, torch.float32), "plain", x_btd.to(LOW).float(), case.width, None, drop)
    mixer = mixer_of(case, LOW)
    mixer.float8 = True
    actual = results(mixer, "fused", x_btd, case.width, None, drop)
    without = results(mixer, "fused", x_btd, case.width, None)
    for name in ("output", "x", "in_z", "in_x", "in_bc", "out"):
        assert relative(actual[name].flatten()[None], expected[name].flatten()[None]) < 0.3, name
        assert relative(without[name].flatten()[None], expected[name].flatten()[None]) > 0.4, name


def test_configs_know_what_products_ask_of_sizes() -> None:
    assert FLOAT8_STEP == float8.STEP
