"""Parameters, FLOPs and bytes of every submodel, from the config alone. Pure integers.

One multiply-add is two FLOPs. Training FLOPs follow the convention of the records in docs/benchmarks: three times the
forward's matrix products (forward, and the two products of backward), recomputation not counted, the causal half of a
chunk's score matrix not subtracted; element-wise work is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from modeling.config import BackboneConfig, LanguageConfig, VisionConfig
from modeling.nesting import LayerWidths, local_heads

_PIXEL_COLOURS = 3


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of one submodel."""

    embedding: int
    """The tied embedding and head, padding rows included; of a classifier patches, positions, class token and head."""
    blocks: int
    """Everything else."""

    @property
    def total(self) -> int:
        """All parameters that the submodel uses."""
        return self.embedding + self.blocks


def mixer_parameters(cfg: BackboneConfig, n_heads: int) -> int:
    """Parameters that a mixer uses at a width of `n_heads` heads."""
    inner, bc = n_heads * cfg.headdim, 2 * cfg.d_state
    projections = cfg.d_model * (2 * inner + bc + n_heads) + inner * cfg.d_model
    convolution = (inner + bc) * (cfg.d_conv + 1)
    return projections + convolution + 3 * n_heads + inner


def language_parameters(cfg: LanguageConfig, widths: LayerWidths) -> Parameters:
    """Parameters of the submodel `widths` (head count of each layer)."""
    return Parameters(embedding=cfg.n_vocab_rows * cfg.d_model, blocks=_block_parameters(cfg, widths))


def vision_parameters(cfg: VisionConfig, widths: LayerWidths) -> Parameters:
    """Parameters of the submodel `widths` (head count of each layer)."""
    positions = cfg.n_tokens(cfg.image_size, cfg.image_size)
    rows = _PIXEL_COLOURS * cfg.patch_size**2 + 1 + positions + (cfg.pool == "cls")
    return Parameters(
        embedding=rows * cfg.d_model + cfg.n_classes * (cfg.d_model + 1), blocks=_block_parameters(cfg, widths)
    )


def submodel_parameters(cfg: BackboneConfig, widths: LayerWidths) -> Parameters:
    """Parameters of the submodel `widths` of either network."""
    if isinstance(cfg, VisionConfig):
        return vision_parameters(cfg, widths)
    assert isinstance(cfg, LanguageConfig)
    return language_parameters(cfg, widths)


def _block_parameters(cfg: BackboneConfig, widths: LayerWidths) -> int:
    norms = (cfg.n_layers + 1) * cfg.d_model * (2 if cfg.residual_norm == "layer" else 1)
    return norms + sum(mixer_parameters(cfg, n_heads) for n_heads in widths)


def local_parameters(cfg: BackboneConfig, tp: int) -> int:
    """Parameters that one tensor-parallel rank holds of the whole model. Raises ValueError where tp does not divide it."""
    heads = local_heads(cfg.n_heads, tp)
    shared = cfg.d_model * 2 * cfg.d_state + 2 * cfg.d_state * (cfg.d_conv + 1)
    whole = submodel_parameters(cfg, cfg.layer_widths(cfg.n_heads))
    elsewhere = (tp - 1) * cfg.n_layers * (mixer_parameters(cfg, heads) - shared)
    if isinstance(cfg, LanguageConfig):  # a classifier's ends are on every rank
        elsewhere += whole.embedding - whole.embedding // tp
    return whole.total - elsewhere


def projection_flops(cfg: BackboneConfig, n_heads: int) -> int:
    """Forward FLOPs a token of a mixer's input and output projections."""
    inner = n_heads * cfg.headdim
    return 2 * cfg.d_model * (2 * inner + 2 * cfg.d_state + n_heads) + 2 * inner * cfg.d_model


def scan_flops(cfg: BackboneConfig, n_heads: int, n_tokens: int | None = None) -> int:
    """Forward FLOPs a token of the chunked scan (arXiv 2405.21060, section 6): C.B^T, scores.x, states in and out.

    A sequence of `n_tokens` that is shorter than a chunk is one.
    """
    inner = n_heads * cfg.headdim
    chunk = cfg.chunk_size if n_tokens is None else min(cfg.chunk_size, n_tokens)
    scores = 2 * chunk * cfg.d_state  # one group: computed once for all heads
    within = 2 * chunk * inner
    states = 2 * 2 * inner * cfg.d_state
    return scores + within + states


def forward_flops_per_token(cfg: LanguageConfig, widths: LayerWidths) -> int:
    """Forward FLOPs a token of the submodel `widths`, head included."""
    head = 2 * cfg.n_vocab_rows * cfg.d_model
    return head + sum(projection_flops(cfg, n) + scan_flops(cfg, n) for n in widths)


def training_flops_per_token(cfg: LanguageConfig, widths: LayerWidths) -> int:
    """Forward and backward FLOPs a token of the submodel `widths`."""
    return 3 * forward_flops_per_token(cfg, widths)


def forward_flops_per_image(cfg: VisionConfig, widths: LayerWidths, size: int | None = None) -> int:
    """Forward FLOPs an image of `size` pixels a side (None: the config's) of the submodel `widths`, head included."""
    side = cfg.image_size if size is None else size
    rows, columns = cfg.grid_of(side, side)
    n_tokens = cfg.n_tokens(side, side)
    patches = 2 * _PIXEL_COLOURS * cfg.patch_size**2 * cfg.d_model * rows * columns
    blocks = n_tokens * sum(projection_flops(cfg, n) + scan_flops(cfg, n, n_tokens) for n in widths)
    return patches + blocks + 2 * cfg.d_model * cfg.n_classes


def training_flops_per_image(cfg: VisionConfig, widths: LayerWidths, size: int | None = None) -> int:
    """Forward and backward FLOPs an image of the submodel `widths`."""
    return 3 * forward_flops_per_image(cfg, widths, size)
