"""Before the first step, in seconds: does every rank have a working device, do all reach each other, is there room?

What fails is said once, with the node's name, on all ranks, before an hour is spent. The dataset's files, whether all
ranks start the same, and left-over shared memory are checked elsewhere (pretrain.dataset_check, same_start, shard_store).
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from modeling.flops import submodel_parameters
from pretrain.config import RunConfig
from pretrain.distributed import Ranks
from pretrain.environment import all_reduce_gb_s

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 256 << 20
LEAST_GB_S = 5.0
"""Floor on the all-reduce's bus bandwidth in GB/s where ALLREDUCE_GB_S is not set: a tenth of a 400 Gbit/s link. A node
that fell back to plain Ethernet or to one of its links is far below."""
LEAST_FREE = 0.9
"""Share of a GPU's memory that must be free at the start; less means that somebody else's process is on it."""


class PreflightError(ValueError):
    """A rank or node is not fit to train."""


def preflight(cfg: RunConfig, ranks: Ranks) -> None:
    """Check device, links and disk. Every rank must call; raises RankError on all of them, naming rank and node."""
    start = time.monotonic()
    ranks.attempt(lambda: _check_node(cfg, ranks.device, with_disk=ranks.is_main), (PreflightError,))
    nodes = sorted(set(ranks.gather_objects(socket.gethostname())))
    ranks.attempt(lambda: _check_links(ranks), (PreflightError,))
    bandwidth = _all_reduce_gb_s(ranks)
    if bandwidth is not None:
        slowest = min(ranks.gather_objects((bandwidth, socket.gethostname())))
        least = all_reduce_gb_s(LEAST_GB_S)

        def fast_enough() -> None:
            if slowest[0] < least:
                raise PreflightError(
                    f"all-reduce over {ranks.world_size} GPUs runs at {slowest[0]:.1f} GB/s (slowest on {slowest[1]}), "
                    f"under the floor of {least:g} GB/s: look at the links, or set ALLREDUCE_GB_S"
                )

        ranks.attempt(fast_enough, (PreflightError,))
    if ranks.is_main:
        speed = "" if bandwidth is None else f", all-reduce {bandwidth:.0f} GB/s"
        logger.info(
            "preflight: %d ranks on %d nodes%s, %.1f s", ranks.world_size, len(nodes), speed, time.monotonic() - start
        )


def _check_node(cfg: RunConfig, device: torch.device, *, with_disk: bool) -> None:
    """This rank's own checks; raises PreflightError with the node's name."""
    try:
        _check_device(device)
        if with_disk:
            _check_disk(cfg)
    # A broken GPU mostly shows as CUDA's own error, a broken mount as the system's: they need the node's name as well.
    except (PreflightError, RuntimeError, OSError) as error:
        raise PreflightError(f"on node {socket.gethostname()}: {error}") from error


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < LEAST_FREE * total:
        raise PreflightError(
            f"GPU {device.index} has {free / 2**30:.0f} of {total / 2**30:.0f} GiB free: another process holds the rest"
        )
    # Small integers are exact in bfloat16 with float32 sums: a wrong entry is a broken device.
    a = torch.arange(256 * 256, device=device).remainder(7).view(256, 256).bfloat16()
    expected = (a.cpu().double() @ a.cpu().double().T).bfloat16()
    if not torch.equal((a @ a.T).cpu(), expected):
        raise PreflightError(
            f"GPU {device.index} multiplied two matrices of small integers wrongly: take it out of use"
        )


def _check_disk(cfg: RunConfig) -> None:
    folder = Path(cfg.run_dir)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    parameters = submodel_parameters(cfg.model, cfg.model.layer_widths(cfg.model.n_heads)).total
    needed = 2 * cfg.checkpoint_bytes(parameters)
    if free < needed:
        raise PreflightError(
            f"{folder} has {free / 1e9:.1f} GB free, two checkpoints of this run take {needed / 1e9:.1f} GB: make room, or "
            "set run_dir"
        )


def _check_links(ranks: Ranks) -> None:
    """Raise PreflightError with the node's name where a sum over all ranks arrives wrong there. All ranks must call."""
    one = torch.ones((), device=ranks.device)
    dist.all_reduce(one)
    if one.item() != ranks.world_size:
        raise PreflightError(
            f"on node {socket.gethostname()}: an all-reduce of ones over {ranks.world_size} ranks gave {one.item()}: "
            "take the node out of use"
        )


def _all_reduce_gb_s(ranks: Ranks) -> float | None:
    """Bus bandwidth of an all-reduce over all GPUs, GB/s; None on a CPU, or alone. All ranks must call."""
    if ranks.device.type != "cuda" or ranks.world_size == 1:
        return None
    message = torch.zeros(MESSAGE_BYTES // 4, device=ranks.device)
    for _ in range(2):
        dist.all_reduce(message)
    torch.cuda.synchronize(ranks.device)
    start = time.perf_counter()
    for _ in range(5):
        dist.all_reduce(message)
    torch.cuda.synchronize(ranks.device)
    seconds = (time.perf_counter() - start) / 5
    return 2 * (ranks.world_size - 1) / ranks.world_size * MESSAGE_BYTES / seconds / 1e9
