"""Joint training throughput of ours beside the public MatMamba's, in one process on one GPU.

    python -m tests.perf.compare_reference --reference DIR [--models 130m 370m] [--longer 4096 8192]
        [--recompute states selective] [--float8] [--out docs/benchmarks/compare_reference.json]

DIR holds a checkout of the public code (its `matmamba` package) and whatever that imports and this environment lacks,
such as `causal_conv1d`, without which its fused path does not run. Both sides do the forward and backward passes of all
four widths on the same tokens in bfloat16, without optimizer, at the reference's micro-batch; each tokens/s is the
median of `--steps` steps after warm-up, and counts each token once. A row is a list entry of the JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from modeling.config import LanguageConfig
from modeling.flops import training_flops_per_token
from modeling.language import LanguageModel
from modeling.ops.fused_mixer import Recompute as MixerRecompute
from modeling.ops.upstream import allow_import_without_cuda_extension
from pretrain.gradients import GradientBuffer
from pretrain.passes import GraphedPasses, Pass, PassInputs
from pretrain.provenance import git_commit
from tests.passes import language_pass

VOCAB = 50257
LEVELS = (1, 2, 4, 8)
GOALS = {"130m": 3.0, "370m": 3.5, "790m": 3.5, "1b4": 2.5}
SIZES = {  # layers, d_model, micro-batch of 1024-token rows: the reference's own (arXiv 2410.06718, its scripts)
    "130m": (24, 768, 64),
    "370m": (48, 1024, 32),
    "790m": (48, 1536, 16),
    "1b4": (48, 2048, 16),
}
SEQUENCE = 1024
Builder = Callable[[str, torch.Tensor], Callable[[int], None]]
GIB = 2**30


def config_of(name: str) -> LanguageConfig:
    """The paper's language model of this name: 64 heads, trained at 64, 32, 16 and 8."""
    n_layers, d_model, _ = SIZES[name]
    return LanguageConfig(n_layers=n_layers, d_model=d_model, widths=(64, 32, 16, 8), vocab_size=VOCAB)


def model_of(cfg: LanguageConfig) -> tuple[LanguageModel, Pass]:
    """A model of ours on the GPU, its gradients in place as in training, and its passes, launched kernel by kernel."""
    with torch.device("meta"):
        model = LanguageModel(cfg, dtype=torch.bfloat16, in_place_gradients=True)
    model = model.to_empty(device="cuda")
    model.init_weights(0)
    GradientBuffer(model.parameters())
    return model, language_pass(model)


def ours(launched: Pass, name: str, tokens_bt: torch.Tensor) -> Callable[[int], None]:
    """Forward and backward of one width of ours as CUDA graphs; the argument is the level, 1 for the full width."""
    cfg, passes = config_of(name), GraphedPasses(launched)
    inputs = PassInputs(
        tokens_bt[:, :-1].contiguous(), tokens_bt[:, 1:].contiguous(), None, torch.ones((), device=tokens_bt.device)
    )
    return lambda level: void(passes(cfg.layer_widths(cfg.n_heads // level), inputs))


def recompute(model: LanguageModel, mode: MixerRecompute) -> None:
    """What the model's mixers compute again in backward, from the next pass on."""
    for block in model.blocks:
        block.mixer.recompute = mode


def multiply_in_float8(model: LanguageModel, *, on: bool) -> None:
    """Whether the model's mixers multiply their projections in float8, from the next pass on."""
    for block in model.blocks:
        block.mixer.float8 = on


def void(_: object) -> None:
    """Let go of it."""


def reference(name: str, tokens_bt: torch.Tensor) -> Callable[[int], None]:
    """The same of the public code, as its training script calls it."""
    allow_import_without_cuda_extension()
    from mamba_ssm.models.config_mamba import MambaConfig
    from matmamba.mixer_seq_simple import MatMambaLMHeadModel

    n_layers, d_model, _ = SIZES[name]
    cfg = MambaConfig(
        d_model=d_model,
        n_layer=n_layers,
        vocab_size=VOCAB,
        ssm_cfg={"layer": "MatMamba2"},
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        pad_vocab_size_multiple=16,
    )
    model = MatMambaLMHeadModel(cfg, device="cuda")

    def run(level: int) -> None:
        with torch.amp.autocast("cuda", dtype=torch.bfloat16):
            logits = model(tokens_bt[:, :-1], mrl_level=level).logits
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), tokens_bt[:, 1:].reshape(-1))
        loss.backward()

    return run


def seconds(call: Callable[[], None], steps: int, warm_up: int = 2) -> float:
    """Median wall time of `call`, GPU work included."""
    times = []
    for i in range(warm_up + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def tokens_of(name: str, sequence: int) -> torch.Tensor:
    """Random ids of a micro-batch, cut into rows of `sequence` tokens and one more: always as many tokens."""
    rows = SIZES[name][2] * SEQUENCE // sequence
    return torch.randint(0, VOCAB, (rows, sequence + 1), generator=torch.Generator().manual_seed(0)).cuda()


def measure(
    build: Builder, name: str, tokens_bt: torch.Tensor, steps: int, *, levels: tuple[int, ...] = LEVELS
) -> dict[str, Any]:
    """Seconds of a joint step and of the share of each of `levels`, the first step's seconds, and peak GiB."""
    result = _measure(build(name, tokens_bt), steps, levels)
    gc.collect()
    torch.cuda.empty_cache()
    return result


def _measure(run: Callable[[int], None], steps: int, levels: tuple[int, ...]) -> dict[str, Any]:
    def joint() -> None:
        for level in LEVELS:
            run(level)

    torch.cuda.synchronize()
    start = time.perf_counter()
    joint()
    torch.cuda.synchronize()
    first_step = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {"first_step": first_step, "joint": seconds(joint, steps)}
    result["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    for level in levels:
        result[str(level)] = seconds(partial(run, level), max(2, steps // 2), 1)
    return result


def matmul_rate() -> float:
    """FLOP/s of a bfloat16 product of two 8192 x 8192 matrices, the ceiling that MFU is counted against."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()

    def product() -> None:
        torch.mm(a, b)

    return 2 * 8192**3 / seconds(product, 30, 5)


def rows_of(
    name: str,
    mine: dict[str, Any],
    theirs: dict[str, Any] | None,
    rate: float,
    *,
    sequence: int = SEQUENCE,
    mode: str = "none",
    precision: str = "bf16",
) -> list[dict[str, Any]]:
    """The JSON rows of one model: the joint step, then each width that was timed; `mode` is activation_checkpointing's.

    MFU counts against the rate of a bfloat16 product, whatever `precision` is.
    """
    cfg, tokens = config_of(name), SIZES[name][2] * SEQUENCE
    flops = {str(level): training_flops_per_token(cfg, cfg.layer_widths(cfg.n_heads // level)) for level in LEVELS}
    flops["joint"] = sum(flops.values())
    rows = []
    for width in [width for width in ("joint", *map(str, LEVELS)) if width in mine]:
        tok_s = tokens / mine[width]
        rows.append(
            {
                "model": name,
                "width": width if width in ("joint", "1") else f"1/{width}",
                "sequence": sequence,
                "activation_checkpointing": mode,
                "precision": precision,
                "reference_tok_s": None if theirs is None else round(tokens / theirs[width]),
                "ours_tok_s": round(tok_s),
                "ratio": None if theirs is None else round(theirs[width] / mine[width], 3),
                "mfu": round(flops[width] * tok_s / rate, 3),
                "reference_peak_gib": None if theirs is None else round(theirs["peak_gib"], 1),
                "ours_peak_gib": round(mine["peak_gib"], 1),
                "ours_first_step_s": round(mine["first_step"], 1),
                "commit": git_commit(),
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
            }
        )
    return rows


def compare(name: str, args: argparse.Namespace, rate: float) -> Iterator[list[dict[str, Any]]]:
    """All rows of one model, ours and the reference's, ours at other lengths, ours in less memory: those that there are, each time
    that there are more. The reference comes last, whose kernels tune for minutes."""
    model, launched = model_of(config_of(name))
    build = partial(ours, launched)
    mine = measure(build, name, tokens_of(name, SEQUENCE), args.steps)
    others: list[dict[str, Any]] = []
    yield rows_of(name, mine, None, rate)
    for sequence in args.longer:
        longer = measure(build, name, tokens_of(name, sequence), args.steps, levels=())
        others += rows_of(name, longer, None, rate, sequence=sequence)
        yield [*rows_of(name, mine, None, rate), *others]
    for mode in args.recompute:
        recompute(model, "inside" if mode == "selective" else mode)
        again = measure(build, name, tokens_of(name, SEQUENCE), args.steps, levels=())
        others += rows_of(name, again, None, rate, mode=mode)
        yield [*rows_of(name, mine, None, rate), *others]
    if args.float8:
        recompute(model, "none")
        multiply_in_float8(model, on=True)
        again = measure(build, name, tokens_of(name, SEQUENCE), args.steps)
        others += rows_of(name, again, None, rate, precision="fp8")
        yield [*rows_of(name, mine, None, rate), *others]
    del model, launched, build
    gc.collect()
    torch.cuda.empty_cache()
    if args.reference is not None:
        theirs = measure(reference, name, tokens_of(name, SEQUENCE), args.steps)
        yield [*rows_of(name, mine, theirs, rate), *others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder with the public matmamba package; without it ours alone")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--longer", type=int, nargs="*", default=[], help="also ours alone at these lengths, equal tokens"
    )
    parser.add_argument(
        "--recompute", choices=("states", "selective"), nargs="*", default=[], help="also ours alone, to save memory"
    )
    parser.add_argument("--float8", action="store_true", help="also ours alone with precision=fp8")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/compare_reference.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU: this benchmark needs one")
    if args.reference is not None:
        if not (args.reference / "matmamba").is_dir():
            sys.exit(f"error: {args.reference} has no matmamba package: give a checkout of the public MatMamba")
        sys.path.insert(0, str(args.reference.resolve()))
    rate = matmul_rate()
    print(f"8192-cubed bfloat16 product: {rate / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        done = rows
        for found in compare(name, args, rate):
            for row in found:
                if row["width"] == "joint" and row not in rows:
                    print(json.dumps(row), flush=True)
            rows = [*done, *found]
            args.out.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")
    print(
        "\n| model | width | sequence | recompute | precision | reference tok/s | ours tok/s | ratio (goal) | MFU | GiB: reference | ours |"
    )
    print("|---" * 11 + "|")
    for row in rows:
        goal = f" ({GOALS[row['model']]})" if row["width"] == "joint" else ""
        cells = [row[key] for key in ("model", "width", "sequence", "activation_checkpointing", "precision")]
        cells += [row["reference_tok_s"], row["ours_tok_s"], f"{row['ratio']}{goal}", f"{row['mfu']:.1%}"]
        print("| " + " | ".join(map(str, [*cells, row["reference_peak_gib"], row["ours_peak_gib"]])) + " |")


if __name__ == "__main__":
    main()
