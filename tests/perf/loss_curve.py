"""The training loss of our kernels beside the plain path's or float8's, and beside another seed's, on GPUs of one kind.

    python -m tests.perf.loss_curve configs/lm_130m.yaml data.path=SHARDS data.tokens_per_step=8192 data.micro_batch=8 \\
        --steps 500 --folder /tmp/curves --out docs/benchmarks/loss_curve.json --plot docs/images/loss_curve.png

Three runs of the trainer: our kernels, the plain path (plain PyTorch, scan included, its operations in CUDA graphs) with
the same seed, and our kernels with another seed. The kernels round elsewhere than the plain path does, so the
curves drift apart as any two roundings do; they must stay much closer than two seeds. The record has every step's losses.
With `--against float8` the second run is our kernels' with precision=fp8.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import preflight
from pretrain.config_io import load_config
from pretrain.metrics import read_metrics
from pretrain.provenance import git_commit, versions

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Curves = dict[str, list[float]]
"""A loss for each step, by width."""


def be_plain() -> None:
    """Take all Triton kernels out of the model: the mixer's, mamba-ssm's scan (which tunes itself for minutes), the
    residual norm's and the loss's."""
    import modeling.backbone
    import modeling.loss
    from modeling.ops import kernels, upstream
    from modeling.ops.norm import rms_norm
    from modeling.tensor_parallel import TensorParallel

    def add_norm(x_md: Tensor, branch_md: Tensor | None, weight_d: Tensor, bias_d: None, **how: Any) -> Any:
        total_md = x_md if branch_md is None else x_md + branch_md
        return total_md, rms_norm(total_md, weight_d, eps=how["eps"], dtype=how["dtype"])

    def cross_entropy_piece(
        hidden_md: Tensor,
        head_vd: Tensor,
        local_targets_m: Tensor,
        n_tokens: int,
        tp: TensorParallel,
        grad_hidden_md: Tensor | None,
        grad_head_vd: Tensor | None,
    ) -> Tensor:
        with torch.enable_grad():
            hidden, head = hidden_md.detach().requires_grad_(), head_vd.detach().requires_grad_()
            loss = F.cross_entropy(F.linear(hidden, head).float(), local_targets_m, reduction="sum") / n_tokens
            if grad_hidden_md is not None and grad_head_vd is not None:
                grad_hidden, grad_head = torch.autograd.grad(loss, (hidden, head))
                grad_hidden_md.copy_(grad_hidden)
                grad_head_vd += grad_head
        return loss.detach()

    upstream.chunk_scan = lambda: None
    kernels.usable = lambda *_: False
    kernels.why_not = lambda *_: "taken out by tests.perf.loss_curve"
    modeling.backbone.add_norm = add_norm
    modeling.loss._cross_entropy_piece = cross_entropy_piece


def start(
    args: argparse.Namespace, name: str, place: int, *, seed: int, plain: bool = False, float8: bool = False
) -> subprocess.Popen[bytes]:
    """A run of the trainer in a process of its own; of runs at once, the one of number `place`."""
    folder = args.folder / name
    overrides = [*args.overrides, f"run_dir={folder}", f"seed={seed}", f"optim.steps={args.steps}"]
    overrides += ["logging.every_steps=1", "logging.eval_every_steps=0", "checkpoint.every_steps=0"]
    # Short chunks: the plain scan holds a chunk x chunk matrix a head.
    overrides += ["model.chunk_size=64"] if plain else []
    overrides += ["precision=fp8"] if float8 else []
    worker = [sys.executable, "-m", "tests.perf.loss_curve", args.config, *overrides, "--worker", str(int(plain))]
    settings = dict(os.environ)
    if args.at_once:
        worker += ["--at-once"]
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        settings["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[place % len(gpus.split(","))]
    print(f"{name}: {args.steps} steps", flush=True)
    return subprocess.Popen(worker, env=settings)


def curves_of(args: argparse.Namespace, name: str) -> Curves:
    """The losses that a run recorded."""
    records = [r for r in read_metrics(args.folder / name / "metrics.jsonl") if r["kind"] == "train"]
    return {width: [round(r["loss"][width], 5) for r in records] for width in records[0]["loss"]}


def validation_of(args: argparse.Namespace, name: str) -> dict[str, float]:
    """The losses of a run's validation after its last step, by width."""
    *_, last = (r for r in read_metrics(args.folder / name / "metrics.jsonl") if r["kind"] == "eval")
    return {width: round(loss, 5) for width, loss in last["loss"].items()}


def difference(a: Curves, b: Curves, *, last: int) -> dict[str, dict[str, float]]:
    """b's loss less a's over the last steps, by width: the mean of its size, and its mean."""
    found = {}
    for width in a:
        gaps = [y - x for x, y in zip(a[width][-last:], b[width][-last:], strict=True)]
        found[width] = {
            "absolute": round(statistics.mean(map(abs, gaps)), 5),
            "signed": round(statistics.mean(gaps), 5),
        }
    return found


def draw(curves: dict[str, Curves], against: str, picture: Path) -> None:
    """All curves, and below them what two seeds and two paths differ by."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 8), sharex=True, constrained_layout=True)
    widths = list(curves["kernels"])
    for name, style in (("kernels", "-"), (against, ":"), ("other seed", "--")):
        for i, width in enumerate(widths):
            top.plot(curves[name][width], style, color=f"C{i}", linewidth=1, label=f"{name}, width {width}")
    for i, width in enumerate(widths):
        for name, style in ((against, "-"), ("other seed", ":")):
            gap = [abs(a - b) + 1e-7 for a, b in zip(curves["kernels"][width], curves[name][width], strict=True)]
            bottom.plot(gap, style, color=f"C{i}", linewidth=0.7, label=f"kernels and {name}, width {width}")
    top.set(ylabel="training loss, nats a token")
    bottom.set(ylabel="difference, nats a token", xlabel="step", yscale="log")
    top.legend(fontsize=6, ncols=3)
    bottom.legend(fontsize=6, ncols=2)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--against", choices=("plain", "float8"), default="plain", help="what the second run is")
    parser.add_argument("--folder", type=Path, help="the three runs go here")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--at-once", action="store_true", help="the three runs side by side, over all GPUs that there are"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.worker is not None:
        if args.worker:
            be_plain()
        if args.at_once:
            preflight.LEAST_FREE = 0.0  # another of the runs may be on this GPU as well
        from pretrain.train import main as train

        sys.exit(train(load_config(args.config, args.overrides)))
    if args.folder is None or args.out is None:
        parser.error("name --folder and --out")
    seed = load_config(args.config, [*args.overrides, "run_dir=unused"]).seed
    asked: dict[str, dict[str, Any]] = {
        "kernels": {"seed": seed},
        args.against: {args.against: True, "seed": seed},
        "other seed": {"seed": seed + 1},
    }
    running = []
    for place, (name, how) in enumerate(asked.items()):
        running.append(start(args, name, place, **how))
        if not args.at_once:
            running[-1].wait()
    if any(process.wait() for process in running):
        sys.exit("error: a run failed, see above")
    curves = {name: curves_of(args, name) for name in asked}
    last = max(1, args.steps // 5)
    record: dict[str, Any] = {
        "command": ["tests.perf.loss_curve", *sys.argv[1:]],
        "commit": git_commit(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "mean_difference_over_last_steps": {
            "steps": last,
            f"kernels and {args.against}": difference(curves["kernels"], curves[args.against], last=last),
            "kernels and other seed": difference(curves["kernels"], curves["other seed"], last=last),
        },
        "validation": {name: validation_of(args, name) for name in asked},
        "curves": curves,
    }
    print(json.dumps({key: record[key] for key in ("mean_difference_over_last_steps", "validation")}, indent=1))
    args.out.write_text(json.dumps(record) + "\n")
    if args.plot is not None:
        draw(curves, args.against, args.plot)


if __name__ == "__main__":
    main()
