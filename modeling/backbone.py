"""The stack of MatMamba2 blocks that every network here is built of, and what all of them do with their parameters.

Letters: b batch, t time, d model, m tokens between mixers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling import nesting
from modeling.config import BackboneConfig
from modeling.mixer import Mixer, MixerState, initial_values
from modeling.noise import NO_DROPS, LayerDrops
from modeling.ops.fused_mixer import Recompute as MixerRecompute
from modeling.ops.norm import add_norm
from modeling.tensor_parallel import Layout, TensorParallel, layout_of, local_part

Recompute = Literal["none", "states", "selective", "block"]


class Gathered(NamedTuple):
    """The heads of a mixer that every tensor-parallel rank has (modeling.gathered_widths)."""

    n_heads: int
    mixer: Mixer


class Block(nn.Module):
    """Add the branch before it, then norm and mix: x + branch, mixer(norm(x + branch)).

    Blocks hand on the residual stream (float32) and what is yet to be added to it, so that the addition and the next
    norm are one pass over memory. Between mixers tokens are flattened: m, batch and time, or under sequence parallelism
    this rank's share of them.
    """

    def __init__(
        self,
        cfg: BackboneConfig,
        tp: TensorParallel,
        dtype: torch.dtype,
        *,
        recompute: MixerRecompute = "none",
        in_place_gradients: bool = False,
        sends_apart: bool = False,
        float8: bool = False,
    ) -> None:
        super().__init__()
        self.eps, self.dtype, self.tp = cfg.norm_eps, dtype, tp
        self.norm = nn.Parameter(torch.empty(cfg.d_model, dtype=torch.float32))
        self.norm_bias = _bias(cfg)
        self.mixer = Mixer(
            cfg,
            tp,
            dtype,
            recompute=recompute,
            in_place_gradients=in_place_gradients,
            sends_apart=sends_apart,
            float8=float8,
        )
        self.gathered: Gathered | None = None
        """What trains instead of `mixer` at the widths that it has, on this rank's own sequences."""

    def forward(
        self,
        x_md: Tensor,
        branch_md: Tensor | None,
        n_heads: int,
        batch: int,
        seq_idx_bt: Tensor | None = None,
        state: MixerState | None = None,
        drops: LayerDrops = NO_DROPS,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with `branch_md` (None: nothing) added, and this block's own branch at `n_heads` heads.

        `drops` says what is dropped of `branch_md` and of this block's projection.
        """
        weight = self.tp.replicate(self.norm)
        bias = None if self.norm_bias is None else self.tp.replicate(self.norm_bias)
        x_md, normed_md = add_norm(x_md, branch_md, weight, bias, eps=self.eps, dtype=self.dtype, drop=drops.branch)
        mixer, drop, gathered = self.mixer, drops.projection, self.gathered
        if gathered is not None and n_heads <= gathered.n_heads and state is None and torch.is_grad_enabled():
            own = self.tp.own(batch)
            mixer, batch = gathered.mixer, own.stop - own.start
            seq_idx_bt = None if seq_idx_bt is None else seq_idx_bt[own]
            drop = None if drop is None else drop._replace(key_b=drop.key_b[own], scale_b=drop.scale_b[own])
        return x_md, mixer(normed_md, n_heads, batch, seq_idx_bt=seq_idx_bt, state=state, drop=drop)


class Backbone(nn.Module):
    """What a network adds its ends to: blocks, the final norm, and which submodel runs as an argument of forward.

    A subclass says in `make_parameters` which are its own, and calls `make_stack` where the blocks' stand among them. Parameters
    are float32 and are cast to `dtype` where they are used. Build it on the meta device, move it with `to_empty`, then call
    `init_weights` or load weights.
    """

    cfg: BackboneConfig
    blocks: Sequence[Block]

    def __init__(
        self,
        cfg: Any,
        *,
        tp: TensorParallel | None = None,
        dtype: torch.dtype = torch.float32,
        recompute: Recompute = "none",
        held: nesting.LayerWidths | None = None,
        in_place_gradients: bool = False,
        float8: bool = False,
    ) -> None:
        """`recompute` trades memory of training for time. Backward does again, with "states", the scan's states, which the
        fused path alone keeps; with "selective" what lies between the mixers' projections; with "block" the whole block,
        whose input alone is kept.

        `held` makes a model whose layers hold fewer heads than cfg.n_heads, one count each: a mix that was cut out.

        `in_place_gradients`: the fused operations add each weight's gradient to its `.grad`, which must exist before
        forward, at the rows that the width uses, within the matrix product: nothing is filled with zeros, rounded or added
        a second time. For `backward()` alone: torch.autograd.grad would find no gradient there. Gradients of weights that
        tensor-parallel ranks share stay partial (`tensor_parallel.is_partial`), to be summed once for all passes of a step.

        `float8`: where gradients are on, the fused path multiplies the mixers' projections in float8, forward and in the
        gradients of their inputs (modeling.ops.float8). Without gradients, as in validation, all is computed in `dtype`.
        """
        super().__init__()
        self.held = held or nesting.uniform(cfg.n_heads, cfg.n_layers)
        nesting.check_layer_widths(self.held, cfg.n_heads, cfg.n_layers, 1 if tp is None else tp.size)
        self.cfg, self.dtype, self.recompute = cfg, dtype, recompute
        self.tp = replace(tp or TensorParallel(), sums_later=in_place_gradients)
        self.in_place_gradients, self.float8 = in_place_gradients, float8
        self.make_parameters()

    def make_parameters(self) -> None:
        """Make all parameters, those of the stack among them."""
        raise NotImplementedError

    def make_stack(self) -> None:
        """Make the blocks and the final norm."""
        inside: dict[Recompute, MixerRecompute] = {"states": "states", "selective": "inside"}
        blocks = [
            Block(
                _holding(self.cfg, n),
                self.tp,
                self.dtype,
                recompute=inside.get(self.recompute, "none"),
                in_place_gradients=self.in_place_gradients,
                sends_apart=self.recompute == "block",
                float8=self.float8,
            )
            for n in self.held
        ]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.final_norm = nn.Parameter(torch.empty(self.cfg.d_model, dtype=torch.float32))
        self.final_norm_bias = _bias(self.cfg)

    def check_widths(self, widths: nesting.LayerWidths) -> None:
        """Raise ValueError where `widths` does not fit the model."""
        nesting.check_layer_widths(widths, self.cfg.n_heads, self.cfg.n_layers, self.tp.size, self.held)

    def run_stack(
        self,
        x_md: Tensor,
        widths: nesting.LayerWidths,
        batch: int,
        *,
        seq_idx_bt: Tensor | None = None,
        states: list[MixerState] | None = None,
        drops: Sequence[LayerDrops] | None = None,
    ) -> Tensor:
        """The final norm's output (compute dtype) of the submodel `widths` on `x_md` (float32), m as between mixers.

        `drops` holds one entry a layer and one for the final norm. All ranks of `tp` must call.
        """
        branch_md = None
        drops = drops or [NO_DROPS] * (len(self.blocks) + 1)
        for layer, block in enumerate(self.blocks):
            if self.recompute == "block" and states is None and torch.is_grad_enabled():
                # What is random in a block is a function of its arguments, so there is no generator to put back.
                x_md, branch_md = checkpoint(
                    block,
                    x_md,
                    branch_md,
                    widths[layer],
                    batch,
                    seq_idx_bt,
                    None,
                    drops[layer],
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                state = None if states is None else states[layer]
                x_md, branch_md = block(x_md, branch_md, widths[layer], batch, seq_idx_bt, state, drops[layer])
        weight = self.tp.replicate(self.final_norm)
        bias = None if self.final_norm_bias is None else self.tp.replicate(self.final_norm_bias)
        drop = drops[-1].branch
        return add_norm(x_md, branch_md, weight, bias, eps=self.cfg.norm_eps, dtype=self.dtype, drop=drop)[1]

    def empty_states(self, batch: int, widths: nesting.LayerWidths) -> list[MixerState]:
        """One state a layer, before the first token of `batch` sequences."""
        return [block.mixer.empty_state(batch, n) for block, n in zip(self.blocks, widths, strict=True)]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter in place. The values depend on `seed` and the parameter's name, not on tp or on order."""
        shapes = self.logical_shapes(self.cfg)
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
            full = self.initial_value(name, shapes[name], generator)
            part = local_part(full, layout_of(name), self.cfg.n_heads, self.tp.size, self.tp.rank)
            parameter.copy_(part)

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Initial value of the parameter `name` of logical `shape`, float32 on the CPU."""
        if layout_of(name) is Layout.BETWEEN:
            return torch.zeros(shape) if name.endswith("_bias") else torch.ones(shape)
        return initial_values(name.rpartition(".")[2], shape, self.cfg, generator)

    @classmethod
    def logical_shapes(cls, cfg: Any) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the whole model, whatever tp is."""
        with torch.device("meta"):
            whole = cls(cfg)
        return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}


def _bias(cfg: BackboneConfig) -> nn.Parameter | None:
    """The bias of a norm of the residual stream; an RMSNorm has none."""
    if cfg.residual_norm == "rms":
        return None
    return nn.Parameter(torch.empty(cfg.d_model, dtype=torch.float32))


def _holding(cfg: BackboneConfig, n_heads: int) -> BackboneConfig:
    return cfg if n_heads == cfg.n_heads else replace(cfg, n_heads=n_heads, widths=(n_heads,))
