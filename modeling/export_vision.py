"""Image classifiers for other tools: timm's way of use, and the public MatMamba's own format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modeling import nesting
from modeling.config import CHANNEL_MEAN, CHANNEL_STD, VisionConfig
from modeling.convert import StateDict, to_matmamba_vision
from modeling.model_folder import ImageUse

TIMM_CODE = Path(__file__).parent / "remote_code" / "matmamba_vision.py"
"""The model that a timm folder carries with it."""
ENDS = {
    "patch": "patch_embed.proj.weight",
    "patch_bias": "patch_embed.proj.bias",
    "positions": "pos_embed",
    "cls": "cls_token",
    "final_norm": "norm.weight",
    "final_norm_bias": "norm.bias",
    "head": "head.weight",
    "head_bias": "head.bias",
}
"""Our names outside blocks to timm's."""


def timm_state(state: StateDict, cfg: VisionConfig) -> StateDict:
    """The state dict of the file that a timm folder carries."""
    theirs = {}
    for name, tensor in state.items():
        if name in ENDS:
            shaped = tensor.unflatten(1, (-1, cfg.patch_size, cfg.patch_size)) if name == "patch" else tensor
            theirs[ENDS[name]] = shaped[None] if name in ("positions", "cls") else shaped
        elif name.endswith(".norm"):
            theirs[f"{name}.weight"] = tensor
        elif name.endswith(".norm_bias"):
            theirs[f"{name.removesuffix('_bias')}.bias"] = tensor
        else:
            theirs[name] = tensor
    return theirs


def write_timm(
    folder: Path,
    state: StateDict,
    cfg: VisionConfig,
    widths: nesting.LayerWidths,
    images: ImageUse,
) -> None:
    """model.safetensors, config.json in timm's words, and the file that runs them; `state` is cut to `widths`."""
    shown: dict[str, Any] = {
        "input_size": [3, cfg.image_size, cfg.image_size],
        "fixed_input_size": False,
        "crop_pct": images.crop_ratio,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": list(CHANNEL_MEAN),
        "std": list(CHANNEL_STD),
        "num_classes": cfg.n_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    if images.classes is not None:
        shown["label_names"] = images.classes
    pool = "token" if cfg.pool == "cls" else "avg"
    about = {
        "architecture": "matmamba_vision",
        "num_classes": cfg.n_classes,
        "num_features": cfg.d_model,
        "global_pool": pool,
        "model_args": {
            "img_size": cfg.image_size,
            "patch_size": cfg.patch_size,
            "num_classes": cfg.n_classes,
            "global_pool": pool,
            "embed_dim": cfg.d_model,
            "depth": cfg.n_layers,
            "num_heads": cfg.n_heads,
            "head_dim": cfg.headdim,
            "d_state": cfg.d_state,
            "d_conv": cfg.d_conv,
            "norm": cfg.norm,
            "norm_eps": cfg.norm_eps,
            "layer_heads": list(widths),
            "widths": [n for n in cfg.widths if n <= min(widths)],
        },
        "pretrained_cfg": shown,
    }
    whole = {name: tensor.contiguous() for name, tensor in timm_state(state, cfg).items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    shutil.copyfile(TIMM_CODE, folder / TIMM_CODE.name)


def write_matmamba_vision(folder: Path, state: StateDict, cfg: VisionConfig) -> None:
    """What the public MatMamba2Vision.from_pretrained reads: config.json and a pickled state dict of the whole model.

    Raises ValueError where that model cannot be of these sizes: it has 64 heads of d_model / 32 channels and eps of 1e-5.
    """
    fixed: dict[str, tuple[float, float]] = {
        "headdim": (cfg.headdim, cfg.d_model // 32),
        "n_heads": (cfg.n_heads, 64),
    }
    fixed |= {"norm_eps": (cfg.norm_eps, 1e-5)}
    for name, (ours, theirs) in fixed.items():
        if ours != theirs:
            raise ValueError(
                f"the public MatMamba2Vision of d_model={cfg.d_model} cannot have this model's {name} ({ours} for {theirs}): "
                "use --format timm or matmamba"
            )
    about = {
        "d_model": cfg.d_model,
        "n_layer": cfg.n_layers,
        "d_intermediate": 0,
        "n_classes": cfg.n_classes,
        "patch_size": cfg.patch_size,
        "image_size": cfg.image_size,
        "ssm_cfg": {"d_state": cfg.d_state, "d_conv": cfg.d_conv, "chunk_size": cfg.chunk_size},
        "norm_epsilon": cfg.norm_eps,
        "rms_norm": cfg.norm == "rms",
        "drop_path_rate": cfg.drop_path,
        "proj_drop_rate": cfg.dropout,
        "pool": cfg.pool,
    }
    theirs_state = {name: tensor.contiguous() for name, tensor in to_matmamba_vision(state, cfg).items()}
    torch.save(theirs_state, folder / "pytorch_model.bin")  # a pickle: that model loads no other
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")


def classes_of(dataset: str, n_classes: int) -> list[str] | None:
    """Names of the classes, of an image dataset that is there; None where it is not, or does not name that many."""
    try:
        named = json.loads((Path(dataset) / "manifest.json").read_text())["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in named] if isinstance(named, list) and len(named) == n_classes else None
