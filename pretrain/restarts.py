"""What a batch script asks around a run: may it start, and should it be requeued? Answered from files alone.

    python -m pretrain.restarts check CONFIG [section.field=value ...] [--world-size N]    says what is wrong with it
    python -m pretrain.restarts begin CONFIG [section.field=value ...] [--world-size N]    prints the run's folder
    python -m pretrain.restarts end RUN_DIR --code N --max-restarts N --job-state STATE [--told]

Every start and end is a line of RUN_DIR/restarts.jsonl, which `python -m pretrain status` reads too. Exit codes of
`begin`: 0 go on, 2 the configuration is wrong, 3 the run crashes before its first new checkpoint, again and again. Of
`end`: 0 requeue, 1 do not. Imports neither torch nor DeepSpeed: it answers in a second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig
from pretrain.config_io import load_config
from pretrain.environment import check_environment
from pretrain.manifest_check import check_paths, check_run

EXIT_REQUEUE = 75
EXIT_MISUSED = 2
EXIT_CRASH_LOOP = 3
SIGNALLED = 128
"""A shell's exit code of a program that a signal ended is this and the signal's number."""
STARTS_WITHOUT_PROGRESS = 2
"""Crashes in a row, none of which left a new checkpoint, after which a run is not started again."""

_GOES_ON = ("RUNNING", "")
"""Slurm's states of a job that nobody is ending; empty where the controller did not answer."""

Event = dict[str, Any]


def latest_step(run_dir: Path) -> int:
    """Step of the run's newest checkpoint, -1 before the first."""
    try:
        return int((run_dir / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    except (OSError, ValueError):
        return -1


def read_events(run_dir: Path) -> list[Event]:
    """Starts and ends so far, oldest first; a line that a crash cut short is left out."""
    events = []
    try:
        lines = (run_dir / "restarts.jsonl").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def crashes_without_progress(events: list[Event], step: int) -> int:
    """How many of the last starts in a row crashed, or were lost with their node, and left no new checkpoint.

    `step` is that of the newest checkpoint now. A run that stopped in order (0, 75), was misused, or was ended from outside was
    no crash, progress or not.
    """
    count = 0
    after = step
    is_crash = True
    for event in reversed(events):
        if event["event"] == "end":
            is_crash = _is_crash(event)
        else:
            if not is_crash or after > event["step"]:
                return count
            count += 1
            after, is_crash = event["step"], True
    return count


def _is_crash(end: Event) -> bool:
    if end["code"] in (0, EXIT_REQUEUE, EXIT_MISUSED) or end.get("state", "") not in _GOES_ON:
        return False
    return not _ended_too_early_to_save(end["code"], told=end.get("told", False))


def _ended_too_early_to_save(code: int, *, told: bool) -> bool:
    """Whether the signal that told the run to stop ended it: it came before the ranks listened, or they had no time to save."""
    return told and code > SIGNALLED


def decide(
    events: list[Event], step: int, *, code: int, restarts: int, max_restarts: int, state: str, told: bool = False
) -> tuple[bool, str]:
    """Whether to requeue a job whose run just ended with `code`, and why.

    `events` ends with this run's end; `step` is that of its newest checkpoint; `restarts` counts the job's earlier
    requeues; `state` is Slurm's JobState, empty where the controller did not answer: that is no reason to stop. `told`: the
    batch script was told to stop, and told the ranks.
    """
    if code == 0:
        return False, f"ended in order; the newest checkpoint is of step {step}"
    if code == EXIT_MISUSED:
        return False, "misused: mend the command or the config"
    # A job that its user cancelled is no longer RUNNING, and must stay cancelled whatever its last exit code was.
    if state not in _GOES_ON:
        return False, f"the job is {state}: it stays so"
    if restarts >= max_restarts:
        return False, f"stopped after {restarts} restarts (MAX_RESTARTS={max_restarts})"
    if code == EXIT_REQUEUE:
        return True, f"stopped in order; the newest checkpoint is of step {step}"
    if _ended_too_early_to_save(code, told=told):
        return True, f"told to stop before it could save (code {code}); the newest checkpoint is of step {step}"
    count = crashes_without_progress(events, step)
    if count >= STARTS_WITHOUT_PROGRESS:
        return False, f"crash loop: {count} starts in a row ended without a new checkpoint, the last with code {code}"
    return True, f"crashed with code {code}; the newest checkpoint is of step {step}"


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.restarts", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "begin"):
        command = commands.add_parser(name)
        command.add_argument("config")
        command.add_argument("overrides", nargs="*")
        command.add_argument("--world-size", type=int, help="ranks that will train")
    end = commands.add_parser("end")
    end.add_argument("run_dir", type=Path)
    end.add_argument("--code", type=int, required=True)
    end.add_argument("--max-restarts", type=int, required=True)
    end.add_argument("--job-state", required=True)
    end.add_argument("--told", action="store_true", help="the batch script was told to stop")
    args = parser.parse_args(argv)
    try:
        if args.command == "end":
            return _end(args)
        cfg = _checked(args.config, args.overrides, args.world_size)
        return _begin(cfg) if args.command == "begin" else 0
    except (ValueError, OSError) as error:  # ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISUSED


def _checked(config: str, overrides: list[str], world_size: int | None) -> RunConfig:
    """The run's config; raises ConfigError where it cannot run, as far as one machine without a GPU can tell."""
    cfg = load_config(config, overrides)
    if world_size is not None:
        cfg.grad_accum_steps(world_size)
    check_environment()
    check_paths(cfg)
    if "://" not in cfg.data.path:
        check_run(cfg)
    return cfg


def _begin(cfg: RunConfig) -> int:
    run_dir = Path(cfg.run_dir)
    step = latest_step(run_dir)
    count = crashes_without_progress(read_events(run_dir), step)
    if count >= STARTS_WITHOUT_PROGRESS:
        print(
            f"error: {count} starts in a row of {run_dir} ended without a new checkpoint. Look at the log, mend the "
            f"cause, and remove {run_dir / 'restarts.jsonl'} to start again",
            file=sys.stderr,
        )
        return EXIT_CRASH_LOOP
    _append(run_dir, {"event": "start", "step": step})
    print(run_dir)
    return 0


def _end(args: argparse.Namespace) -> int:
    step = latest_step(args.run_dir)
    event: Event = {"event": "end", "step": step, "code": args.code, "state": args.job_state, "told": args.told}
    requeue, why = decide(
        [*read_events(args.run_dir), event],
        step,
        code=args.code,
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        max_restarts=args.max_restarts,
        state=args.job_state,
        told=args.told,
    )
    _append(args.run_dir, {**event, "requeue": requeue, "why": why})
    print(f"run ended with code {args.code}: {'requeueing' if requeue else 'not requeueing'}, {why}")
    return 0 if requeue else 1


def _append(run_dir: Path, event: Event) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    job = {"job": os.environ.get("SLURM_JOB_ID"), "nodes": os.environ.get("SLURM_JOB_NODELIST")}
    with (run_dir / "restarts.jsonl").open("a") as f:
        f.write(json.dumps({"time": round(time.time(), 3), **job, **event}) + "\n")
        f.flush()
        os.fsync(f.fileno())


if __name__ == "__main__":
    sys.exit(main())
