"""The list of collectives that --dry-run prints, against the calls that real ranks make."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from modeling.models import build_model
from pretrain.collectives import collectives
from pretrain.config import RunConfig
from pretrain.data import Batch
from pretrain.distributed import Ranks, init_ranks
from pretrain.engine import Engine
from pretrain.images import ImageBatch
from pretrain.objective import add_gradients, step_widths
from pretrain.vision_config import VisionRunConfig
from tests.distributed.harness import run_ranks
from tests.distributed.test_layouts import small_run
from tests.distributed.test_vision_train import run_config

OPERATIONS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
Calls = Counter[tuple[str, str, int]]
"""Operation, group and bytes of the whole tensor, and how often."""


class Recorder(TorchDispatchMode):
    """Counts what torch.distributed is really asked for, below our code, megatron-core's and DeepSpeed's."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.calls: Calls = Counter()
        groups = {"tp": ranks.tp.group, "dp": ranks.dp_group}
        self.over = {tuple(dist.get_process_group_ranks(group)): over for over, group in groups.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(a) for a in args if "ProcessGroup" in str(getattr(a, "_type", str)()))
            tensors = [x for a in args for x in (a if isinstance(a, list) else [a]) if isinstance(x, torch.Tensor)]
            whole = max(x.numel() * x.element_size() for x in tensors)
            over = self.over[tuple(dist.get_process_group_ranks(group))]
            key = (OPERATIONS[func.__name__.partition(".")[0]], over, whole)
            self.calls[key] += 1
        return func(*args, **(kwargs or {}))


def batch_of(cfg: RunConfig) -> Batch | ImageBatch:
    if isinstance(cfg, VisionRunConfig):
        pixels = torch.randint(0, 256, (cfg.data.micro_batch, 3, 16, 16), dtype=torch.uint8)
        return ImageBatch(
            pixels, torch.zeros(cfg.data.micro_batch, dtype=torch.int64), torch.arange(cfg.data.micro_batch)
        )
    ids = torch.randint(0, 100, (cfg.data.micro_batch, cfg.tokens_per_sequence + 1))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)


def calls_of_a_step(cfg: RunConfig) -> Calls:
    ranks = init_ranks(cfg.parallel.tensor, sequence=cfg.parallel.sequence)
    model = build_model(
        cfg.model,
        tp=ranks.tp,
        recompute=cfg.parallel.activation_checkpointing,
        in_place_gradients=cfg.parallel.keeps_gradients,
    )
    model.init_weights(cfg.seed)
    engine = Engine(model, cfg, ranks)
    widths = step_widths(cfg.model, cfg.nesting, cfg.loss_weights, cfg.seed, 0)
    accumulation = cfg.grad_accum_steps(ranks.world_size)
    with Recorder(ranks) as recorder:
        for micro in range(accumulation):
            batches = [batch_of(cfg) for _ in range(cfg.draws_per_micro_batch)]
            for _ in add_gradients(engine, batches, widths, cfg, n_micro=accumulation, last=micro == accumulation - 1):
                pass
        engine.step(1e-3)
    return recorder.calls


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {"tensor": 2}),
        (4, {"tensor": 4, "sequence": True}),
        (2, {"tensor": 2, "activation_checkpointing": "block"}),
        (2, {"tensor": 2, "sequence": True, "activation_checkpointing": "block"}),
        (4, {"tensor": 2, "zero_stage": 1}),
        (4, {"tensor": 2, "zero_stage": 2}),
        (4, {"tensor": 2, "sequence": True}),
        (2, {"zero_stage": 2}),
    ],
    ids=str,
)
def test_the_listed_collectives_are_those_that_are_made(world_size: int, parallel: dict[str, Any]) -> None:
    # mix_rate 1: the narrower width runs as a mix in every step, and must cost the same.
    compare(small_run(parallel=parallel, nesting={"mix_rate": 1.0}), world_size)


@pytest.mark.parametrize("sequence", [False, True])
def test_widths_that_draw_tokens_of_their_own_embed_them(sequence: bool) -> None:
    compare(small_run(parallel={"tensor": 2, "sequence": sequence}, nesting={"draw": "separate"}), 2)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (4, 1), (2, 2)])
def test_gathered_widths_send_their_weights_once_a_step(tp: int, dp: int, recompute: str) -> None:
    # No mixes, whose layers are split by heads or not as they are drawn.
    cfg = small_run(
        parallel={"tensor": tp, "sequence": True, "activation_checkpointing": recompute}, data={"micro_batch": tp}
    )
    assert cfg.gathered_heads == 4
    compare(cfg, tp * dp)


def test_a_mix_counts_as_the_width_that_it_replaces() -> None:
    layout = {"parallel": {"tensor": 2, "sequence": True}, "data": {"micro_batch": 2}}
    plain, mixed = (small_run(**layout, nesting={"mix_rate": rate}) for rate in (0.0, 1.0))
    assert collectives(plain, 2) == collectives(mixed, 2)


@pytest.mark.parametrize(("gathered_width", "split"), [(0.75, 1), (0.5, 2), (0.1, 3)])
def test_a_drawn_width_counts_as_the_widest_that_it_can_be(gathered_width: float, split: int) -> None:
    """Six heads or four are drawn, in each of a step's two micro-batches."""
    cfg = small_run(
        model={"widths": [8, 6, 4, 2]},
        parallel={"tensor": 2, "sequence": True, "gathered_width": gathered_width},
        data={"micro_batch": 2},
        nesting={"rule": "sandwich"},
    )
    passes = {row.what: row.passes for row in collectives(cfg, 2)}
    assert passes["inputs of mixers"] == passes["gated norm, forward and backward"] == 2 * split
    assert passes["input of the head"] == passes["largest logits"] == 2 * 3


@pytest.mark.parametrize("pool", ["cls", "avg"])
@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2},
        {"tensor": 2, "sequence": True, "activation_checkpointing": "block", "gathered_width": 0.0},
        {"tensor": 2, "sequence": True},
        {"tensor": 2, "sequence": True, "activation_checkpointing": "block"},
    ],
    ids=["tp", "sequence, block, all split", "sequence", "sequence, block"],
)
def test_a_classifiers_collectives_are_those_that_are_made(parallel: dict[str, Any], pool: str) -> None:
    compare(run_config(Path("unused"), Path("unused"), parallel=parallel, model={"pool": pool}), 2)


def compare(cfg: RunConfig, world_size: int) -> None:
    listed: Calls = Counter()
    for row in collectives(cfg, world_size, compute_bytes=4):
        listed[row.operation, row.over, row.n_bytes] += row.per_step
    for made in run_ranks(world_size, calls_of_a_step, cfg):
        over_tp = {key: n for key, n in made.items() if key[1] == "tp" and key[2] > 4}
        assert over_tp == {key: n for key, n in listed.items() if key[1] == "tp"}
        if world_size == cfg.parallel.tensor:
            continue  # DeepSpeed calls collectives over a group of one rank too: nothing is sent
        reduced = {key: n for key, n in made.items() if key[:2] == ("all-reduce", "dp") and key[2] > 4}
        assert reduced == {key: n for key, n in listed.items() if key[:2] == ("all-reduce", "dp")}
        # One call for each of the two parameter groups, each filled up to a multiple of what ZeRO aligns to.
        for operation in ("all-gather", "reduce-scatter"):
            sent = sum(key[2] * n for key, n in made.items() if key[:2] == (operation, "dp"))
            expected = sum(key[2] * n for key, n in listed.items() if key[:2] == (operation, "dp"))
            assert expected <= sent <= expected + 2 * 4 * world_size * 4, operation
            assert (expected > 0) is (operation == "all-gather" or cfg.parallel.keeps_gradients)
