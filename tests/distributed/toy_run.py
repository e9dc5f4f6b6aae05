"""A run small enough for a test: two layers, three widths, ten steps, over an epoch border."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from pretrain import train
from pretrain.config import RunConfig
from pretrain.config_io import config_from_dict
from pretrain.metrics import read_metrics


def run_config(dataset: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    """Ten steps of a two-layer model on 48 training sequences: the second epoch starts in step 6."""
    raw: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {
            "n_layers": 2,
            "d_model": 32,
            "headdim": 8,
            "d_state": 8,
            "widths": [8, 4, 2],
            "chunk_size": 16,
            "vocab_size": 64,
        },
        "data": {"path": str(dataset), "seq_len": 32, "tokens_per_step": 256, "micro_batch": 2, "n_workers": 0},
        "optim": {"lr": 1e-2, "steps": 10, "warmup_steps": 2},
        "checkpoint": {"every_steps": 0, "keep_last": 3},
        "logging": {"every_steps": 1, "eval_every_steps": 5, "eval_sequences": 8},
    }
    for section, values in overrides.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    return config_from_dict(raw)


def losses(cfg: RunConfig) -> list[tuple[str, int, dict[str, float]]]:
    records = read_metrics(Path(cfg.run_dir) / "metrics.jsonl")
    return [(record["kind"], record["step"], record["loss"]) for record in records if record["kind"] != "event"]


def signal_in_step(what: signal.Signals, step: int, *, rank: int) -> None:
    """In the run to come, `rank` gets a signal while the gradients of step `step` (0-based) are being computed."""
    accumulate = train.accumulate_gradients

    def accumulate_under_a_signal(run: train.Run, micro_batches: Any) -> float:
        if run.state.step == step and run.ranks.rank == rank:
            os.kill(os.getpid(), what)
        return accumulate(run, micro_batches)

    train.accumulate_gradients = accumulate_under_a_signal


def train_until(cfg: RunConfig, stop_after: int) -> int:
    """Train; rank 0 is told to stop (SIGTERM) in step `stop_after` (0-based)."""
    signal_in_step(signal.SIGTERM, stop_after, rank=0)
    return train.main(cfg)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
