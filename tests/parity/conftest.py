"""What the tests of decoding share, and those of kernels."""

from __future__ import annotations

import pytest
import torch

from modeling.language import LanguageModel
from modeling.ops import ssd


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> LanguageModel:
    """A model of the module's CFG, as if trained: its initial values are wider than training's, so that logits are far
    from equal and the likeliest token is clear."""
    model = LanguageModel(request.module.CFG)
    model.init_weights(0)
    with torch.no_grad():
        model.embedding.mul_(20)
    return model.eval()


@pytest.fixture
def plain_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain mixer's scan is ours in PyTorch, also where mamba-ssm's kernel, less exact and other at each run, is at hand."""
    monkeypatch.setattr(ssd.upstream, "chunk_scan", lambda: None)
