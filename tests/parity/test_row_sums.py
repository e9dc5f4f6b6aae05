"""A mixer's smallest gradients, summed over programs and added to what is there, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeling.ops.kernels.row_sums import ROWS, ConvSums, ProjectionSums, RateSums, add_row_sums, sum_rows
from tests.parity.kernel_checks import DEVICE


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE)


@pytest.mark.parametrize(
    ("rows", "inner", "bc", "heads", "held"),
    [
        ((3, 7, 5), 24, 16, 3, 2),
        ((1, 1, 1), 8, 4, 1, 1),
        ((ROWS + 1, 2 * ROWS, 40), 48, 32, 20, 24),
        pytest.param((64, 1056, 256), 4096, 256, 64, 64, marks=pytest.mark.gpu),
        pytest.param((64, 4224, 256), 512, 256, 8, 64, marks=pytest.mark.gpu),
    ],
)
def test_parts_are_summed_and_added_to_the_first_channels_alone(
    rows: tuple[int, int, int], inner: int, bc: int, heads: int, held: int
) -> None:
    """`held` times as many heads' sums exist as the width has; what is beyond the width stays as it was."""
    taps, norm, rates = drawn(rows[0], 5, inner + bc), drawn(rows[1], inner), drawn(rows[2], 3, heads)
    conv = ConvSums(drawn(inner * held, 4), drawn(inner * held), drawn(bc, 4), drawn(bc))
    norm_sum, of_heads = drawn(inner * held + 1), RateSums(*(drawn(heads * held + k) for k in range(3)))
    model = 100
    projection, into = drawn(bc + heads + 5, model), ProjectionSums(drawn(bc, model), drawn(heads * held, model))
    totals = (*conv, norm_sum, *of_heads, *into)
    before = [total.clone().double() for total in totals]
    add_row_sums(taps, conv, norm, norm_sum, rates, of_heads, projection, into)

    tap_sums = taps.double().sum(0)
    expected = [
        tap_sums[:4, :inner].T,
        tap_sums[4, :inner],
        tap_sums[:4, inner:].T,
        tap_sums[4, inner:],
        norm.double().sum(0),
        *rates.double().sum(0),
        projection[:bc].double(),
        projection[bc : bc + heads].double(),
    ]
    for total, was, added in zip(totals, before, expected, strict=True):
        was[: len(added)] += added
        torch.testing.assert_close(total.double(), was, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 100), (ROWS + 1, 40)])
def test_rows_are_summed(rows: int, width: int) -> None:
    parts = drawn(rows, width)
    torch.testing.assert_close(sum_rows(parts).double(), parts.double().sum(0), rtol=1e-5, atol=1e-4)
