"""The nested image classifier: patches, positions, MatMamba2 blocks, final norm, pooling, head (arXiv 2410.06718, section 4.1).

Letters: b batch, c colours, t tokens (patches row by row, then the class token), d model, m tokens between mixers, k classes,
h and w rows and columns of patches, p and q pixels in a patch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modeling import nesting
from modeling.backbone import Backbone
from modeling.config import VisionConfig
from modeling.noise import Noise

COLOURS = 3
POSITION_STD = 0.02


class VisionModel(Backbone):
    """A nested image classifier. Which submodel runs is an argument: one head count for each layer.

    The scan is causal, so the class token comes last: it alone has seen every patch. Width concerns mixers only; patch
    embedding, positions, norms and head are whole at every width.
    """

    cfg: VisionConfig

    def make_parameters(self) -> None:
        """See Backbone."""
        cfg = self.cfg
        d, pixels = cfg.d_model, COLOURS * cfg.patch_size**2

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=torch.float32))

        self.patch = parameter(d, pixels)
        self.patch_bias = parameter(d)
        self.positions = parameter(cfg.n_tokens(cfg.image_size, cfg.image_size), d)
        # Of two dimensions, so that it decays like the embedding that it is.
        self.cls = parameter(1, d) if cfg.pool == "cls" else None
        self.make_stack()
        self.head = parameter(cfg.n_classes, d)
        self.head_bias = parameter(cfg.n_classes)

    def forward(self, images_bchw: Tensor, widths: nesting.LayerWidths, *, noise: Noise | None = None) -> Tensor:
        """Pooled embeddings, shape b d in the compute dtype, of the submodel `widths`; `logits` turns them into scores.

        `images_bchw` holds normalised colours; any height and width that patches fill. `noise` turns on dropout and
        drop-path at the config's rates. All ranks of `tp` must call. Raises ValueError where widths or images do not fit.
        """
        cfg = self.cfg
        self.check_widths(widths)
        if images_bchw.dim() != 4 or images_bchw.shape[1] != COLOURS:
            raise ValueError(f"images of shape {tuple(images_bchw.shape)}: must be batch x {COLOURS} x height x width")
        batch, _, height, width = images_bchw.shape
        x_md = self.tp.part(self._embed(images_bchw).flatten(0, 1))
        drops = None
        if noise is not None:
            drops = noise.layers(
                widths,
                dropout=cfg.dropout,
                drop_path=cfg.drop_path,
                n_tokens=cfg.n_tokens(height, width),
                first_row=self.tp.rank * len(x_md) if self.tp.sequence else 0,
            )
        hidden_md = self.run_stack(x_md, widths, batch, drops=drops)
        hidden_btd = self.tp.collect(hidden_md).unflatten(0, (batch, -1))
        return hidden_btd[:, -1] if cfg.pool == "cls" else hidden_btd.float().mean(1).to(self.dtype)

    def logits(self, features_bd: Tensor) -> Tensor:
        """Scores of the classes, float32, shape b k."""
        return F.linear(features_bd, self.head.to(self.dtype)).float() + self.head_bias

    def _embed(self, images_bchw: Tensor) -> Tensor:
        """Tokens in float32, shape b t d."""
        cfg, tp = self.cfg, self.tp
        rows, columns = cfg.grid_of(*images_bchw.shape[2:])
        patches = rearrange(
            images_bchw.to(self.dtype), "b c (h p) (w q) -> b (h w) (c p q)", p=cfg.patch_size, q=cfg.patch_size
        )
        x_btd = F.linear(patches, tp.replicate(self.patch).to(self.dtype)).float()
        positions_td = tp.replicate(self.positions)
        n_learned = (cfg.image_size // cfg.patch_size) ** 2
        grid_td = resized_positions(positions_td[:n_learned], rows, columns)
        x_btd = x_btd + (grid_td + tp.replicate(self.patch_bias))
        if self.cls is None:
            return x_btd
        cls_d = tp.replicate(self.cls)[0] + positions_td[n_learned]
        return torch.cat([x_btd, cls_d.expand(len(x_btd), 1, -1)], dim=1)

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """See Backbone. As in the reference, and timm: patches and head uniform, positions normal, class token zero.

        The head's bias makes the sigmoid of a fresh logit about 1 / n_classes, for losses that treat classes apart; a
        softmax does not see a bias that all classes share. The reference writes -6.9 there, which is -ln(1000).
        """
        if name in ("patch", "patch_bias"):
            bound = 1 / math.sqrt(COLOURS * self.cfg.patch_size**2)
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        if name == "positions":
            return torch.empty(shape).normal_(std=POSITION_STD, generator=generator)
        if name == "cls":
            return torch.zeros(shape)
        if name == "head":
            bound = 1 / math.sqrt(self.cfg.d_model)
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        if name == "head_bias":
            return torch.full(shape, -math.log(self.cfg.n_classes))
        return super().initial_value(name, shape, generator)


def resized_positions(grid_td: Tensor, rows: int, columns: int) -> Tensor:
    """The positions of a square grid of patches (t d, row by row) for a grid of `rows` x `columns`, bicubic in between."""
    side = math.isqrt(len(grid_td))
    if (rows, columns) == (side, side):
        return grid_td
    image = rearrange(grid_td, "(h w) d -> 1 d h w", h=side)
    image = F.interpolate(image, size=(rows, columns), mode="bicubic", antialias=True)
    return rearrange(image, "1 d h w -> (h w) d")
