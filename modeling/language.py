"""The nested language model: embedding, MatMamba2 blocks, final norm, head tied to the embedding.

Letters: b batch, t time, d model, m tokens between mixers, v vocabulary (this rank's rows).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling import nesting
from modeling.backbone import Backbone
from modeling.config import LanguageConfig
from modeling.mixer import MixerState

EMBEDDING_STD = 0.02


class LanguageModel(Backbone):
    """A nested LM. Which submodel runs is an argument: one head count for each layer."""

    cfg: LanguageConfig

    def make_parameters(self) -> None:
        """See Backbone."""
        cfg = self.cfg
        self.vocab = nesting.vocab_rows(cfg.n_vocab_rows, self.tp.size, self.tp.rank)
        self.embedding = nn.Parameter(torch.empty(len(self.vocab), cfg.d_model, dtype=torch.float32))
        self.make_stack()

    def forward(
        self,
        tokens_bt: Tensor,
        widths: nesting.LayerWidths,
        *,
        seq_idx_bt: Tensor | None = None,
        states: list[MixerState] | None = None,
        embedded_md: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, shape b t d in the compute dtype, of the submodel `widths`; `logits` turns them into scores.

        `tokens_bt` is int64 below cfg.vocab_size; `seq_idx_bt` (int32) keeps documents apart; `states`, one a layer, are
        read and overwritten; `embedded_md` is what `embed` says of the tokens, where the caller has it. All ranks of `tp`
        must call. Raises ValueError where `widths` does not fit the model.
        """
        self.check_widths(widths)
        batch = tokens_bt.shape[0]
        x_md = self.embed(tokens_bt) if embedded_md is None else embedded_md
        hidden_md = self.run_stack(x_md, widths, batch, seq_idx_bt=seq_idx_bt, states=states)
        return self.tp.enter(hidden_md).unflatten(0, (batch, -1))

    def logits(self, hidden_btd: Tensor) -> Tensor:
        """Scores of this rank's vocabulary rows, float32, shape b t v; padding rows beyond cfg.vocab_size included."""
        return F.linear(hidden_btd, self.embedding.to(self.dtype)).float()

    def embed(self, tokens_bt: Tensor) -> Tensor:
        """What every submodel begins with: the tokens' embeddings, float32, m as between mixers. All ranks of `tp` must call."""
        rows_md = self._own_rows(tokens_bt)
        return rows_md if self._holds_all_rows else self.tp.leave(rows_md)

    def add_embedding_gradient(self, tokens_bt: Tensor, grad_md: Tensor) -> None:
        """Add what backward through `embed` would, given its result's gradient, without its sum over ranks again. All ranks of
        `tp` must call."""
        with torch.enable_grad():
            rows_md = self._own_rows(tokens_bt)
        rows_md.backward(grad_md if self._holds_all_rows else self.tp.collect(grad_md))

    @property
    def _holds_all_rows(self) -> bool:
        """Whether every id is this rank's: nothing to mask, nobody to sum with."""
        return len(self.vocab) == self.cfg.n_vocab_rows

    def _own_rows(self, tokens_bt: Tensor) -> Tensor:
        """The embeddings that this rank holds, of all tokens; zeros for the others'."""
        if self._holds_all_rows:
            return F.embedding(tokens_bt, self.embedding).flatten(0, 1)
        local_bt = tokens_bt - self.vocab.start
        mine_bt = (local_bt >= 0) & (local_bt < len(self.vocab))
        rows_btd = F.embedding(torch.where(mine_bt, local_bt, 0), self.embedding)
        return (rows_btd * mine_bt[..., None]).flatten(0, 1)

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """See Backbone."""
        if name == "embedding":
            return torch.empty(shape).normal_(std=EMBEDDING_STD, generator=generator)
        return super().initial_value(name, shape, generator)
