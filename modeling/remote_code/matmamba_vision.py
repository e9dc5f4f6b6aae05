"""A nested image classifier (MatMamba-Vision, arXiv 2410.06718) as timm's models are used, in one file that needs torch alone.

    from matmamba_vision import load
    model = load(FOLDER)                      # config.json and model.safetensors; or timm.create_model("local-dir:FOLDER")
    model(images)                             # b 3 h w, normalised as model.pretrained_cfg says; any size that patches fill
    model(images, width="1/4")                # a fraction of the full width, heads ("16h"), or one of either for each layer
    model.forward_features(images)            # b t d: patches row by row, then the class token
    model.reset_classifier(10)                # for fine-tuning; proj_drop_rate and drop_path_rate are arguments of the class

Width n of a layer is its first n heads, so every width is a part of the same weights; without `width` the model runs as wide as
it is. Where timm is installed, importing this file registers `matmamba_vision` with it.

modeling.export writes this file beside the weights; it is no part of the package that wrote it and imports nothing of it.

Letters: b batch, t time, d model, i inner (heads x headdim), h heads, p headdim, n state, c chunks or channels, l and s places
in a chunk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as fused_scan
except Exception:  # absent, or built for other versions: both raise many things. Plain PyTorch then does the same
    fused_scan = None

Width = str | Sequence[str | int] | None


def scan(x_bthp: Tensor, dt_bth: Tensor, A_h: Tensor, B_btn: Tensor, C_btn: Tensor, D_h: Tensor, chunk: int) -> Tensor:
    """Mamba2's scan (arXiv 2405.21060) from a zero state, in float32; `dt_bth` is after softplus."""
    x, dt, B, C = x_bthp.float(), dt_bth.float(), B_btn.float(), C_btn.float()
    b, t, h, p = x.shape
    chunk = min(chunk, t)
    pad = -t % chunk  # padded steps have dt = 0: they change no state
    x, B, C = F.pad(x, (0, 0, 0, 0, 0, pad)), F.pad(B, (0, 0, 0, pad)), F.pad(C, (0, 0, 0, pad))
    dt_bclh = F.pad(dt, (0, 0, 0, pad)).view(b, -1, chunk, h)
    B_bcln, C_bcln = B.view(b, -1, chunk, B.shape[-1]), C.view(b, -1, chunk, C.shape[-1])
    xd_bclhp = x.view(b, -1, chunk, h, p) * dt_bclh[..., None]
    decay_bchl = (dt_bclh * A_h).transpose(-1, -2).cumsum(-1)
    # Within a chunk: y_l += sum over s <= l of (C_l . B_s) exp(decay_l - decay_s) dt_s x_s.
    later_ls = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    gap_bchls = (decay_bchl[..., :, None] - decay_bchl[..., None, :]).masked_fill(later_ls, -math.inf)
    y = torch.einsum("bcls,bchls,bcshp->bclhp", C_bcln @ B_bcln.mT, gap_bchls.exp(), xd_bclhp)
    added = torch.einsum("bchl,bclhp,bcln->bchpn", (decay_bchl[..., -1:] - decay_bchl).exp(), xd_bclhp, B_bcln)
    # Over chunks: the state carried in.
    state, carried = x.new_zeros(b, h, p, B.shape[-1]), []
    for c in range(dt_bclh.shape[1]):
        into_bhl = decay_bchl[:, c].exp()
        carried.append(torch.einsum("bhl,bhpn,bln->blhp", into_bhl, state, C_bcln[:, c]))
        state = state * into_bhl[..., -1, None, None] + added[:, c]
    y = (y + torch.stack(carried, dim=1)).reshape(b, -1, h, p)[:, :t]
    return y + D_h[:, None] * x[:, :t]


class Mixer(nn.Module):
    """Mamba2 with one B/C group: project, convolve, scan, gate, project, with the first `heads` heads."""

    def __init__(self, d: int, held: int, headdim: int, d_state: int, d_conv: int, eps: float, drop: float) -> None:
        super().__init__()
        self.headdim, self.d_state, self.eps, self.drop = headdim, d_state, eps, drop
        inner, bc = held * headdim, 2 * d_state

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape))

        self.in_z, self.in_x, self.in_bc = parameter(inner, d), parameter(inner, d), parameter(bc, d)
        self.in_dt = parameter(held, d)
        self.conv_x, self.conv_x_bias = parameter(inner, d_conv), parameter(inner)
        self.conv_bc, self.conv_bc_bias = parameter(bc, d_conv), parameter(bc)
        self.dt_bias, self.A_log, self.D = parameter(held), parameter(held), parameter(held)
        self.gated_norm, self.out = parameter(inner), parameter(d, inner)

    @torch.no_grad()
    def init_weights(self, n_layers: int) -> None:
        """As mamba-ssm draws them; only for models made without weights."""
        for name, value in self.named_parameters():
            if name in ("D", "gated_norm"):
                value.fill_(1)
            elif name == "A_log":
                value.uniform_(1, 16).log_()
            elif name == "dt_bias":
                dt = torch.exp(torch.empty_like(value).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
                value.copy_(dt + torch.log(-torch.expm1(-dt)))
            else:
                bound = 1 / math.sqrt(self.conv_x.shape[1] if name.startswith("conv_") else value.shape[-1])
                bound /= math.sqrt(n_layers) if name == "out" else 1
                value.uniform_(-bound, bound)

    def forward(self, x_btd: Tensor, heads: int) -> Tensor:
        """Same shape and dtype as `x_btd`."""
        p, n, dtype = self.headdim, self.d_state, x_btd.dtype
        inner = heads * p
        weight = torch.cat([self.in_z[:inner], self.in_x[:inner], self.in_bc, self.in_dt[:heads]])
        projected = F.dropout(F.linear(x_btd, weight), self.drop, self.training)
        z_bti, raw_btc, dt_bth = projected.split([inner, inner + 2 * n, heads], dim=-1)
        conv_ck = torch.cat([self.conv_x[:inner], self.conv_bc]).to(dtype)
        conv_bias_c = torch.cat([self.conv_x_bias[:inner], self.conv_bc_bias]).to(dtype)
        padded_bct = F.pad(raw_btc.mT, (conv_ck.shape[1] - 1, 0))
        mixed_bct = F.conv1d(padded_bct, conv_ck[:, None], conv_bias_c, groups=conv_ck.shape[0])
        x_bti, B_btn, C_btn = F.silu(mixed_bct.mT).split([inner, n, n], dim=-1)
        y_bti = self._scan(x_bti.unflatten(-1, (heads, p)), dt_bth, B_btn, C_btn).flatten(2)
        gated = y_bti.float() * F.silu(z_bti.float())
        normed = F.rms_norm(gated, (inner,), self.gated_norm[:inner].float(), self.eps).to(dtype)
        return F.dropout(F.linear(normed, self.out[:, :inner]), self.drop, self.training)

    def _scan(self, x_bthp: Tensor, dt_bth: Tensor, B_btn: Tensor, C_btn: Tensor) -> Tensor:
        heads = dt_bth.shape[2]
        A_h, D_h, bias_h = -self.A_log[:heads].float().exp(), self.D[:heads].float(), self.dt_bias[:heads].float()
        if x_bthp.is_cuda and fused_scan is not None:
            B, C = B_btn[:, :, None], C_btn[:, :, None]
            return fused_scan(x_bthp, dt_bth, A_h, B, C, 256, D=D_h, dt_bias=bias_h, dt_softplus=True)
        return scan(x_bthp, F.softplus(dt_bth.float() + bias_h), A_h, B_btn, C_btn, D_h, 64)


class Norm(nn.Module):
    """LayerNorm, or without a bias RMSNorm, computed in float32."""

    def __init__(self, d: int, kind: str, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if kind == "layer" else None

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """In `dtype`."""
        shape = self.weight.shape
        if self.bias is None:
            return F.rms_norm(x.float(), shape, self.weight.float(), self.eps).to(dtype)
        return F.layer_norm(x.float(), shape, self.weight.float(), self.bias.float(), self.eps).to(dtype)


class Block(nn.Module):
    """x + mixer(norm(x)), which a share of the images skip in training."""

    def __init__(self, norm: Norm, mixer: Mixer, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mixer, self.drop_path = norm, mixer, drop_path

    def forward(self, x_btd: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """Float32, as `x_btd`."""
        branch_btd = self.mixer(self.norm(x_btd, dtype), heads)
        if self.training and self.drop_path:
            keep_b11 = x_btd.new_empty(len(x_btd), 1, 1).bernoulli_(1 - self.drop_path)
            branch_btd = branch_btd * (keep_b11 / (1 - self.drop_path))
        return x_btd + branch_btd


class PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, d: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, d, patch_size, patch_size)


class MatMambaVision(nn.Module):
    """The classifier; arguments and methods are named as timm's Vision Transformers name them."""

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 512,
        depth: int = 20,
        num_heads: int = 64,
        head_dim: int = 16,
        d_state: int = 128,
        d_conv: int = 4,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        layer_heads: Sequence[int] | None = None,
        widths: Sequence[int] = (),
        in_chans: int = 3,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        """`layer_heads` are the heads that each layer holds, all `num_heads` by default; `widths` the trained head counts."""
        super().__init__()
        if in_chans != 3:
            raise ValueError(f"in_chans={in_chans}: the patches are of 3 colours")
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool={global_pool!r}: must be token or avg")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_size, self.num_heads, self.drop_rate = patch_size, num_heads, drop_rate
        self.layer_heads = tuple([num_heads] * depth if layer_heads is None else layer_heads)
        if len(self.layer_heads) != depth or not all(1 <= n <= num_heads for n in self.layer_heads):
            raise ValueError(f"layer_heads={self.layer_heads}: give {depth} counts from 1 to num_heads={num_heads}")
        self.widths = tuple(widths)
        self.grad_checkpointing = False
        self.pretrained_cfg = self.default_cfg = default_cfg(
            num_classes=num_classes, input_size=(3, img_size, img_size)
        )
        self.patch_embed = PatchEmbed(embed_dim, patch_size)
        self.grid = img_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if global_pool == "token" else None
        n_positions = self.grid**2 + (self.cls_token is not None)
        self.pos_embed = nn.Parameter(torch.randn(1, n_positions, embed_dim) * 0.02)
        blocks = [
            Block(
                Norm(embed_dim, norm, norm_eps),
                Mixer(embed_dim, held, head_dim, d_state, d_conv, norm_eps, proj_drop_rate),
                drop_path_rate * layer / max(1, depth - 1),
            )
            for layer, held in enumerate(self.layer_heads)
        ]
        for block in blocks:
            block.mixer.init_weights(depth)
        self.blocks = nn.ModuleList(blocks)
        self.norm = Norm(embed_dim, norm, norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimizers should not decay, beside those of one dimension."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters are of which depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in backward instead of keeping what is in them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` classes; 0: none. The pooling stays that of the weights."""
        if global_pool not in (None, self.global_pool):
            raise ValueError(f"global_pool={global_pool!r}: this model was trained with {self.global_pool!r}")
        self.num_classes = num_classes
        weight = self.pos_embed
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes
            else nn.Identity()
        )

    def heads_of(self, width: Width) -> tuple[int, ...]:
        """Heads of each layer. Raises ValueError where `width` names no submodel that this model holds."""
        if width is None:
            return self.layer_heads
        counts = [self._count(part) for part in (width.split(",") if isinstance(width, str) else width)]
        if len(counts) == 1:
            counts *= len(self.layer_heads)
        if len(counts) != len(self.layer_heads):
            raise ValueError(
                f"{len(counts)} widths for {len(self.layer_heads)} layers: give one, or one for each layer"
            )
        for layer, (asked, held) in enumerate(zip(counts, self.layer_heads, strict=True)):
            if asked > held:
                raise ValueError(f"layer {layer}: width {asked}, but this model was cut to {held} heads there")
        return tuple(counts)

    def _count(self, part: str | int) -> int:
        text = f"{part}h" if isinstance(part, int) else part.strip()
        try:
            number = Fraction(text.removesuffix("h"))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"width {part!r}: not a number. Write a fraction (1/4) or a head count (16h)") from None
        count = number * self.num_heads if number <= 1 and not text.endswith("h") else number
        if count.denominator != 1 or not 1 <= count <= self.num_heads:
            raise ValueError(f"width {part!r} is {float(count):g} heads: must be whole, from 1 to {self.num_heads}")
        return int(count)

    def forward_features(self, x: Tensor, width: Width = None) -> Tensor:
        """The normed tokens, b t d, in the weights' dtype. Raises ValueError where patches do not fill the images."""
        heads, dtype = self.heads_of(width), self.patch_embed.proj.weight.dtype
        if x.shape[-2] % self.patch_size or x.shape[-1] % self.patch_size:
            raise ValueError(f"images of {tuple(x.shape[-2:])}: each side must be a multiple of {self.patch_size}")
        grid_bdhw = self.patch_embed.proj(x.to(dtype))
        positions_1td = self._positions(*grid_bdhw.shape[-2:])
        tokens_btd = grid_bdhw.flatten(2).mT.float()
        if self.cls_token is not None:
            tokens_btd = torch.cat([tokens_btd, self.cls_token.float().expand(len(x), -1, -1)], dim=1)
        tokens_btd = tokens_btd + positions_1td
        for block, n in zip(self.blocks, heads, strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens_btd = checkpoint(block, tokens_btd, n, dtype, use_reentrant=False)
            else:
                tokens_btd = block(tokens_btd, n, dtype)
        return self.norm(tokens_btd, dtype)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Learned at one size, bicubic in between at others."""
        positions, n = self.pos_embed.float(), self.grid**2
        if (rows, columns) == (self.grid, self.grid):
            return positions
        image = positions[:, :n].mT.unflatten(-1, (self.grid, self.grid))
        image = F.interpolate(image, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat([image.flatten(2).mT, positions[:, n:]], dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of `forward_features`' tokens; with `pre_logits` their pooled embedding."""
        pooled = x[:, -1] if self.global_pool == "token" else x.float().mean(1).to(x.dtype)
        pooled = F.dropout(pooled, self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor, width: Width = None) -> Tensor:
        """Logits, b classes, of normalised images."""
        return self.forward_head(self.forward_features(x, width))


def default_cfg(**changes: Any) -> dict[str, Any]:
    """How images are made for the model, and where its ends are, in timm's words."""
    return {
        "url": "",
        "input_size": (3, 224, 224),
        "fixed_input_size": False,
        "pool_size": None,
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "num_classes": 1000,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **changes,
    }


def load(folder: str | Path, *, device: str = "cpu", **model_args: Any) -> MatMambaVision:
    """The model that modeling.export wrote into `folder`, in evaluation mode; needs safetensors. `model_args` change it."""
    from safetensors.torch import load_file

    about = json.loads((Path(folder) / "config.json").read_text())
    model = MatMambaVision(**{**about["model_args"], **model_args})
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    model.pretrained_cfg = model.default_cfg = default_cfg(**about["pretrained_cfg"])
    return model.to(device).eval()


try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError:
    pass  # timm is not here: `load` does what its create_model would
else:
    default_cfgs = generate_default_cfgs({"matmamba_vision": default_cfg()})

    @register_model
    def matmamba_vision(pretrained: bool = False, **kwargs: Any) -> MatMambaVision:
        """What timm.create_model("local-dir:FOLDER") calls; sizes come from the folder's config.json."""
        return build_model_with_cfg(MatMambaVision, "matmamba_vision", pretrained, **kwargs)
