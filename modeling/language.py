"""The nested language model: embedding, MatMamba2 blocks, final norm, head tied to the embedding.

Letters: b batch, t time, d model, m tokens between mixers, v vocabulary (this rank's rows).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling import nesting
from modeling.config import LanguageConfig
from modeling.mixer import Mixer, MixerState, initial_values
from modeling.ops.fused_mixer import Recompute as MixerRecompute
from modeling.ops.norm import add_rms_norm
from modeling.tensor_parallel import Layout, TensorParallel, layout_of, local_part

EMBEDDING_STD = 0.02
Recompute = Literal["none", "states", "selective", "block"]


class Block(nn.Module):
    """Add the branch before it, then norm and mix: x + branch, mixer(norm(x + branch)).

    Blocks hand on the residual stream (float32) and what is yet to be added to it, so that the addition and the next
    norm are one pass over memory. Between mixers tokens are flattened: m, batch and time, or under sequence parallelism
    this rank's share of them.
    """

    def __init__(
        self,
        cfg: LanguageConfig,
        tp: TensorParallel,
        dtype: torch.dtype,
        *,
        recompute: MixerRecompute = "none",
        in_place_gradients: bool = False,
    ) -> None:
        super().__init__()
        self.eps, self.dtype, self.tp = cfg.norm_eps, dtype, tp
        self.norm = nn.Parameter(torch.empty(cfg.d_model, dtype=torch.float32))
        self.mixer = Mixer(cfg, tp, dtype, recompute=recompute, in_place_gradients=in_place_gradients)

    def forward(
        self,
        x_md: Tensor,
        branch_md: Tensor | None,
        n_heads: int,
        batch: int,
        seq_idx_bt: Tensor | None = None,
        state: MixerState | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with `branch_md` (None: nothing) added, and this block's own branch at `n_heads` heads."""
        weight = self.tp.replicate(self.norm)
        x_md, normed_md = add_rms_norm(x_md, branch_md, weight, eps=self.eps, dtype=self.dtype)
        normed_btd = self.tp.enter(normed_md).unflatten(0, (batch, -1))
        partial_btd = self.mixer(normed_btd, n_heads, seq_idx_bt=seq_idx_bt, state=state)
        return x_md, self.tp.leave(partial_btd.flatten(0, 1))


class LanguageModel(nn.Module):
    """A nested LM. Which submodel runs is an argument: one head count for each layer.

    Parameters are float32 and are cast to `dtype` where they are used. Build it on the meta device, move it with
    `to_empty`, then call `init_weights` or load weights.
    """

    def __init__(
        self,
        cfg: LanguageConfig,
        *,
        tp: TensorParallel | None = None,
        dtype: torch.dtype = torch.float32,
        recompute: Recompute = "none",
        held: nesting.LayerWidths | None = None,
        in_place_gradients: bool = False,
    ) -> None:
        """`recompute` trades memory of training for time. Backward does again, with "states", the scan's states, which the
        fused path alone keeps; with "selective" what lies between the mixers' projections; with "block" the whole block,
        whose input alone is kept.

        `held` makes a model whose layers hold fewer heads than cfg.n_heads, one count each: a mix that was cut out.

        `in_place_gradients`: the fused operations add each weight's gradient to its `.grad`, which must exist before
        forward, at the rows that the width uses, within the matrix product: nothing is filled with zeros, rounded or added
        a second time. For `backward()` alone: torch.autograd.grad would find no gradient there.
        """
        super().__init__()
        self.held = held or nesting.uniform(cfg.n_heads, cfg.n_layers)
        nesting.check_layer_widths(self.held, cfg.n_heads, cfg.n_layers, 1 if tp is None else tp.size)
        self.cfg, self.tp, self.dtype, self.recompute = cfg, tp or TensorParallel(), dtype, recompute
        self.vocab = nesting.vocab_rows(cfg.n_vocab_rows, self.tp.size, self.tp.rank)
        self.embedding = nn.Parameter(torch.empty(len(self.vocab), cfg.d_model, dtype=torch.float32))
        inside: dict[Recompute, MixerRecompute] = {"states": "states", "selective": "inside"}
        self.in_place_gradients = in_place_gradients
        blocks = [
            Block(
                _holding(cfg, n),
                self.tp,
                dtype,
                recompute=inside.get(recompute, "none"),
                in_place_gradients=in_place_gradients,
            )
            for n in self.held
        ]
        self.blocks: Sequence[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.final_norm = nn.Parameter(torch.empty(cfg.d_model, dtype=torch.float32))

    def forward(
        self,
        tokens_bt: Tensor,
        widths: nesting.LayerWidths,
        *,
        seq_idx_bt: Tensor | None = None,
        states: list[MixerState] | None = None,
    ) -> Tensor:
        """Final hidden states, shape b t d in the compute dtype, of the submodel `widths`; `logits` turns them into scores.

        `tokens_bt` is int64 below cfg.vocab_size; `seq_idx_bt` (int32) keeps documents apart; `states`, one a layer, are
        read and overwritten. All ranks of `tp` must call. Raises ValueError where `widths` does not fit the model.
        """
        nesting.check_layer_widths(widths, self.cfg.n_heads, self.cfg.n_layers, self.tp.size)
        for layer, (asked, held) in enumerate(zip(widths, self.held, strict=True)):
            if asked > held:
                raise ValueError(f"layer {layer}: width {asked}, but this model was cut to {held} heads there")
        batch = tokens_bt.shape[0]
        x_md, branch_md = self._embed(tokens_bt), None
        for layer, block in enumerate(self.blocks):
            if self.recompute == "block" and states is None and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no generator to put back.
                x_md, branch_md = checkpoint(
                    block,
                    x_md,
                    branch_md,
                    widths[layer],
                    batch,
                    seq_idx_bt,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                state = None if states is None else states[layer]
                x_md, branch_md = block(x_md, branch_md, widths[layer], batch, seq_idx_bt, state)
        weight = self.tp.replicate(self.final_norm)
        hidden_md = add_rms_norm(x_md, branch_md, weight, eps=self.cfg.norm_eps, dtype=self.dtype)[1]
        return self.tp.enter(hidden_md).unflatten(0, (batch, -1))

    def logits(self, hidden_btd: Tensor) -> Tensor:
        """Scores of this rank's vocabulary rows, float32, shape b t v; padding rows beyond cfg.vocab_size included."""
        return F.linear(hidden_btd, self.embedding.to(self.dtype)).float()

    def empty_states(self, batch: int, widths: nesting.LayerWidths) -> list[MixerState]:
        """One state a layer, before the first token of `batch` sequences."""
        return [block.mixer.empty_state(batch, n) for block, n in zip(self.blocks, widths, strict=True)]

    def _embed(self, tokens_bt: Tensor) -> Tensor:
        if len(self.vocab) == self.cfg.n_vocab_rows:  # every id is this rank's: nothing to mask, nobody to sum with
            return F.embedding(tokens_bt, self.embedding).flatten(0, 1)
        local_bt = tokens_bt - self.vocab.start
        mine_bt = (local_bt >= 0) & (local_bt < len(self.vocab))
        rows_btd = F.embedding(torch.where(mine_bt, local_bt, 0), self.embedding)
        return self.tp.leave((rows_btd * mine_bt[..., None]).flatten(0, 1))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter in place. The values depend on `seed` and the parameter's name, not on tp or on order."""
        shapes = logical_shapes(self.cfg)
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
            full = _initial_value(name, shapes[name], self.cfg, generator)
            part = local_part(full, layout_of(name), self.cfg.n_heads, self.tp.size, self.tp.rank)
            parameter.copy_(part)


def _holding(cfg: LanguageConfig, n_heads: int) -> LanguageConfig:
    return cfg if n_heads == cfg.n_heads else replace(cfg, n_heads=n_heads, widths=(n_heads,))


def logical_shapes(cfg: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the whole model, whatever tp is."""
    with torch.device("meta"):
        whole = LanguageModel(cfg)
    return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}


def _initial_value(name: str, shape: tuple[int, ...], cfg: LanguageConfig, generator: torch.Generator) -> Tensor:
    if name == "embedding":
        return torch.empty(shape).normal_(std=EMBEDDING_STD, generator=generator)
    if layout_of(name) is Layout.REPLICATED:
        return torch.ones(shape)
    return initial_values(name.rpartition(".")[2], shape, cfg, generator)
