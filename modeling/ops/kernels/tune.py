"""Search the launch settings of the scan's kernels for a GPU that none are shipped for, in bounded time.

    python -m modeling.ops.kernels.tune [--seconds 180] [--out FILE]

Each kernel is timed with a few settings, the shipped ones first, on the tiles of narrow and of wide heads; the fastest whose
results are the shipped ones' is kept in the user's cache, where runs on this machine find it. Compiling takes most of the
time; what is not reached by --seconds keeps its shipped settings. --out writes elsewhere, to look at: nothing reads it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import TritonError

from modeling.ops.kernels import launches, tiles
from modeling.ops.kernels.scan_backward import scan_backward
from modeling.ops.kernels.scan_common import time_steps
from modeling.ops.kernels.scan_forward import scan_outputs
from modeling.ops.kernels.scan_walks import scan_states

Settings = dict[str, int]
WALKS = ("states", "state_gradients")
CANDIDATES: dict[str, list[Settings]] = {
    kernel: [
        {**({"HEADS": heads} if kernel in WALKS else {}), "num_warps": warps, "num_stages": stages, **limit}
        for heads, warps, stages, limit in (
            [(1, 4, 2, {}), (1, 4, 3, {}), (1, 4, 4, {}), (2, 4, 2, {}), (2, 4, 3, {}), (1, 8, 3, {}), (2, 8, 3, {})]
            if kernel in WALKS
            else [
                (0, 4, 2, {}),
                (0, 4, 3, {}),
                (0, 4, 4, {}),
                (0, 8, 2, {}),
                (0, 8, 3, {}),
                (0, 4, 2, {"maxnreg": 168}),
                (0, 4, 3, {"maxnreg": 128}),
            ]
        )
    ]
    for kernel in ("group_gradients", "inputs_gradients", "outputs", "states", "state_gradients")
}
"""What is tried, the kernels that take longest first."""
HEADDIMS = (64, 24)
BATCH, TIME, HEADS, STATE = 32, 1024, 32, 128
"""More walks than run at once: of fewer, tiles.walk_of changes the settings."""
TOLERANCE = 1e-2
"""Relative error in the Frobenius norm of bfloat16 results that were added up in another order."""


class Problem:
    """One layer's scan of heads of `headdim`, on the GPU, in bfloat16."""

    def __init__(self, headdim: int) -> None:
        self.headdim, self.columns = headdim, max(32, tiles.columns_of(headdim))
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=generator)

        self.mixed = normal(BATCH, TIME, HEADS * headdim + 2 * STATE).bfloat16()
        self.grad_y = normal(BATCH, TIME, HEADS * headdim).bfloat16()
        self.A_log, self.D = normal(HEADS), normal(HEADS)
        self.steps = time_steps(normal(BATCH, TIME, HEADS).bfloat16(), normal(HEADS) - 4, self.A_log)
        self.states = scan_states(self.mixed, self.steps, heads=HEADS, headdim=headdim, seq_idx_bt=None)

    def run(self, kernel: str) -> Tensor:
        """What `kernel` makes, or what is made of it."""
        how = {"heads": HEADS, "headdim": self.headdim, "seq_idx_bt": None}
        if kernel == "states":
            return scan_states(self.mixed, self.steps, **how)  # type: ignore[arg-type]
        if kernel == "outputs":
            return scan_outputs(self.mixed, self.steps, self.states, self.D, **how)  # type: ignore[arg-type]
        grad_dt = torch.empty(BATCH, TIME, HEADS, device="cuda", dtype=torch.bfloat16)
        grad_mixed, *_ = scan_backward(
            self.grad_y, self.mixed, self.steps, self.states, self.A_log, self.D, grad_dt, **how  # type: ignore[arg-type]
        )  # fmt: skip
        return grad_mixed


def seconds_of(run: Callable[[], object]) -> float:
    """Median of a few runs on the GPU."""
    taken = triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")
    return float(taken) / 1e3


def best_of(
    kernel: str,
    columns: int,
    run: Callable[[], Tensor],
    candidates: list[Settings],
    late: Callable[[], bool],
    timed: Callable[[Callable[[], object]], float] = seconds_of,
) -> tuple[Settings, float, float]:
    """The fastest settings, their seconds, and those of the first of `candidates`, whose results all others must have.

    What does not compile or fit is left out. No new one is begun once it is `late`.
    """
    first, *others = candidates
    with launches.trying(kernel, columns, first):
        expected, shipped_s = run().float(), timed(run)
    best, best_s = first, shipped_s
    for settings in others:
        if late():
            break
        try:
            with launches.trying(kernel, columns, settings):
                found, taken = run().float(), timed(run)
        except (TritonError, RuntimeError):  # too many registers, or too much shared memory
            continue
        error = float((found - expected).norm() / expected.norm())
        if taken < best_s and not math.isnan(error) and error < TOLERANCE:
            best, best_s = settings, taken
    return best, best_s, shipped_s


def search(seconds: float) -> launches.Table:
    """The best settings of each kernel on this GPU, found within about `seconds`. Prints a line for each."""
    started = time.monotonic()

    def late() -> bool:
        return time.monotonic() - started > seconds

    table: launches.Table = {}
    for headdim in HEADDIMS:
        problem = Problem(headdim)
        for kernel, candidates in CANDIDATES.items():
            if late():
                print(f"headdim {headdim}, {kernel}: not reached in {seconds:.0f} s, stays as shipped", flush=True)
                continue
            shipped = tiles.LAUNCH[kernel][problem.columns]
            ordered = [shipped, *(other for other in candidates if other != shipped)]
            best, best_s, shipped_s = best_of(
                kernel, problem.columns, lambda: problem.run(kernel), ordered, late  # noqa: B023
            )  # fmt: skip
            table.setdefault(kernel, {})[problem.columns] = best
            print(
                f"headdim {headdim}, {kernel}: {best_s * 1e3:.3f} ms with {best}, {shipped_s * 1e3:.3f} as shipped",
                flush=True,
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling.ops.kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=180, help="begin nothing new after so many")
    parser.add_argument("--out", type=Path, help="write there instead of where runs look")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU, and the plain path has no launch settings")
    gpu = torch.cuda.get_device_name()
    if args.out is None and launches.is_shipped(gpu):
        sys.exit(f"error: {gpu}: settings for it are shipped, a search would not be read. --out FILE searches anyway")
    path = args.out or launches.kept_at(gpu)
    launches.write(path, search(args.seconds), gpu=gpu)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
