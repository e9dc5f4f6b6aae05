"""Sizes of a nested model, checked where they are written. Loads without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from modeling import nesting

VOCAB_MULTIPLE = 128
"""Embedding rows are padded to a multiple of this, whatever tp is, so that checkpoints do not depend on tp."""
NormKind = Literal["rms", "layer"]
CROP_RATIO = 0.875
"""Side of the central square that a classifier is shown over the short side of the image, where nothing else is said."""
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in 0..1: torchvision's and the reference's constants. Images are normalised by them."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A stack of MatMamba2 blocks. One B/C group, as in the reference: B and C feed every head at every width."""

    n_layers: int
    """Number of blocks."""
    d_model: int
    """Channels of the residual stream; every width keeps all of them."""
    headdim: int = 0
    """Channels of a head; 0 means d_model / 32, the reference's choice (64 heads at expand 2)."""
    n_heads: int = 0
    """Heads of the full width; 0 means expand * d_model / headdim. A submodel cut out has fewer."""
    widths: tuple[int, ...] = ()
    """Trained widths as head counts, widest first; empty means the full width alone, a plain Mamba2."""
    d_state: int = 128
    """State channels per head channel."""
    expand: int = 2
    """Inner channels of the full width over d_model, where n_heads is not given."""
    d_conv: int = 4
    """Taps of the causal convolution."""
    chunk_size: int = 256
    """Time steps in a chunk of the scan; changes speed and rounding only."""
    norm_eps: float = 1e-5
    """Added to the mean square, or the variance, in every norm."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "headdim", "n_heads", "d_state", "expand", "d_conv", "chunk_size"):
            _check_whole(f"model.{name}", getattr(self, name))
        for width in self.widths:
            _check_whole("model.widths", width)
        for name in ("n_layers", "d_model", "d_state", "expand", "d_conv", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.headdim == 0:
            if self.d_model % 32:
                raise ValueError(f"model.headdim=0 means d_model/32, but d_model={self.d_model}: set model.headdim")
            object.__setattr__(self, "headdim", self.d_model // 32)
        inner = self.expand * self.d_model
        if self.headdim < 1 or (self.n_heads == 0 and inner % self.headdim):
            raise ValueError(
                f"model.headdim={self.headdim}: must divide expand * d_model = {self.expand} * {self.d_model} = {inner}"
            )
        if self.n_heads < 0:
            raise ValueError(f"model.n_heads={self.n_heads}: must not be negative")
        if self.n_heads == 0:
            object.__setattr__(self, "n_heads", inner // self.headdim)
        if not self.widths:
            object.__setattr__(self, "widths", (self.n_heads,))
        nesting.check_widths(self.widths, self.n_heads)
        if not isinstance(self.norm_eps, int | float) or not 0 < self.norm_eps < math.inf:
            raise ValueError(f"model.norm_eps={self.norm_eps!r}: must be positive")

    @property
    def d_inner(self) -> int:
        """Inner channels of the full width: n_heads * headdim."""
        return self.n_heads * self.headdim

    @property
    def residual_norm(self) -> NormKind:
        """The norm before each mixer and at the end; inside mixers it is always the gated RMSNorm."""
        return "rms"

    def layer_widths(self, n_heads: int) -> nesting.LayerWidths:
        """The uniform width of `n_heads` heads in every layer."""
        return nesting.uniform(n_heads, self.n_layers)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(BackboneConfig):
    """A nested language model: embedding, blocks, final norm, head tied to the embedding."""

    vocab_size: int
    """Token ids the tokenizer can produce, 0 .. vocab_size - 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole("model.vocab_size", self.vocab_size)
        if self.vocab_size < 2:
            raise ValueError(f"model.vocab_size={self.vocab_size}: must be at least 2")

    @property
    def n_vocab_rows(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of VOCAB_MULTIPLE."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class VisionConfig(BackboneConfig):
    """A nested image classifier: patches, positions, blocks, final norm, pooling, head."""

    n_classes: int
    """Classes that the head tells apart."""
    image_size: int = 224
    """Pixels of a side of the square images that positions are learned at; others are interpolated from them."""
    patch_size: int = 16
    """Pixels of a side of a patch, which is one token."""
    pool: Literal["cls", "avg"] = "cls"
    """cls: a learned token after the last patch, where the causal scan has seen all of them. avg: the mean over patches."""
    norm: NormKind = "layer"
    """The norm before each mixer and at the end: LayerNorm with a bias, as the reference's, or RMSNorm."""
    dropout: float = 0.0
    """Share of the entries dropped of each mixer's input projection (z, x, B, C and dt), and again of its output."""
    drop_path: float = 0.0
    """Share of the images that skip the last mixer in training; earlier mixers less, down to none at the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("n_classes", 2), ("image_size", 1), ("patch_size", 1)):
            _check_whole(f"model.{name}", getattr(self, name))
            if getattr(self, name) < least:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least {least}")
        self.grid_of(self.image_size, self.image_size)
        for name, known in (("pool", ("cls", "avg")), ("norm", ("rms", "layer"))):
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name}={str(getattr(self, name))[:40]!r}: must be one of {', '.join(known)}")
        for name in ("dropout", "drop_path"):
            rate = getattr(self, name)
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
                raise ValueError(f"model.{name}={str(rate)[:40]}: must be at least 0 and below 1")

    @property
    def residual_norm(self) -> NormKind:
        """See BackboneConfig."""
        return self.norm

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of so many pixels. Raises ValueError where patches do not fill it."""
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            raise ValueError(
                f"an image of {height} x {width} pixels: each side must be a multiple of model.patch_size={p}"
            )
        return height // p, width // p

    def n_tokens(self, height: int, width: int) -> int:
        """Tokens of an image of so many pixels: its patches, and the class token where there is one."""
        rows, columns = self.grid_of(height, width)
        return rows * columns + (self.pool == "cls")


def _check_whole(name: str, value: object) -> None:
    """Raise ValueError unless `value` is an int: sizes also come out of files that others wrote."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={str(value)[:40]!r}: must be a whole number")
