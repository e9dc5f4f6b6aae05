"""What all widths of a micro-batch begin with: its tokens' embeddings, made once for all of them.

Their gradients by it add up in one place, and go through the embedding once. It saves each width but one the look-up, the
gradient's sort and scatter, and with tensor parallelism the two largest collectives of a pass.

Letters: b batch, t time, d model, m tokens between mixers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.language import LanguageModel


class SharedEmbedding:
    """Of one model. All ranks of its `tp` must call alike."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._leaves: dict[torch.Size, Tensor] = {}

    @torch.no_grad()
    def begin(self, tokens_bt: Tensor) -> Tensor:
        """The embeddings (m d, float32): a leaf whose gradient is zero. For each shape the same one, at the same address."""
        made_md = self._model.embed(tokens_bt)
        leaf_md = self._leaves.get(tokens_bt.shape)
        if leaf_md is None:
            leaf_md = self._leaves[tokens_bt.shape] = torch.empty_like(made_md).requires_grad_()
            leaf_md.grad = torch.empty_like(made_md)
        assert leaf_md.grad is not None
        leaf_md.grad.zero_()
        return leaf_md.copy_(made_md)

    def end(self, tokens_bt: Tensor) -> None:
        """Add to the embedding's gradient what the widths have left in the leaf's."""
        grad_md = self._leaves[tokens_bt.shape].grad
        assert grad_md is not None
        self._model.add_embedding_gradient(tokens_bt, grad_md)
