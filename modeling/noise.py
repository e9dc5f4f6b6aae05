"""What a training pass drops: masks as a function of the run's seed, the submodel, the layer, and each image's number.

An image's number in the global data order is its own for the whole run, so it stands for the step too. Nothing depends on
how images are laid over ranks and micro-batches, and nothing has to be saved (modeling.ops.dropout).

Letters: b images, l layers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modeling.nesting import LayerWidths
from modeling.ops.dropout import Drop, split_mix, threshold_of

SITES = 3
"""Draws of a layer: its projection's entries, its output's entries, and whether an image skips it."""


class LayerDrops(NamedTuple):
    """What a block drops."""

    branch: Drop | None
    """Of the branch that it adds first: the output of the block before it."""
    projection: Drop | None
    """Of its mixer's input projection."""


NO_DROPS = LayerDrops(None, None)


@dataclass(frozen=True)
class Noise:
    """The draws of one training pass of one submodel."""

    seed: int
    """The run's."""
    number_b: Tensor
    """Each image's number in the global data order, int64."""

    def layers(
        self, widths: LayerWidths, *, dropout: float, drop_path: float, n_tokens: int, first_row: int
    ) -> list[LayerDrops] | None:
        """What each block, and at the end the final norm, drops; None where both rates are 0.

        `dropout` is the rate of projections and of outputs, `drop_path` that of skipping the last layer; it rises evenly
        from 0 at the first (arXiv 1603.09382). Images have `n_tokens` tokens; between mixers this rank's first one is
        `first_row` of the batch.
        """
        if dropout == 0 and drop_path == 0:
            return None
        n_layers = len(widths)
        text = f"{self.seed}:{','.join(map(str, widths))}".encode()
        base = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
        device = self.number_b.device
        # On the device all the way: a copy from the host would wait for it, and could not be captured in a CUDA graph.
        site_l = split_mix(torch.arange(SITES * n_layers, device=device) + base)
        key_lb = split_mix(split_mix(self.number_b)[None, :] ^ site_l[:, None])
        projection_lb, output_lb, path_lb = key_lb.view(SITES, n_layers, -1).unbind()

        threshold = threshold_of(dropout)
        kept = 2.0**32 / (2**32 - threshold)
        rise = threshold_of(drop_path) / max(1, n_layers - 1)
        skip_l1 = (torch.arange(n_layers, dtype=torch.float64, device=device) * rise).floor()[:, None]
        stays_lb = (path_lb >> 32) + 2**31 >= skip_l1
        output_scale_lb = (stays_lb * (kept * 2.0**32 / (2.0**32 - skip_l1))).float()
        projection_scale_b = torch.full(self.number_b.shape, kept, dtype=torch.float32, device=device)
        drops: list[LayerDrops] = []
        branch: Drop | None = None
        for layer in range(n_layers):
            projection = Drop(projection_lb[layer], projection_scale_b, threshold, n_tokens) if threshold else None
            drops.append(LayerDrops(branch, projection))
            branch = Drop(output_lb[layer], output_scale_lb[layer], threshold, n_tokens, first_row)
        return [*drops, LayerDrops(branch, None)]
