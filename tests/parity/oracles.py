"""Independent Mamba2 models: mamba-ssm's reference functions, its Triton modules, and transformers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from modeling.config import BackboneConfig, LanguageConfig, VisionConfig
from modeling.ops.upstream import allow_import_without_cuda_extension

allow_import_without_cuda_extension()

# The stand-in above must come first.
from mamba_ssm.models.config_mamba import MambaConfig  # noqa: E402
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # noqa: E402
from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref  # noqa: E402
from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref  # noqa: E402


def mamba_ssm_ref_logits(state: Mapping[str, Tensor], cfg: LanguageConfig, tokens_bt: Tensor) -> Tensor:
    """Logits of the model that a MambaLMHeadModel state dict describes, by mamba-ssm's `_ref` functions; any device."""
    x = F.embedding(tokens_bt, state["backbone.embedding.weight"])
    for layer in range(cfg.n_layers):
        own = {k.removeprefix(f"backbone.layers.{layer}."): v for k, v in state.items() if f".{layer}." in k}
        x = x + _mixer_ref(own, cfg, rms_norm_ref(x, own["norm.weight"], None, eps=cfg.norm_eps))
    hidden = rms_norm_ref(x, state["backbone.norm_f.weight"], None, eps=cfg.norm_eps)
    return F.linear(hidden, state["backbone.embedding.weight"])


def _mixer_ref(own: Mapping[str, Tensor], cfg: BackboneConfig, x: Tensor) -> Tensor:
    inner, n, t = cfg.d_inner, cfg.d_state, x.shape[1]
    z, xbc, dt = F.linear(x, own["mixer.in_proj.weight"]).split([inner, inner + 2 * n, cfg.n_heads], dim=-1)
    weight, bias = own["mixer.conv1d.weight"], own["mixer.conv1d.bias"]
    conv = F.conv1d(rearrange(xbc, "b t c -> b c t"), weight, bias, padding=cfg.d_conv - 1, groups=weight.shape[0])
    xbc = F.silu(rearrange(conv[..., :t], "b c t -> b t c"))
    x, B, C = xbc.split([inner, n, n], dim=-1)
    y = ssd_chunk_scan_combined_ref(
        rearrange(x, "b t (h p) -> b t h p", h=cfg.n_heads),
        dt,
        -torch.exp(own["mixer.A_log"]),
        rearrange(B, "b t n -> b t 1 n"),
        rearrange(C, "b t n -> b t 1 n"),
        next(size for size in range(cfg.chunk_size, 0, -1) if t % size == 0),  # it wants whole chunks
        D=own["mixer.D"],
        dt_bias=own["mixer.dt_bias"],
        dt_softplus=True,
    )
    y = rearrange(y, "b t h p -> b t (h p)")
    y = rms_norm_ref(y, own["mixer.norm.weight"], None, z=z, eps=cfg.norm_eps, norm_before_gate=False)
    return F.linear(y, own["mixer.out_proj.weight"])


def matmamba_vision_logits(
    state: Mapping[str, Tensor], cfg: VisionConfig, images_bchw: Tensor, heads: Sequence[int]
) -> Tensor:
    """Logits of the model that a public MatMamba2Vision's state dict describes, with the first `heads` heads of each layer.

    Its arithmetic in plain PyTorch, width by slices of the stacked weights as there, on mamba-ssm's `_ref` functions.
    """
    norm = partial(_norm, state, eps=cfg.norm_eps)
    patches = F.conv2d(
        images_bchw, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=cfg.patch_size
    )
    tokens = patches.flatten(2).mT
    tokens = torch.cat([tokens, state["cls_token"].expand(len(tokens), -1, -1)], dim=1) + state["pos_embed"]
    inner, n, p = cfg.d_inner, cfg.d_state, cfg.headdim
    for layer, h in enumerate(heads):
        prefix = f"layers.{layer}.mixer."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        z, x, bc, dt = own["in_proj.weight"].split([inner, inner, 2 * n, cfg.n_heads])
        small = {
            "mixer.in_proj.weight": torch.cat([z[: h * p], x[: h * p], bc, dt[:h]]),
            "mixer.out_proj.weight": own["out_proj.weight"][:, : h * p],
            "mixer.norm.weight": own["norm.weight"][: h * p],
        }
        for name in ("conv1d.weight", "conv1d.bias"):
            small[f"mixer.{name}"] = torch.cat([own[name][: h * p], own[name][-2 * n :]])
        for name in ("A_log", "D", "dt_bias"):
            small[f"mixer.{name}"] = own[name][:h]
        tokens = tokens + _mixer_ref(small, replace(cfg, n_heads=h, widths=(h,)), norm(f"layers.{layer}.norm", tokens))
    tokens = norm("norm_f", tokens)
    pooled = tokens[:, -1] if cfg.pool == "cls" else tokens[:, :-1].mean(1)
    return F.linear(pooled, state["head.weight"], state["head.bias"])


def _norm(state: Mapping[str, Tensor], name: str, x: Tensor, *, eps: float) -> Tensor:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    if bias is None:
        return rms_norm_ref(x, weight, None, eps=eps)
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def mamba_ssm_model(state: Mapping[str, Tensor], cfg: LanguageConfig, device: torch.device) -> MambaLMHeadModel:
    """mamba-ssm's own module with these weights, float32; runs on a GPU only. Wants d_model to divide d_inner."""
    config = MambaConfig(
        d_model=cfg.d_model,
        n_layer=cfg.n_layers,
        vocab_size=cfg.n_vocab_rows,
        ssm_cfg={
            "layer": "Mamba2",
            "headdim": cfg.headdim,
            "d_state": cfg.d_state,
            "d_conv": cfg.d_conv,
            "expand": cfg.d_inner // cfg.d_model,
            "chunk_size": cfg.chunk_size,
            "use_mem_eff_path": False,
        },
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=False,
        pad_vocab_size_multiple=1,
    )
    model = MambaLMHeadModel(config, device=device, dtype=torch.float32)
    model.load_state_dict(dict(state))
    return model


def transformers_model(state: Mapping[str, Tensor], cfg: LanguageConfig) -> Any:
    """transformers' Mamba2ForCausalLM with these weights, float32, on its plain-PyTorch path."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        num_heads=cfg.n_heads,
        head_dim=cfg.headdim,
        vocab_size=cfg.n_vocab_rows,
        hidden_size=cfg.d_model,
        state_size=cfg.d_state,
        num_hidden_layers=cfg.n_layers,
        layer_norm_epsilon=cfg.norm_eps,
        expand=cfg.d_inner / cfg.d_model,
        conv_kernel=cfg.d_conv,
        n_groups=1,
        chunk_size=cfg.chunk_size,
        use_bias=False,
        use_conv_bias=True,
        tie_word_embeddings=True,
        residual_in_fp32=True,
    )
    model = Mamba2ForCausalLM(config)
    renamed = {name.replace("backbone.embedding.", "backbone.embeddings."): tensor for name, tensor in state.items()}
    model.load_state_dict(renamed)
    return model.eval()
