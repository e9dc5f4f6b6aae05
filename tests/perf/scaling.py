"""Weak and strong scaling of training steps over the GPUs of one machine, beside the planner's prediction.

    python -m tests.perf.scaling configs/lm_1b4.yaml --gpus 1 2 4 8 --tensor 1 2 4 [--scaling weak filled] -o record.json
        [section.field=value ...]
    python -m tests.perf.scaling configs/lm_1b4.yaml --layouts 1x1 4x1 -o record.json parallel.sequence=true    # tp x dp

For each number of GPUs and each tensor-parallel size that divides it, or each layout that is named, torchrun starts ranks
that take steps on the same random tokens through the trainer's own engine and objective. weak: each data-parallel replica
keeps the configured micro-batch, one a step. strong: the step stays that of the most GPUs, each with a micro-batch of its
own, shared out. filled: strong's step in micro-batches tp times as large, since a replica of tp GPUs has the memory of all of
them; with tp 1 it is strong. A launch of ranks measures strong, then weak; filled has one of its own. A row has the median
step, tokens/s a GPU and its share of one GPU's (where that was measured first), the loss and gradient norm of the first steps
beside one GPU's on the same step (strong, filled: the same tokens), the planner's step, and, on GPUs, the time of each
collective and of copies between GPUs, and how much of it runs while something else does. Rows are written as they come.
Without GPUs the ranks are CPU processes over gloo: for trying it out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from modeling.language import LanguageModel
from pretrain.config import RunConfig
from pretrain.config_io import config_from_dict, config_to_plain, load_config
from pretrain.config_sections import ConfigError
from pretrain.data import Batch
from pretrain.distributed import Ranks, close_ranks, init_ranks
from pretrain.engine import Engine
from pretrain.hardware import compute_dtype, device_name
from pretrain.objective import add_gradients, graphed, step_widths
from pretrain.passes import why_launched
from pretrain.peers import with_peer_copies
from pretrain.plan import GPUS, MEASURED_ON, NVLINK_GB_S, Cluster, predict
from pretrain.provenance import git_commit, versions

LAUNCHES = (("strong", "weak"), ("filled",))
"""What one launch of ranks measures. Strong and filled are compared to one GPU's first steps, so they come first in theirs."""
WARM_UP = 3
COMPARED = 3
"""Steps whose loss and gradient norm are kept: the first ones, before rounding has grown."""
Row = dict[str, Any]


def layout(cfg: RunConfig, world_size: int, tensor: int, scaling: str, largest_dp: int) -> RunConfig:
    """The run's config at one layout. Raises ConfigError where the step does not divide."""
    replicas = world_size // tensor if scaling == "weak" else largest_dp
    tokens = cfg.data.micro_batch * cfg.data.seq_len * replicas
    micro_batch = cfg.data.micro_batch * (tensor if scaling == "filled" else 1)
    data = replace(cfg.data, tokens_per_step=tokens, micro_batch=micro_batch)
    laid = replace(cfg, parallel=replace(cfg.parallel, tensor=tensor), data=data)
    laid.grad_accum_steps(world_size)
    return laid


def tokens_of(cfg: RunConfig, ranks: Ranks, step: int) -> list[Batch]:
    """This replica's micro-batches of a step: its share of the step's random sequences, the same at every layout."""
    generator = torch.Generator().manual_seed(step)
    shape = (cfg.data.sequences_per_step, cfg.data.seq_len + 1)
    ids = torch.randint(0, cfg.model.vocab_size, shape, generator=generator).to(ranks.device)
    mine = ids.chunk(ranks.dp_size)[ranks.dp_rank].split(cfg.data.micro_batch)
    return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None) for part in mine]


def take_step(engine: Engine, cfg: RunConfig, batches: list[Batch]) -> tuple[torch.Tensor, float]:
    """One optimizer step as the trainer takes it; this replica's mean loss, still on the device, and the gradient norm."""
    widths = step_widths(cfg.model, cfg.nesting, cfg.loss_weights, cfg.seed, 0)
    total = torch.zeros((), device=batches[0].tokens_bt.device)
    for m, batch in enumerate(batches):
        last = m == len(batches) - 1
        for width, loss in add_gradients(engine, [batch], widths, cfg, n_micro=len(batches), last=last):
            total += loss.total * (width.weight / len(batches))
    return total, engine.step(1e-4)


SENDING = ("nccl", "Memcpy PtoP")
"""How the names of kernels and copies begin that move data between GPUs."""
WAITING = "wait_signal"
"""In the name of the kernel that waits until a copy from another GPU has arrived."""


def collective_seconds(work: Any) -> dict[str, dict[str, float]]:
    """GPU seconds of each collective and of copies between GPUs in `work`, and how many of them pass while another kernel
    runs; and those in which a kernel waits for such a copy."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    others = sorted((start, end) for start, end, name in spans if not name.startswith(SENDING) and "signal" not in name)
    found: dict[str, dict[str, float]] = {}
    for start, end, name in spans:
        if name.startswith(SENDING) or WAITING in name:
            what = WAITING if WAITING in name else name.partition("(")[0].strip()
            row = found.setdefault(what, {"seconds": 0.0, "beside_others": 0.0})
            row["seconds"] += (end - start) / 1e6
            row["beside_others"] += covered(start, end, others) / 1e6
    return found


def covered(start: float, end: float, spans: list[tuple[float, float]]) -> float:
    """How much of start .. end lies in at least one of `spans`, which are sorted by their start."""
    total, reached = 0.0, start
    for low, high in spans:
        if low >= end:
            break
        total += max(0.0, min(high, end) - max(low, reached))
        reached = max(reached, min(high, end))
    return total


def measure(layouts: dict[str, RunConfig], steps: int) -> list[Row]:
    """One layout's steps of each scaling, by its name, on this rank; every rank of the job calls. Rank 0's rows count.

    The configs differ in data.tokens_per_step alone.
    """
    cfg = next(iter(layouts.values()))
    ranks = with_peer_copies(init_ranks(cfg.parallel.tensor, sequence=cfg.parallel.sequence), cfg.parallel)
    with torch.device("meta"):
        model = LanguageModel(
            cfg.model,
            tp=ranks.tp,
            dtype=compute_dtype(cfg, ranks.device),
            recompute=cfg.parallel.activation_checkpointing,
            in_place_gradients=cfg.parallel.keeps_gradients,
            float8=cfg.float8,
        )
    model.to_empty(device=ranks.device)
    model.init_weights(cfg.seed)
    engine = Engine(model, cfg, ranks)
    if why_launched(cfg, ranks.device) is None:
        engine.graphs = graphed(engine, cfg, ranks)
    rows = [{"scaling": scaling, **_steps(engine, laid, ranks, steps)} for scaling, laid in layouts.items()]
    engine.close()
    close_ranks()
    return rows


def _steps(engine: Engine, cfg: RunConfig, ranks: Ranks, steps: int) -> Row:
    losses, norms, ends = [], [], []
    batches_of = [tokens_of(cfg, ranks, step) for step in range(max(WARM_UP, COMPARED) + steps)]
    ranks.agree_any(False)  # all start together
    for batches in batches_of:
        loss, norm = take_step(engine, cfg, batches)
        if ranks.device.type == "cuda":
            # As the trainer, which reads the norm: what goes on beside the next step (gathered widths' weights) counts there.
            torch.cuda.current_stream().synchronize()
        ends.append(time.perf_counter())
        losses.append(loss)
        norms.append(norm)
    taken = [end - start for start, end in pairwise(ends)]
    row: Row = {
        "world_size": ranks.world_size,
        "tensor": cfg.parallel.tensor,
        "dp": ranks.dp_size,
        "micro_batch": cfg.data.micro_batch,
        "tokens_per_step": cfg.data.tokens_per_step,
        "step_s": statistics.median(ranks.gather_objects(statistics.median(taken[-steps:]))),
        "losses": [ranks.mean(loss) for loss in losses[:COMPARED]],
        "norms": norms[:COMPARED],
        "device": device_name(ranks.device) or "CPU",
    }
    row["tokens_per_s_per_device"] = cfg.data.tokens_per_step / row["step_s"] / ranks.world_size
    if ranks.device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        row["collectives"] = collective_seconds(lambda: take_step(engine, cfg, batches_of[-1]))
    return row


def beside(row: Row, cfg: RunConfig, baseline: Row | None, args: argparse.Namespace) -> Row:
    """The row with what it is compared to: one GPU's, and the planner's."""
    if baseline is not None:
        row["of_one_device"] = row["tokens_per_s_per_device"] / baseline["tokens_per_s_per_device"]
        if row["tokens_per_step"] == baseline["tokens_per_step"]:
            for what in ("losses", "norms"):
                pairs = zip(row[what], baseline[what], strict=True)
                row[f"{what}_off"] = max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)
    gpu = next((name for name in GPUS if name in row["device"]), MEASURED_ON)
    cluster = Cluster(
        nodes=1,
        gpus_per_node=row["world_size"],
        gpu=gpu,
        nvlink_gb_s=args.nvlink_gb_s,
        network_gb_s=args.nvlink_gb_s,
    )
    row["planned_step_s"] = predict(cfg, cluster).step_s
    return row


def launch(layouts: dict[str, RunConfig], world_size: int, steps: int) -> list[Row]:
    """`measure` on `world_size` ranks of this machine. Raises RuntimeError with what they said where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        work, out = Path(folder) / "work.json", Path(folder) / "rows.json"
        plain = {scaling: config_to_plain(cfg) for scaling, cfg in layouts.items()}
        work.write_text(json.dumps({"layouts": plain, "steps": steps, "out": str(out)}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        command += ["-m", "tests.perf.scaling", "--worker", str(work)]
        environment = {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        if done.returncode or not out.exists():
            # What the ranks said stands before what torchrun says of them.
            said = done.stderr.partition("ChildFailedError")[0]
            raise RuntimeError(f"{world_size} ranks failed: {said[-6000:]}")
        rows: list[Row] = json.loads(out.read_text())
        return rows


def layout_named(text: str) -> tuple[int, int]:
    """Tensor- and data-parallel size of "2x4"."""
    tensor, _, data = text.partition("x")
    return int(tensor), int(data)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        asked = json.loads(Path(sys.argv[2]).read_text())
        layouts = {scaling: config_from_dict(plain) for scaling, plain in asked["layouts"].items()}
        found = measure(layouts, asked["steps"])
        if os.environ["RANK"] == "0":
            Path(asked["out"]).write_text(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layouts", type=layout_named, nargs="+", help="tp x dp each, instead of --gpus and --tensor")
    parser.add_argument("--scaling", nargs="+", choices=("weak", "strong", "filled"), default=["weak", "strong"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--nvlink-gb-s", type=float, default=NVLINK_GB_S)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_intermixed_args()
    cfg = load_config(args.config, ["run_dir=unused", "data.path=unused", *args.overrides])
    rows: list[Row] = []
    baselines: dict[str, Row] = {}
    asked = args.layouts or [(tp, gpus // tp) for gpus in sorted(args.gpus) for tp in args.tensor if gpus % tp == 0]
    largest = max(tp * dp for tp, dp in asked)
    for tensor, dp in asked:
        world_size = tensor * dp
        for together in LAUNCHES:
            layouts = {}
            for scaling in together:
                if scaling not in args.scaling or (scaling == "filled" and tensor == 1):
                    continue
                try:
                    layouts[scaling] = layout(cfg, world_size, tensor, scaling, largest)
                except ConfigError as error:
                    print(f"{scaling}, {world_size} ranks, tp {tensor}: left out: {error}", flush=True)
            for row in launch(layouts, world_size, args.steps) if layouts else []:
                scaling = row["scaling"]
                baseline = baselines.get("strong" if scaling == "filled" else scaling)
                rows.append(beside(row, layouts[scaling], baseline, args))
                if world_size == 1:
                    baselines[scaling] = row
                print(json.dumps(rows[-1]), flush=True)
        if args.output:
            about = {"config": args.config, "overrides": args.overrides, "commit": git_commit()}
            args.output.write_text(json.dumps({"rows": rows, **about, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
