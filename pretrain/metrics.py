"""What a run reports: losses per width, speed and memory, to metrics.jsonl always and to Weights & Biases if asked."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from modeling.nesting import LayerWidths, width_name
from pretrain.config import RunConfig
from pretrain.config_sections import ConfigError
from pretrain.hardware import device_name, memory_gib, peak_tflops

if TYPE_CHECKING:  # so that reading and plotting metrics does not import megatron-core
    from pretrain.distributed import Ranks

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class StepMeter:
    """Adds up losses on the device and time on the host between two records; the GPU is waited for in `record` alone."""

    def __init__(self, cfg: RunConfig, ranks: Ranks) -> None:
        self.cfg, self.ranks = cfg, ranks
        self.peak, self.peak_source = peak_tflops(device_name(ranks.device), cfg.logging.peak_tflops)
        self._flops_per_token = {n: self._flops_of(cfg.model.layer_widths(n)) for n in cfg.model.widths}
        self._start_interval()

    def add_mix(self, layers: LayerWidths, n_tokens: int) -> None:
        """Count a pass whose layers differ in width: its work alone, since its loss is no trained width's."""
        self._flops += self._flops_of(layers) * n_tokens * self.ranks.dp_size

    def _flops_of(self, layers: LayerWidths) -> float:
        """Training FLOPs a token."""
        return self.cfg.training_flops(layers) / self.cfg.tokens_per_sequence

    def add(self, n_heads: int, loss: Tensor, n_tokens: int) -> None:
        """Count one width's mean loss over this rank's `n_tokens` tokens."""
        row = self.cfg.model.widths.index(n_heads)
        self._step_sums[row, 0] += loss.detach() * n_tokens
        self._step_sums[row, 1] += n_tokens
        self._flops += self._flops_per_token[n_heads] * n_tokens * self.ranks.dp_size

    def end_step(self, n_tokens: int, *, bad: bool = False) -> None:
        """Count a step that consumed `n_tokens` tokens over all ranks, each once however many widths saw it.

        The losses of a bad step, which may not be finite, are left out of the record.
        """
        self._steps += 1
        self._tokens += n_tokens
        if not bad:
            self._sums += self._step_sums
        self._step_sums.zero_()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside (validation, saving) out of the speed."""
        before = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - before

    def record(self, *, step: int, tokens: int, lr: float, grad_norm: float) -> Record:
        """Everything since the last record, averaged over all ranks. Every rank must call."""
        sums = self._sums.cpu()
        dist.all_reduce(sums, group=self.ranks.cpu_group)
        elapsed_s = max(time.perf_counter() - self._start - self._paused_s, 1e-9)
        tflops = self._flops / elapsed_s / self.ranks.world_size / 1e12
        widths = self.cfg.model.widths
        record: Record = {
            "step": step,
            "tokens": tokens,
            "loss": {
                width_name(n_heads, widths[0]): float(sums[i, 0] / sums[i, 1])
                for i, n_heads in enumerate(widths)
                if sums[i, 1] > 0
            },
            "lr": lr,
            "grad_norm": grad_norm,
            "step_s": elapsed_s / self._steps,
            "tokens_per_s": self._tokens / elapsed_s,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak if self.peak else None,
            "memory_gib": memory_gib(self.ranks.device),
            "eta_s": (self.cfg.optim.steps - step) * elapsed_s / self._steps,
        }
        if self.cfg.task == "vision":
            each = self.cfg.tokens_per_sequence
            record |= {"images": tokens // each, "images_per_s": record["tokens_per_s"] / each}
        self._start_interval()
        return record

    def _start_interval(self) -> None:
        self._step_sums = torch.zeros(len(self.cfg.model.widths), 2, dtype=torch.float64, device=self.ranks.device)
        self._sums = torch.zeros(len(self.cfg.model.widths), 2, dtype=torch.float64, device=self.ranks.device)
        self._flops = 0.0
        self._tokens = self._steps = 0
        self._paused_s = 0.0
        self._start = time.perf_counter()


class MetricsWriter:
    """Rank 0's records: one JSON object a line in run_dir/metrics.jsonl, and the same to Weights & Biases.

    A resumed run first drops the lines after the step it resumes from, so that a curve has one value a step. Weights & Biases
    takes nothing back: there a curve has the values of both passes over such a step, the later ones logged later. On other ranks
    (`enabled` false) nothing is written. Raises ConfigError where Weights & Biases is asked for without a login.
    """

    def __init__(self, cfg: RunConfig, *, start_step: int, enabled: bool) -> None:
        self._file: TextIO | None = None
        self._wandb: Any = None
        if not enabled:
            return
        self._path = Path(cfg.run_dir) / "metrics.jsonl"
        _drop_after(self._path, start_step)
        self._file = self._path.open("a", buffering=1)
        if cfg.logging.wandb != "disabled":
            self._wandb = _start_wandb(cfg)

    def write(self, kind: str, record: Record) -> None:
        """Append `record` under `kind` ("train", "eval" or "event")."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **record}) + "\n")
        if self._wandb is not None:
            self._wandb.log(_flatten(kind, record))

    def go_back(self, step: int) -> None:
        """Drop what was recorded after `step`, which the run is about to take again; its events stay."""
        if self._file is not None:
            self._file.close()
            _drop_after(self._path, step, keep_events=True)
            self._file = self._path.open("a", buffering=1)

    def evals(self) -> list[Record]:
        """The validations recorded so far, without those that the run went back over; none on other ranks."""
        return [] if self._file is None else [r for r in read_metrics(self._path) if r["kind"] == "eval"]

    def close(self) -> None:
        """Flush and finish."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: str | Path) -> list[Record]:
    """All records of a metrics.jsonl; a last line that a crash cut short is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _drop_after(path: Path, step: int, *, keep_events: bool = False) -> None:
    if not path.exists():
        return
    kept = [
        record for record in read_metrics(path) if record["step"] <= step or (keep_events and record["kind"] == "event")
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    temporary.rename(path)


def _start_wandb(cfg: RunConfig) -> Any:
    """The run at Weights & Biases; None, with a line in the log, where it cannot be reached. Raises ConfigError without a login."""
    import wandb  # costs a second, and most runs on a laptop or in a test have it disabled

    folder = Path(cfg.run_dir).resolve()
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        run = wandb.init(
            project=cfg.logging.wandb_project,
            name=folder.name,
            id=id_file.read_text().strip(),
            resume="allow",
            mode=cfg.logging.wandb,
            dir=str(folder),
        )
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise ConfigError(
            f"logging.wandb={cfg.logging.wandb}: {error} Log in (WANDB_API_KEY, or `wandb login` once on this machine), or set "
            "logging.wandb=offline or disabled"
        ) from error
    except wandb.errors.CommError as error:
        logger.warning("Weights & Biases cannot be reached (%s): records go to metrics.jsonl alone", error)
        return None
    # Not W&B's own count of steps, which must not fall: what is logged at a lower one is dropped without an error.
    run.define_metric("*", step_metric="step")
    return run


def _flatten(kind: str, record: Record) -> dict[str, Any]:
    """The record for W&B; its "step" is what every other key is drawn over."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat.update({f"{kind}/{key}_{name}": item for name, item in value.items()})
        else:
            flat["step" if key == "step" else f"{kind}/{key}"] = value
    return flat
