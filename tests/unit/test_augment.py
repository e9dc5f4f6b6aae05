"""What becomes of a batch on the device: normalising, erasing, mixing and targets, against numpy by hand and scipy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from pretrain.augment import Draws, erased, mixing_weights, normalised, smoothed, training_inputs
from pretrain.config_sections import ConfigError
from pretrain.image_config import AugmentConfig
from pretrain.images import ImageBatch

SIZE, K = 32, 10
OFF = AugmentConfig(erasing_prob=0.0, mix_prob=0.0, smoothing=0.0)


def batch(n: int = 8, first: int = 0, size: int = SIZE) -> ImageBatch:
    """Images whose pixels and labels are functions of their numbers."""
    numbers_b = torch.arange(first, first + n)
    pixels = torch.stack([torch.randint(0, 256, (size, size, 3), generator=_generator(i)) for i in numbers_b.tolist()])
    return ImageBatch(pixels.to(torch.uint8).permute(0, 3, 1, 2), numbers_b * 7 % K, numbers_b)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(
    one: ImageBatch, cfg: AugmentConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return training_inputs(one, cfg, n_classes=K, seed=seed, dtype=dtype)


def test_normalising_is_torchvisions() -> None:
    images_bchw = batch().images_bchw
    expected = functional.normalize(images_bchw.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):
        found = normalised(images_bchw, dtype)
        assert found.dtype == dtype
        assert found.is_contiguous()
        torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


def test_with_everything_off_it_only_normalises() -> None:
    one = batch()
    x_bchw, targets_bk = inputs(one, OFF)
    assert torch.equal(x_bchw, normalised(one.images_bchw, torch.float32))
    assert torch.equal(targets_bk, torch.nn.functional.one_hot(one.labels_b, K).float())


def test_draws_are_uniform_and_unrelated() -> None:
    draws = Draws(1, torch.arange(50_000))
    first, second = draws.uniform("a").numpy(), draws.uniform("b").numpy()
    other_seed = Draws(2, torch.arange(50_000)).uniform("a").numpy()
    high_numbers = Draws(1, torch.arange(50_000) + 2**33).uniform("a").numpy()
    assert scipy.stats.kstest(first, "uniform").pvalue > 1e-3
    for one, other in (
        (first, second),
        (first, other_seed),
        (first, high_numbers),
        (first[1:], first[:-1]),
        (first[::2], first[1::2]),
    ):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert 0 <= first.min() < first.max() < 1
    counts = np.bincount(draws.integer("c", 16).numpy(), minlength=16)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_the_draws_are_frozen() -> None:
    """A change here changes every run that is resumed."""
    assert Draws(7, torch.tensor([0, 1, 2**40])).integer("x", 2**32).tolist() == [3032132694, 1610512716, 1605746638]


@pytest.mark.parametrize("alpha", [0.4, 0.8, 1.0, 3.0])
def test_beta_is_scipys(alpha: float) -> None:
    sample = Draws(0, torch.arange(20_000)).beta("share", alpha).double().numpy()
    assert scipy.stats.kstest(sample, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_erasing_by_hand() -> None:
    cfg = AugmentConfig(erasing_prob=1.0)
    numbers_b = torch.arange(400)
    marked = torch.full((400, 3, SIZE, SIZE), 99.0)
    out = erased(marked, cfg, Draws(0, numbers_b), 0)
    hit = out != 99
    assert torch.equal(hit[:, 0], hit[:, 1])
    areas = []
    for inside in hit[:, 0].numpy():
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "not one rectangle"
        assert inside.sum() == len(rows) * len(columns)
        assert 0.25 < len(rows) / len(columns) < 4  # 0.3 and its inverse, before rounding to pixels
        areas.append(inside.mean())
    assert 0.01 < min(areas) < 0.05  # 0.02, before rounding
    assert 0.25 < max(areas) < 0.33
    assert np.mean(areas) == pytest.approx(0.16, abs=0.02)
    noise = out[hit]
    assert scipy.stats.kstest(noise[::7].numpy(), "norm").pvalue > 1e-4
    some = erased(marked, AugmentConfig(erasing_prob=0.25), Draws(0, numbers_b), 0)
    assert (some != 99).flatten(1).any(1).float().mean().item() == pytest.approx(0.25, abs=0.06)


def test_mixing_by_hand() -> None:
    """Every pair is mixup with one weight, or cutmix with one rectangle, and targets are shared as the pixels are."""
    one = batch(200)
    x_bchw, targets_bk = inputs(one, AugmentConfig(erasing_prob=0.0))
    plain = normalised(one.images_bchw, torch.float32).numpy()
    n_cut = 0
    for i in range(0, 200, 2):
        a, b = plain[i], plain[i + 1]
        share = ((x_bchw[i].numpy() - a) / np.where(np.abs(b - a) < 1e-3, np.nan, b - a)).astype(float)
        values = share[np.isfinite(share)]
        is_cut = np.all((np.abs(values) < 1e-4) | (np.abs(values - 1) < 1e-4))
        n_cut += is_cut
        if is_cut:
            inside = np.nanmax(np.where(np.isfinite(share), share, np.nan), axis=0) > 0.5
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert inside.sum() == len(rows) * len(columns), "not one rectangle"
            lam = inside.mean()
        else:
            lam = np.median(values)
            assert np.abs(values - lam).max() < 1e-3
        for j, k in ((i, i + 1), (i + 1, i)):
            expected = np.full(K, 0.1 / K)
            expected[one.labels_b[j]] += 0.9 * (1 - lam)
            expected[one.labels_b[k]] += 0.9 * lam
            np.testing.assert_allclose(targets_bk[j].numpy(), expected, atol=2e-4)
        np.testing.assert_allclose(x_bchw[i + 1].numpy() + x_bchw[i].numpy(), a + b, atol=1e-4)
    assert n_cut == pytest.approx(50, abs=20)
    torch.testing.assert_close(targets_bk.sum(1), torch.ones(200), atol=1e-6, rtol=0)


def test_cutmix_shares_are_the_clipped_areas() -> None:
    cfg = AugmentConfig(mixup_alpha=0.0)
    weight_b1hw, share_b = mixing_weights(cfg, Draws(0, torch.arange(3000)), SIZE)
    torch.testing.assert_close(weight_b1hw.mean(dim=(1, 2, 3)), share_b, atol=1e-6, rtol=0)
    rng = np.random.default_rng(0)
    by_hand = []
    for _ in range(3000):
        side = int(SIZE * np.sqrt(rng.beta(1.0, 1.0)))
        y, x = rng.integers(SIZE, size=2)
        rows = np.clip([y - side // 2, y + side // 2], 0, SIZE)
        columns = np.clip([x - side // 2, x + side // 2], 0, SIZE)
        by_hand.append((rows[1] - rows[0]) * (columns[1] - columns[0]) / SIZE**2)
    assert scipy.stats.ks_2samp(share_b.numpy(), by_hand).pvalue > 1e-3


def test_pairs_that_are_not_mixed_are_left_alone() -> None:
    for kind in ({"mixup_alpha": 0.0}, {"cutmix_alpha": 0.0}):
        weight_b1hw, share_b = mixing_weights(AugmentConfig(mix_prob=0.3, **kind), Draws(0, torch.arange(3000)), SIZE)
        torch.testing.assert_close(weight_b1hw.mean(dim=(1, 2, 3)), share_b, atol=1e-6, rtol=0)
        assert (share_b > 0).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_the_result_does_not_depend_on_how_the_stream_is_cut() -> None:
    whole = inputs(batch(16), AugmentConfig(), seed=3)
    parts = [inputs(batch(n, first), AugmentConfig(), seed=3) for first, n in ((0, 4), (4, 2), (6, 10))]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
    assert not torch.equal(inputs(batch(16), AugmentConfig(), seed=4)[0], whole[0])


def test_global_generators_play_no_part() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = inputs(batch(), AugmentConfig())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(inputs(batch(), AugmentConfig())[0], first[0])


@pytest.mark.parametrize(
    "change",
    [
        {"erasing_prob": 0.5},
        {"erasing_area": (0.5, 0.6)},
        {"erasing_min_ratio": 0.9},
        {"mixup_alpha": 0.2},
        {"cutmix_alpha": 3.0},
        {"mix_prob": 0.3},
        {"switch_prob": 0.1},
        {"smoothing": 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_field_of_the_devices_share_changes_something(change: dict[str, Any]) -> None:
    base = AugmentConfig(erasing_prob=1.0)
    before, after = inputs(batch(32), base), inputs(batch(32), dataclasses.replace(base, **change))
    assert not (torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]))


def test_every_field_is_tested_by_name() -> None:
    """Those of the CPU's share are in test_image_transform.py."""
    on_cpu = {"crop_scale", "crop_ratio", "hflip_prob", "rand_augment_ops", "rand_augment_magnitude"}
    on_cpu |= {"jitter_prob", "jitter_strength"}
    on_device = {"erasing_prob", "erasing_area", "erasing_min_ratio", "mixup_alpha", "cutmix_alpha", "mix_prob"}
    on_device |= {"switch_prob", "smoothing"}
    assert {field.name for field in dataclasses.fields(AugmentConfig)} == on_cpu | on_device


def test_smoothing_is_torchs() -> None:
    logits_bk = torch.randn(8, K, generator=_generator(0))
    labels_b = batch().labels_b
    expected = torch.nn.functional.cross_entropy(logits_bk, labels_b, label_smoothing=0.1)
    found = torch.nn.functional.cross_entropy(logits_bk, smoothed(labels_b, K, 0.1))
    torch.testing.assert_close(found, expected)


def test_images_that_make_no_pairs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.micro_batch=3 is odd"):
        AugmentConfig().check_micro_batch(3)
    AugmentConfig(mix_prob=0.0).check_micro_batch(3)
    AugmentConfig(mixup_alpha=0.0, cutmix_alpha=0.0).check_micro_batch(3)
    with pytest.raises(AssertionError, match="do not make pairs"):
        inputs(batch(3), AugmentConfig())
