"""Process groups: who this rank is, which ranks share its replica, and what DeepSpeed wants to know of it."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from modeling.tensor_parallel import TensorParallel
from pretrain.config_sections import ConfigError

START_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a collective waits for a rank before the job fails."""


T = TypeVar("T")


class RankError(RuntimeError):
    """Work that every rank was to do failed on some; the message names them and what each said."""

    def __init__(self, message: str, *, misused: bool = False) -> None:
        super().__init__(message)
        self.misused = misused
        """Whether every rank that failed said ConfigError: another start of the same command will fail too."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job. `init_ranks` makes it; every rank must call that once."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tp: TensorParallel
    dp_rank: int
    dp_size: int
    dp_group: Any
    cpu_group: Any
    """Gloo group of all ranks, for decisions that must not wait for the GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def agree_any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank: one answer everywhere. Every rank must call; no GPU is involved."""
        return bool(self.agree_max(int(flag)))

    def agree_max(self, value: int) -> int:
        """The largest `value` of any rank: one answer everywhere. Every rank must call; no GPU is involved."""
        vote = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return int(vote.item())

    def mean(self, value: Tensor) -> float:
        """The mean of one number over all ranks, in float64: one answer everywhere. Every rank must call."""
        total = value.detach().double().cpu()
        dist.all_reduce(total, group=self.cpu_group)
        return total.item() / self.world_size

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank, on every rank. Every rank must call."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def attempt(self, work: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
        """`work()` on every rank; returns this rank's result. Every rank must call.

        Raises RankError on all of them where it raised one of `errors` on any: no rank goes on alone into a collective.
        """
        result, said = None, None
        try:
            result = work()
        except errors as error:
            said = str(error), isinstance(error, ConfigError)
        ranks_by_message: dict[str, list[int]] = {}
        misused = True
        for rank, theirs in enumerate(self.gather_objects(said)):
            if theirs is not None:
                ranks_by_message.setdefault(theirs[0], []).append(rank)
                misused = misused and theirs[1]
        if ranks_by_message:
            message = "; ".join(f"{_name(ranks)}: {message}" for message, ranks in ranks_by_message.items())
            raise RankError(message, misused=misused)
        return cast(T, result)


def init_ranks(tensor_parallel: int, *, sequence: bool = False) -> Ranks:
    """Join the job that torchrun or Slurm started, or make one of a single rank, and split it into tp x dp.

    Uses NCCL and one GPU a rank where there are GPUs, gloo otherwise. Raises ConfigError where the launcher's variables
    are incomplete, or the ranks do not divide by `tensor_parallel`. `sequence` is parallel.sequence. Every rank must call.
    """
    _read_launcher()
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world_size % tensor_parallel:
        raise ConfigError(f"{world_size} ranks are not a multiple of parallel.tensor={tensor_parallel}")
    device = _device(local_rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=START_TIMEOUT)
    parallel_state.initialize_model_parallel(
        # Tensor-parallel ranks are neighbours, so that they share a node and its fast links.
        tensor_model_parallel_size=tensor_parallel,
        # What tp sends beside a matrix product gets the next free multiprocessors, not those that the product leaves over.
        high_priority_stream_groups=["tp"] if device.type == "cuda" else None,
    )
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=device,
        tp=TensorParallel(
            size=tensor_parallel,
            rank=parallel_state.get_tensor_model_parallel_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
            sequence=sequence,
        ),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        cpu_group=dist.new_group(backend="gloo", timeout=START_TIMEOUT),
    )


def close_ranks() -> None:
    """Leave the job in order. Every rank must call; not after another rank has failed."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def is_broken_link(error: RuntimeError) -> bool:
    """Whether a collective raised it: gloo raises plain RuntimeErrors, NCCL its own."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "Connection", "NCCL"))


class Mpu:
    """megatron-core's groups under the names that DeepSpeed calls; pass it as `mpu`."""

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)


def _name(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"rank {ranks[0]} and {len(ranks) - 1} more"


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    n_gpus = torch.cuda.device_count()
    # Slurm with --gpus-per-task shows each task one GPU; torchrun shows every rank all of them.
    index = local_rank if n_gpus > 1 else 0
    if index >= n_gpus or (
        n_gpus == 1 and int(os.environ["LOCAL_WORLD_SIZE"]) > 1 and "SLURM_PROCID" not in os.environ
    ):
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own, the node shows {n_gpus}: start one rank a GPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _read_launcher() -> None:
    """Fill in torchrun's variables from Slurm's, or for a single process. DeepSpeed and streaming read them too."""
    env = os.environ
    # srun alone sets this one. A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS, and is no rank.
    n_tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in env and int(n_tasks) > 1:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], n_tasks, env["SLURM_LOCALID"]
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
        env.setdefault("LOCAL_WORLD_SIZE", tasks.partition("(")[0].partition(",")[0])
        if "MASTER_ADDR" not in env:
            raise ConfigError(
                "MASTER_ADDR is not set: in the batch script, export "
                'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1) and a MASTER_PORT'
            )
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        env["MASTER_PORT"] = str(_free_port())
    needed = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in env]
    if missing:
        raise ConfigError(f"RANK is set but {', '.join(missing)} is not: start with torchrun, srun, or neither")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
