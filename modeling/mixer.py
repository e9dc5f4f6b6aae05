"""The MatMamba2 mixer: project, convolve, scan, gate, project, with the first `n_heads` heads.

Letters: b batch, t time, m tokens between mixers, d model, i inner (heads x headdim, of the width in use), h heads, p
headdim, g groups (1), n state, k conv taps. Sizes are this rank's part under tensor parallelism; the logical axes stay the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling import nesting
from modeling.config import BackboneConfig
from modeling.ops import kernels, norm
from modeling.ops.conv import causal_conv_silu
from modeling.ops.dropout import Drop, dropped
from modeling.ops.fused_mixer import NO_SUMS, MixerWeights, Recompute, Shape, Sums, fused_mixer
from modeling.ops.ssd import ssd
from modeling.tensor_parallel import TensorParallel

A_RANGE = (1.0, 16.0)
DT_RANGE = (1e-3, 1e-1)
DT_FLOOR = 1e-4


@dataclass
class MixerState:
    """What one layer remembers of a sequence at one width, on one rank."""

    conv_bkc: Tensor
    """The last k - 1 inputs of the convolution: x channels, then B, then C."""
    ssm_bhpn: Tensor
    """State of the scan, float32."""


class Mixer(nn.Module):
    """Mamba2 with one B/C group whose width is an argument (arXiv 2410.06718, section 3.2).

    Each part of mamba-ssm's fused in_proj and conv1d is a parameter of its own, heads first, so that a width is a
    prefix of rows and tensor parallelism never has to shard a part of a tensor.
    """

    def __init__(
        self,
        cfg: BackboneConfig,
        tp: TensorParallel,
        dtype: torch.dtype,
        *,
        recompute: Recompute = "none",
        in_place_gradients: bool = False,
        sends_apart: bool = False,
        float8: bool = False,
    ) -> None:
        """What training computes again in backward: with `recompute` "inside" all that lies between the projections, with
        "states" the scan's states, which the fused path alone keeps.

        With `sends_apart` the fused path sends before and after itself instead of beside its products: torch then stops doing
        a block again before its output is sent a second time.

        With `in_place_gradients` the fused path adds weights' gradients to their `.grad` itself, and with `float8` it multiplies
        its projections in float8 in training; see Backbone.
        """
        super().__init__()
        self.cfg, self.tp, self.dtype, self.recompute = cfg, tp, dtype, recompute
        self._channels_of: dict[tuple[int, torch.device], Tensor] = {}
        self.in_place_gradients, self.sends_apart, self.float8 = in_place_gradients, sends_apart, float8
        heads = nesting.local_heads(cfg.n_heads, tp.size)
        inner, bc = heads * cfg.headdim, 2 * cfg.d_state

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=torch.float32))

        self.in_z = parameter(inner, cfg.d_model)
        self.in_x = parameter(inner, cfg.d_model)
        self.in_bc = parameter(bc, cfg.d_model)
        self.in_dt = parameter(heads, cfg.d_model)
        self.conv_x = parameter(inner, cfg.d_conv)
        self.conv_x_bias = parameter(inner)
        self.conv_bc = parameter(bc, cfg.d_conv)
        self.conv_bc_bias = parameter(bc)
        self.dt_bias = parameter(heads)
        self.A_log = parameter(heads)
        self.D = parameter(heads)
        self.gated_norm = parameter(inner)
        self.out = parameter(cfg.d_model, inner)

    def forward(
        self,
        x_md: Tensor,
        n_heads: int,
        batch: int,
        *,
        seq_idx_bt: Tensor | None = None,
        state: MixerState | None = None,
        drop: Drop | None = None,
    ) -> Tensor:
        """Mix `x_md` (compute dtype) with the model's first `n_heads` heads; same shape and dtype.

        m is `batch` sequences, flattened; under sequence parallelism this rank's share of them.
        `seq_idx_bt` numbers documents that must not see each other. `state`, where given, is read as the past and
        overwritten with the present, so that a sequence can be fed in pieces of any length. `drop` says which
        entries of the input projection (z, x, B, C and dt) are dropped. All ranks of `tp` must call.
        """
        if state is None and kernels.usable(x_md, self.cfg.headdim, self.cfg.d_state, self.cfg.d_conv):
            return self._fused(x_md, n_heads, batch, seq_idx_bt, drop)
        x_btd = self.tp.enter(x_md).unflatten(0, (batch, -1))
        return self.tp.leave(self._plain(x_btd, n_heads, seq_idx_bt, state, drop).flatten(0, 1))

    def _fused(
        self, x_md: Tensor, n_heads: int, batch: int, seq_idx_bt: Tensor | None = None, drop: Drop | None = None
    ) -> Tensor:
        cfg, tp = self.cfg, self.tp
        shared = ("in_bc", "conv_bc", "conv_bc_bias")
        parameters = [getattr(self, f) for f in MixerWeights._fields]
        weights = [tp.share(p) if f in shared else p for f, p in zip(MixerWeights._fields, parameters, strict=True)]
        sums: Sums = NO_SUMS
        if self.in_place_gradients and torch.is_grad_enabled():
            # What tensor parallelism has yet to sum over ranks goes the way of autograd.
            sums = tuple(p.grad if w is p else None for w, p in zip(weights, parameters, strict=True))
        heads = nesting.local_heads(n_heads, tp.size)
        shape = Shape(
            heads,
            cfg.headdim,
            n_channels=n_heads * cfg.headdim,
            eps=cfg.norm_eps,
            recompute=self.recompute,
            float8=self.float8 and torch.is_grad_enabled(),
        )
        total = tp.total if tp.size > 1 else None
        dropping = None if drop is None else (drop, self._channels(n_heads, x_md.device))
        out_md = fused_mixer(
            tp.enter(x_md) if self.sends_apart else x_md,
            MixerWeights(*weights),
            shape,
            TensorParallel() if self.sends_apart else tp.beside,
            batch=batch,
            seq_idx_bt=seq_idx_bt,
            total=total,
            sums=sums,
            dropping=dropping,
        )
        return tp.leave(out_md) if self.sends_apart else out_md

    def _plain(
        self,
        x_btd: Tensor,
        n_heads: int,
        seq_idx_bt: Tensor | None,
        state: MixerState | None,
        drop: Drop | None = None,
    ) -> Tensor:
        cfg, tp = self.cfg, self.tp
        heads = nesting.local_heads(n_heads, tp.size)
        inner = heads * cfg.headdim

        weight = torch.cat([self.in_z[:inner], self.in_x[:inner], tp.share(self.in_bc), self.in_dt[:heads]])
        projected = F.linear(x_btd, weight.to(self.dtype))
        if drop is not None:
            channel_c = self._channels(n_heads, x_btd.device)
            projected = dropped(projected.flatten(0, 1), drop, channel_c).view_as(projected)
        if self.recompute == "inside" and state is None and torch.is_grad_enabled():
            normed_bti = checkpoint(
                self._inside, projected, n_heads, seq_idx_bt, None, use_reentrant=False, preserve_rng_state=False
            )
        else:
            normed_bti = self._inside(projected, n_heads, seq_idx_bt, state)
        return F.linear(normed_bti, self.out[:, :inner].to(self.dtype))

    def _channels(self, n_heads: int, device: torch.device) -> Tensor:
        """The number in the whole model of each channel of this rank's input projection, int32."""
        key = (n_heads, device)
        if key not in self._channels_of:
            cfg, tp = self.cfg, self.tp
            numbers = nesting.projection_channels(
                n_heads, headdim=cfg.headdim, bc=2 * cfg.d_state, full=cfg.n_heads, tp=tp.size, rank=tp.rank
            )
            self._channels_of[key] = torch.tensor(numbers, dtype=torch.int32, device=device)
        return self._channels_of[key]

    def _inside(self, projected: Tensor, n_heads: int, seq_idx_bt: Tensor | None, state: MixerState | None) -> Tensor:
        """Between the two projections: convolve, scan, gate, norm."""
        cfg, tp = self.cfg, self.tp
        heads = nesting.local_heads(n_heads, tp.size)
        inner, bc = heads * cfg.headdim, 2 * cfg.d_state
        z_bti, xbc_btc, dt_bth = projected.split([inner, inner + bc, heads], dim=-1)

        conv = torch.cat([self.conv_x[:inner], tp.share(self.conv_bc)])
        conv_bias = torch.cat([self.conv_x_bias[:inner], tp.share(self.conv_bc_bias)])
        past_bkc = None if state is None else state.conv_bkc
        mixed_btc = causal_conv_silu(xbc_btc, conv, conv_bias, seq_idx_bt=seq_idx_bt, state_bkc=past_bkc)
        x_bti, B_btn, C_btn = mixed_btc.split([inner, cfg.d_state, cfg.d_state], dim=-1)

        y_bthp, last_bhpn = ssd(
            rearrange(x_bti, "b t (h p) -> b t h p", p=cfg.headdim),
            dt_bth,
            -torch.exp(self.A_log[:heads]),
            rearrange(B_btn, "b t n -> b t 1 n"),
            rearrange(C_btn, "b t n -> b t 1 n"),
            self.D[:heads],
            self.dt_bias[:heads],
            chunk_size=cfg.chunk_size,
            seq_idx_bt=seq_idx_bt,
            state_bhpn=None if state is None else state.ssm_bhpn,
        )
        if state is not None:
            state.conv_bkc = torch.cat([state.conv_bkc, xbc_btc], dim=1)[:, -(cfg.d_conv - 1) :]
            state.ssm_bhpn = last_bhpn

        u_bti = norm.gate(rearrange(y_bthp, "b t h p -> b t (h p)"), z_bti)
        return norm.scale(
            u_bti,
            tp.total(norm.square_sum(u_bti)),
            self.gated_norm[:inner],
            n_channels=n_heads * cfg.headdim,
            eps=cfg.norm_eps,
            dtype=self.dtype,
        )

    def empty_state(self, batch: int, n_heads: int) -> MixerState:
        """The state before the first token of `batch` sequences at this width."""
        cfg, device = self.cfg, self.in_z.device
        heads = nesting.local_heads(n_heads, self.tp.size)
        channels = heads * cfg.headdim + 2 * cfg.d_state
        return MixerState(
            conv_bkc=torch.zeros(batch, cfg.d_conv - 1, channels, dtype=self.dtype, device=device),
            ssm_bhpn=torch.zeros(batch, heads, cfg.headdim, cfg.d_state, device=device),
        )


def initial_values(name: str, shape: tuple[int, ...], cfg: BackboneConfig, generator: torch.Generator) -> Tensor:
    """Initial value of the mixer parameter `name` of logical `shape`, float32 on the CPU, as mamba-ssm draws it."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    if name.startswith("in_"):
        return uniform(-1 / math.sqrt(cfg.d_model), 1 / math.sqrt(cfg.d_model))
    if name.startswith("conv_"):
        return uniform(-1 / math.sqrt(cfg.d_conv), 1 / math.sqrt(cfg.d_conv))
    if name == "out":  # scaled down by the number of residual additions, as GPT-2 does
        bound = 1 / math.sqrt(cfg.d_inner) / math.sqrt(cfg.n_layers)
        return uniform(-bound, bound)
    if name == "dt_bias":  # softplus(dt_bias) is log-uniform in DT_RANGE
        delta = torch.exp(uniform(math.log(DT_RANGE[0]), math.log(DT_RANGE[1]))).clamp(min=DT_FLOOR)
        return delta + torch.log(-torch.expm1(-delta))
    if name == "A_log":
        return torch.log(uniform(*A_RANGE))
    if name in ("D", "gated_norm"):
        return torch.ones(shape)
    raise AssertionError(f"no initial value for mixer parameter {name}")
