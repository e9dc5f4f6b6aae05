"""The image classifier over tensor-parallel ranks, with drops: features, losses and every gradient are those of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from modeling.config import VisionConfig
from modeling.gathered_widths import GatheredWidths
from modeling.noise import Noise
from modeling.tensor_parallel import TensorParallel, is_partial, layout_of, local_index
from modeling.vision import VisionModel
from pretrain.distributed import init_ranks
from pretrain.gradients import GradientBuffer
from tests.distributed.harness import RankFailedError, run_ranks

WIDTHS = [(8, 8), (4, 4), (8, 4)]
TOLERANCE = 1e-5
"""Float32: the same sums in another order."""


def config(pool: str = "cls") -> VisionConfig:
    return VisionConfig(
        n_layers=2, d_model=32, headdim=8, d_state=8, widths=(8, 4), chunk_size=8, n_classes=5, image_size=16,
        patch_size=4, pool=pool, dropout=0.2, drop_path=0.3,
    )  # fmt: skip


def results(model: VisionModel) -> dict[str, Any]:
    """Losses of every width on six images, and the gradients of their sum."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not layout_of(name).is_sharded:  # zeros and ones would hide a mix-up
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    images = torch.randn(6, 3, 16, 16, generator=generator)
    noise = Noise(1, torch.arange(6))
    losses = []
    for widths in WIDTHS:
        loss = cross_entropy(model.logits(model(images, widths, noise=noise)), torch.tensor([0, 1, 2, 3, 4, 0]))
        loss.backward()
        losses.append(float(loss.detach()))
    return {"losses": losses, "gradients": {name: p.grad for name, p in model.named_parameters()}}


def one_rank(cfg: VisionConfig) -> dict[str, Any]:
    model = VisionModel(cfg)
    model.init_weights(7)
    return results(model)


def on_ranks(cfg: VisionConfig, sequence: bool) -> dict[str, Any]:
    ranks = init_ranks(2, sequence=sequence)
    model = VisionModel(cfg, tp=ranks.tp)
    model.init_weights(7)
    return results(model)


def on_ranks_that_gather(cfg: VisionConfig) -> dict[str, Any]:
    """Half of the width on images of each rank's own."""
    ranks = init_ranks(2, sequence=True)
    model = VisionModel(cfg, tp=ranks.tp, in_place_gradients=True)
    model.init_weights(7)
    GradientBuffer(model.parameters())
    gathered = GatheredWidths(model.blocks, model.tp, 4)
    found = results(model)
    gathered.start_return()
    for name, gradient in found["gradients"].items():
        if is_partial(name, sequence=True):
            torch.distributed.all_reduce(gradient)
    return found


def compare(cfg: VisionConfig, on_rank: Callable[..., dict[str, Any]], *args: Any) -> None:
    expected = one_rank(cfg)
    for rank, result in enumerate(run_ranks(2, on_rank, cfg, *args)):
        assert_close(torch.tensor(result["losses"]), torch.tensor(expected["losses"]), "losses")
        for name, whole in expected["gradients"].items():
            index = local_index(tuple(whole.shape), layout_of(name), cfg.n_heads, 2, rank)
            assert_close(result["gradients"][name], whole[index], name)


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    error = float((actual - expected).norm() / expected.norm())
    assert error < TOLERANCE, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("pool", ["cls", "avg"])
@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
def test_two_ranks_equal_one(sequence: bool, pool: str) -> None:
    compare(config(pool), on_ranks, sequence)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_two_ranks_that_gather_half_of_the_width_equal_one(pool: str) -> None:
    """With the masks of the whole model's channels and of each rank's images."""
    compare(config(pool), on_ranks_that_gather)


def _as_sharded(self: TensorParallel, x: Tensor) -> Tensor:
    return self.enter(x)


@pytest.mark.parametrize(
    ("method", "mutation"),
    [("collect", _as_sharded), ("part", lambda self, x: x), ("replicate", lambda self, weight: weight)],
    ids=["features' gradient summed", "tokens not shared out", "patches' gradient not summed"],
)
def test_a_wrong_collective_is_noticed(method: str, mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorParallel, method, mutation)
    with pytest.raises((AssertionError, RankFailedError)):
        compare(config(), on_ranks, True)
