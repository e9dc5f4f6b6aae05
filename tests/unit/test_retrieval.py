"""Neighbours and their scores, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modeling import retrieval
from modeling.retrieval import retrieval_scores
from pretrain.evaluate import main as evaluate
from pretrain.retrieval import main as retrieve


def at(*degrees: float) -> Tensor:
    """Unit vectors in the plane, of lengths that must not matter."""
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], -1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_a_query_by_hand() -> None:
    # By distance from 0 degrees: classes 1, 0, 1, 0, 0. Images of class 0 stand at ranks 2, 4, 5.
    scores = retrieval_scores(
        at(0), at(50, 10, 20, 30, 40), torch.tensor([0]), torch.tensor([0, 1, 0, 1, 0]), own_n=False
    )
    assert scores.recall_at_1 == 0
    assert scores.recall_at_5 == 1
    assert scores.mean_average_precision == pytest.approx((1 / 2 + 2 / 4 + 3 / 5) / 3)
    assert scores.n_queries == 1


def test_an_image_is_not_its_own_neighbour_and_a_lone_one_asks_nothing() -> None:
    features, labels = at(0, 5, 90, 100, 210), torch.tensor([0, 0, 1, 0, 2])
    scores = retrieval_scores(features, features, labels, labels, own_n=True)
    assert scores.n_queries == 3, "classes 1 and 2 have one image each"
    assert scores.recall_at_1 == pytest.approx(2 / 3)
    assert scores.recall_at_5 == 1
    # Others of class 0 stand at ranks 1 and 3 for the first two images, at 2 and 3 for the one at 100 degrees.
    expected = (2 * (1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 3
    assert scores.mean_average_precision == pytest.approx(expected)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(23, 8, generator=generator), torch.randint(0, 4, (23,), generator=generator)
    narrow = features + 0.3 * torch.randn(23, 8, generator=generator)
    whole = retrieval_scores(narrow, features, labels, labels, own_n=True)
    monkeypatch.setattr(retrieval, "BLOCK", 5)
    assert retrieval_scores(narrow, features, labels, labels, own_n=True) == pytest.approx(whole)


def test_random_features_find_their_class_as_often_as_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(2000, 16, generator=generator), torch.arange(2000) % 10
    scores = retrieval_scores(features, features, labels, labels, own_n=True)
    assert abs(scores.recall_at_1 - 0.1) < 5 * (0.09 / 2000) ** 0.5
    assert abs(scores.mean_average_precision - 0.1) < 0.01


@pytest.mark.parametrize(
    ("queries", "labels", "message"),
    [
        ((2, 3), [0, 1], "another image of its class"),
        ((2, 4), [0, 0], "of 4 features"),
        ((3, 3), [0, 0, 0], "same images"),
    ],
)
def test_what_cannot_be_scored_is_refused(queries: tuple[int, int], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_scores(
            torch.randn(queries), torch.randn(2, 3), torch.tensor(labels), torch.tensor([0, 1]), own_n=True
        )


@pytest.mark.parametrize("program", [evaluate, retrieve])
def test_where_results_cannot_be_written_is_said_first(
    program: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, says in (
        (tmp_path / "none" / "out.json", "there is no folder"),
        (tmp_path, "cannot be written as a file"),
    ):
        assert program(["no such run", "--json", str(path)]) == 2
        assert f"error: {path}: {says}" in capsys.readouterr().err, "the run was looked for first"
