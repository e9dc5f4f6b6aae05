"""Decoding speed at every width, beside mamba-ssm's and transformers' own generation, in one process on one GPU.

    python -m tests.perf.decode_throughput configs/lm_1b4.yaml --out docs/benchmarks/decode_1b4.json
    python -m tests.perf.decode_throughput --model RUN --speculate --out docs/benchmarks/decode_130m.json

With a config the weights are random, which costs the same time; --model takes a trained run, checkpoint or model folder,
and --speculate also times speculation on it. All sides hold the same bfloat16 weights of the same submodel. Time per step
is (time of a long generation - time of a short one) / (their difference in tokens), the median of --repeats, so that the
prompt and the capture of CUDA graphs cancel. mamba-ssm runs with its CUDA graphs, transformers as `generate` does by
default. The floor is one reading of the weights in use and one reading and writing of the states at --bandwidth.

Without causal_conv1d both libraries convolve in plain torch; the record says whether it was there.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from modeling.config import LanguageConfig
from modeling.convert import cut, to_mamba_ssm
from modeling.decode import generate
from modeling.export import hf_config, read_state
from modeling.flops import language_parameters
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.model_folder import CONFIG_NAME, load_model
from modeling.nesting import width_name
from modeling.ops.upstream import allow_import_without_cuda_extension
from modeling.speculative import generate_speculatively
from pretrain.config_io import load_config

PROMPT_TOKENS = 64
SHORT, LONG = 40, 168
GIB = 2**30
State = dict[str, torch.Tensor]
Decoder = Callable[[torch.Tensor, int], None]
"""Generates so many tokens after a prompt of shape (batch, time)."""


def seconds_per_step(decoder: Decoder, prompt_bt: torch.Tensor, repeats: int) -> float:
    """Median time of one decoding step."""
    decoder(prompt_bt, LONG)  # compile, tune, and let caches reach their largest size
    found = []
    for _ in range(repeats):
        taken = []
        for n in (SHORT, LONG):
            torch.cuda.synchronize()
            start = time.perf_counter()
            decoder(prompt_bt, n)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        found.append((taken[1] - taken[0]) / (LONG - SHORT))
    return statistics.median(found)


def ours(model: InferenceModel, n_heads: int) -> Decoder:
    """Greedy decoding at a uniform width of the nested model."""
    widths = model.cfg.layer_widths(n_heads)

    def run(prompt_bt: torch.Tensor, n: int) -> None:
        for _ in generate(model, prompt_bt.tolist(), widths, max_new_tokens=n):
            pass

    return run


def mamba_ssm(state: State, cfg: LanguageConfig) -> tuple[Decoder, Any]:
    """mamba-ssm's model of one width, in bfloat16, and its generation with CUDA graphs."""
    allow_import_without_cuda_extension()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    about = MambaConfig(
        d_model=cfg.d_model,
        n_layer=cfg.n_layers,
        vocab_size=cfg.n_vocab_rows,
        ssm_cfg={
            "layer": "Mamba2",
            "headdim": cfg.headdim,
            "d_state": cfg.d_state,
            # Its Mamba2 multiplies this by d_model: a fraction lets it hold the narrow widths too.
            "expand": Fraction(cfg.d_inner, cfg.d_model),
            "chunk_size": cfg.chunk_size,
        },
        pad_vocab_size_multiple=1,
    )
    model = MambaLMHeadModel(about, device="cuda", dtype=torch.bfloat16).eval()
    model.load_state_dict(to_mamba_ssm(state, cfg))

    def run(prompt_bt: torch.Tensor, n: int) -> None:
        model.generate(prompt_bt, max_length=prompt_bt.shape[1] + n, cg=True, top_k=1)

    return run, model


def transformers(state: State, cfg: LanguageConfig) -> tuple[Decoder, Any]:
    """transformers' Mamba2ForCausalLM of one width, in bfloat16."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    about = {k: v for k, v in hf_config(cfg, torch.bfloat16).items() if k not in ("architectures", "model_type")}
    with torch.device("meta"):
        model = Mamba2ForCausalLM(Mamba2Config(**about))
    theirs = to_mamba_ssm(state, cfg)
    renamed = {name.replace("backbone.embedding.", "backbone.embeddings."): t for name, t in theirs.items()}
    model.load_state_dict({name: t.to("cuda", torch.bfloat16) for name, t in renamed.items()}, assign=True)
    model.tie_weights()
    model = model.eval()

    def run(prompt_bt: torch.Tensor, n: int) -> None:
        model.generate(prompt_bt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

    return run, model


def measure(decoder: Decoder, prompt_bt: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Milliseconds a step, tokens/s and the peak of memory, or what went wrong."""
    torch.cuda.reset_peak_memory_stats()
    try:
        seconds = seconds_per_step(decoder, prompt_bt, repeats)
    except torch.cuda.OutOfMemoryError:
        return {"failed": "out of memory"}
    return {
        "ms_per_step": round(1e3 * seconds, 4),
        "tokens_per_s": round(prompt_bt.shape[0] / seconds, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
    }


def largest_difference(model: InferenceModel, n_heads: int, theirs: Any, prompt_bt: torch.Tensor) -> float:
    """Relative difference of the last scores from another library's, all in bfloat16."""
    state = model.empty_state(prompt_bt.shape[0], model.cfg.layer_widths(n_heads))
    mine = model.logits(model.forward(prompt_bt, state)[:, -1])
    with torch.no_grad():
        other = theirs(prompt_bt).logits[:, -1, : mine.shape[-1]].float()
    return float((mine - other).norm() / other.norm())


def free() -> None:
    """Give cached memory back before another model is built."""
    gc.collect()
    torch.cuda.empty_cache()


def read(args: argparse.Namespace) -> tuple[State, LanguageConfig]:
    """The whole nested model's parameters, float32 on the CPU: a trained one's, or random ones of a config."""
    if args.model is not None:
        if (args.model / CONFIG_NAME).exists():
            model = load_model(args.model)
            return {name: p.detach() for name, p in model.named_parameters()}, model.cfg
        state, cfg, _ = read_state(args.model)
        return state, cfg
    cfg = load_config(args.config, []).model
    with torch.device("meta"):
        model = LanguageModel(cfg)
    model = model.to_empty(device="cpu")
    model.init_weights(0)
    return {name: p.detach() for name, p in model.named_parameters()}, cfg


def speculation(model: InferenceModel, prompt: list[int], n: int) -> list[dict[str, Any]]:
    """Tokens/s of one sequence for each draft width and length, beside plain decoding of the full width."""
    full = model.cfg.layer_widths(model.cfg.n_heads)
    plain_s = seconds_per_step(ours(model, model.cfg.n_heads), torch.tensor([prompt], device=model.device), 3)
    rows = [{"draft": None, "tokens_per_s": round(1 / plain_s, 1)}]
    plain_ids = torch.stack(list(generate(model, [prompt], full, max_new_tokens=n)), dim=1)[0].tolist()
    for n_heads in model.cfg.widths[1:]:
        for draft_tokens in (2, 4, 6):
            taken, result = [], None
            for length in (SHORT, n):
                torch.cuda.synchronize()
                start = time.perf_counter()
                widths = model.cfg.layer_widths(n_heads)
                result = generate_speculatively(
                    model, [prompt], full, widths, max_new_tokens=length, draft_tokens=draft_tokens
                )
                torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
            assert result is not None
            same = next((i for i, (a, b) in enumerate(zip(result.ids[0], plain_ids, strict=True)) if a != b), n)
            rate = (n - SHORT) / (taken[1] - taken[0])
            rows.append(
                {
                    "draft": width_name(n_heads, model.cfg.n_heads),
                    "draft_tokens": draft_tokens,
                    "acceptance": round(result.acceptance, 3),
                    "tokens_per_s": round(rate, 1),
                    "speed_up": round(rate * plain_s, 3),
                    "same_tokens_before_rounding_differs": same,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", help="a run's YAML: random weights of its model")
    parser.add_argument("--model", type=Path, help="a trained run, checkpoint or model folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, default=4.27, help="TB/s of a copy on this GPU, for the floor")
    parser.add_argument("--skip", nargs="*", default=[], choices=("mamba_ssm", "transformers"))
    parser.add_argument("--speculate", action="store_true", help="also speculation, which needs a trained model")
    parser.add_argument("--prompt-ids", type=Path, help="JSON list of token ids to speculate from; default: random")
    parser.add_argument("--out", type=Path, help="write the record here")
    args = parser.parse_args(argv)
    if (args.config is None) == (args.model is None):
        parser.error("give a config or --model")
    if not torch.cuda.is_available():
        print("error: no GPU: this measures decoding on one", file=sys.stderr)
        return 2
    state, cfg = read(args)
    whole = LanguageModel(cfg)
    whole.load_state_dict(state, assign=True)
    record: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "causal_conv1d": importlib.util.find_spec("causal_conv1d") is not None,
        "model": asdict(cfg),
        "bandwidth_tb_per_s": args.bandwidth,
        "rows": [],
    }
    generator = torch.Generator().manual_seed(0)
    for n_heads in cfg.widths:
        name, widths = width_name(n_heads, cfg.n_heads), cfg.layer_widths(n_heads)
        weight_bytes = 2 * language_parameters(cfg, widths).total
        for batch in args.batches:
            prompt_bt = torch.randint(0, cfg.vocab_size, (batch, PROMPT_TOKENS), generator=generator).cuda()
            row: dict[str, Any] = {"width": name, "batch": batch}
            for key, dtype in (("ours", torch.float32), ("ours, bf16 states", torch.bfloat16)):
                model = InferenceModel(whole, dtype=torch.bfloat16, device="cuda", state_dtype=dtype)
                row[key] = measure(ours(model, n_heads), prompt_bt, args.repeats)
                states = model.empty_state(1, widths).n_bytes
                row[key]["state_mib_per_sequence"] = round(states / 2**20, 3)
                floor = (weight_bytes + 2 * batch * states) / (args.bandwidth * 1e12)
                row[key]["floor_ms"] = round(1e3 * floor, 4)
                del model
                free()
            part, small = cut(state, cfg, n_heads)
            for key, build in (("mamba_ssm", mamba_ssm), ("transformers", transformers)):
                if key in args.skip:
                    continue
                decoder, theirs = build(part, small)
                row[key] = measure(decoder, prompt_bt, args.repeats if key == "mamba_ssm" else 1)
                if batch == 1:
                    model = InferenceModel(whole, dtype=torch.bfloat16, device="cuda")
                    row[key]["logits_relative_difference"] = largest_difference(model, n_heads, theirs, prompt_bt)
                    del model
                del decoder, theirs
                free()
            record["rows"].append(row)
            print(json.dumps(row), flush=True)
    if args.speculate:
        prompt = torch.randint(0, cfg.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
        if args.prompt_ids is not None:
            prompt = json.loads(args.prompt_ids.read_text())
        model = InferenceModel(whole, dtype=torch.bfloat16, device="cuda")
        record["speculation"] = speculation(model, prompt, 512)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
