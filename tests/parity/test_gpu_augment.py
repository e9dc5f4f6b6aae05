"""Augmentation on a GPU against the same on the CPU."""

from __future__ import annotations

import pytest
import torch

from pretrain.image_config import AugmentConfig
from tests.unit.test_augment import batch, inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU")]


def test_a_gpu_gives_what_the_cpu_gives() -> None:
    one = batch(64, size=224)
    on_cpu = inputs(one, AugmentConfig())
    on_gpu = inputs(one.to("cuda"), AugmentConfig())
    torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1], atol=1e-5, rtol=0)
    # exp, sqrt and their roundings differ in the last bit: a rectangle's side may fall on the other of two pixels
    assert (on_gpu[0].cpu() - on_cpu[0]).abs().gt(1e-3).float().mean().item() < 0.01
