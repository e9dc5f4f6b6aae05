"""Training a language model: token shards, next-token loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modeling.language import LanguageModel
from modeling.loss import Loss, next_token_loss
from modeling.model_folder import EOS_ID
from modeling.nesting import LayerWidths
from modeling.tensor_parallel import filled_up
from pretrain.config import LanguageRunConfig
from pretrain.data import Batch, TokenLoader, validation_batches
from pretrain.dataset_check import check_dataset
from pretrain.distributed import Ranks
from pretrain.engine import Engine
from pretrain.passes import PassInputs
from pretrain.task import Scores


@dataclass(frozen=True)
class LanguageTask:
    """See Task."""

    cfg: LanguageRunConfig

    def check_data(self, *, training: bool = True) -> dict[str, Any]:
        """See Task; the id that ends a document, which need not be the one that its name would tell."""
        manifest = check_dataset(self.cfg.data, self.cfg.model.vocab_size, training=training)
        return {EOS_ID: manifest.eos_id}

    def loader(self, ranks: Ranks, *, start: int) -> TokenLoader:
        """See Task."""
        return TokenLoader(
            self.cfg.data,
            split="train",
            vocab_size=self.cfg.model.vocab_size,
            seed=self.cfg.seed,
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
            n_sequences_per_step=self.cfg.samples_per_step,
            start_sequence=start,
        )

    def validation(self, ranks: Ranks) -> list[Batch]:
        """See Task."""
        return validation_batches(
            self.cfg.data,
            vocab_size=self.cfg.model.vocab_size,
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
            n_sequences=self.cfg.n_eval_sequences,
        )

    def inputs(self, batch: Batch) -> PassInputs:
        """See Task."""
        scale = torch.ones((), device=batch.tokens_bt.device)
        return PassInputs(batch.tokens_bt, batch.targets_bt, batch.seq_idx_bt, scale)

    def loss(
        self, engine: Engine, widths: LayerWidths, inputs: PassInputs, teacher: Tensor | None
    ) -> tuple[Loss, Tensor]:
        """See Task; a teacher is its final hidden states."""
        hidden_btd = engine(inputs.tokens_bt, widths, seq_idx_bt=inputs.seq_idx_bt, embedded_md=inputs.embedded_md)
        loss = next_token_loss(
            engine.model,
            hidden_btd,
            inputs.targets_bt,
            teacher_btd=teacher,
            distill_weight=self.cfg.nesting.distill_weight,
            temperature=self.cfg.nesting.distill_temperature,
        )
        return loss, hidden_btd

    def scores(
        self, model: LanguageModel, batches: Iterable[Batch], submodels: Sequence[LayerWidths], ranks: Ranks
    ) -> list[Scores]:
        """See Task: the mean next-token loss in nats."""
        return [{"loss": loss} for loss in submodel_losses(model, batches, submodels, ranks)]


@torch.no_grad()
def submodel_losses(
    model: LanguageModel, batches: Iterable[Batch], submodels: Sequence[LayerWidths], ranks: Ranks
) -> list[float]:
    """Mean next-token loss in nats of each submodel over all ranks' batches, each token counted once.

    `batches` is this data-parallel rank's share. All ranks must call. Ranks may hold different numbers of batches.
    """
    sums = torch.zeros(len(submodels) + 1, dtype=torch.float64)
    for batch in batches:
        n_tokens = batch.targets_bt.numel()
        tokens_bt, targets_bt = batch.tokens_bt.to(ranks.device), batch.targets_bt.to(ranks.device)
        seq_idx_bt = None if batch.seq_idx_bt is None else batch.seq_idx_bt.to(ranks.device)
        for i, widths in enumerate(submodels):
            hidden_btd = hidden_states(model, tokens_bt, widths, seq_idx_bt)
            sums[i] += n_tokens * next_token_loss(model, hidden_btd, targets_bt).cross_entropy.double().cpu()
        sums[-1] += n_tokens
    # Ranks of one replica hold the same sums; adding all of them leaves the ratio as it is.
    dist.all_reduce(sums, group=ranks.cpu_group)
    return [float(total / sums[-1]) for total in sums[:-1]]


def hidden_states(
    model: LanguageModel, tokens_bt: Tensor, widths: LayerWidths, seq_idx_bt: Tensor | None = None
) -> Tensor:
    """The final hidden states of any number of sequences, also where sequence parallelism wants whole shares of tokens.

    All ranks of the model's replica must call.
    """
    b, t = tokens_bt.shape
    # Up to the next number of sequences whose tokens divide; a sequence does not see the others.
    multiple = model.tp.size // math.gcd(model.tp.size, t) if model.tp.sequence else 1
    if seq_idx_bt is not None:
        seq_idx_bt = filled_up(seq_idx_bt, multiple)
    return model(filled_up(tokens_bt, multiple), widths, seq_idx_bt=seq_idx_bt)[:b]
