"""A training run, from config to checkpoint. `train` is the order of a step; `main` the order of a start."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from modeling.backbone import Backbone
from modeling.checkpoint_reader import RunState
from modeling.models import build_model
from modeling.nesting import width_name
from modeling.ops.kernels import launches, why_not
from modeling.ops.upstream import chunk_scan
from pretrain import resume, retention
from pretrain.checkpoint import checkpoint_dir, remove_interrupted, set_aside, step_name
from pretrain.config import RunConfig
from pretrain.config_sections import ConfigError, require
from pretrain.dataset_check import dataset_sha256
from pretrain.distributed import RankError, Ranks, close_ranks, init_ranks, is_broken_link
from pretrain.engine import Engine
from pretrain.environment import check_environment
from pretrain.hardware import compute_dtype
from pretrain.heartbeat import Heartbeats
from pretrain.manifest_check import check_paths
from pretrain.metrics import MetricsWriter, Record, StepMeter
from pretrain.objective import add_gradients, graphed, step_widths
from pretrain.optim import learning_rate
from pretrain.passes import why_launched
from pretrain.peers import shared_out, with_peer_copies
from pretrain.preflight import preflight
from pretrain.progress import TrainingProgress
from pretrain.provenance import record_start
from pretrain.replicas import check_replicas, weights_are_finite
from pretrain.run_lock import HeldElsewhereError, RunLock
from pretrain.same_run import DATASET
from pretrain.same_start import check_same_dataset, check_same_start
from pretrain.saver import Saver
from pretrain.stability import NonFiniteError, check_last_steps, count, gone_back, why_bad
from pretrain.stopping import Stop, StopWatch
from pretrain.task import Loader, Task
from pretrain.tasks import task_of
from pretrain.warm_start import warm_start
from pretrain.watchdog import Watchdog

logger = logging.getLogger(__name__)

_ADVICE = "Resume from the last checkpoint with a lower optim.lr, or look at the data of this step"

EXIT_REQUEUE = 75
"""Exit code of a run that was told to stop, saved, and wants to be started again (EX_TEMPFAIL)."""


@dataclass
class Run:
    """Everything a training loop touches; there are no globals."""

    cfg: RunConfig
    task: Task
    ranks: Ranks
    engine: Engine
    loader: Loader
    validation: Iterable[Any]
    meter: StepMeter
    writer: MetricsWriter
    progress: TrainingProgress
    saver: Saver
    stop: StopWatch
    watchdog: Watchdog
    state: RunState
    saved_step: int = -1
    """Step of the newest checkpoint in the run's folder: the one that it goes on from, or that this start has begun to write."""

    @property
    def model(self) -> Backbone:
        return self.engine.model

    def report(self, kind: str, record: Record) -> None:
        """Record it for programs and show it to people."""
        self.writer.write(kind, record)
        self.progress.show(kind, record)

    def due(self, every_steps: int) -> bool:
        """Whether the step just done is a multiple of `every_steps` (0: never)."""
        return every_steps > 0 and self.state.step % every_steps == 0


def train(run: Run) -> int:
    """Train until the last step, or until told to stop. Returns the exit code: 0, or EXIT_REQUEUE to be started again."""
    cfg = run.cfg
    if run.state.step == cfg.optim.steps and not is_validated(run):  # the start before was ended after its last save
        with run.watchdog.pause():
            finish(run)
    while run.state.step < cfg.optim.steps:
        micro_batches = run.loader.next_step()
        loss = accumulate_gradients(run, micro_batches)  # every width on the same tokens, one reduction
        why = why_bad(run.state, cfg.stability, loss)
        lr, grad_norm = learning_rate(run.state.step, cfg.optim), math.nan
        if why is None:
            grad_norm = run.engine.step(lr)  # updates nothing where the norm is not finite
            why = None if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}"
        else:
            run.engine.discard()
        run.state = advance(run, loss, bad=why is not None)  # before the save: a checkpoint at step N holds N steps
        if why is not None and skip(run, why):
            continue
        stop = run.stop.ask(run.saver.slowest_s)  # one answer on all ranks
        last = run.state.step == cfg.optim.steps
        if run.due(cfg.logging.every_steps) or last or stop:
            run.report(
                "train", run.meter.record(step=run.state.step, tokens=run.state.tokens, lr=lr, grad_norm=grad_norm)
            )
        if (last or stop or run.due(cfg.checkpoint.every_steps)) and not weights_are_finite(run.model, run.ranks):
            roll_back(run, f"step {run.state.step - 1}: the weights are not finite, and not saved")
            continue
        with run.meter.pause(), run.watchdog.pause():
            # Saved before it is evaluated: a run told to stop may have seconds left.
            save(run, wait=last or bool(stop))
            if last:
                finish(run)
            elif run.due(cfg.logging.eval_every_steps):
                evaluate(run)
        run.progress.advance(run.state.step)
        run.watchdog.beat(run.state.step)
        if stop and not last:
            run.report("event", {"step": run.state.step, "event": stop.text})
            if stop is not Stop.FILE:
                return EXIT_REQUEUE  # a file beside the signal is for the start that follows: nobody else would obey it
            run.stop.obeyed()
            return 0
    run.stop.obeyed()  # asked for in the last step, or while that was validated
    check_last_steps(run.state)  # here, so that a start that finds nothing left to do ends like the one before it
    return 0


def accumulate_gradients(run: Run, micro_batches: list[Any]) -> float:
    """Forward and backward of the step's widths on every micro-batch; returns the step's loss, the same on all ranks.

    `micro_batches` holds, for each micro-batch, one batch that all widths share, or one for each. The loss is the mean
    over ranks of what is minimised; it is not finite where any width's on any rank is not.
    """
    cfg = run.cfg
    widths = step_widths(cfg.model, cfg.nesting, cfg.loss_weights, cfg.seed, run.state.step)
    draws = cfg.draws_per_micro_batch
    n_micro = len(micro_batches) // draws
    total = torch.zeros((), device=run.ranks.device)
    for m in range(n_micro):
        batches = [batch.to(run.ranks.device) for batch in micro_batches[m * draws : (m + 1) * draws]]
        for width, loss in add_gradients(run.engine, batches, widths, cfg, n_micro=n_micro, last=m == n_micro - 1):
            if width.is_mix:
                run.meter.add_mix(width.layers, cfg.tokens_per_pass)
            else:
                run.meter.add(width.n_heads, loss.cross_entropy, cfg.tokens_per_pass)
            total += loss.total * (width.weight / n_micro)
    return run.ranks.mean(total)


def advance(run: Run, loss: float, *, bad: bool) -> RunState:
    """Where the run stands after one more step."""
    sequence = run.loader.state_dict()["sequence"]
    n_tokens = (sequence - run.state.sequence) * run.cfg.tokens_per_sequence
    run.meter.end_step(n_tokens, bad=bad)
    return replace(
        count(run.state, run.cfg.stability, loss, bad=bad),
        step=run.state.step + 1,
        tokens=run.state.tokens + n_tokens,
        sequence=sequence,
        n_updates=run.engine.n_updates,
    )


def skip(run: Run, why: str) -> bool:
    """Report a step that updated nothing; after too many in a row, go back to a checkpoint. Returns whether it did.

    Raises NonFiniteError where that is no way out either.
    """
    state, max_skips = run.state, run.cfg.stability.max_skips
    said = f"step {state.step - 1}: {why}; nothing was updated"
    run.report("event", {"step": state.step, "event": f"{said} ({state.bad_in_a_row} in a row)"})
    if state.bad_in_a_row <= max_skips:
        return False
    roll_back(run, f"{said}. {state.bad_in_a_row} bad steps in a row (stability.max_skips={max_skips})")
    return True


def roll_back(run: Run, said: str) -> None:
    """Go back to the newest checkpoint from before the bad steps, and on with the data after them.

    Raises NonFiniteError on all ranks, with what `said` tells, where that is no way out.
    """
    cfg, state = run.cfg.stability, run.state
    if state.rollbacks >= cfg.max_rollbacks or not cfg.max_skips:
        raise NonFiniteError(
            f"{said} after {state.rollbacks} roll-backs (stability.max_rollbacks={cfg.max_rollbacks}). {_ADVICE}"
        )
    with run.meter.pause(), run.watchdog.pause():
        run.saver.settle()
        saved = resume.go_back(run.engine, run.cfg, run.ranks, state.step - state.bad_in_a_row)
    if saved is None:
        raise NonFiniteError(f"{said}, and no checkpoint before them. {_ADVICE}")
    run.state = gone_back(saved, state)
    run.writer.go_back(saved.step)
    forget_later_bests(run)
    event = f"rolled back from step {state.step} to {saved.step}; sequences {saved.sequence} to {state.sequence} are left out"
    run.report("event", {"step": saved.step, "event": event})


def forget_later_bests(run: Run) -> None:
    """Let no validation of a step that the run has yet to take, or to take again, keep a checkpoint or lose one its place."""
    if run.ranks.is_main:
        retention.go_back(checkpoint_dir(run.cfg.run_dir), run.state.step, run.writer.evals())


def save(run: Run, *, wait: bool) -> None:
    """Finish the checkpoint in flight if it is written; start the one that is due; `wait` for it to be whole.

    Ranks that drifted apart are found before they are saved.
    """
    done = [run.saver.poll()]
    due = wait or run.due(run.cfg.checkpoint.every_steps)
    if due or run.due(run.cfg.parallel.check_replicas_every):
        check_replicas(run.model, run.ranks)
    if due:
        done.append(run.saver.start(run.state))
        run.saved_step = run.state.step
        if wait or not run.cfg.checkpoint.asynchronous:
            done.append(run.saver.finish())
    for saved in done:
        if saved is not None:
            record = {"event": f"saved {saved.folder}", "stall_s": saved.stall_s, "total_s": saved.total_s}
            run.report("event", {"step": run.state.step, **record})


def is_validated(run: Run) -> bool:
    """Whether the records have a validation of the step that the run stands at, finite at every width. Every rank must call."""
    losses = [record["loss"].values() for record in run.writer.evals() if record["step"] == run.state.step]
    return run.ranks.agree_any(any(all(map(math.isfinite, values)) for values in losses))


def finish(run: Run) -> None:
    """Validate the last step, and then remove what its checkpoint made old.

    Where the validation is not finite at any width, that checkpoint is set aside and NonFiniteError raised on all ranks: the next
    start goes on from the one before it, and does not find a finished run.
    """
    losses = evaluate(run)
    if all(map(math.isfinite, losses.values())):
        if not run.state.bad_in_a_row:  # a run that goes on with more steps may want those from before the streak
            run.saver.prune()
        return
    said = f"the validation after the last step is not finite ({', '.join(f'{name}: {loss}' for name, loss in losses.items())})"
    if run.saved_step == run.state.step:
        run.saver.settle()
        folder = checkpoint_dir(run.cfg.run_dir) / step_name(run.state.step)
        run.ranks.attempt(lambda: set_aside([folder] if run.ranks.is_main else [], "not-finite"), (OSError,))
        said += f"; {folder.name} is now not-finite-{folder.name}"
    raise NonFiniteError(f"{said}. {_ADVICE}")


def evaluate(run: Run) -> dict[str, float]:
    """Validate every trained width, of the weights' moving average where the run keeps one, and record it.

    Returns the loss of each, the same on all ranks.
    """
    cfg = run.cfg
    submodels = {width_name(n, cfg.model.n_heads): cfg.model.layer_widths(n) for n in cfg.model.widths}
    with run.engine.averaged():
        scores = run.task.scores(run.model, run.validation, list(submodels.values()), run.ranks)
    by_name = {what: dict(zip(submodels, (one[what] for one in scores), strict=True)) for what in scores[0]}
    run.report("eval", {"step": run.state.step, "tokens": run.state.tokens, **by_name})
    if run.saved_step == run.state.step and run.ranks.is_main:
        retention.note_losses(checkpoint_dir(cfg.run_dir), run.state.step, by_name["loss"])
    return by_name["loss"]


def main(cfg: RunConfig) -> int:
    """Build everything in order, train, and return the exit code. Every rank must call."""
    ranks = init_ranks(cfg.parallel.tensor, sequence=cfg.parallel.sequence)
    _set_up_logging(ranks)
    dtype = compute_dtype(cfg, ranks.device)
    mixer = ranks.attempt(lambda: _mixer_path(cfg, ranks.device, dtype), (ValueError,))
    check_same_start(cfg, ranks, mixer)
    cfg.grad_accum_steps(ranks.world_size)  # raises where a step does not divide
    ranks.attempt(check_environment, (ConfigError,))
    ranks.attempt(lambda: check_paths(cfg) if ranks.is_main else None, (ConfigError,))
    ranks = with_peer_copies(ranks, cfg.parallel)
    task = task_of(cfg)
    about_data = ranks.attempt(task.check_data, (ValueError, OSError))
    dataset = ranks.attempt(lambda: dataset_sha256(cfg.data), (ValueError, OSError))
    check_same_dataset(dataset, ranks)
    lock = ranks.attempt(lambda: _claim(cfg) if ranks.is_main else None, (ConfigError, HeldElsewhereError))
    if cfg.deterministic:
        _be_deterministic()  # before preflight: cuBLAS reads its setting at its first product
    preflight(cfg, ranks)
    stop = StopWatch(cfg.run_dir, ranks, cfg.checkpoint.stop_margin_s)

    with torch.device("meta"):
        model = build_model(
            cfg.model,
            tp=ranks.tp,
            dtype=dtype,
            recompute=cfg.parallel.activation_checkpointing,
            in_place_gradients=cfg.parallel.keeps_gradients,
            float8=cfg.float8,
        )
    model.to_empty(device=ranks.device)
    model.init_weights(cfg.seed)
    warm_start(model, cfg, ranks)
    engine = Engine(model, cfg, ranks)
    if cfg.parallel.tensor > 1:
        logger.info("tensor parallelism shares out: %s", shared_out(cfg))
    state = resume.resume(engine, cfg, ranks, dataset) or RunState()
    # Not before: a start that is refused leaves what the run's own files say.
    ranks.attempt(lambda: record_start(cfg) if ranks.is_main else None, (ConfigError,))
    is_own = ranks.agree_any((checkpoint_dir(cfg.run_dir) / step_name(state.step)).is_dir())
    loader = task.loader(ranks, start=state.sequence)
    validation = task.validation(ranks)
    meter = StepMeter(cfg, ranks)
    launched = why_launched(cfg, ranks.device)
    if launched is None:
        engine.graphs = graphed(engine, cfg, ranks)
    passes = "passes: CUDA graphs" if launched is None else f"passes: launched kernel by kernel ({launched})"
    logger.info("%s; %s; %s; %s", meter.peak_source, mixer, passes, f"{dtype} compute")
    with TrainingProgress(start_step=state.step, n_steps=cfg.optim.steps, enabled=ranks.is_main) as progress:
        run = Run(
            cfg=cfg,
            task=task,
            ranks=ranks,
            engine=engine,
            loader=loader,
            validation=validation,
            meter=meter,
            writer=ranks.attempt(
                lambda: MetricsWriter(cfg, start_step=state.step, enabled=ranks.is_main), (ConfigError,)
            ),
            progress=progress,
            saver=Saver(engine, cfg, ranks, {DATASET: dataset, **about_data}),
            stop=stop,
            watchdog=Watchdog(cfg.run_dir, ranks.rank, heartbeats=Heartbeats(ranks)),
            state=state,
            saved_step=state.step if is_own else -1,
        )
        try:
            forget_later_bests(run)  # a start may take up an earlier step than the one before it had reached
            code = train(run)
        except RuntimeError as error:  # a collective fails where a rank is gone, and does not say which
            lost = run.watchdog.lost_ranks() if is_broken_link(error) else []
            if lost:
                raise RankError(f"rank {ranks.rank}: {'; '.join(lost)}: lost ({error})") from error
            raise
        finally:
            engine.close()
            run.watchdog.stop()
            run.saver.close()
            loader.close()
            run.writer.close()
    if lock is not None:
        lock.release()
    # Together: srun ends all ranks once one has left with 75, also one that still closes its records or removes old checkpoints.
    ranks.gather_objects(None)
    close_ranks()
    return code


def _mixer_path(cfg: RunConfig, device: torch.device, dtype: torch.dtype) -> str:
    why = why_not(device, dtype, cfg.model.headdim, cfg.model.d_state, cfg.model.d_conv)
    if why is None:
        projections = ", projections in float8" if cfg.float8 else ""
        return f"mixer: fused Triton kernels, {launches.origin()}{projections}"
    require(not cfg.float8, f"precision=fp8 needs the fused kernels, and they do not run here ({why}): use bf16")
    scan = "mamba-ssm's Triton scan" if device.type == "cuda" and chunk_scan() is not None else "plain PyTorch"
    return f"mixer: {scan} ({why})"


def _claim(cfg: RunConfig) -> RunLock:
    """Take the run's folder, and remove what a start that had it before left half-written."""
    lock = RunLock(cfg.run_dir)
    try:
        removed = remove_interrupted(checkpoint_dir(cfg.run_dir))
    except OSError as error:
        raise ConfigError(f"run_dir={cfg.run_dir} cannot be written: {error}") from None
    if removed:
        logger.info("removed what interrupted saves left: %s", ", ".join(removed))
    return lock


def _be_deterministic() -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["MAMBA_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)


def _set_up_logging(ranks: Ranks) -> None:
    level = logging.INFO if ranks.is_main else logging.WARNING
    logging.basicConfig(
        level=level, format=f"%(asctime)s [rank {ranks.rank}] %(message)s", datefmt="%H:%M:%S", force=True
    )
