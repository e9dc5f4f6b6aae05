"""A public MatMamba2Vision's weights as ours: sizes read off the tensors, for modeling.import_model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modeling.config import VisionConfig
from modeling.convert import StateDict, from_matmamba_vision

PATCHES = "patch_embed.proj.weight"
"""A state dict that has it is of an image classifier."""


def read_vision(theirs: Mapping[str, Tensor], about: Mapping[str, Any]) -> tuple[StateDict, VisionConfig]:
    """Our logical state dict (float32, CPU), and the config with one width, the full one.

    `about` is what a config.json beside it says, {} without one; of it only the pooling cannot be read off the tensors, which
    is the class token's where nothing is said. Raises ValueError where tensors or config are none of ours.
    """
    first = "layers.0.mixer."
    needed = (
        PATCHES,
        "pos_embed",
        "head.weight",
        *(first + name for name in ("norm.weight", "A_log", "conv1d.weight")),
    )
    missing = [name for name in needed if name not in theirs]
    if missing:
        raise ValueError(f"no MatMamba2Vision: {missing[0]} is missing (there are {', '.join(list(theirs)[:3])}, ...)")
    only: dict[str, tuple[Any, ...]] = {
        "d_intermediate": (0,),
        "attn_layer_idx": ([], None),
        "pool": ("cls", "avg"),
        "norm_epsilon": (1e-5,),  # of its block norms; that of its gated norms is fixed, and ours is one for both
    }
    for key, allowed in only.items():
        if key in about and about[key] not in allowed:
            raise ValueError(f"config.json: {key}={about[key]!r}, our models have {allowed[0]!r}: not importable")
    d_model, _, patch_size, _ = theirs[PATCHES].shape
    d_inner, n_heads = theirs[f"{first}norm.weight"].shape[0], theirs[f"{first}A_log"].shape[0]
    channels, *_, d_conv = theirs[f"{first}conv1d.weight"].shape
    side = math.isqrt(theirs["pos_embed"].shape[1] - 1)
    if d_inner % n_heads or channels <= d_inner or (channels - d_inner) % 2:
        raise ValueError(f"{n_heads} heads, {d_inner} inner and {channels} convolved channels fit no Mamba2")
    cfg = VisionConfig(
        n_layers=len({name.split(".")[1] for name in theirs if name.startswith("layers.")}),
        d_model=d_model,
        n_heads=n_heads,
        headdim=d_inner // n_heads,
        d_state=(channels - d_inner) // 2,
        d_conv=d_conv,
        n_classes=theirs["head.weight"].shape[0],
        image_size=side * patch_size,
        patch_size=patch_size,
        pool=about.get("pool", "cls"),
        norm="layer" if "norm_f.bias" in theirs else "rms",
    )
    state = from_matmamba_vision({name: tensor.float() for name, tensor in theirs.items()}, cfg)
    return {name: tensor.contiguous() for name, tensor in state.items()}, cfg
