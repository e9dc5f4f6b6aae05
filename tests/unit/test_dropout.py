"""Masks: how often, how independently, and on what alone entries are dropped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modeling.nesting import projection_channels
from modeling.noise import Noise
from modeling.ops.dropout import Drop, dropped, random_bits, split_mix, threshold_of

N = 2**18


def unit(bits: Tensor) -> Tensor:
    """The bits as numbers in [0, 1)."""
    return (bits.double() + 2**31) / 2**32


def test_the_hash_is_the_one_that_is_written_down() -> None:
    """Word by word in Python's integers, which do not wrap by themselves."""
    mask = 2**32 - 1

    def first(x: int) -> int:
        x = (x ^ x >> 16) * 0x21F0AAAD & mask
        return x ^ x >> 15

    def second(x: int) -> int:
        x = x * 0x735A2D97 & mask
        return x ^ x >> 15

    for key, token, channel in ((0, 0, 0), (2**63 - 5, 196, 4095), (-7, 3, 1), (1 << 31, 1, 2**20)):
        low, high = key & mask, key >> 32 & mask
        row = second(first(low + token * 0x9E3779B9 & mask))
        x = first(row + channel * 0x9E3779B9 & mask)
        expected = second(x + (high ^ token * 0x85EBCA6B & mask) & mask)
        actual = random_bits(
            torch.tensor([key]), torch.tensor([token], dtype=torch.int32), torch.tensor([channel]).int()
        )
        assert int(actual) & mask == expected


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 0.5, 0.9])
def test_entries_are_dropped_at_the_rate_and_keep_their_mean(rate: float) -> None:
    threshold = threshold_of(rate)
    drop = Drop(split_mix(torch.arange(4)), torch.full((4,), 2**32 / (2**32 - threshold)), threshold, n_tokens=64)
    out = dropped(torch.ones(256, N // 256), drop)
    error = math.sqrt(rate * (1 - rate) / N)
    assert abs(float((out == 0).double().mean()) - rate) <= 5 * error
    assert abs(float(out.double().mean()) - 1) <= 5 * error / (1 - rate) + 1e-6


@pytest.mark.parametrize("axis", ["image", "token", "channel"])
def test_neighbours_are_independent(axis: str) -> None:
    """Correlation of neighbours along each axis, and bins of a million draws against uniform."""
    images, tokens, channels = 8, 64, 2048
    key_m = split_mix(torch.arange(images)).repeat_interleave(tokens)
    token_m = torch.arange(tokens, dtype=torch.int32).repeat(images)
    draws = unit(random_bits(key_m, token_m, torch.arange(channels, dtype=torch.int32))).view(images, tokens, channels)
    dim = ["image", "token", "channel"].index(axis)
    n = draws.shape[dim] - 1
    a, b = draws.narrow(dim, 0, n) - 0.5, draws.narrow(dim, 1, n) - 0.5
    correlation = float((a * b).mean() * 12)
    assert abs(correlation) < 5 / math.sqrt(a.numel())
    for low_bits in (draws, (draws * 2**16) % 1):
        counts = torch.histc(low_bits.flatten(), bins=256, min=0, max=1)
        expected = draws.numel() / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def drops_of(seed: int = 0, widths: tuple[int, ...] = (4, 4, 4), numbers: tuple[int, ...] = (5, 6), **rates: float):  # type: ignore[no-untyped-def]
    rates = {"dropout": 0.25, "drop_path": 0.5} | rates
    return Noise(seed, torch.tensor(numbers)).layers(widths, n_tokens=3, first_row=0, **rates)  # type: ignore[arg-type]


def masks(drops: list) -> Tensor:  # type: ignore[type-arg]
    """Every mask of a pass, image by image."""
    ones = torch.ones(6, 50)
    found = [dropped(ones, drop) for layer in drops for drop in layer if drop is not None]
    return torch.stack(found).view(len(found), 2, 3, 50)


def test_masks_depend_on_seed_widths_layer_site_and_image_and_on_nothing_else() -> None:
    base = masks(drops_of())
    assert torch.equal(base, masks(drops_of()))
    for other in (drops_of(seed=1), drops_of(widths=(4, 4, 2)), drops_of(numbers=(7, 8))):
        assert float((masks(other) == base).float().mean()) < 0.9
    # An image's masks are its own, wherever it stands in a batch.
    assert torch.equal(masks(drops_of(numbers=(6, 5))).flip(1), base)
    flat = base.flatten(1)
    alike = [(i, j) for i in range(len(flat)) for j in range(i) if torch.equal(flat[i], flat[j])]
    assert alike == []


def test_a_rank_with_a_share_of_the_tokens_drops_what_one_with_all_of_them_drops() -> None:
    whole, x = drops_of()[1].branch, torch.randn(6, 50)
    for first, n in ((0, 3), (3, 3), (2, 4)):
        assert torch.equal(
            dropped(x[first : first + n], whole._replace(first_row=first)), dropped(x, whole)[first : first + n]
        )


def test_paths_are_dropped_more_often_the_deeper_they_are() -> None:
    numbers = tuple(range(20000))
    drops = Noise(0, torch.tensor(numbers)).layers((1,) * 5, dropout=0.0, drop_path=0.4, n_tokens=1, first_row=0)
    assert drops is not None
    shares = [float((layer.branch.scale_b == 0).float().mean()) for layer in drops[1:] if layer.branch is not None]
    for share, rate in zip(shares, (0, 0.1, 0.2, 0.3, 0.4), strict=True):
        assert abs(share - rate) <= 5 * math.sqrt(0.25 / len(numbers))
    scale_b = drops[-1].branch.scale_b  # type: ignore[union-attr]
    torch.testing.assert_close(scale_b[scale_b > 0], torch.full_like(scale_b[scale_b > 0], 1 / 0.6))
    assert all(layer.projection is None for layer in drops)


def test_no_rate_draws_nothing() -> None:
    assert drops_of(dropout=0.0, drop_path=0.0) is None


def test_ranks_number_their_channels_as_one_rank_does() -> None:
    whole = projection_channels(4, headdim=3, bc=10, full=8, tp=1, rank=0)
    assert whole == [*range(12), *range(24, 36), *range(48, 58), *range(58, 62)]
    first, second = (projection_channels(4, headdim=3, bc=10, full=8, tp=2, rank=rank) for rank in (0, 1))
    assert set(first) | set(second) == set(whole)
    assert set(first) & set(second) == set(range(48, 58)), "B and C alone are on both"
    assert first[:6] == [0, 1, 2, 6, 7, 8], "heads 0 and 2"


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_outside_zero_to_one_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="below 1"):
        threshold_of(rate)
