"""A nested Mamba2 (MatMamba, arXiv 2410.06718) for transformers, in one file that needs torch and transformers alone.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model(input_ids, width="1/4").logits
    model.generate(**tokenizer("The", return_tensors="pt"), width="1,1/2,1/4,1/4", max_new_tokens=50)

`width` is a fraction of the full width ("1/4"), a head count ("16h"), or one of either for each layer, with commas or as a
list; without it the model runs as wide as it is. Width n of a layer is its first n heads, so every width is a part of the
same weights. Batches of unequal prompts are padded on the left.

modeling.export writes this file beside the weights; it is no part of the package that wrote it and imports nothing of it.

Letters: b batch, t time, d model, i inner (heads x headdim), h heads, p headdim, n state, k conv taps, c chunks or
channels, l and s places in a chunk, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as fused_scan

    NO_FUSED_SCAN = ""
except Exception as error:  # absent, or built for other versions: both raise many things
    fused_scan, NO_FUSED_SCAN = None, f"{type(error).__name__}: {error}"

NO_STEP = -1e4
"""A dt this low gives softplus(dt + bias) = 0 exactly: the step changes no state."""
Width = str | Sequence[str | int] | None


class MatMambaConfig(PretrainedConfig):
    """Sizes of a nested model, and how many heads each layer of this folder holds."""

    model_type = "matmamba"

    def __init__(
        self,
        n_layers: int = 24,
        d_model: int = 768,
        n_heads: int = 64,
        headdim: int = 24,
        d_state: int = 128,
        d_conv: int = 4,
        chunk_size: int = 256,
        norm_eps: float = 1e-5,
        vocab_size: int = 50257,
        widths: Sequence[int] = (64, 32, 16, 8),
        layer_heads: Sequence[int] | None = None,
        **rest: Any,
    ) -> None:
        """`widths` are the trained ones, as head counts of `n_heads`; `layer_heads` defaults to all heads in every layer."""
        self.n_layers, self.d_model, self.n_heads, self.headdim = n_layers, d_model, n_heads, headdim
        self.d_state, self.d_conv, self.chunk_size, self.norm_eps = d_state, d_conv, chunk_size, norm_eps
        self.vocab_size, self.widths = vocab_size, list(widths)
        self.layer_heads = [n_heads] * n_layers if layer_heads is None else list(layer_heads)
        if len(self.layer_heads) != n_layers or not all(1 <= n <= n_heads for n in self.layer_heads):
            raise ValueError(f"layer_heads={self.layer_heads}: give {n_layers} counts from 1 to n_heads={n_heads}")
        # The names that transformers and its users look for.
        self.hidden_size, self.num_hidden_layers = d_model, n_layers
        super().__init__(**{"tie_word_embeddings": False, **rest})

    def heads_of(self, width: Width) -> tuple[int, ...]:
        """Heads of each layer. Raises ValueError where `width` names no submodel that this folder holds."""
        if width is None:
            return tuple(self.layer_heads)
        if not isinstance(width, str) and not isinstance(width, Sequence):
            raise ValueError(f'width={width!r}: write a fraction "1/4", heads "16h", or one for each layer')
        parts = width.split(",") if isinstance(width, str) else list(width)
        counts = [self._count(part) for part in parts]
        if len(counts) == 1:
            counts *= self.n_layers
        if len(counts) != self.n_layers:
            raise ValueError(f"{len(counts)} widths for {self.n_layers} layers: give one width, or one for each layer")
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
        count = number * self.n_heads if number <= 1 and not text.endswith("h") else number
        if count.denominator != 1 or not 1 <= count <= self.n_heads:
            raise ValueError(
                f"width {part!r} is {float(count):g} heads: must be a whole number from 1 to {self.n_heads}"
            )
        return int(count)


class MatMambaCache:
    """What a submodel remembers of a batch of sequences; its size does not grow with them."""

    is_linear = (True,)  # asked by transformers 5 before it would cut a prompt itself

    def __init__(self, config: MatMambaConfig, heads: tuple[int, ...], batch: int, like: Tensor) -> None:
        """Before the first token; `like` is a weight, whose device and dtype the convolution's part has."""
        self.heads, self.n_seen = heads, 0
        self.conv_bkc, self.ssm_bhpn = list[Tensor](), list[Tensor]()
        for n in heads:
            channels = n * config.headdim + 2 * config.d_state
            self.conv_bkc.append(like.new_zeros(batch, config.d_conv - 1, channels))
            shape = (batch, n, config.headdim, config.d_state)
            self.ssm_bhpn.append(torch.zeros(shape, device=like.device, dtype=torch.float32))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.n_seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these sequences, in this order."""
        self.conv_bkc = [t.index_select(0, beam_idx.to(t.device)) for t in self.conv_bkc]
        self.ssm_bhpn = [t.index_select(0, beam_idx.to(t.device)) for t in self.ssm_bhpn]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last dim, in float32, returned in `dtype`."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype)


def scan(
    x_bthp: Tensor, dt_bth: Tensor, A_h: Tensor, B_btn: Tensor, C_btn: Tensor, D_h: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Mamba2's scan (arXiv 2405.21060) from a state, in float32; `dt_bth` is after softplus. Returns y and the last state."""
    x, dt, B, C = x_bthp.float(), dt_bth.float(), B_btn.float(), C_btn.float()
    b, t, h, p = x.shape
    if t == 1:
        decay_bh11 = torch.exp(dt[:, 0] * A_h)[..., None, None]
        state = decay_bh11 * state + torch.einsum("bh,bhp,bn->bhpn", dt[:, 0], x[:, 0], B[:, 0])
        return torch.einsum("bhpn,bn->bhp", state, C[:, 0])[:, None] + D_h[:, None] * x, state
    chunk = min(chunk, t)
    pad = -t % chunk  # padded steps have dt = 0: they change no state
    x, B, C, dt = (
        F.pad(x, (0, 0, 0, 0, 0, pad)),
        F.pad(B, (0, 0, 0, pad)),
        F.pad(C, (0, 0, 0, pad)),
        F.pad(dt, (0, 0, 0, pad)),
    )
    dt_bclh = dt.view(b, -1, chunk, h)
    B_bcln, C_bcln = B.view(b, -1, chunk, B.shape[-1]), C.view(b, -1, chunk, C.shape[-1])
    xd_bclhp = x.view(b, -1, chunk, h, p) * dt_bclh[..., None]
    decay_bchl = (dt_bclh * A_h).transpose(-1, -2).cumsum(-1)
    # Within a chunk: y_l += sum over s <= l of (C_l . B_s) exp(decay_l - decay_s) dt_s x_s.
    later_ls = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    gap_bchls = (decay_bchl[..., :, None] - decay_bchl[..., None, :]).masked_fill(later_ls, -math.inf)
    y = torch.einsum("bcls,bchls,bcshp->bclhp", C_bcln @ B_bcln.mT, gap_bchls.exp(), xd_bclhp)
    added = torch.einsum("bchl,bclhp,bcln->bchpn", (decay_bchl[..., -1:] - decay_bchl).exp(), xd_bclhp, B_bcln)
    # Over chunks: the state carried in.
    carried = []
    for c in range(dt_bclh.shape[1]):
        into_bhl = decay_bchl[:, c].exp()
        carried.append(torch.einsum("bhl,bhpn,bln->blhp", into_bhl, state, C_bcln[:, c]))
        state = state * into_bhl[..., -1, None, None] + added[:, c]
    y = (y + torch.stack(carried, dim=1)).reshape(b, -1, h, p)[:, :t]
    return y + D_h[:, None] * x[:, :t], state


class MatMambaMixer(nn.Module):
    """Mamba2 with one B/C group: project, convolve, scan, gate, project, with the first `heads` heads."""

    def __init__(self, config: MatMambaConfig, held: int) -> None:
        super().__init__()
        self.config = config
        inner, bc, d, k = held * config.headdim, 2 * config.d_state, config.d_model, config.d_conv

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape))

        self.in_z, self.in_x, self.in_bc = parameter(inner, d), parameter(inner, d), parameter(bc, d)
        self.in_dt = parameter(held, d)
        self.conv_x, self.conv_x_bias = parameter(inner, k), parameter(inner)
        self.conv_bc, self.conv_bc_bias = parameter(bc, k), parameter(bc)
        self.dt_bias, self.A_log, self.D = parameter(held), parameter(held), parameter(held)
        self.gated_norm, self.out = parameter(inner), parameter(d, inner)

    def forward(self, x_btd: Tensor, heads: int, mask_bt: Tensor | None, cache: MatMambaCache, layer: int) -> Tensor:
        """Same shape and dtype as `x_btd`. The cache moves on; where `mask_bt` is False a token is not there."""
        cfg, p, n = self.config, self.config.headdim, self.config.d_state
        inner, dtype = heads * p, x_btd.dtype
        z_bti = F.linear(x_btd, self.in_z[:inner])
        raw_btc = torch.cat([F.linear(x_btd, self.in_x[:inner]), F.linear(x_btd, self.in_bc)], dim=-1)
        dt_bth = F.linear(x_btd, self.in_dt[:heads])
        if mask_bt is not None:
            raw_btc = raw_btc.masked_fill(~mask_bt[..., None], 0)
            dt_bth = dt_bth.masked_fill(~mask_bt[..., None], NO_STEP)
        padded_btc = torch.cat([cache.conv_bkc[layer], raw_btc], dim=1)
        conv_ck = torch.cat([self.conv_x[:inner], self.conv_bc]).to(dtype)
        conv_bias_c = torch.cat([self.conv_x_bias[:inner], self.conv_bc_bias]).to(dtype)
        mixed_bct = F.conv1d(padded_btc.mT, conv_ck[:, None], conv_bias_c, groups=conv_ck.shape[0])
        x_bti, B_btn, C_btn = F.silu(mixed_bct.mT).split([inner, n, n], dim=-1)
        y_bti, cache.ssm_bhpn[layer] = self._scan(
            x_bti.unflatten(-1, (heads, p)), dt_bth, B_btn, C_btn, cache.ssm_bhpn[layer]
        )
        cache.conv_bkc[layer] = padded_btc[:, -(cfg.d_conv - 1) :]
        gated = y_bti.float() * F.silu(z_bti.float())
        return F.linear(rms_norm(gated, self.gated_norm[:inner], cfg.norm_eps, dtype), self.out[:, :inner])

    def _scan(
        self, x_bthp: Tensor, dt_bth: Tensor, B_btn: Tensor, C_btn: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        heads, t = dt_bth.shape[2], dt_bth.shape[1]
        A_h, D_h, bias_h = -self.A_log[:heads].float().exp(), self.D[:heads].float(), self.dt_bias[:heads].float()
        chunk = self.config.chunk_size
        if t > 1 and x_bthp.is_cuda:
            if fused_scan is not None:
                y, state = fused_scan(
                    x_bthp,
                    dt_bth,
                    A_h,
                    B_btn[:, :, None],
                    C_btn[:, :, None],
                    chunk,
                    D=D_h,
                    dt_bias=bias_h,
                    dt_softplus=True,
                    initial_states=state,
                    return_final_states=True,
                )
                return y.flatten(2), state
            logger.warning_once(
                f"mamba-ssm's kernels cannot be imported ({NO_FUSED_SCAN}): prompts are read by plain PyTorch"
            )
        y, state = scan(x_bthp, F.softplus(dt_bth.float() + bias_h), A_h, B_btn, C_btn, D_h, state, chunk)
        return y.flatten(2), state


class MatMambaBlock(nn.Module):
    """One layer: norm, then mixer."""

    def __init__(self, config: MatMambaConfig, held: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(config.d_model))
        self.mixer = MatMambaMixer(config, held)


class MatMambaForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; the head is the embedding."""

    config_class = MatMambaConfig
    base_model_prefix = ""
    _is_stateful = True
    _no_split_modules = ("MatMambaBlock",)
    # A_log, dt_bias and D lose their meaning in fewer bits.
    _keep_in_fp32_modules_strict = ("A_log", "D", "dt_bias", "norm", "gated_norm", "final_norm")

    def __init__(self, config: MatMambaConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(MatMambaBlock(config, held) for held in config.layer_heads)
        self.final_norm = nn.Parameter(torch.empty(config.d_model))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, which is the head too."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding, and with it the head."""
        self.embedding = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As mamba-ssm draws them; only for models made of a config alone."""
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.02)
        for name, value in module.named_parameters(recurse=False):
            if "norm" in name or name == "D":
                value.fill_(1)
            elif name == "A_log":
                value.uniform_(1, 16).log_()
            elif name == "dt_bias":
                dt = torch.exp(torch.empty_like(value).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
                value.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif isinstance(module, MatMambaMixer):
                bound = 1 / math.sqrt(self.config.d_conv if name.startswith("conv_") else value.shape[-1])
                value.uniform_(-bound, bound)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MatMambaCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        width: Width = None,
        logits_to_keep: int = 0,
        cache: MatMambaCache | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Scores of the submodel `width` after each of `input_ids` (int64, shape b t).

        `attention_mask` (b t) is 0 where a row is padded; to go on from a cache, padding must stand on the left.
        `past_key_values`, which newer transformers call `cache`, is the past, of the same width, and moves on. `labels` are
        shifted here; -100 is left out. `logits_to_keep` > 0: scores of so many last tokens only. Comes out: logits
        (float32, shape b t v), the mean next-token loss where labels were given, and the cache under transformers' name
        for it. Raises ValueError where the width or the cache does not fit.
        """
        heads = self.config.heads_of(width)
        past = past_key_values if cache is None else cache
        if past is not None and past.heads != heads:
            raise ValueError(f"the cache is of widths {past.heads}, asked is {heads}: start without a cache")
        dtype = self.embedding.weight.dtype
        mask_bt = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        keep = use_cache or past is not None
        if keep and mask_bt is not None and not bool(mask_bt[:, -1].all()):
            raise ValueError('a cache needs padding on the left: set tokenizer.padding_side = "left"')
        if past is None:
            past = MatMambaCache(self.config, heads, input_ids.shape[0], self.embedding.weight)
        x_btd = self.embedding(input_ids).float()
        for layer, block in enumerate(self.blocks):
            normed_btd = rms_norm(x_btd, block.norm, self.config.norm_eps, dtype)
            x_btd = x_btd + block.mixer(normed_btd, heads[layer], mask_bt, past, layer)
        past.n_seen += input_ids.shape[1]
        hidden_btd = rms_norm(x_btd[:, -logits_to_keep:], self.final_norm, self.config.norm_eps, dtype)
        logits_btv = F.linear(hidden_btd, self.embedding.weight).float()
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten()
            loss = F.cross_entropy(logits_btv[:, :-1].flatten(0, 1), targets.to(logits_btv.device), ignore_index=-100)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_btv, past_key_values=past if keep else None)
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`forward` makes the cache: it knows the width."""
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MatMambaCache | None = None,
        use_cache: bool | None = None,
        width: Width = None,
        cache: MatMambaCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` is given for the tokens that the cache has not read."""
        past = past_key_values if cache is None else cache
        seen = 0 if past is None else past.n_seen
        return {
            "input_ids": input_ids[:, seen:].contiguous(),
            "attention_mask": None if attention_mask is None else attention_mask[:, seen:],
            "past_key_values": past,
            "use_cache": use_cache,
            "width": width,
            "logits_to_keep": 1,
        }

    def _reorder_cache(self, past: MatMambaCache, beam_idx: Tensor) -> MatMambaCache:
        past.reorder_cache(beam_idx)
        return past
