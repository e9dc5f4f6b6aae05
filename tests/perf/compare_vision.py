"""MatMamba-Vision beside the public code, and beside a plain ViT at rising resolution, in one process on one GPU.

    python -m tests.perf.compare_vision --reference DIR [--models 35m 135m] [--micro-batch 128 512 1024] [--parts exact parity
        joint resolution] [--out docs/benchmarks/compare_vision.json]

DIR holds a checkout of the public code (its `matmamba` package) and what it imports and this environment lacks; without timm
tests/perf/timm_stand_in.py takes its place. Without --reference ours runs alone.

- exact: the public code with the same weights on the CPU, in float32, its two Triton calls replaced by mamba-ssm's own `_ref`
  functions: logits of every width and a mix. Needs no GPU.
- parity: the same with its Triton kernels, in float32 (which its scan multiplies as TF32) and in bfloat16.
- joint: forward and backward of all four widths on the same images at 224 px, bfloat16, with both dropouts, drop-path and soft
  targets, without optimizer. images/s counts each image once; a median of `--steps` steps after warm-up.
- resolution: images/s of inference at every width from 224 to 1024 px, against a ViT of as many parameters made of torch's own
  pieces (scaled_dot_product_attention), both as CUDA graphs. Batches hold about as many tokens at every resolution.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.config import VisionConfig
from modeling.convert import to_matmamba_vision
from modeling.cuda_graph import graphed
from modeling.flops import forward_flops_per_image, training_flops_per_image
from modeling.ops.upstream import allow_import_without_cuda_extension
from modeling.vision import VisionModel
from pretrain.gradients import GradientBuffer
from pretrain.passes import GraphedPasses
from pretrain.provenance import git_commit
from pretrain.vision_task import VisionInputs
from tests.passes import classifier_pass
from tests.perf import timm_stand_in
from tests.perf.compare_reference import LEVELS, matmul_rate, measure, seconds, void

CLASSES, SIZE, RATE = 1000, 224, 0.1
MODELS = {"35m": 512, "135m": 1024}
"""Channels; 20 layers and 64 heads, trained at 64, 32, 16 and 8."""
VITS = {"35m": (512, 11), "135m": (768, 19)}
"""Channels and layers of the ViT of about as many parameters; heads of 64 channels, an MLP of four times the channels."""
GOAL = 2.5
RESOLUTIONS = (224, 384, 512, 768, 1024)
TOKENS = 256 * 197
"""Tokens of a batch in the resolution part, at most."""
BOUNDS = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
"""Relative error of logits. TF32 keeps 10 bits and bfloat16 7, through 20 layers."""


def config_of(name: str) -> VisionConfig:
    """The paper's model of this name with its training recipe's drops."""
    return VisionConfig(
        n_layers=20,
        d_model=MODELS[name],
        widths=(64, 32, 16, 8),
        n_classes=CLASSES,
        image_size=SIZE,
        dropout=RATE,
        drop_path=RATE,
    )


def build_ours(name: str, dtype: torch.dtype = torch.bfloat16, *, in_place_gradients: bool = False) -> VisionModel:
    cfg = config_of(name)
    with torch.device("meta"):
        model = VisionModel(cfg, dtype=dtype, in_place_gradients=in_place_gradients)
    model = model.to_empty(device="cuda")
    model.init_weights(0)
    return model


def build_reference(name: str) -> Any:
    """The public model, as its training script builds it."""
    allow_import_without_cuda_extension()
    timm_stand_in.install()
    from matmamba.matmamba2_vision import MatMamba2Vision

    cfg = config_of(name)
    return MatMamba2Vision(
        d_model=cfg.d_model, n_layer=cfg.n_layers, d_intermediate=0, n_classes=CLASSES, patch_size=cfg.patch_size,
        drop_path_rate=RATE, proj_drop_rate=RATE,
    ).cuda()  # fmt: skip


def some_images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, device="cuda", dtype=torch.bfloat16)


def soft_targets(batch: int) -> Tensor:
    """What mixup and smoothing leave of labels."""
    return torch.softmax(torch.randn(batch, CLASSES, device="cuda") * 3, -1)


def ours(name: str, images: Tensor) -> Callable[[int], None]:
    """Forward and backward of one width of ours as in training: gradients in place, passes as CUDA graphs.

    The argument is the level, 1 for the full width.
    """
    model = build_ours(name, in_place_gradients=True)
    GradientBuffer(model.parameters())

    passes = GraphedPasses(classifier_pass(model, seed=0))
    numbers, scale = torch.arange(len(images), device="cuda"), torch.ones((), device="cuda")
    inputs = VisionInputs(images, soft_targets(len(images)), numbers, scale)
    return lambda level: void(passes(model.cfg.layer_widths(model.cfg.n_heads // level), inputs))


def reference(name: str, images: Tensor) -> Callable[[int], None]:
    """The same of the public code, as its training script calls it."""
    model, targets = build_reference(name).train(), soft_targets(len(images))

    def run(level: int) -> None:
        with torch.amp.autocast("cuda", dtype=torch.bfloat16):
            logits = model(images, mrl_level=level)
            loss = torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1).mean()
        loss.backward()

    return run


@torch.no_grad()
def exact() -> list[dict[str, Any]]:
    """Relative error of logits on the CPU for a small model of the 35M's width; ends the program where it is not rounding."""
    allow_import_without_cuda_extension()
    timm_stand_in.install()
    import matmamba.mamba2 as public
    from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref
    from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref
    from matmamba.matmamba2_vision import MatMamba2Vision

    def scan(x: Tensor, *args: Any, chunk_size: int, D: Tensor, dt_bias: Tensor, **_: Any) -> Tensor:
        # Called without documents, states or a gate; it wants whole chunks, and one does not change the sum.
        return ssd_chunk_scan_combined_ref(x, *args, x.shape[1], D=D, dt_bias=dt_bias, dt_softplus=True)

    kernels = public.mamba_chunk_scan_combined, public.rmsnorm_fn
    public.mamba_chunk_scan_combined, public.rmsnorm_fn = scan, rms_norm_ref
    rows = []
    for pool in ("cls", "avg"):
        cfg = VisionConfig(
            n_layers=2, d_model=512, widths=(64, 32, 16, 8), n_classes=10, image_size=64, patch_size=8, pool=pool
        )  # fmt: skip
        mine = VisionModel(cfg)
        mine.init_weights(0)
        unlike(mine)
        theirs = MatMamba2Vision(d_model=512, n_layer=2, n_classes=10, image_size=64, patch_size=8, pool=pool).eval()
        theirs.load_state_dict(to_matmamba_vision({key: p.detach() for key, p in mine.named_parameters()}, cfg))
        images = torch.randn(3, 3, 64, 64)
        for widths in (*map(cfg.layer_widths, cfg.widths), (64, 8)):
            for block, n_heads in zip(theirs.layers, widths, strict=True):
                block.mixer.use_mem_eff_path = False
                block.mixer.mixnmatch, block.mixer.mixnmatch_dims = True, 512 * n_heads // 64
            error = relative(mine.logits(mine(images, widths)), theirs(images))
            rows.append({"part": "exact", "pool": pool, "layer_heads": widths, "error": error})
            print(json.dumps(rows[-1]), flush=True)
            if not error < 1e-5:
                sys.exit(f"error: pool {pool}, heads {widths}: logits differ by {error:.1e}")
    public.mamba_chunk_scan_combined, public.rmsnorm_fn = kernels
    return rows


def unlike(model: VisionModel) -> None:
    """Make all parameters differ from their neighbours, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.add_(0.2 * noise * (0.1 + parameter.abs()))


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative error, without what all classes share."""
    actual, expected = (x - x.mean(-1, keepdim=True) for x in (actual, expected))
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def parity(name: str) -> list[dict[str, Any]]:
    """Relative error between both models' logits at every width; ends the program where it is out of bounds."""
    rows: list[dict[str, Any]] = []
    theirs = build_reference(name).eval()
    for dtype, bound in BOUNDS.items():
        mine = build_ours(name, dtype)
        unlike(mine)
        state = {key: p.detach() for key, p in mine.named_parameters()}
        theirs.load_state_dict(to_matmamba_vision(state, mine.cfg))
        images = torch.randn(8, 3, SIZE, SIZE, device="cuda")
        for level in LEVELS:
            actual = mine.logits(mine(images, mine.cfg.layer_widths(mine.cfg.n_heads // level)))
            with torch.amp.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                expected = theirs(images, mrl_level=level).float()
            error = relative(actual, expected)
            row = {"part": "parity", "model": name, "dtype": str(dtype), "width": width_name(level), "error": error}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if not error < bound:
                sys.exit(f"error: {name} {dtype} at width {width_name(level)}: logits differ by {error:.1e}")
        del mine
    return rows


def joint(name: str, micro_batch: int, steps: int, with_reference: bool, rate: float) -> dict[str, Any]:
    """Images/s of the joint step and of each width, ours and theirs; null where memory ran out."""
    images, cfg = some_images(micro_batch, SIZE), config_of(name)
    mine = fitting(ours, name, images, steps)
    theirs = fitting(reference, name, images, steps) if with_reference else None
    flops = sum(training_flops_per_image(cfg, cfg.layer_widths(n)) for n in cfg.widths)
    row: dict[str, Any] = {"part": "joint", "model": name, "micro_batch": micro_batch}
    for side, result in (("ours", mine), ("reference", theirs)):
        for key in ("joint", *map(str, LEVELS)):
            at = "" if key == "joint" else f"_{width_name(int(key))}"
            row[f"{side}_images_s{at}"] = None if result is None else round(micro_batch / result[key])
        row[f"{side}_peak_gib"] = None if result is None else round(result["peak_gib"], 1)
        row[f"{side}_mfu"] = None if result is None else round(flops * micro_batch / result["joint"] / rate, 3)
    row["ratio"] = None if mine is None or theirs is None else round(theirs["joint"] / mine["joint"], 3)
    print(json.dumps(row), flush=True)
    return row


def fitting(build: Any, name: str, images: Tensor, steps: int) -> dict[str, Any] | None:
    """What `measure` says, or None where it needs more memory than there is."""
    try:
        return measure(build, name, images, steps)
    except torch.OutOfMemoryError:
        pass  # outside the handler, whose traceback holds the tensors
    gc.collect()
    torch.cuda.empty_cache()
    return None


class Vit(nn.Module):
    """A plain pre-norm ViT with a class token, of torch's pieces."""

    def __init__(self, d: int, layers: int) -> None:
        super().__init__()
        self.heads = d // 64
        self.patch = nn.Conv2d(3, d, 16, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, d))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2 * layers + 1))
        self.qkv = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(d, d) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)) for _ in range(layers)
        )
        self.head = nn.Linear(d, CLASSES)

    def forward(self, images: Tensor, positions: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + positions
        for i, (qkv, out, mlp) in enumerate(zip(self.qkv, self.out, self.mlp, strict=True)):
            q, k, v = qkv(self.norms[2 * i](x)).unflatten(-1, (3, self.heads, 64)).permute(2, 0, 3, 1, 4)
            x = x + out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x)[:, 0])


@torch.no_grad()
def resolution(name: str, steps: int) -> list[dict[str, Any]]:
    """Images/s of inference at each resolution, ours at every width and the ViT's, all as CUDA graphs."""
    model, vit = build_ours(name), Vit(*VITS[name]).to("cuda", torch.bfloat16).eval()
    counts = {"parameters": total(model), "vit_parameters": total(vit)}
    rows = []
    for size in RESOLUTIONS:
        tokens = model.cfg.n_tokens(size, size)
        images = some_images(max(1, TOKENS // tokens), size)
        positions = torch.zeros(1, tokens, VITS[name][0], device="cuda", dtype=torch.bfloat16)
        row: dict[str, Any] = {"part": "resolution", "model": name, "px": size, "batch": len(images), **counts}
        run_vit = graphed(partial(vit, positions=positions), [images], [])
        row["vit_images_s"] = round(len(images) / seconds(partial(run_vit, images), steps, 3), 1)  # type: ignore[arg-type]
        for level in LEVELS:
            widths = model.cfg.layer_widths(model.cfg.n_heads // level)
            run = graphed(partial(model, widths=widths), [images], [])
            images_s = len(images) / seconds(partial(run, images), steps, 3)  # type: ignore[arg-type]
            row[f"ours_images_s_{width_name(level)}"] = round(images_s, 1)
            row[f"gflop_{width_name(level)}"] = round(forward_flops_per_image(model.cfg, widths, size) / 1e9, 2)
        row["ratio"] = round(row["ours_images_s_1"] / row["vit_images_s"], 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def total(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def width_name(level: int) -> str:
    return "1" if level == 1 else f"1/{level}"


def print_tables(rows: list[dict[str, Any]]) -> None:
    def of(part: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["part"] == part]

    if of("joint"):
        print(
            f"\n| model | micro-batch | reference images/s | ours images/s | ratio (goal {GOAL}) | MFU | GiB: theirs | ours |"
        )
        print("|---|---|---|---|---|---|---|---|")
    for row in of("joint"):
        print(
            f"| {row['model']} | {row['micro_batch']} | {row['reference_images_s']} | {row['ours_images_s']} | {row['ratio']} "
            f"| {row['ours_mfu']} | {row['reference_peak_gib']} | {row['ours_peak_gib']} |"
        )
    if of("resolution"):
        print("\n| model | px | batch | ViT images/s | ours: 1 | 1/2 | 1/4 | 1/8 | width 1 over ViT |")
        print("|---|---|---|---|---|---|---|---|---|")
    for row in of("resolution"):
        widths = " | ".join(str(row[f"ours_images_s_{width_name(level)}"]) for level in LEVELS)
        print(f"| {row['model']} | {row['px']} | {row['batch']} | {row['vit_images_s']} | {widths} | {row['ratio']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder with the public matmamba package; without it ours alone")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--micro-batch", nargs="+", type=int, default=[128, 512, 1024])
    parser.add_argument("--parts", nargs="+", choices=("exact", "parity", "joint", "resolution"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/compare_vision.json"))
    args = parser.parse_args()
    parts = args.parts or (["exact", "parity"] if args.reference else []) + ["joint", "resolution"]
    gpu = torch.cuda.is_available()
    if not gpu and parts != ["exact"]:
        sys.exit("error: no CUDA GPU: this benchmark needs one, but for --parts exact")
    if args.reference is not None:
        if not (args.reference / "matmamba").is_dir():
            sys.exit(f"error: {args.reference} has no matmamba package: give a checkout of the public MatMamba")
        sys.path.insert(0, str(args.reference.resolve()))
    elif {"exact", "parity"} & set(parts):
        sys.exit("error: --parts exact and parity compare with the public code: give --reference")
    rate = matmul_rate() if gpu else 0.0
    about = {
        "commit": git_commit(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
        "timm": timm_stand_in.install(),
        "product_tflops": round(rate / 1e12),
    }
    print(json.dumps(about), flush=True)
    rows: list[dict[str, Any]] = []

    def record(found: list[dict[str, Any]]) -> None:
        rows.extend({**row, **about} for row in found)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")
        gc.collect()
        torch.cuda.empty_cache()

    if "exact" in parts:
        record(exact())
    for name in args.models:
        if "parity" in parts:
            record(parity(name))
        if "joint" in parts:
            for micro_batch in args.micro_batch:
                record([joint(name, micro_batch, args.steps, args.reference is not None, rate)])
        if "resolution" in parts:
            record(resolution(name, args.steps))
    print_tables(rows)


if __name__ == "__main__":
    main()
