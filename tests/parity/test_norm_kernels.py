"""The residual norm's kernels against plain PyTorch in float32: outputs and every gradient, with memory poisoned beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modeling.ops.dropout import dropped_float
from modeling.ops.kernels import residual_norm
from modeling.ops.norm import add_norm_fused, layer_norm, rms_norm
from tests.parity.kernel_checks import DEVICE, GPU, LOW, assert_close, poison, some_drop


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize(
    ("shape", "branch", "layer", "drop"),
    [
        ((2, 5, 48), True, False, None),
        ((1, 3, 300), False, False, None),
        ((3, 7, 1024), True, False, 0.3),
        ((2, 5, 48), True, True, 0.3),
        ((2, 5, 48), True, True, 0.0),
        ((1, 3, 300), False, True, None),
        ((3, 7, 1024), True, True, None),
    ],
    ids=str,
)
def test_residual_norm_equals_the_plain_one(
    shape: tuple[int, ...], branch: bool, layer: bool, drop: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn() -> Tensor:
        return torch.randn(shape, generator=generator).flatten(0, 1).to(DEVICE)

    x, weight, w_total, w_out = randn() + 0.5, nn.Parameter(randn()[0]), randn(), randn()
    bias = nn.Parameter(randn()[0]) if layer else None
    added = randn().to(dtype) if branch else None
    dropping = None if drop is None else some_drop(shape[0] + 1, shape[1], drop, first_row=shape[1] - 2)

    def run(fused: bool) -> dict[str, Tensor]:
        leaves = [x.clone().requires_grad_(), None if added is None else added.clone().requires_grad_()]
        for parameter in (weight, bias):
            if parameter is not None:
                parameter.grad = None
        poison()
        if fused:
            total, out = add_norm_fused(leaves[0], leaves[1], weight, bias, eps=1e-5, dtype=dtype, drop=dropping)
        else:
            total = leaves[0]
            if leaves[1] is not None:
                total = total + (leaves[1].float() if dropping is None else dropped_float(leaves[1], dropping))
            if bias is None:
                out = rms_norm(total, weight, eps=1e-5, dtype=torch.float32)
            else:
                out = layer_norm(total, weight, bias, eps=1e-5, dtype=torch.float32)
        ((total * w_total).sum() + (out.float() * w_out).sum()).backward()
        tensors = [*leaves, weight, bias]
        grads = {f"gradient {i}": leaf.grad for i, leaf in enumerate(tensors) if leaf is not None}
        return {"total": total.detach(), "out": out.detach(), **grads}  # type: ignore[dict-item]

    assert_close(run(fused=True), run(fused=False), dtype)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(3, 13, 48), (2, 9, 300), pytest.param((9, 400, 1024), marks=pytest.mark.gpu)],
    ids=str,
)
def test_programs_of_backward_walk_over_many_rows(
    shape: tuple[int, ...], layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a micro-batch has: rows are loaded ahead, and the weight's gradient adds up in each program."""
    if shape[-1] == 1024 and not GPU:
        pytest.skip("a real shape: waits for a CUDA GPU")
    if shape[-1] < 1024:
        monkeypatch.setattr(residual_norm, "THREADS", 512)
    test_residual_norm_equals_the_plain_one(shape, True, layer, None, LOW)


def test_a_norm_weight_of_almost_nothing_is_divided_by_and_one_of_zero_hides_its_channel() -> None:
    """Backward divides the output by the weight: what is hidden is that channel alone, and nothing becomes NaN."""
    generator = torch.Generator().manual_seed(0)
    x, w_out = (torch.randn(6, 48, generator=generator).to(DEVICE) for _ in range(2))
    start = torch.randn(48, generator=generator)
    start[5], start[7], start[11] = 1e-6, 0.0, -0.0

    def run(fused: bool) -> tuple[Tensor, Tensor]:
        leaf, weight = x.clone().requires_grad_(), nn.Parameter(start.to(DEVICE))
        out = (
            add_norm_fused(leaf, None, weight, None, eps=1e-5, dtype=torch.float32)[1]
            if fused
            else rms_norm(leaf, weight, eps=1e-5, dtype=torch.float32)
        )
        (out * w_out).sum().backward()
        assert leaf.grad is not None
        assert weight.grad is not None
        return leaf.grad, weight.grad

    (grad_x, grad_weight), (expected_x, expected_weight) = run(fused=True), run(fused=False)
    hidden = start == 0
    assert grad_weight[hidden].tolist() == [0.0, 0.0]
    assert grad_x[:, hidden].abs().max() == 0
    torch.testing.assert_close(grad_x[:, ~hidden], expected_x[:, ~hidden], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_weight[~hidden], expected_weight[~hidden], rtol=1e-4, atol=1e-5)
