"""DeepSpeed behind one small class; the only file that imports it. Its JSON is derived from RunConfig.

Parameters are float32 and the model casts them where they are used, so DeepSpeed runs in float32 too: gradients of all
widths and micro-batches accumulate in float32, and A_log, dt_bias, D and norms never see a narrower type. ZeRO shards
the optimizer's state over data parallelism.

Under ZeRO 1 gradients add up in buffers that live as long as the run: backward is torch's own, so that matrix products can
add straight into them (Backbone's in_place_gradients) and passes can be CUDA graphs, which know memory by its address, and
the step is pretrain/flat_update.py's, on DeepSpeed's groups and state. Under ZeRO 2 DeepSpeed's hooks take each backward's
gradients away to shard them, and its own step ends it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
import deepspeed
from deepspeed.utils import logger as deepspeed_logger

from modeling.backbone import Backbone
from modeling.checkpoint_reader import EMA, KINDS
from modeling.gathered_widths import GatheredWidths
from modeling.language import LanguageModel
from modeling.tensor_parallel import is_partial, layout_of
from pretrain.config import RunConfig
from pretrain.distributed import Mpu, Ranks
from pretrain.flat_update import FlatUpdate, alias_masters
from pretrain.gradients import GradientBuffer
from pretrain.optim import parameter_groups
from pretrain.passes import GraphedPasses
from pretrain.shared_embedding import SharedEmbedding

NEVER_CLIP = 1e30
"""Norm bound that stands for no clipping: DeepSpeed computes the norm, and refuses a non-finite one, only under a bound."""


@dataclass(frozen=True)
class Fragment:
    """The part of one local parameter whose optimizer state this rank holds: flat entries start .. start + numel."""

    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor | None = None
    """The moving average of the master, where the run keeps one."""


class Engine:
    """One model under DeepSpeed ZeRO. All ranks must call `backward` and `step`."""

    def __init__(self, model: Backbone, cfg: RunConfig, ranks: Ranks) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        if ranks.device.type == "cpu":
            # Its shared-memory collective would be compiled at first use (a minute); gloo serves CPU ranks here.
            sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters():
            # DeepSpeed counts a parameter in the gradient norm on tp rank 0 alone unless it is marked as sharded.
            parameter.tensor_model_parallel = layout_of(name).is_sharded  # type: ignore[attr-defined]
        optimizer = torch.optim.AdamW(
            parameter_groups(_partial_first(model), cfg.optim),
            lr=cfg.optim.lr,
            betas=cfg.optim.betas,
            eps=cfg.optim.eps,
            fused=ranks.device.type == "cuda",
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            mpu=Mpu(),
            dist_init_required=False,
            config=deepspeed_config(cfg, ranks),
        )
        self.model: Any = model
        self.parameters = dict(model.named_parameters())
        self._update: FlatUpdate | None = None
        self.gradients: GradientBuffer | None = None
        if cfg.parallel.keeps_gradients:
            alias_masters(self.optimizer)
            assert not self.optimizer._grad_acc_hooks, "managed_gradient_accumulation=false leaves gradients to us"
            for parameter in self.parameters.values():
                # DeepSpeed slices its view of a parameter with autograd on. That keeps the parameter's gradient accumulator
                # alive, tied to the stream that was current then, and a CUDA graph may not wait for another stream.
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    mapping.lp_fragment = mapping.lp_fragment.detach()
            self._update = FlatUpdate(self.optimizer, self.parameters, model.tp, ranks.dp_group, cfg.optim.clip_norm)
            self.gradients = self._update.gradients
        self.gathered: GatheredWidths | None = None
        if cfg.gathered_heads:
            self.gathered = GatheredWidths(model.blocks, model.tp, cfg.gathered_heads)
        self.embedding: SharedEmbedding | None = None
        """Where the widths of a micro-batch share their embedded tokens."""
        if cfg.shares_embedding:
            assert isinstance(model, LanguageModel)
            self.embedding = SharedEmbedding(model)
        self._make_optimizer_state()
        self._ema_decay = cfg.optim.ema_decay
        self._ema: dict[str, Tensor] = {}
        if self._ema_decay:
            self._ema = {name: part.master.detach().clone() for name, part in self._fragments()}
        self._dp_group = ranks.dp_group
        self.graphs: GraphedPasses | None = None
        """The passes as CUDA graphs, where the run has them."""
        self._captured_at = self._addresses()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; under ZeRO 2 through DeepSpeed's hooks, which also hang on the model itself.

        Where widths are gathered, a training pass of one must be after `gathered.wait_fetched`, which add_gradients sees to.
        """
        return self.model.forward(*args, **kwargs) if self.gradients is not None else self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`. `last` marks the final backward of the step.

        A step has one backward for each width and micro-batch, and gradients are reduced once. Under ZeRO 2 DeepSpeed would
        take each for a whole one, so the boundary is set by hand. The caller has already divided the loss by the number
        of micro-batches.
        """
        if self.gradients is not None:
            loss.backward()
            return
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Reduce, clip, update at rate `lr`, clear gradients. Returns the gradient norm before clipping, over all ranks.

        Where the norm is not finite every rank's parameters and state stay as they were; inf is returned.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.gathered is not None:
            self.gathered.start_return()
            self.gathered.wait()
        if self._update is not None:
            norm = self._update.step()
        else:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
        if self._ema and math.isfinite(norm):
            self._move_average()
        if self.gradients is not None:
            self.gradients.clear()
        if self.gathered is not None:
            self.gathered.start_clear()
            self.gathered.start_fetch()
        if self.graphs is not None and self._addresses() != self._captured_at:
            raise RuntimeError("the step moved parameters, and CUDA graphs know them by address: cuda_graphs=never")
        return float(norm)

    def close(self) -> None:
        """Let go of the CUDA graphs, before the ranks part: NCCL does not close while graphs hold its collectives."""
        if self.graphs is not None:
            self.graphs.clear()

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters.values()]

    def discard(self) -> None:
        """Clear the gradients of this step and update nothing. All ranks must call, instead of `step`.

        Under ZeRO 2 DeepSpeed drops a step whose norm is not finite, with all that it keeps of the gradients: this makes it so.
        """
        if self.gathered is not None:
            self.gathered.start_clear()
            self.gathered.wait()
        if self.gradients is not None:
            self.gradients.clear()
            return
        for gradients in self.optimizer.averaged_gradients.values():
            if gradients:
                gradients[0].fill_(torch.inf)
        self.engine.step()

    def fragment(self, name: str) -> Fragment | None:
        """This rank's master and moments of parameter `name`, as views; None where other ranks hold all of it."""
        mapping = self.parameters[name]._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        return Fragment(
            start=mapping.lp_fragment_address.start,
            master=mapping.hp_fragment,
            exp_avg=mapping.get_optim_state_fragment("exp_avg"),
            exp_avg_sq=mapping.get_optim_state_fragment("exp_avg_sq"),
            ema=self._ema.get(name),
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a fragment holds of each parameter, by name."""
        return (*KINDS, EMA) if self._ema_decay else KINDS

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model's weights are their moving average, if the run keeps one. Every rank must call.

        They are put together from the shards in place, so that nothing that knows them by their address has to know.
        """
        if not self._ema_decay:
            yield
            return
        if self.gathered is not None:
            self.gathered.wait_fetched()  # it has read the weights
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            flat = torch.zeros(parameter.numel(), device=parameter.device)
            part = self.fragment(name)
            if part is not None and part.ema is not None:
                flat[part.start : part.start + part.ema.numel()] = part.ema
            dist.all_reduce(flat, group=self._dp_group)  # every entry is one rank's, zero on the others
            parameter.data.copy_(flat.view_as(parameter))
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(kept[name])

    def _fragments(self) -> Iterator[tuple[str, Fragment]]:
        for name in self.parameters:
            part = self.fragment(name)
            if part is not None:
                yield name, part

    @torch.no_grad()
    def _move_average(self) -> None:
        n = self.n_updates
        decay = min(self._ema_decay, (1 + n) / (10 + n))
        masters = [part.master for _, part in self._fragments()]
        torch._foreach_lerp_(list(self._ema.values()), masters, 1 - decay)

    @property
    def n_updates(self) -> int:
        """Optimizer updates applied so far: Adam's step, which corrects its bias."""
        return int(next(iter(self._adam.state.values()))["step"].item())

    def restore(self, n_updates: int) -> None:
        """After fragments and parameters were overwritten in place: set Adam's step. All ranks must call."""
        for state in self._adam.state.values():
            state["step"].fill_(float(n_updates))
        if self.gathered is not None:
            self.gathered.start_fetch()

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def _make_optimizer_state(self) -> None:
        """Create the moments now, as zeros: torch makes them at the first step, too late to load a checkpoint into."""
        for group in self._adam.param_groups:
            for partition in group["params"]:
                state = self._adam.state[partition]
                # The fused kernel wants the step on the device, the loop on the host, as torch itself places it.
                device = partition.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(partition)
                state["exp_avg_sq"] = torch.zeros_like(partition)
        self.optimizer._lazy_init_hp_params_optimizer_state()


def _partial_first(model: Backbone) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters whose gradients are partial over tp, then all others: so the former lie together in each group."""
    return sorted(model.named_parameters(), key=lambda item: not is_partial(item[0], sequence=model.tp.sequence))


def deepspeed_config(cfg: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's JSON for this run. Accumulation is 1: where a step ends is said by hand (see Engine.backward)."""
    return {
        # false: `step` reduces whatever gradients there are; backward is nothing that DeepSpeed sees.
        "managed_gradient_accumulation": not cfg.parallel.keeps_gradients,
        "train_micro_batch_size_per_gpu": cfg.data.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": cfg.optim.clip_norm or NEVER_CLIP,
        "zero_optimization": {
            "stage": cfg.parallel.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": cfg.parallel.zero_stage > 1,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
