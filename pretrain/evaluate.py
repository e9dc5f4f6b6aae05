"""Validation loss of every width, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from modeling.language import LanguageModel
from modeling.loss import next_token_loss
from pretrain.data import Batch
from pretrain.distributed import Ranks


@torch.no_grad()
def validation_losses(
    model: LanguageModel, batches: Iterable[Batch], widths: Sequence[int], ranks: Ranks
) -> dict[int, float]:
    """Mean next-token loss in nats of each uniform width (head count) over all ranks' batches, each token counted once.

    `batches` is this data-parallel rank's share. All ranks must call. Ranks may hold different numbers of batches.
    """
    sums = torch.zeros(len(widths) + 1, dtype=torch.float64)
    for batch in batches:
        n_tokens = batch.targets_bt.numel()
        tokens_bt, targets_bt = batch.tokens_bt.to(ranks.device), batch.targets_bt.to(ranks.device)
        seq_idx_bt = None if batch.seq_idx_bt is None else batch.seq_idx_bt.to(ranks.device)
        for i, n_heads in enumerate(widths):
            hidden_btd = model(tokens_bt, model.cfg.layer_widths(n_heads), seq_idx_bt=seq_idx_bt)
            sums[i] += n_tokens * next_token_loss(model, hidden_btd, targets_bt).next_token.double().cpu()
        sums[-1] += n_tokens
    # Ranks of one replica hold the same sums; adding all of them leaves the ratio as it is.
    dist.all_reduce(sums, group=ranks.cpu_group)
    return {n_heads: float(sums[i] / sums[-1]) for i, n_heads in enumerate(widths)}
