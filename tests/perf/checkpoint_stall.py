"""What a checkpoint costs: how long training stands still, how long until it is whole, how long loading takes.

    python tests/perf/checkpoint_stall.py configs/lm_1b4.yaml --folder /local/disk -o record.json

In one run on one GPU: our synchronous save, our asynchronous save with training steps going on beside the write, loading,
and DeepSpeed's own save_checkpoint of the same state. Every checkpoint is removed before the next is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modeling.checkpoint_reader import RunState
from modeling.language import LanguageModel
from modeling.loss import next_token_loss
from pretrain import resume
from pretrain.checkpoint import checkpoint_dir
from pretrain.config import RunConfig
from pretrain.config_io import load_config
from pretrain.distributed import close_ranks, init_ranks
from pretrain.engine import Engine
from pretrain.hardware import compute_dtype, device_name
from pretrain.provenance import git_commit, versions
from pretrain.saver import Saver


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder on the disk to measure")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--micro-batch", type=int, default=2)
    args = parser.parse_args()
    cfg = load_config(args.config, [f"run_dir={args.folder / 'run'}"])
    ranks = init_ranks(1)
    with torch.device("meta"):
        model = LanguageModel(cfg.model, tp=ranks.tp, dtype=compute_dtype(cfg, ranks.device))
    model.to_empty(device=ranks.device)
    model.init_weights(cfg.seed)
    engine = Engine(model, cfg, ranks)
    ids = torch.randint(0, cfg.model.vocab_size, (args.micro_batch, cfg.data.seq_len + 1), device=ranks.device)

    def sync() -> None:
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def step() -> float:
        start = time.perf_counter()
        for i, n_heads in enumerate(cfg.model.widths):
            loss = next_token_loss(model, engine(ids[:, :-1], cfg.model.layer_widths(n_heads)), ids[:, 1:])
            engine.backward(loss.total, last=i == len(cfg.model.widths) - 1)
        engine.step(1e-4)
        sync()
        return time.perf_counter() - start

    for _ in range(3):
        step()
    quiet = sorted(step() for _ in range(9))[4]
    record: dict[str, Any] = {"step_s": quiet}

    def with_mode(asynchronous: bool) -> RunConfig:
        return replace(cfg, checkpoint=replace(cfg.checkpoint, asynchronous=asynchronous, every_steps=1000))

    waiting = Saver(engine, with_mode(False), ranks)
    start = time.perf_counter()
    saved = waiting.save(RunState(step=1))
    record["synchronous_s"] = time.perf_counter() - start
    record["bytes"] = folder_bytes(saved.folder)
    waiting.close()

    start = time.perf_counter()
    state = resume.resume(engine, replace(cfg, checkpoint=replace(cfg.checkpoint, resume=str(saved.folder))), ranks)
    sync()
    record["load_s"] = time.perf_counter() - start
    assert state is not None
    shutil.rmtree(checkpoint_dir(cfg.run_dir))

    start = time.perf_counter()
    going_on = Saver(engine, with_mode(True), ranks)
    record["host_buffer_s"] = time.perf_counter() - start  # once, at the start of a run
    rounds = []
    for number in (2, 3, 4):
        going_on.start(RunState(step=number))
        beside, done = [], None
        while done is None:
            beside.append(step())
            done = going_on.poll()
        lost = sum(beside) - quiet * len(beside)
        rounds.append(
            {"stall_s": done.stall_s, "total_s": done.total_s, "steps_beside": len(beside), "slowed_by_s": lost}
        )
        shutil.rmtree(done.folder)
    going_on.close()
    record["asynchronous"] = rounds
    record["stall_over_synchronous"] = sorted(r["stall_s"] for r in rounds)[1] / record["synchronous_s"]

    deepspeed_dir = args.folder / "deepspeed"
    start = time.perf_counter()
    engine.engine.save_checkpoint(str(deepspeed_dir), tag="x")
    record["deepspeed_save_s"] = time.perf_counter() - start
    record["deepspeed_bytes"] = folder_bytes(deepspeed_dir)
    shutil.rmtree(deepspeed_dir)

    record |= {
        "config": args.config,
        "commit": git_commit(),
        "device": device_name(ranks.device),
        "versions": versions(),
    }
    print(json.dumps(record, indent=1))
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    close_ranks()


if __name__ == "__main__":
    main()
