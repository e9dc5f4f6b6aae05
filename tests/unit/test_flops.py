"""Counts worked out by hand, and against the shapes of the model itself."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from modeling import flops
from modeling.config import BackboneConfig, LanguageConfig, VisionConfig
from modeling.models import build_model, logical_shapes
from modeling.tensor_parallel import LAYOUTS, TensorParallel

TINY = LanguageConfig(
    n_layers=1, d_model=4, headdim=2, n_heads=4, widths=(4, 2), d_state=3, d_conv=2, chunk_size=8, vocab_size=100
)
TINY_VISION = VisionConfig(
    n_layers=1, d_model=4, headdim=2, n_heads=4, widths=(4, 2), d_state=3, d_conv=2, chunk_size=8, n_classes=7,
    image_size=4, patch_size=2,
)  # fmt: skip
VISION_35M = VisionConfig(n_layers=20, d_model=512, widths=(64, 32, 16, 8), n_classes=1000)
LM_1B4 = LanguageConfig(n_layers=48, d_model=2048, widths=(64, 32, 16, 8), vocab_size=50257)


def test_two_heads_of_the_tiny_model_by_hand() -> None:
    # 4 inner channels: z 16, x 16, B and C 24, dt 8, out 16; conv 10 channels of 2 taps and a bias; 3 x 2 heads; norm 4.
    assert flops.mixer_parameters(TINY, 2) == 80 + 30 + 6 + 4
    assert flops.language_parameters(TINY, (2,)) == flops.Parameters(embedding=128 * 4, blocks=120 + 2 * 4)
    assert flops.projection_flops(TINY, 2) == 2 * 80
    # C.B^T 2 x 8 x 3, scores.x 2 x 8 x 4, states written and read 2 x 2 x 4 x 3.
    assert flops.scan_flops(TINY, 2) == 48 + 64 + 48
    assert flops.forward_flops_per_token(TINY, (2,)) == 160 + 160 + 2 * 512
    assert flops.training_flops_per_token(TINY, (2,)) == 3 * 1344
    # tp=2 holds two heads and half of the embedding.
    assert flops.local_parameters(TINY, 2) == 384


def test_a_tiny_classifier_by_hand() -> None:
    # Four patches of 2 x 2 x 3 pixels and a class token. Patches 12 x 4 + 4, positions 5 x 4, class token 4, head 7 x 4 + 7;
    # two norms with bias; the mixer is the one above.
    assert flops.vision_parameters(TINY_VISION, (2,)) == flops.Parameters(embedding=111, blocks=120 + 2 * 8)
    # A sequence of 5 tokens is one chunk of 5: C.B^T 2 x 5 x 3, scores.x 2 x 5 x 4, states 48.
    assert flops.scan_flops(TINY_VISION, 2, 5) == 30 + 40 + 48
    assert flops.forward_flops_per_image(TINY_VISION, (2,)) == 4 * 2 * 12 * 4 + 5 * (160 + 118) + 2 * 4 * 7
    # At 8 pixels: 16 patches, 17 tokens, chunks of 8.
    assert flops.training_flops_per_image(TINY_VISION, (2,), 8) == 3 * (16 * 96 + 17 * (160 + 160) + 56)
    # tp=2 holds two of four heads (B and C whole, as 30 of 120 show), and all of the rest.
    assert flops.local_parameters(TINY_VISION, 2) == 111 + 136


@pytest.mark.parametrize("cfg", [TINY, LM_1B4, TINY_VISION, VISION_35M], ids=["tiny", "1.4B", "tiny vision", "35M"])
def test_parameters_are_those_of_the_model(cfg: BackboneConfig) -> None:
    for width in cfg.widths:
        shapes = logical_shapes(replace(cfg, n_heads=width, widths=(width,)))
        total = sum(prod(shape) for shape in shapes.values())
        assert flops.submodel_parameters(cfg, cfg.layer_widths(width)).total == total
    for tp in (1, 2):
        with torch.device("meta"):
            part = build_model(cfg, tp=TensorParallel(size=tp, rank=0))
        assert flops.local_parameters(cfg, tp) == sum(p.numel() for p in part.parameters())


def test_an_eighth_of_the_1b4_keeps_a_fifth_of_its_parameters() -> None:
    whole = flops.language_parameters(LM_1B4, LM_1B4.layer_widths(64)).total
    eighth = flops.language_parameters(LM_1B4, LM_1B4.layer_widths(8)).total
    assert round(eighth / 1e6) == 280
    assert round(100 * eighth / whole) == 21


def test_every_parameter_has_a_layout() -> None:
    names = [*logical_shapes(TINY), *logical_shapes(TINY_VISION)]
    assert {name.rpartition(".")[2] for name in names} == set(LAYOUTS)
