"""Do the ranks still hold the same model, and a sound one? A memory fault or a wrong collective makes them drift apart without a sound."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modeling.tensor_parallel import layout_of
from pretrain.distributed import RankError, Ranks


def fingerprints(model: nn.Module) -> Tensor:
    """One int64 for each parameter, on the CPU: the sum of its float32 entries' bit patterns, exact in any order."""
    sums = [p.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()]
    return torch.stack(sums).cpu()


def weights_are_finite(model: nn.Module, ranks: Ranks) -> bool:
    """Whether every weight is, on every rank: an update may overflow, and the checkpoints before it are then the better ones.
    Every rank must call."""
    finite = torch.stack([torch.isfinite(p).all() for p in model.parameters()]).all()
    return not ranks.agree_any(not finite.item())


def check_replicas(model: nn.Module, ranks: Ranks) -> None:
    """Raise RankError on all ranks where parameters differ in any bit between ranks that should hold the same.

    Those are the data-parallel replicas of each tensor-parallel part, and all ranks for what is replicated over tp.
    Costs one read of the parameters and a few kilobytes. Every rank must call.
    """
    names = [name for name, _ in model.named_parameters()]
    mine = fingerprints(model)
    everyone = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    dist.all_gather(everyone, mine, group=ranks.cpu_group)
    places = ranks.gather_objects((ranks.tp.rank, ranks.dp_rank))
    wrong: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        kept: dict[int, dict[int, list[int]]] = {}
        for rank, (tp_rank, _) in enumerate(places):
            part = tp_rank if layout_of(name).is_sharded else 0
            kept.setdefault(part, {}).setdefault(int(everyone[rank][row]), []).append(rank)
        for holders in kept.values():
            most = max(holders.values(), key=len)
            odd = [rank for held in holders.values() if held is not most for rank in held]
            if odd:
                wrong[name] = sorted({*wrong.get(name, []), *odd})
    if wrong:
        name, odd = next(iter(wrong.items()))
        raise RankError(
            f"{len(wrong)} parameters differ between ranks that must hold the same, first {name} on ranks {odd}: a memory "
            "fault or a collective that went wrong. Take those nodes out and resume from the last checkpoint"
        )
