"""On a GPU: our model through the Triton scan against mamba-ssm's own module, float32 and bf16, forward and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.config import LanguageConfig
from modeling.convert import cut, from_mamba_ssm, to_mamba_ssm
from modeling.language import LanguageModel
from modeling.loss import next_token_loss
from tests.parity import oracles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU"),
    pytest.mark.timeout(900),  # mamba-ssm's kernels tune themselves for minutes at first use
]

CFG = LanguageConfig(
    n_layers=2, d_model=192, headdim=24, n_heads=64, widths=(64, 32, 16, 8), vocab_size=1000, chunk_size=256
)
"""mamba-ssm's module wants a whole number of d_model channels inside: 8, 4, 2 and 1 times at these widths."""
BATCH, T = 2, 1000


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def mamba_ssm_loss_and_gradients(
    state: dict[str, Tensor], cfg: LanguageConfig, ids_bt: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    model = oracles.mamba_ssm_model(to_mamba_ssm(state, cfg), cfg, torch.device("cuda"))
    logits = model(ids_bt[:, :-1]).logits
    F.cross_entropy(logits.float().flatten(0, 1), ids_bt[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), from_mamba_ssm(gradients, cfg)


def ours(
    state: dict[str, Tensor], n_heads: int, dtype: torch.dtype, ids_bt: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    model = LanguageModel(CFG, dtype=dtype).cuda()
    model.load_state_dict(state)
    hidden = model(ids_bt[:, :-1], CFG.layer_widths(n_heads))
    next_token_loss(model, hidden, ids_bt[:, 1:]).total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return model.logits(hidden).detach(), cut(gradients, CFG, n_heads)[0]


@dataclass(frozen=True)
class Bounds:
    """Largest relative error allowed of the logits, of a gradient, and of the gradient of a per-head vector."""

    logits: float
    gradient: float
    per_head: float


BOUNDS = {
    # Both sides run mamba-ssm's scan kernels, whose float32 dots are TF32 in backward: inputs that differ in the last
    # bit come out up to 2^-11 apart a term. Measured on an H200: logits 3.9e-6, gradients 1.1e-4, per head 1.4e-4.
    torch.float32: Bounds(logits=1e-5, gradient=3e-4, per_head=5e-4),
    # Against the float32 module. Each of two layers rounds its activations at 4e-3; D, A_log and dt_bias have one
    # entry a head, each the sum of thousands of terms of both signs. Measured: 8.4e-3, 1.5e-2, 2.1e-2.
    torch.bfloat16: Bounds(logits=2e-2, gradient=2e-2, per_head=4e-2),
}


@pytest.mark.parametrize("n_heads", CFG.widths)
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_width_equals_mamba_ssm_module(n_heads: int, dtype: torch.dtype) -> None:
    whole = LanguageModel(CFG)
    whole.init_weights(0)
    state = {name: p.detach().cuda() for name, p in whole.named_parameters()}
    ids_bt = torch.randint(0, 1000, (BATCH, T + 1), generator=torch.Generator().manual_seed(0)).cuda()
    small, small_cfg = cut(state, CFG, n_heads)
    expected, expected_gradients = mamba_ssm_loss_and_gradients(small, small_cfg, ids_bt)
    actual, gradients = ours(state, n_heads, dtype, ids_bt)
    bounds = BOUNDS[dtype]
    errors = {"logits": (relative(actual, expected), bounds.logits)}
    for name, gradient in expected_gradients.items():
        bound = bounds.per_head if name.endswith(("A_log", "D", "dt_bias")) else bounds.gradient
        errors[name] = (relative(gradients[name], gradient), bound)
    worst = max(errors, key=lambda name: errors[name][0])
    print(f"\n{dtype} width {n_heads}: logits {errors['logits'][0]:.2e}, worst {worst} {errors[worst][0]:.2e}")
    too_far = [f"{name}: {error:.1e} > {bound:.0e}" for name, (error, bound) in errors.items() if not error < bound]
    assert not too_far, "; ".join(too_far)
