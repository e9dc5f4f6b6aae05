"""ZeRO 1's step over the flat groups that DeepSpeed lays parameters out in: reduce, measure, clip, update, gather.

DeepSpeed partitions parameters and owns the optimizer's state; its own step would copy gradients into buckets, out of them,
into a shard, and to float64 for the norm, and keep a second float32 copy of parameters that are float32 already. Here
gradients lie as parameters do, so that a rank's shard of them is a slice: scattered into, measured and read by AdamW where
it is. A step reads and writes a third of the bytes, and needs 8 bytes a parameter of the shard less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modeling.tensor_parallel import TensorParallel, is_partial, layout_of
from pretrain.gradients import GradientBuffer, place_in

CLIP_EPS = 1e-6
"""Added to the norm before it is divided by the bound, as DeepSpeed and torch.nn.utils.clip_grad_norm_ do."""


def alias_masters(zero: Any) -> None:
    """Let DeepSpeed's float32 master copies be the parameters themselves, which are float32 as well.

    Before the optimizer has state. `zero` is DeepSpeed's ZeRO 1 optimizer.
    """
    for group, shard in enumerate(zero.single_partition_of_fp32_groups):
        rank = dist.get_rank(group=zero.real_dp_process_group[group])
        shard.data = zero.parallel_partitioned_bit16_groups[group][rank].data
    zero._link_all_hp_params()


class FlatUpdate:
    """One step after another on the same buffers. All ranks must call `step`."""

    def __init__(
        self, zero: Any, parameters: Mapping[str, nn.Parameter], tp: TensorParallel, dp_group: Any, clip_norm: float
    ) -> None:
        """`parameters` by name, those whose gradients are partial over tp before all others in each of DeepSpeed's groups."""
        self._adam: torch.optim.Optimizer = zero.optimizer
        self._tp, self._dp_group, self._clip_norm = tp, dp_group, clip_norm
        self._dp_size, dp_rank = dist.get_world_size(dp_group), dist.get_rank(dp_group)
        self._flats: list[Tensor] = zero.bit16_groups_flat
        self._masters: list[Tensor] = zero.single_partition_of_fp32_groups
        self.gradients = GradientBuffer(parameters.values(), self._flats)
        self._shards = [flat.chunk(self._dp_size)[dp_rank] for flat in self.gradients.flats]
        shared = [0] * len(self._flats)
        self._measured: list[Tensor] = []
        counts: list[float] = []
        for name, parameter in parameters.items():
            which, start = place_in(parameter, self._flats)
            if tp.size > 1 and tp.sums_later and is_partial(name, sequence=tp.sequence):
                shared[which] = max(shared[which], start + parameter.numel())
            shard = self._shards[which]
            low, high = (
                min(max(at - dp_rank * shard.numel(), 0), shard.numel()) for at in (start, start + parameter.numel())
            )
            if high > low:
                self._measured.append(shard[low:high])
                # What every tensor-parallel rank has alike counts once.
                counts.append(float(layout_of(name).is_sharded or tp.rank == 0))
        self._shared = [flat[:end] for flat, end in zip(self.gradients.flats, shared, strict=True) if end]
        self._counted = torch.tensor(counts, device=self._flats[0].device)

    @torch.no_grad()
    def step(self) -> float:
        """Reduce, clip and update, at the rates that the optimizer's groups have. Returns the norm before clipping.

        Where it is not finite nothing but the gradients has changed.
        """
        for gradient in self._shared:
            dist.all_reduce(gradient, group=self._tp.group)
        if self._dp_size > 1:
            for shard, gradient in zip(self._shards, self.gradients.flats, strict=True):
                dist.reduce_scatter_tensor(shard, gradient, group=self._dp_group)
        norm = self._norm() / self._dp_size
        if not math.isfinite(norm):
            return math.inf
        clip = max(1.0, (norm + CLIP_EPS) / self._clip_norm) if self._clip_norm else 1.0
        self._update(self._dp_size * clip)
        if self._dp_size > 1:
            for flat, master in zip(self._flats, self._masters, strict=True):
                dist.all_gather_into_tensor(flat, master.data, group=self._dp_group)
        return norm

    def _norm(self) -> float:
        """Of the gradients' sum over data parallelism, all parameters, on every rank."""
        total = torch.zeros((), device=self._counted.device)
        if self._measured:
            norms = torch.stack(torch._foreach_norm(self._measured))
            total = (norms.double().square() * self._counted).sum().float()
        for size, group in ((self._dp_size, self._dp_group), (self._tp.size, self._tp.group)):
            if size > 1:
                dist.all_reduce(total, group=group)
        return float(total.double().sqrt())

    def _update(self, divisor: float) -> None:
        """AdamW with the gradients over `divisor`."""
        for master, shard in zip(self._masters, self._shards, strict=True):
            master.grad = shard
        if self._counted.is_cuda:  # the fused kernel divides as it reads
            self._adam.grad_scale = torch.full((), divisor, device=self._counted.device)  # type: ignore[attr-defined]
            self._adam.step()
            del self._adam.grad_scale  # type: ignore[attr-defined]
        else:
            torch._foreach_div_(self._shards, divisor)
            self._adam.step()
        for master in self._masters:
            master.grad = None
