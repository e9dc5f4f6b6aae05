"""What preparation jobs of any kind of data share: the output folder's lock and settings, workers, a place in a Slurm job."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PROGRESS_FOLDER = ".progress"
WORKER_KILLED = (
    "a worker process was killed, for want of memory perhaps: run it again with fewer --workers; what was done is kept"
)


class OutputError(ValueError):
    """The output folder cannot be used as asked; the message says why and what to do."""


@contextlib.contextmanager
def locked(output: Path, part: str) -> Iterator[None]:
    """Refuse to run where another process writes the same part, or where the work was shared among another number of jobs.

    A job that Slurm runs again alone (`--array=3`) sees one task and takes itself for the only one.
    """
    folder = output / PROGRESS_FOLDER
    folder.mkdir(exist_ok=True)
    ours, *others = (
        int(name.rpartition("-of-")[2]) for name in (part, *(p.stem for p in folder.glob("part-*-of-*.lock")))
    )
    for theirs in others:
        if theirs != ours:
            raise OutputError(
                f"{output} was begun by {theirs} jobs, this is one of {ours}: to run one of them again, say "
                f"--rank N --world-size {theirs} (a Slurm array of a few tasks does not know the others); to share the "
                "work anew, name another --output"
            )
    with open(folder / f"{part}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{output}: another process is writing {part}; wait for it, or end it") from None
        yield


def check_settings(output: Path, made_with: dict[str, Any] | None, asked: dict[str, Any]) -> None:
    """Raise OutputError where `output` was begun with other settings than those `asked`; the message names each."""
    if made_with is None:
        raise OutputError(f"{output} was made by a different number of jobs: name another --output")
    changed = [key for key in asked if made_with.get(key) != asked[key]]
    if changed:
        differences = "; ".join(f"{key}: {made_with.get(key)!r} there, {asked[key]!r} asked" for key in changed)
        raise OutputError(
            f"{output} was begun with other settings ({differences[:500]}): ask for the same, or name another --output"
        )


def already_finished(output: Path) -> int:
    """Say that `output` needs nothing more; the exit status."""
    remove_progress(output)  # a crash may have come between the manifest and this
    print(f"{output} is finished: nothing to do")
    return 0


def remove_progress(output: Path) -> None:
    """Remove what only an unfinished job needs."""
    for path in (output / PROGRESS_FOLDER).glob("*"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (output / PROGRESS_FOLDER).rmdir()


class WorkerPool(ProcessPoolExecutor):
    """`n_workers` processes that leave Ctrl-C to this one and die with it, each begun with `start(*arguments)`.

    Spawned: forking a process that already runs pyarrow's and the tokenizers' threads can deadlock the child. Where a
    worker was killed, or none could be started, `submit`, `map` and the futures raise BrokenProcessPool. Leaving the
    `with` waits for nothing and cancels what has not begun.
    """

    def __init__(self, n_workers: int, start: Callable[..., object] | None = None, *arguments: object) -> None:
        super().__init__(n_workers, get_context("spawn"), _start_worker, (os.getpid(), start, arguments))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        try:
            return super().submit(fn, *args, **kwargs)
        except OSError as error:
            # It starts workers, and finds the pipes shut where another was killed a moment ago; or there is no memory.
            raise BrokenProcessPool(f"a worker process could not be started: {error}") from error

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=False, cancel_futures=True)


def _start_worker(parent: int, start: Callable[..., object] | None, arguments: tuple[object, ...]) -> None:
    """In a worker: leave Ctrl-C to the process `parent`, which ends the pool, and die with it even where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    if start is not None:
        start(*arguments)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def place_from_slurm() -> tuple[int, int]:
    """(rank, world size) of a task of an array, or of an srun step; (0, 1) elsewhere.

    SLURM_NTASKS is no guide: a batch script has it too, and there this program runs once.
    """
    number = {name: int(value) for name, value in os.environ.items() if name.startswith("SLURM_") and value.isdigit()}
    if "SLURM_ARRAY_TASK_ID" in number:
        from_first = number["SLURM_ARRAY_TASK_ID"] - number.get("SLURM_ARRAY_TASK_MIN", 0)
        return from_first // number.get("SLURM_ARRAY_TASK_STEP", 1), number.get("SLURM_ARRAY_TASK_COUNT", 1)
    if "SLURM_STEP_NUM_TASKS" in number:
        return number.get("SLURM_PROCID", 0), number["SLURM_STEP_NUM_TASKS"]
    return 0, 1


def git_commit() -> str:
    """The commit of the code that ran; empty where it is not in a repository, or there is no git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
