"""The two layers of timm that the public MatMamba-Vision needs, for machines without timm.

Written from timm's documentation of them; `install` does nothing where timm is there. Nothing else may import this as timm.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """A convolution that cuts the image into patches: b c h w to b t d, patches row by row."""

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-2:] == self.img_size, f"images of {tuple(x.shape[-2:])}, made for {self.img_size}"
        return self.proj(x).flatten(2).transpose(1, 2)


class DropPath(nn.Module):
    """In training sets whole samples to zero at `drop_prob`, and scales the others up."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * keep.bernoulli_(1 - self.drop_prob).div_(1 - self.drop_prob)


class Mlp(nn.Module):
    """Imported there and never built: models without an MLP are what is compared."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("the stand-in has no Mlp: install timm")


def install() -> str:
    """Make `import timm` and `from timm.layers import ...` work; returns what serves them."""
    if "timm" not in sys.modules and importlib.util.find_spec("timm") is None:
        with contextlib.suppress(ImportError):  # transformers asks for timm once, and must not find this
            importlib.import_module("transformers.utils.import_utils")
        timm, layers = ModuleType("timm"), ModuleType("timm.layers")
        for layer in (PatchEmbed, DropPath, Mlp):
            setattr(layers, layer.__name__, layer)
        timm.layers = layers  # type: ignore[attr-defined]
        timm.__version__ = "stand-in"  # type: ignore[attr-defined]
        sys.modules |= {"timm": timm, "timm.layers": layers}
    import timm

    return str(timm.__version__)
