"""Which heads of a Mamba2 come first: a width is the first heads, so a model that was never nested wants its best ones there.

Heads do not see each other inside a mixer: B and C are shared, and the gated norm takes one mean over all channels. So any
order computes the same function at full width, up to the rounding of sums, and decides what a narrower width is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modeling.config import LanguageConfig
from modeling.tensor_parallel import Layout, layout_of


def head_importance(state: Mapping[str, Tensor], cfg: LanguageConfig, layer: int) -> Tensor:
    """What each head of a layer can contribute, float64, shape h: ||out_h diag(g_h)|| ||in_x_h|| ||in_z_h||.

    out_h are the head's columns of the output projection, g_h its part of the gated norm's weight, in_x_h and in_z_h its
    rows of the input projection, all in Frobenius norm. A head is x times its gate, scaled by g and sent through out: each
    factor near zero makes it mute. Weights alone are looked at, no data.
    """
    mixer = {name: state[f"blocks.{layer}.mixer.{name}"].double() for name in ("out", "gated_norm", "in_x", "in_z")}
    heads = (cfg.n_heads, cfg.headdim)
    leaving_h = (mixer["out"] * mixer["gated_norm"]).unflatten(1, heads).square().sum(dim=(0, 2)).sqrt()
    entering_h = [mixer[name].unflatten(0, heads).square().sum(dim=(1, 2)).sqrt() for name in ("in_x", "in_z")]
    return leaving_h * entering_h[0] * entering_h[1]


def importance_order(state: Mapping[str, Tensor], cfg: LanguageConfig) -> list[list[int]]:
    """Of each layer, its heads from the most to the least important; equal ones stay in their order."""
    importances = (head_importance(state, cfg, layer) for layer in range(cfg.n_layers))
    return [torch.argsort(h, descending=True, stable=True).tolist() for h in importances]


def reorder_heads(
    state: Mapping[str, Tensor], cfg: LanguageConfig, orders: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """The same model with head orders[l][i] of layer l in place i: every parameter that has heads, on the axis that has them.

    Raises ValueError where an order is no permutation of the layer's heads.
    """
    if len(orders) != cfg.n_layers or any(sorted(order) != list(range(cfg.n_heads)) for order in orders):
        raise ValueError(f"head orders: give {cfg.n_layers} permutations of 0 .. {cfg.n_heads - 1}, one for each layer")
    moved = {}
    for name, tensor in state.items():
        layout = layout_of(name)
        if layout not in (Layout.HEAD_ROWS, Layout.HEAD_COLUMNS):
            moved[name] = tensor
            continue
        axis = 0 if layout is Layout.HEAD_ROWS else 1
        order = torch.tensor(orders[int(name.split(".")[1])], device=tensor.device)
        by_head = tensor.unflatten(axis, (cfg.n_heads, -1))
        moved[name] = by_head.index_select(axis, order).flatten(axis, axis + 1)
    return moved
