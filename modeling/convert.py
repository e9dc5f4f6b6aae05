"""State dicts of mamba-ssm and the public MatMamba to ours and back, and submodels cut out of a nested model.

mamba-ssm's Mamba2 stacks what we keep apart: in_proj rows are [z, x, B, C, dt] and conv1d channels [x, B, C]. The public
MatMamba uses the same names. Only one B/C group is supported, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from modeling import nesting
from modeling.config import BackboneConfig, LanguageConfig, VisionConfig
from modeling.models import build_model, logical_shapes

StateDict = dict[str, Tensor]
Config = TypeVar("Config", bound=BackboneConfig)


def cut(
    state: Mapping[str, Tensor], cfg: Config, n_heads: int, held: nesting.LayerWidths | None = None
) -> tuple[StateDict, Config]:
    """The standalone model of the first `n_heads` heads of every layer: its logical state dict and its config.

    `held` are the heads of each layer of a `state` that was itself cut out of the model `cfg`. What comes out has one width, its
    own full one, and computes what the nested model computes in place at `n_heads`. Tensors are copies. Raises ValueError where
    the width or the state dict does not fit `cfg`.
    """
    nesting.check_layer_widths(cfg.layer_widths(n_heads), cfg.n_heads, cfg.n_layers, 1, held)
    check_state(state, cfg, held)
    small = replace(cfg, n_heads=n_heads, widths=(n_heads,))
    shapes = logical_shapes(small)
    part = {name: tensor[tuple(slice(size) for size in shapes[name])].clone() for name, tensor in state.items()}
    return part, small


def cut_mix(
    state: Mapping[str, Tensor],
    cfg: BackboneConfig,
    widths: nesting.LayerWidths,
    held: nesting.LayerWidths | None = None,
) -> StateDict:
    """The parameters that the submodel `widths` (heads of each layer) uses, for a model with `held=widths`.

    `held` are the heads of each layer of a `state` that was itself cut out of the model `cfg`. Raises ValueError where the widths
    or the state dict do not fit `cfg`.
    """
    nesting.check_layer_widths(widths, cfg.n_heads, cfg.n_layers, 1, held)
    check_state(state, cfg, held)
    shapes = _held_shapes(cfg, widths)
    return {name: tensor[tuple(slice(size) for size in shapes[name])].clone() for name, tensor in state.items()}


def check_state(state: Mapping[str, Tensor], cfg: BackboneConfig, held: nesting.LayerWidths | None = None) -> None:
    """Raise ValueError, naming the parameter, unless `state` is exactly the model's parameters: the whole one's, or what
    is left of it where its layers were cut to `held` heads."""
    expected = logical_shapes(cfg) if held is None else _held_shapes(cfg, held)
    _check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, expected)


def _held_shapes(cfg: BackboneConfig, held: nesting.LayerWidths) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_model(cfg, held=held).named_parameters()}


def from_mamba_ssm(state: Mapping[str, Tensor], cfg: LanguageConfig) -> StateDict:
    """Our logical state dict from a MambaLMHeadModel's or a public MatMamba's; dtypes are kept, parts are views.

    The embedding is padded with zero rows to cfg.n_vocab_rows where it has fewer. Raises ValueError, naming the key, where a
    tensor is missing, unknown or of another shape than `cfg` asks for.
    """
    state = dict(state)
    embedding = state.get("backbone.embedding.weight")
    if embedding is not None and cfg.vocab_size <= embedding.shape[0] < cfg.n_vocab_rows:
        missing = cfg.n_vocab_rows - embedding.shape[0]
        state["backbone.embedding.weight"] = torch.cat([embedding, embedding.new_zeros(missing, embedding.shape[1])])
    head = state.pop("lm_head.weight", None)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"lm_head.weight {tuple(head.shape)} differs from backbone.embedding.weight {tuple(embedding.shape)}: "
            "our head is the embedding. Use a checkpoint with tie_embeddings=True"
        )
    expected = {name: shape for name, shape in _mamba_ssm_shapes(cfg).items() if name != "lm_head.weight"}
    _check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, expected)
    ours = {"embedding": state["backbone.embedding.weight"], "final_norm": state["backbone.norm_f.weight"]}
    for layer in range(cfg.n_layers):
        source, target = f"backbone.layers.{layer}.", f"blocks.{layer}."
        ours[f"{target}norm"] = state[f"{source}norm.weight"]
        ours |= _mixer_from(state, f"{source}mixer.", f"{target}mixer.", cfg)
    return ours


def to_mamba_ssm(state: Mapping[str, Tensor], cfg: LanguageConfig) -> StateDict:
    """A MambaLMHeadModel's state dict from our logical one; the inverse of `from_mamba_ssm`. Raises ValueError."""
    check_state(state, cfg)
    theirs = {"backbone.embedding.weight": state["embedding"], "backbone.norm_f.weight": state["final_norm"]}
    theirs["lm_head.weight"] = state["embedding"]
    for layer in range(cfg.n_layers):
        target = f"backbone.layers.{layer}."
        theirs[f"{target}norm.weight"] = state[f"blocks.{layer}.norm"]
        theirs |= _mixer_to(state, f"blocks.{layer}.mixer.", f"{target}mixer.")
    return theirs


def to_hf(state: Mapping[str, Tensor], cfg: LanguageConfig) -> StateDict:
    """A Mamba2ForCausalLM's state dict (transformers) from our logical one; its head is tied and left out."""
    theirs = to_mamba_ssm(state, cfg)
    del theirs["lm_head.weight"]
    return {name.replace("backbone.embedding.", "backbone.embeddings."): tensor for name, tensor in theirs.items()}


def from_hf(state: Mapping[str, Tensor]) -> StateDict:
    """The same tensors under mamba-ssm's names."""
    return {name.replace("backbone.embeddings.", "backbone.embedding."): tensor for name, tensor in state.items()}


def from_matmamba_vision(state: Mapping[str, Tensor], cfg: VisionConfig) -> StateDict:
    """Our logical state dict from a public MatMamba2Vision's; dtypes are kept, parts are views.

    Its class token and the last row of its positions, which average pooling never reads, are left out there. Raises
    ValueError, naming the key, where a tensor is missing, unknown or of another shape than `cfg` asks for.
    """
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _check_shapes(found, _matmamba_vision_shapes(cfg))
    n_positions = cfg.n_tokens(cfg.image_size, cfg.image_size)
    ours = {
        "patch": state["patch_embed.proj.weight"].flatten(1),
        "patch_bias": state["patch_embed.proj.bias"],
        "positions": state["pos_embed"][0, :n_positions],
    }
    if cfg.pool == "cls":
        ours["cls"] = state["cls_token"][0]
    for name, theirs in _vision_same(cfg).items():
        ours[name] = state[theirs]
    for layer in range(cfg.n_layers):
        ours |= _mixer_from(state, f"layers.{layer}.mixer.", f"blocks.{layer}.mixer.", cfg)
    return {name: ours[name] for name in logical_shapes(cfg)}


def to_matmamba_vision(state: Mapping[str, Tensor], cfg: VisionConfig) -> StateDict:
    """A public MatMamba2Vision's state dict from our logical one; the inverse of `from_matmamba_vision`. Raises ValueError.

    With average pooling the class token and its position, which that model has and does not read, are zeros.
    """
    check_state(state, cfg)
    positions, patch = state["positions"], state["patch"]
    cls = state.get("cls")
    if cls is None:
        cls = positions.new_zeros(1, cfg.d_model)
        positions = torch.cat([positions, cls])
    theirs = {
        "cls_token": cls[None],
        "pos_embed": positions[None],
        "patch_embed.proj.weight": patch.unflatten(1, (-1, cfg.patch_size, cfg.patch_size)),
        "patch_embed.proj.bias": state["patch_bias"],
    }
    theirs |= {name: state[ours] for ours, name in _vision_same(cfg).items()}
    for layer in range(cfg.n_layers):
        theirs |= _mixer_to(state, f"blocks.{layer}.mixer.", f"layers.{layer}.mixer.")
    return theirs


def _vision_same(cfg: VisionConfig) -> dict[str, str]:
    """Parameters outside mixers that are one tensor on both sides: our name to theirs."""
    norms = {"final_norm": "norm_f"} | {f"blocks.{layer}.norm": f"layers.{layer}.norm" for layer in range(cfg.n_layers)}
    same = {ours: f"{theirs}.weight" for ours, theirs in norms.items()}
    if cfg.residual_norm == "layer":
        same |= {f"{ours}_bias": f"{theirs}.bias" for ours, theirs in norms.items()}
    return same | {"head": "head.weight", "head_bias": "head.bias"}


def _matmamba_vision_shapes(cfg: VisionConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        empty = {name: torch.empty(shape) for name, shape in logical_shapes(cfg).items()}
        return {name: tuple(tensor.shape) for name, tensor in to_matmamba_vision(empty, cfg).items()}


def _mixer_from(state: Mapping[str, Tensor], source: str, target: str, cfg: BackboneConfig) -> StateDict:
    """Our parameters of the mixer that mamba-ssm's names begin with `source`, under names that begin with `target`."""
    inner, n = cfg.d_inner, cfg.d_state
    z, x, bc, dt = state[f"{source}in_proj.weight"].split([inner, inner, 2 * n, cfg.n_heads])
    conv_x, conv_bc = state[f"{source}conv1d.weight"].squeeze(1).split([inner, 2 * n])
    bias_x, bias_bc = state[f"{source}conv1d.bias"].split([inner, 2 * n])
    mixer = {"in_z": z, "in_x": x, "in_bc": bc, "in_dt": dt, "conv_x": conv_x, "conv_bc": conv_bc}
    mixer |= {"conv_x_bias": bias_x, "conv_bc_bias": bias_bc}
    mixer |= {name: state[f"{source}{theirs}"] for name, theirs in _SAME.items()}
    return {f"{target}{name}": tensor for name, tensor in mixer.items()}


def _mixer_to(state: Mapping[str, Tensor], source: str, target: str) -> StateDict:
    """The other way."""
    ours = {name: state[f"{source}{name}"] for name in _MIXER}
    theirs = {
        "in_proj.weight": torch.cat([ours[name] for name in ("in_z", "in_x", "in_bc", "in_dt")]),
        "conv1d.weight": torch.cat([ours["conv_x"], ours["conv_bc"]]).unsqueeze(1),
        "conv1d.bias": torch.cat([ours["conv_x_bias"], ours["conv_bc_bias"]]),
        **{name: ours[own] for own, name in _SAME.items()},
    }
    return {f"{target}{name}": tensor for name, tensor in theirs.items()}


_SAME = {"dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "gated_norm": "norm.weight", "out": "out_proj.weight"}
"""Mixer parameters that are one tensor on both sides: our name to theirs."""
_MIXER = ("in_z", "in_x", "in_bc", "in_dt", "conv_x", "conv_bc", "conv_x_bias", "conv_bc_bias", *_SAME)


def _mamba_ssm_shapes(cfg: LanguageConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        empty = {name: torch.empty(shape) for name, shape in logical_shapes(cfg).items()}
    return {name: tuple(tensor.shape) for name, tensor in to_mamba_ssm(empty, cfg).items()}


def _check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in _in_order(expected, found):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{name}: shape {found.get(name, 'absent')}, the config says {expected.get(name, 'absent')}. "
                "Use the config that the weights were made with (one B/C group; a language model's head tied to its embedding)"
            )


def _in_order(*maps: Mapping[str, object]) -> Iterator[str]:
    seen: set[str] = set()
    for names in maps:
        for name in names:
            if name not in seen:
                seen.add(name)
                yield name
