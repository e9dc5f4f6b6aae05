"""Time, bytes, FLOPs and distance to its floor of each kernel of a joint training step, on one GPU.

    python -m tests.perf.kernels 130m 1b4 [--layers 4] [--out RECORD.json]
    python -m tests.perf.kernels --plot PICTURE.png --out RECORD.json

Runs the forward and backward passes of all four widths through a few layers of the paper's model at its micro-batch under
torch's profiler. A kernel's floor is the larger of the bytes it must move over the measured copy bandwidth and the FLOPs it
must do over the measured rate of an 8192-cubed bfloat16 product: every tensor read or written once, matrix work under the
causal mask counted by half. `--plot` draws a record, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch.profiler import ProfilerActivity, profile

from modeling.ops.kernels import tiles
from pretrain.passes import PassInputs
from pretrain.provenance import git_commit
from tests.perf.compare_reference import LEVELS, SEQUENCE, SIZES, config_of, matmul_rate, model_of, seconds, tokens_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Needs = tuple[float, float]
"""Bytes and FLOPs."""


def needs(name: str, level: int) -> dict[str, Needs]:
    """Least bytes and FLOPs of one layer's kernels at a width, bfloat16 activations; of the head's for the whole model."""
    cfg = config_of(name)
    m, d, n, v = SIZES[name][2] * SEQUENCE, cfg.d_model, cfg.d_state, cfg.n_vocab_rows
    h = cfg.n_heads // level
    i = h * cfg.headdim
    chunk = tiles.CHUNK
    states = m / chunk * i * n * 2
    rows = 2 * i + 2 * n + h
    return {
        "_time_steps": (m * h * 18, 0),
        "_gather_projection": (rows * d * 6, 0),
        "_conv_forward": (m * (i + 2 * n) * 4, 0),
        "_conv_backward": (m * (i + 2 * n) * 6, 0),
        "_walk": (2 * (m * (2 * i + 2 * n + 4 * h) + states), m * 4 * i * n),  # forwards and backwards
        "_outputs": (m * (4 * i + 4 * n + 8 * h) + states, m * (2 * i * n + chunk * (i + n))),
        "_inputs_gradients": (m * (6 * i + 4 * n + 28 * h) + states, m * (2 * i * n + chunk * (2 * i + n))),
        "_group_gradients": (m * (4 * i + 8 * n + 12 * h) + 2 * states, m * (6 * i * n + 2 * chunk * n)),
        "_rate_gradients": (m * h * 26, 0),
        "_gated_forward": (m * i * 6, 0),
        "_gated_backward": (m * i * 10, 0),
        "_residual_forward": (m * d * 12, 0),
        "_residual_backward": (m * d * 14, 0),
        "_softmax_statistics": (m * v * 2, 0),
        "_softmax_gradient": (m * v * 4, 0),
        "products of the layer": (0, 6 * m * d * (rows + i)),
        "products of the head": (0, 6 * m * d * v),
    }


OF_THE_HEAD = ("_softmax_statistics", "_softmax_gradient", "products of the head")


def step_of(name: str, layers: int) -> Callable[[], None]:
    """A joint forward and backward pass of the model with `layers` layers."""
    cfg = replace(config_of(name), n_layers=layers)
    _, launched = model_of(cfg)
    tokens_bt = tokens_of(name, SEQUENCE)
    inputs = PassInputs(
        tokens_bt[:, :-1].contiguous(), tokens_bt[:, 1:].contiguous(), None, torch.ones((), device="cuda")
    )

    def run() -> None:
        for level in LEVELS:
            launched(cfg.layer_widths(cfg.n_heads // level), inputs)

    return run


def kernel_seconds(run: Callable[[], None], steps: int) -> dict[str, float]:
    """GPU seconds of each kernel in one call of `run`, by name; the matrix products of cuBLAS and cutlass as one."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        is_product = any(word in event.key for word in ("gemm", "nvjet", "cutlass", "splitK"))
        total["products" if is_product else event.key] += event.self_device_time_total / 1e6 / steps
    return dict(total)


def table(name: str, layers: int, steps: int, rate: float, bandwidth: float) -> list[dict[str, Any]]:
    """One row a kernel, the slowest first; what we did not write is summed as `others`."""
    measured = kernel_seconds(step_of(name, layers), steps)
    least: dict[str, Needs] = defaultdict(lambda: (0.0, 0.0))
    for level in LEVELS:
        for kernel, (n_bytes, flops) in needs(name, level).items():
            times = 1 if kernel in OF_THE_HEAD else layers
            key = "products" if kernel.startswith("products") else kernel
            least[key] = (least[key][0] + times * n_bytes, least[key][1] + times * flops)
    rows = []
    for kernel, (n_bytes, flops) in least.items():
        floor = max(n_bytes / bandwidth, flops / rate)
        taken = measured.pop(kernel, 0.0)
        rows.append(
            {"kernel": kernel, "ms": taken * 1e3, "gb": n_bytes / 1e9, "tflop": flops / 1e12, "floor_ms": floor * 1e3}
        )
    rows.append({"kernel": "others", "ms": sum(measured.values()) * 1e3, "gb": 0.0, "tflop": 0.0, "floor_ms": 0.0})
    for row in rows:
        row.update(model=name, layers=layers, of_floor=row["ms"] / row["floor_ms"] if row["floor_ms"] else None)
    others = sorted(measured.items(), key=lambda item: -item[1])[:8]
    print("others:", ", ".join(f"{kernel[:60]} {t * 1e3:.2f} ms" for kernel, t in others))
    return sorted(rows, key=lambda row: -row["ms"])


def draw(record: dict[str, Any], picture: Path) -> None:
    """Time beside the floor of every kernel of each model, and a roofline of those that multiply matrices."""
    models = list(dict.fromkeys(row["model"] for row in record["rows"]))
    figure, axes = plt.subplots(1, len(models) + 1, figsize=(5 * len(models) + 6, 5), constrained_layout=True)
    for axis, model in zip(axes, models, strict=False):
        rows = [
            row for row in record["rows"] if row["model"] == model and row["floor_ms"] and row["kernel"] != "products"
        ]
        names = [row["kernel"].strip("_").replace("_", " ") for row in rows]
        axis.barh(names, [row["ms"] for row in rows], color="tab:blue", label="measured")
        axis.barh(names, [row["floor_ms"] for row in rows], color="tab:orange", height=0.4, label="floor")
        axis.invert_yaxis()
        axis.set(title=f"{model}: four layers and the head", xlabel="ms of a joint step")
        axis.legend()
    roof = axes[-1]
    intensity = [2**i for i in range(3, 11)]
    peak, bandwidth = record["product_flop_s"], record["copy_bytes_s"]
    roof.plot(intensity, [min(peak, bandwidth * x) / 1e12 for x in intensity], "k-", label="roof: copy, product")
    for model, marker in zip(models, "os^v", strict=False):
        rows = [row for row in record["rows"] if row["model"] == model and row["tflop"] and row["gb"]]
        for color, row in enumerate(rows):
            name = row["kernel"].strip("_").replace("_", " ")
            x, y = row["tflop"] * 1e3 / row["gb"], row["tflop"] / row["ms"] * 1e3
            roof.plot(x, y, marker, color=f"C{color}", label=f"{model} {name}")
    roof.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s", title="the scan's kernels")
    roof.legend(fontsize=7)
    figure.savefig(picture, dpi=100)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds(lambda: b.copy_(a), 20, 5)  # type: ignore[arg-type,return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(SIZES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.plot is not None:
        draw(json.loads(args.out.read_text()), args.plot)
        return
    unknown = set(args.models) - set(SIZES)
    if unknown or not args.models:
        parser.error(f"name models of {', '.join(SIZES)}" + (f", not {', '.join(unknown)}" if unknown else ""))
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU: this benchmark needs one")
    rate, bandwidth = matmul_rate(), copy_bandwidth()
    print(f"product {rate / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    for name in args.models:
        mine = table(name, args.layers, args.steps, rate, bandwidth)
        rows += mine
        print(
            f"\n{name}, {args.layers} layers\n| kernel | ms | GB | TFLOP | floor ms | times the floor |\n|---|---|---|---|---|---|"
        )
        for row in mine:
            ratio = f"{row['of_floor']:.2f}" if row["of_floor"] else ""
            print(
                f"| {row['kernel']} | {row['ms']:.2f} | {row['gb']:.1f} | {row['tflop']:.2f} | {row['floor_ms']:.2f} | {ratio} |"
            )
        print(f"whole step {sum(row['ms'] for row in mine):.1f} ms", flush=True)
    if args.out is not None:
        record = {
            "device": torch.cuda.get_device_name(),
            "commit": git_commit(),
            "torch": torch.__version__,
            "product_flop_s": rate,
            "copy_bytes_s": bandwidth,
            "rows": rows,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
