"""What the tests of decoding share."""

from __future__ import annotations

import pytest
import torch

from modeling.language import LanguageModel


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> LanguageModel:
    """A model of the module's CFG, as if trained: its initial values are wider than training's, so that logits are far
    from equal and the likeliest token is clear."""
    model = LanguageModel(request.module.CFG)
    model.init_weights(0)
    with torch.no_grad():
        model.embedding.mul_(20)
    return model.eval()
