"""A trained model made ready to run at any width: weights packed once, states updated in place.

Every width reads a prefix of the same tensors, so that a narrow draft beside the full model costs no memory for weights.
Training's LanguageModel keeps each part of a projection apart for tensor parallelism; here one matrix product does them all.

Letters: b batch, t time, d model, r rows of the packed projection, v vocabulary; the rest as in modeling/ops/step.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from modeling import nesting
from modeling.cuda_graph import KeptSteps
from modeling.language import LanguageModel
from modeling.mixer import Mixer
from modeling.nesting import LayerWidths
from modeling.ops.kernels.step import begins_early, finish_step, mix_step, shift_groups
from modeling.ops.kernels.step_products import FEW_TOKENS, add_branch, project
from modeling.ops.norm import add_norm
from modeling.ops.step import is_few, mixer_step


@dataclass(frozen=True)
class _Layer:
    block_norm_d: Tensor
    into_rd: Tensor
    """Rows: B, C, one dt for each head held, then x and z of head 0, of head 1, ..."""
    conv_ck: Tensor
    conv_bias_c: Tensor
    A_h: Tensor
    D_h: Tensor
    dt_bias_h: Tensor
    gated_norm_i: Tensor
    out_di: Tensor
    """The output projection: a width is its first columns."""


@dataclass
class State:
    """What a submodel remembers of a batch of sequences; its size does not grow with them."""

    widths: LayerWidths
    """The submodel that it belongs to: another one's states differ from the first layer on whose width differs."""
    conv: list[Tensor]
    """One a layer, compute dtype, shape b k c: the last inputs of the convolution."""
    ssm: list[Tensor]
    """One a layer, float32 or bfloat16, shape b h p n: the state of the scan."""
    waiting: list[Tensor] | None = None
    """The projections of tokens that were looked at and not yet taken in (`InferenceModel.peek`), one a layer."""

    @property
    def batch(self) -> int:
        """Sequences held."""
        return self.conv[0].shape[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of all sequences' states."""
        return sum(t.numel() * t.element_size() for t in (*self.conv, *self.ssm))

    def clone(self) -> State:
        """A copy that shares nothing with this state."""
        return replace(self, conv=[t.clone() for t in self.conv], ssm=[t.clone() for t in self.ssm], waiting=None)

    def copy_(self, other: State) -> None:
        """Overwrite this state with `other`, of the same widths and batch."""
        for mine, theirs in zip((*self.conv, *self.ssm), (*other.conv, *other.ssm), strict=True):
            mine.copy_(theirs)
        self.waiting = None

    def zero_(self) -> None:
        """Forget everything: the state before the first token."""
        for tensor in (*self.conv, *self.ssm):
            tensor.zero_()
        self.waiting = None


class InferenceModel:
    """A whole language model on one device. Which submodel runs is an argument of every call."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copy the weights of `model`: matrices in `dtype`, the rest float32. Raises ValueError where tp is not 1.

        `state_dtype` is what the scan's states are stored in: bfloat16 halves their memory and traffic and rounds them
        at every step; arithmetic is float32 in any case.
        """
        if model.tp.size != 1:
            raise ValueError(
                f"inference needs a whole model, this one is split over tp={model.tp.size}: load it at tp=1"
            )
        self.cfg, self.held, self.dtype = model.cfg, tuple(model.held), dtype
        self.device, self.state_dtype = torch.device(device), state_dtype
        self.kept_steps = KeptSteps()
        with torch.no_grad():
            self.embedding_vd = model.embedding[: self.cfg.vocab_size].to(self.device, dtype, copy=True)
            self.final_norm_d = model.final_norm.to(self.device, torch.float32, copy=True)
            self.layers = [self._pack(block.norm, block.mixer) for block in model.blocks]

    def _pack(self, block_norm: Tensor, mixer: Mixer) -> _Layer:
        p = self.cfg.headdim
        heads_x, heads_z = (rearrange(w, "(h p) d -> h p d", p=p) for w in (mixer.in_x, mixer.in_z))
        xz = rearrange(torch.stack([heads_x, heads_z], dim=1), "h two p d -> (h two p) d")
        into = torch.cat([mixer.in_bc, mixer.in_dt, xz])

        def exact(tensor: Tensor) -> Tensor:
            return tensor.detach().to(self.device, torch.float32, copy=True)

        return _Layer(
            block_norm_d=exact(block_norm),
            into_rd=into.to(self.device, self.dtype),
            # The convolution's weights are rounded as LanguageModel rounds them where it uses them.
            conv_ck=exact(torch.cat([mixer.conv_bc, mixer.conv_x]).to(self.dtype)),
            conv_bias_c=exact(torch.cat([mixer.conv_bc_bias, mixer.conv_x_bias]).to(self.dtype)),
            A_h=exact(-torch.exp(mixer.A_log)),
            D_h=exact(mixer.D),
            dt_bias_h=exact(mixer.dt_bias),
            gated_norm_i=exact(mixer.gated_norm),
            out_di=mixer.out.detach().to(self.device, self.dtype, copy=True).contiguous(),
        )

    @property
    def n_weight_bytes(self) -> int:
        """Bytes of all weights, whatever widths are used."""
        tensors = [self.embedding_vd, self.final_norm_d, *(t for layer in self.layers for t in vars(layer).values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def own_width(self) -> str:
        """All that is held, as people write it: "1", "1/2", or the heads of each layer of a mix that was cut out."""
        if len(set(self.held)) == 1:
            return nesting.width_name(self.held[0], self.cfg.n_heads)
        return ",".join(f"{n}h" for n in self.held)

    def check_widths(self, widths: LayerWidths) -> None:
        """Raise ValueError unless `widths` is a submodel of this model."""
        nesting.check_layer_widths(widths, self.cfg.n_heads, self.cfg.n_layers, 1, self.held)

    def empty_state(self, batch: int, widths: LayerWidths) -> State:
        """The state of `batch` sequences before their first token. Raises ValueError where `widths` does not fit."""
        self.check_widths(widths)
        cfg = self.cfg
        conv, ssm = [], []
        for heads in widths:
            channels = heads * cfg.headdim + 2 * cfg.d_state
            conv.append(torch.zeros(batch, cfg.d_conv - 1, channels, dtype=self.dtype, device=self.device))
            shape = (batch, heads, cfg.headdim, cfg.d_state)
            ssm.append(torch.zeros(shape, dtype=self.state_dtype, device=self.device))
        return State(widths, conv, ssm)

    def state_bytes(self, widths: LayerWidths) -> int:
        """Bytes of one sequence's state at `widths`."""
        cfg, inner = self.cfg, [heads * self.cfg.headdim for heads in widths]
        conv = sum(i + 2 * cfg.d_state for i in inner) * (cfg.d_conv - 1) * self.dtype.itemsize
        return conv + sum(inner) * cfg.d_state * self.state_dtype.itemsize

    @torch.no_grad()
    def forward(self, tokens_bt: Tensor, state: State, lengths_b: Tensor | None = None) -> Tensor:
        """Final hidden states, compute dtype, shape b t d, of the submodel and past that `state` holds; it moves on.

        `tokens_bt` is int64 on the model's device. Row b's first lengths_b tokens are real (int32, 1 to t; default
        all): the rest is padding, whose outputs mean nothing.
        """
        if lengths_b is None:
            lengths_b = torch.full((tokens_bt.shape[0],), tokens_bt.shape[1], dtype=torch.int32, device=self.device)
        return self._run(tokens_bt, state, lengths_b, keep=False)

    @torch.no_grad()
    def peek(self, tokens_bt: Tensor, state: State) -> Tensor:
        """As `forward`, but the state waits for `take`, which says how many of each row's tokens to take in."""
        nothing_b = torch.zeros(tokens_bt.shape[0], dtype=torch.int32, device=self.device)
        return self._run(tokens_bt, state, nothing_b, keep=True)

    @torch.no_grad()
    def take(self, state: State, count_b: Tensor) -> None:
        """Take in the first count_b (int32, 0 to t) of each row's tokens that `peek` saw, without projecting them again.

        Raises ValueError where nothing waits.
        """
        if state.waiting is None:
            raise ValueError("no tokens wait to be taken in: call peek first")
        few = is_few(state.waiting[0].shape[1], self.cfg.d_conv, self.device)
        for i, projected_btr in enumerate(state.waiting):
            if few:
                mix_step(*self._mix_arguments(i, projected_btr, state, count_b), held=self.held[i])
                shift_groups(state.conv[i], projected_btr, count_b, inner=state.widths[i] * self.cfg.headdim)
            else:
                self._mix(i, projected_btr, state, count_b)
        state.waiting = None

    def _run(self, tokens_bt: Tensor, state: State, absorb_b: Tensor, *, keep: bool) -> Tensor:
        waiting: list[Tensor] | None = [] if keep else None
        x_btd = F.embedding(tokens_bt, self.embedding_vd).float()
        run = self._run_many
        if is_few(tokens_bt.shape[1], self.cfg.d_conv, self.device):
            run = self._run_few if tokens_bt.numel() > FEW_TOKENS else self._run_fewest
        hidden_btd = run(x_btd, state, absorb_b, waiting)
        state.waiting = waiting
        return hidden_btd

    def _run_many(self, x_btd: Tensor, state: State, absorb_b: Tensor, waiting: list[Tensor] | None) -> Tensor:
        """All layers, with the mixer in chunks; each layer's projection is appended to `waiting`, or let go."""
        how: dict[str, Any] = {"eps": self.cfg.norm_eps, "dtype": self.dtype}
        branch_btd = None
        for i, layer in enumerate(self.layers):
            x_btd, normed_btd = add_norm(x_btd, branch_btd, layer.block_norm_d, **how)
            projected_btr = self._project(i, normed_btd, state)
            if waiting is not None:
                waiting.append(projected_btr)
            mixed_bti = self._mix(i, projected_btr, state, absorb_b)
            branch_btd = F.linear(mixed_bti, layer.out_di[:, : mixed_bti.shape[-1]])
        return add_norm(x_btd, branch_btd, self.final_norm_d, **how)[1]

    def _run_few(self, x_btd: Tensor, state: State, absorb_b: Tensor, waiting: list[Tensor] | None) -> Tensor:
        """The same in two kernels a layer beside its products."""
        how: dict[str, Any] = {"eps": self.cfg.norm_eps, "dtype": self.dtype}
        normed_btd = add_norm(x_btd, None, self.layers[0].block_norm_d, **how)[1]
        norms = [*(layer.block_norm_d for layer in self.layers[1:]), self.final_norm_d]
        for i, (layer, next_norm_d) in enumerate(zip(self.layers, norms, strict=True)):
            projected_btr = self._project(i, normed_btd, state)
            if waiting is not None:
                waiting.append(projected_btr)
            arguments = self._mix_arguments(i, projected_btr, state, absorb_b)
            gated_bti, squares_btq = mix_step(*arguments, held=self.held[i])
            inner = gated_bti.shape[-1]
            branch_btd = F.linear(gated_bti, layer.out_di[:, :inner])
            x_btd, normed_btd = finish_step(
                x_btd, branch_btd, squares_btq, next_norm_d, state.conv[i], projected_btr, absorb_b, inner=inner, **how
            )
        return normed_btd

    def _run_fewest(self, x_btd: Tensor, state: State, absorb_b: Tensor, waiting: list[Tensor] | None) -> Tensor:
        """The same for FEW_TOKENS tokens at most: three kernels a layer with its products. Overwrites `x_btd`."""
        early, eps = begins_early(self.device), self.cfg.norm_eps
        for i, layer in enumerate(self.layers):
            projected_btr = project(x_btd, layer.block_norm_d, self._into(i, state), eps=eps)
            if waiting is not None:
                waiting.append(projected_btr)
            arguments = self._mix_arguments(i, projected_btr, state, absorb_b)
            gated_bti, squares_btq = mix_step(*arguments, held=self.held[i], early=early)
            out_di = layer.out_di[:, : gated_bti.shape[-1]]
            add_branch(x_btd, gated_bti, squares_btq, out_di, state.conv[i], projected_btr, absorb_b, eps=eps)
        return add_norm(x_btd, None, self.final_norm_d, eps=eps, dtype=self.dtype)[1]

    def _into(self, i: int, state: State) -> Tensor:
        """The rows of layer i's input projection that the submodel of `state` uses."""
        rows = 2 * self.cfg.d_state + self.held[i] + 2 * state.widths[i] * self.cfg.headdim
        return self.layers[i].into_rd[:rows]

    def _project(self, i: int, normed_btd: Tensor, state: State) -> Tensor:
        return F.linear(normed_btd, self._into(i, state))

    def _mix(self, i: int, projected_btr: Tensor, state: State, absorb_b: Tensor) -> Tensor:
        arguments = self._mix_arguments(i, projected_btr, state, absorb_b)
        return mixer_step(*arguments, held=self.held[i], chunk_size=self.cfg.chunk_size, eps=self.cfg.norm_eps)

    def _mix_arguments(self, i: int, projected_btr: Tensor, state: State, absorb_b: Tensor) -> tuple[Tensor, ...]:
        layer, heads, cfg = self.layers[i], state.widths[i], self.cfg
        inner = heads * cfg.headdim
        channels = 2 * cfg.d_state + inner
        return (
            projected_btr,
            layer.conv_ck[:channels],
            layer.conv_bias_c[:channels],
            layer.A_h[:heads],
            layer.D_h[:heads],
            layer.dt_bias_h[:heads],
            layer.gated_norm_i[:inner],
            state.conv[i],
            state.ssm[i],
            absorb_b,
        )

    @torch.no_grad()
    def logits(self, hidden_btd: Tensor) -> Tensor:
        """Scores of the tokens 0 .. vocab_size - 1, float32, shape b t v."""
        return F.linear(hidden_btd, self.embedding_vd).float()


def carry(state: State, widths: LayerWidths) -> State | None:
    """The state of the submodel `widths` after the same tokens, where `state` knows it exactly; else None.

    A layer's state depends on the widths of the layers before it. So it is known where nothing differs, or where only the
    last layer does and is narrower there: its heads are the first ones, and B, C and their convolution are shared.
    """
    if widths[:-1] != state.widths[:-1] or widths[-1] > state.widths[-1]:
        return None
    copy = state.clone()
    headdim, d_state = copy.ssm[-1].shape[2:]
    copy.conv[-1] = copy.conv[-1][..., : 2 * d_state + widths[-1] * headdim].contiguous()
    copy.ssm[-1] = copy.ssm[-1][:, : widths[-1]].contiguous()
    return replace(copy, widths=widths)
