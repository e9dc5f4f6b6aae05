"""On a GPU: our model through the Triton scan against mamba-ssm's own module, float32 and bf16, forward and gradients."""

from __future__ import annotations

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

CFG = LanguageConfig(n_layers=2, d_model=768, headdim=24, widths=(64, 32, 16, 8), vocab_size=1000, chunk_size=256)
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


@pytest.mark.parametrize("n_heads", CFG.widths)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Both sides run the same scan kernel in float32; what differs is the order of the sums around it. In bf16 each of
    # two layers rounds its activations at 4e-3.
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
    ids=["float32", "bf16"],
)
def test_width_equals_mamba_ssm_module(n_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    whole = LanguageModel(CFG)
    whole.init_weights(0)
    state = {name: p.detach().cuda() for name, p in whole.named_parameters()}
    ids_bt = torch.randint(0, 1000, (BATCH, T + 1), generator=torch.Generator().manual_seed(0)).cuda()
    small, small_cfg = cut(state, CFG, n_heads)
    expected, expected_gradients = mamba_ssm_loss_and_gradients(small, small_cfg, ids_bt)
    actual, gradients = ours(state, n_heads, dtype, ids_bt)
    errors = {name: relative(gradients[name], expected_gradients[name]) for name in expected_gradients}
    errors["logits"] = relative(actual, expected)
    worst = max(errors, key=lambda name: errors[name])
    print(f"\n{dtype} width {n_heads}: logits {errors['logits']:.2e}, worst {worst} {errors[worst]:.2e}")
    assert errors[worst] < tolerance, {name: f"{error:.1e}" for name, error in errors.items() if error > tolerance}
