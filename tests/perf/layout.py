"""Memory and time of a training step on one GPU, for every LM size and way of recomputing; what the layout machinery costs.

    python -m tests.perf.layout -o record.json [--sizes 130m 370m 790m 1b4] [--modes none states selective block] [--micro-batch N]

For each size and mode: the peak of torch's allocator in the passes and in DeepSpeed's update, beside the estimate that
`--dry-run` prints, and the median time of a micro-batch of all widths. For each size without recomputation also two ratios
in the same run: tensor parallelism of one rank against a model without its calls, each at its best of many turns (where the
GPU waits for the host, medians differ by more than the calls cost); and a step through DeepSpeed against plain torch's
AdamW on the bare model.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.language import LanguageModel
from modeling.loss import next_token_loss
from modeling.tensor_parallel import TensorParallel
from pretrain.config import RunConfig
from pretrain.config_io import load_config
from pretrain.distributed import Ranks, close_ranks, init_ranks
from pretrain.engine import Engine
from pretrain.hardware import compute_dtype, device_name
from pretrain.memory import estimate
from pretrain.optim import parameter_groups
from pretrain.provenance import git_commit, versions

MODES = ("none", "states", "selective", "block")
GIB = 2**30


def build(cfg: RunConfig, ranks: Ranks, tp: TensorParallel, *, in_place_gradients: bool = False) -> LanguageModel:
    with torch.device("meta"):
        model = LanguageModel(
            cfg.model,
            tp=tp,
            dtype=compute_dtype(cfg, ranks.device),
            recompute=cfg.parallel.activation_checkpointing,
            in_place_gradients=in_place_gradients,
            float8=cfg.float8,
        )
    model.to_empty(device=ranks.device)
    for parameter in model.parameters():  # values do not matter; those of a real start take a minute to draw
        torch.nn.init.uniform_(parameter, -0.02, 0.02)
    return model


def micro_batch(model: Any, head: LanguageModel, ids: Tensor, backward: Callable[[Tensor, bool], None]) -> None:
    """Forward and backward of every width, each of which embeds for itself, on every side."""
    widths = head.cfg.widths
    for i, n_heads in enumerate(widths):
        loss = next_token_loss(head, model(ids[:, :-1], head.cfg.layer_widths(n_heads)), ids[:, 1:])
        backward(loss.total / len(widths), i == len(widths) - 1)


def timed(
    works: dict[str, Callable[[], None]], rounds: int, choose: Callable[[list[float]], float] = statistics.median
) -> dict[str, float]:
    """Seconds of each work; the works take turns, so that a drifting clock touches all alike."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: choose(values) for name, values in taken.items()}


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def measure_mode(cfg: RunConfig, ranks: Ranks) -> dict[str, Any]:
    before = torch.cuda.memory_allocated()  # DeepSpeed lets go of an earlier model late
    model = build(cfg, ranks, ranks.tp, in_place_gradients=cfg.parallel.keeps_gradients)
    engine = Engine(model, cfg, ranks)
    ids = torch.randint(0, cfg.model.vocab_size, (cfg.data.micro_batch, cfg.data.seq_len + 1), device=ranks.device)

    def step() -> None:
        micro_batch(engine, model, ids, lambda loss, last: engine.backward(loss, last=last))
        engine.step(1e-4)

    peaks = {"passes": 0, "update": 0}

    def note(phase: str) -> None:
        peaks[phase] = max(peaks[phase], torch.cuda.max_memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()

    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        for last_one in (False, True):  # the second runs beside the first one's gradients, as all but one of a run do
            micro_batch(
                engine, model, ids, lambda loss, last, last_one=last_one: engine.backward(loss, last=last and last_one)
            )
        note("passes")
        engine.step(1e-4)
        note("update")
    peak = max(peaks.values())
    step()
    seconds = timed({"step": step}, 5)["step"]
    guess = estimate(cfg, world_size=1)
    return {
        "peak_gib": peak / GIB,
        "passes_gib": peaks["passes"] / GIB,
        "update_gib": peaks["update"] / GIB,
        "estimate_gib": guess.total / GIB,
        "estimate_over_peak": guess.total / peak,
        "step_s": seconds,
        "tokens_per_s": ids.shape[0] * (ids.shape[1] - 1) / seconds,
    }


def measure_tp1(cfg: RunConfig, ranks: Ranks, ids: torch.Tensor) -> float:
    """Time of forward and backward without the collectives' calls over the time with them."""
    model = build(cfg, ranks, ranks.tp)

    def pass_with() -> None:
        micro_batch(model, model, ids, lambda loss, last: loss.backward())
        model.zero_grad(set_to_none=True)

    calls = {name: getattr(TensorParallel, name) for name in ("enter", "leave", "share", "replicate", "sum")}

    def pass_without() -> None:
        for name in calls:
            setattr(TensorParallel, name, lambda self, x: x)
        pass_with()
        for name, method in calls.items():
            setattr(TensorParallel, name, method)

    pass_with()
    taken = timed({"with": pass_with, "without": pass_without}, 15, min)
    return taken["without"] / taken["with"]


def measure_plain(cfg: RunConfig, ranks: Ranks, ids: torch.Tensor) -> float:
    """Seconds of one step of the bare model under torch's own AdamW: no DeepSpeed, no groups."""
    bare = build(cfg, ranks, TensorParallel())
    optimizer = torch.optim.AdamW(parameter_groups(bare.named_parameters(), cfg.optim), lr=1e-4, fused=True)

    def plain_step() -> None:
        micro_batch(bare, bare, ids, lambda loss, last: loss.backward())
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    plain_step()
    return timed({"plain": plain_step}, 5)["plain"]


def measure_ratios(cfg: RunConfig, ranks: Ranks) -> dict[str, float]:
    """Times without over times with: 1 means that the machinery is free."""
    ids = torch.randint(0, cfg.model.vocab_size, (cfg.data.micro_batch, cfg.data.seq_len + 1), device=ranks.device)
    tp1 = measure_tp1(cfg, ranks, ids)
    free()
    return {"tp1_ratio": tp1, "plain_torch_step_s": measure_plain(cfg, ranks, ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["130m", "370m", "790m", "1b4"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[])
    args = parser.parse_args()
    ranks = init_ranks(1)
    rows: list[dict[str, Any]] = []
    for place, size in enumerate(args.sizes):
        cfg = load_config(f"configs/lm_{size}.yaml", ["run_dir=unused", "data.path=unused"])
        if args.micro_batch:
            cfg = replace(cfg, data=replace(cfg.data, micro_batch=args.micro_batch[place]))
        ratios = measure_ratios(cfg, ranks) if "none" in args.modes else {}
        free()
        for mode in args.modes:
            moded = replace(cfg, parallel=replace(cfg.parallel, activation_checkpointing=mode))
            row = {"model": size, "micro_batch": cfg.data.micro_batch, "mode": mode, **measure_mode(moded, ranks)}
            free()
            if mode == "none":
                row |= {**ratios, "deepspeed_ratio": ratios["plain_torch_step_s"] / row["step_s"]}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.output:
                about = {"commit": git_commit(), "device": device_name(ranks.device), "versions": versions()}
                args.output.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")
    close_ranks()


if __name__ == "__main__":
    main()
