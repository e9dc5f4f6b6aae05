"""Parameters, FLOPs and bytes of every submodel, from the config alone. Pure integers.

One multiply-add is two FLOPs. Training FLOPs follow the convention of the records in docs/benchmarks: three times the
forward's matrix products (forward, and the two products of backward), recomputation not counted, the causal half of a
chunk's score matrix not subtracted; element-wise work is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from modeling.config import BackboneConfig, LanguageConfig
from modeling.nesting import LayerWidths, local_heads


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of one submodel."""

    embedding: int
    """The tied embedding and head, padding rows included."""
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
    norms = (cfg.n_layers + 1) * cfg.d_model
    return Parameters(
        embedding=cfg.n_vocab_rows * cfg.d_model,
        blocks=norms + sum(mixer_parameters(cfg, n_heads) for n_heads in widths),
    )


def local_parameters(cfg: LanguageConfig, tp: int) -> int:
    """Parameters that one tensor-parallel rank holds of the whole model. Raises ValueError where tp does not divide it."""
    heads = local_heads(cfg.n_heads, tp)
    shared = cfg.d_model * 2 * cfg.d_state + 2 * cfg.d_state * (cfg.d_conv + 1)
    sharded = mixer_parameters(cfg, heads) - shared
    return cfg.n_vocab_rows // tp * cfg.d_model + (cfg.n_layers + 1) * cfg.d_model + cfg.n_layers * (shared + sharded)


def projection_flops(cfg: BackboneConfig, n_heads: int) -> int:
    """Forward FLOPs a token of a mixer's input and output projections."""
    inner = n_heads * cfg.headdim
    return 2 * cfg.d_model * (2 * inner + 2 * cfg.d_state + n_heads) + 2 * inner * cfg.d_model


def scan_flops(cfg: BackboneConfig, n_heads: int) -> int:
    """Forward FLOPs a token of the chunked scan (arXiv 2405.21060, section 6): C.B^T, scores.x, states in and out."""
    inner = n_heads * cfg.headdim
    scores = 2 * cfg.chunk_size * cfg.d_state  # one group: computed once for all heads
    within = 2 * cfg.chunk_size * inner
    states = 2 * 2 * inner * cfg.d_state
    return scores + within + states


def forward_flops_per_token(cfg: LanguageConfig, widths: LayerWidths) -> int:
    """Forward FLOPs a token of the submodel `widths`, head included."""
    head = 2 * cfg.n_vocab_rows * cfg.d_model
    return head + sum(projection_flops(cfg, n) + scan_flops(cfg, n) for n in widths)


def training_flops_per_token(cfg: LanguageConfig, widths: LayerWidths) -> int:
    """Forward and backward FLOPs a token of the submodel `widths`."""
    return 3 * forward_flops_per_token(cfg, widths)
