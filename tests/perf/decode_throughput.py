"""Decoding speed at every width, beside mamba-ssm's and transformers' own generation, in one process on one GPU.

    python -m tests.perf.decode_throughput configs/lm_1b4.yaml --out docs/benchmarks/decode_1b4.json
    python -m tests.perf.decode_throughput --model RUN --speculate --prompt-ids ids.json --out docs/benchmarks/decode_130m.json

With a config the weights are random, which costs the same time; --model takes a trained run, checkpoint or model folder,
and --speculate also times speculation on it. All sides hold the same bfloat16 weights of the same submodel. Time per step
is (time of a long generation - time of a short one) / (their difference in tokens), the median of --repeats, so that the
prompt and the capture of CUDA graphs cancel. mamba-ssm runs with its CUDA graphs, transformers as `generate` does by
default, for fewer tokens, because it is slow. The floor is one reading of the weights in use and one reading and writing of
the states at a large copy's bandwidth.

The record is written after every row, so that a run that is cut short has lost one row; rows that have not begun by
--seconds are named in it instead. Without causal_conv1d both libraries convolve in plain torch; what cannot be imported is
in the record with the import's own error.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modeling.config import LanguageConfig
from modeling.convert import cut, to_hf, to_mamba_ssm
from modeling.decode import generate
from modeling.export import hf_config, read_source
from modeling.flops import language_parameters
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.model_folder import CONFIG_NAME, load_model
from modeling.nesting import parse_width, width_name
from modeling.ops.upstream import allow_import_without_cuda_extension
from modeling.sampling import Sampling
from modeling.speculative import generate_speculatively
from pretrain.config_io import load_config
from pretrain.provenance import git_commit
from tests.perf.kernels import copy_bandwidth

PROMPT_TOKENS = 16
GIB = 2**30
State = dict[str, torch.Tensor]
Decoder = Callable[[torch.Tensor, int], None]
"""Generates so many tokens after a prompt of shape (batch, time)."""


@dataclass(frozen=True)
class Effort:
    """How long one number may take: new tokens of a long and of a short generation, and how often both are timed."""

    short: int
    long: int
    repeats: int


def seconds_per_step(decoder: Decoder, prompt_bt: torch.Tensor, effort: Effort) -> float:
    """Median time of one decoding step."""
    decoder(prompt_bt, effort.long)  # compile, tune, and let caches reach their largest size
    found = []
    for _ in range(effort.repeats):
        taken = []
        for n in (effort.short, effort.long):
            torch.cuda.synchronize()
            start = time.perf_counter()
            decoder(prompt_bt, n)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        found.append((taken[1] - taken[0]) / (effort.long - effort.short))
    return statistics.median(found)


def ours(model: InferenceModel, n_heads: int) -> Decoder:
    """Greedy decoding at a uniform width of the nested model."""
    widths = model.cfg.layer_widths(n_heads)

    def run(prompt_bt: torch.Tensor, n: int) -> None:
        for _ in generate(model, prompt_bt.tolist(), widths, max_new_tokens=n):
            pass

    return run


def mamba_ssm(state: State, cfg: LanguageConfig) -> tuple[Decoder, Any, int]:
    """mamba-ssm's generation of one width with CUDA graphs, its model in bfloat16, and the bytes of a sequence's state."""
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

    return run, model, n_bytes(*model.allocate_inference_cache(1, 1).values())


def transformers(state: State, cfg: LanguageConfig) -> tuple[Decoder, Any, int]:
    """As `mamba_ssm`, of transformers' Mamba2ForCausalLM."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    # Its plain path pads the prompt to a chunk and holds (chunk, chunk, heads, d_state) a sequence: 2 GB at 256.
    cfg = replace(cfg, chunk_size=PROMPT_TOKENS)
    about = {k: v for k, v in hf_config(cfg, torch.bfloat16).items() if k not in ("architectures", "model_type")}
    about["vocab_size"] = cfg.n_vocab_rows  # as many rows as ours multiplies
    with torch.device("meta"):
        model = Mamba2ForCausalLM(Mamba2Config(**about))
    theirs = {name: t.to("cuda", torch.bfloat16) for name, t in to_hf(state, cfg).items()}
    model.load_state_dict({**theirs, "lm_head.weight": theirs["backbone.embeddings.weight"]}, assign=True)
    model.tie_weights()
    model = model.eval()

    def run(prompt_bt: torch.Tensor, n: int) -> None:
        model.generate(prompt_bt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

    # Its cache has no class of its own in some releases: a window of the convolution and a state, in the model's dtype.
    conv_state = (cfg.d_inner + 2 * cfg.d_state) * cfg.d_conv
    return run, model, 2 * cfg.n_layers * (conv_state + cfg.d_inner * cfg.d_state)


def n_bytes(*tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of all tensors in all sequences."""
    return sum(t.numel() * t.element_size() for some in tensors for t in some)


def why_absent(module: str) -> str | None:
    """The error of importing `module`, None where it can be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken install raises anything
        return f"{type(error).__name__}: {error}"
    return None


def measure(decoder: Decoder, prompt_bt: torch.Tensor, effort: Effort) -> dict[str, Any]:
    """Milliseconds a step, tokens/s and the peak of memory above what was there before, or what went wrong."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        seconds = seconds_per_step(decoder, prompt_bt, effort)
    except torch.cuda.OutOfMemoryError:
        return {"failed": "out of memory"}
    return {
        "ms_per_step": round(1e3 * seconds, 4),
        "tokens_per_s": round(prompt_bt.shape[0] / seconds, 1),
        "peak_gib_above_start": round((torch.cuda.max_memory_allocated() - before) / GIB, 3),
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
    """The whole nested model's parameters, float32 on the GPU: a trained one's, or random ones of a config."""
    if args.model is not None:
        if (args.model / CONFIG_NAME).exists():
            model = load_model(args.model)
            state, cfg = {name: p.detach() for name, p in model.named_parameters()}, model.cfg
        else:
            source = read_source(args.model)
            state, cfg = source.state, source.cfg
    else:
        cfg = load_config(args.config, []).model
        model = LanguageModel(cfg)
        model.init_weights(0)
        state = {name: p.detach() for name, p in model.named_parameters()}
    return {name: tensor.cuda() for name, tensor in state.items()}, cfg


class Record:
    """What was measured so far, on disk after every addition."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self._path, self._seconds, self._start = path, seconds, time.monotonic()
        self.content: dict[str, Any] = {}

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    @property
    def is_late(self) -> bool:
        """Whether nothing new may begin."""
        return self.elapsed_s > self._seconds

    def say(self, what: str) -> None:
        print(f"[{self.elapsed_s:6.1f} s] {what}", flush=True)

    def add(self, key: str, row: Any) -> None:
        """Append `row` to the list `key`, print it, and write everything."""
        self.content.setdefault(key, []).append(row)
        self.content["seconds"] = round(self.elapsed_s, 1)
        self.say(json.dumps(row))
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self.content, indent=1) + "\n")


def measure_width(
    record: Record, args: argparse.Namespace, state: State, models: dict[str, InferenceModel], n_heads: int
) -> None:
    """One row for each batch, each side's model built once."""
    cfg = models["ours"].cfg
    name, widths = width_name(n_heads, cfg.n_heads), cfg.layer_widths(n_heads)
    if record.is_late:
        record.add("left_out", {"width": name, "batches": args.batches})
        return
    decoders: dict[str, Decoder] = {key: ours(model, n_heads) for key, model in models.items()}
    part, small = cut(state, cfg, n_heads)
    difference, state_bytes = {}, {key: model.state_bytes(widths) for key, model in models.items()}
    probe_bt = torch.randint(0, cfg.vocab_size, (1, PROMPT_TOKENS), device="cuda")
    for key, build in (("mamba_ssm", mamba_ssm), ("transformers", transformers)):
        if key not in args.skip and key not in record.content["absent"]:
            record.say(f"width {name}: building {key}'s model")
            try:
                decoders[key], theirs, state_bytes[key] = build(part, small)
            except Exception as error:  # transformers 5 refuses what is no whole multiple of d_model
                record.add("left_out", {"width": name, "side": key, "error": str(error)[:300]})
                continue
            difference[key] = largest_difference(models["ours"], n_heads, theirs, probe_bt)
    del part
    for batch in args.batches:
        if record.is_late:
            record.add("left_out", {"width": name, "batches": [batch]})
            continue
        prompt_bt = torch.randint(0, cfg.vocab_size, (batch, PROMPT_TOKENS), device="cuda")
        row: dict[str, Any] = {"width": name, "batch": batch}
        for key, decoder in decoders.items():
            slow = key == "transformers"
            row[key] = measure(decoder, prompt_bt, Effort(4, 16, 1) if slow else Effort(40, 136, args.repeats))
            row[key]["state_mib_per_sequence"] = round(state_bytes[key] / 2**20, 3)
            if key in models:
                moved = 2 * language_parameters(cfg, widths).total + 2 * batch * state_bytes[key]
                row[key]["floor_ms"] = round(1e3 * moved / (args.bandwidth * 1e12), 4)
            else:
                row[key]["logits_relative_difference"] = difference[key]
                if "ms_per_step" in row[key] and "ms_per_step" in row["ours"]:
                    row[f"times_{key}"] = round(row[key]["ms_per_step"] / row["ours"]["ms_per_step"], 3)
            free()
        record.add("rows", row)


def speculate(record: Record, model: InferenceModel, prompts: list[list[int]], n: int) -> None:
    """Tokens/s of one sequence for each draft width and length, beside plain decoding of the full width.

    Over all prompts, one after the other: acceptance depends on the text.
    """
    cfg, short = model.cfg, 40
    full = cfg.layer_widths(cfg.n_heads)
    effort = Effort(short, n, 1)
    plain_s = statistics.mean(
        seconds_per_step(ours(model, cfg.n_heads), torch.tensor([prompt]), effort) for prompt in prompts
    )
    record.add("speculation", {"draft": None, "tokens_per_s": round(1 / plain_s, 1), "prompts": len(prompts)})
    plain = [torch.stack(list(generate(model, [p], full, max_new_tokens=n)), dim=1)[0].tolist() for p in prompts]
    for n_heads in cfg.widths[1:]:
        for draft_tokens, temperature in ((2, 0.0), (4, 0.0), (6, 0.0), (4, 0.8)):
            if record.is_late:
                record.add("left_out", {"draft": width_name(n_heads, cfg.n_heads), "draft_tokens": draft_tokens})
                continue
            taken = {short: 0.0, n: 0.0}
            drafted = accepted = 0
            same = []
            run = partial(
                generate_speculatively,
                model,
                target=full,
                draft=cfg.layer_widths(n_heads),
                draft_tokens=draft_tokens,
                sampling=Sampling(temperature=temperature),
            )
            run(prompts[:1], max_new_tokens=short)  # captures the round's graphs, which later ones find
            for prompt, expected in zip(prompts, plain, strict=True):
                for length in (short, n):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    generator = torch.Generator(model.device).manual_seed(0)
                    result = run([prompt], max_new_tokens=length, generator=generator)
                    torch.cuda.synchronize()
                    taken[length] += time.perf_counter() - start
                drafted, accepted = drafted + result.drafted, accepted + result.accepted
                pairs = zip(result.ids[0], expected, strict=True)
                same.append(next((i for i, (a, b) in enumerate(pairs) if a != b), n))
            rate = (n - short) * len(prompts) / (taken[n] - taken[short])
            row = {"draft": width_name(n_heads, cfg.n_heads), "draft_tokens": draft_tokens, "temperature": temperature}
            row |= {"acceptance": round(accepted / drafted, 3), "tokens_per_s": round(rate, 1)}
            row |= {"speed_up": round(rate * plain_s, 3)}
            if temperature == 0:
                row["same_tokens_before_rounding_differs"] = same
            record.add("speculation", row)


def read_prompts(path: Path | None, vocab_size: int) -> list[list[int]]:
    """Prompts to speculate from: a JSON list of lists of ids, one random prompt where there is no file."""
    if path is None:
        return [torch.randint(0, vocab_size, (PROMPT_TOKENS,)).tolist()]
    prompts = json.loads(path.read_text())
    return [prompts] if isinstance(prompts[0], int) else prompts


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for a record in docs/benchmarks: milliseconds a step."""
    sides = [key for key in ("ours", "ours, bf16 states", "mamba_ssm", "transformers") if any(key in r for r in rows)]
    lines = [f"| width | batch | floor | {' | '.join(sides)} | MiB a sequence |", "|---" * (len(sides) + 4) + "|"]
    for row in rows:
        shown = [str(row.get(key, {}).get("ms_per_step", row.get(key, {}).get("failed", "-"))) for key in sides]
        mine = row["ours"]
        cells = (row["width"], row["batch"], mine["floor_ms"], *shown, mine["state_mib_per_sequence"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", help="a run's YAML: random weights of its model")
    parser.add_argument("--model", type=Path, help="a trained run, checkpoint or model folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--widths", nargs="+", help="as 1 1/2 8h; default: every trained width")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=170, help="begin no new row after so many; speculation's too")
    parser.add_argument("--bandwidth", type=float, help="TB/s for the floor; default: measured, of a large copy")
    parser.add_argument("--skip", nargs="*", default=[], choices=("mamba_ssm", "transformers"))
    parser.add_argument("--speculate", action="store_true", help="speculation first, which needs a trained model")
    parser.add_argument("--prompt-ids", type=Path, help="JSON lists of token ids to speculate from; default: random")
    parser.add_argument("--out", type=Path, help="write the record here, after every row")
    args = parser.parse_args(argv)
    if (args.config is None) == (args.model is None):
        parser.error("give a config or --model")
    if not torch.cuda.is_available():
        print("error: no GPU: this measures decoding on one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    args.bandwidth = args.bandwidth or copy_bandwidth() / 1e12
    free()
    record = Record(args.out, args.seconds)
    allow_import_without_cuda_extension()
    absent = {
        name: why
        for name, module in (
            ("mamba_ssm", "mamba_ssm.models.mixer_seq_simple"),
            ("transformers", "transformers.models.mamba2.modeling_mamba2"),
            ("causal_conv1d", "causal_conv1d"),
        )
        if (why := why_absent(module)) is not None
    }
    for name, why in absent.items():
        record.say(f"{name} cannot be imported: {why}")
    record.say("reading or drawing the weights")
    state, cfg = read(args)
    record.content |= {
        "command": ["tests.perf.decode_throughput", *(sys.argv[1:] if argv is None else argv)],
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "absent": absent,
        "model": asdict(cfg),
        "prompt_tokens": PROMPT_TOKENS,
        "commit": git_commit(),
        "bandwidth_tb_per_s": args.bandwidth,
        "rows": [],
    }
    with torch.device("meta"):
        whole = LanguageModel(cfg)
    whole.load_state_dict(state, assign=True)
    dtypes = {"ours": torch.float32, "ours, bf16 states": torch.bfloat16}
    models = {
        key: InferenceModel(whole, dtype=torch.bfloat16, device="cuda", state_dtype=dtype)
        for key, dtype in dtypes.items()
    }
    if args.speculate:
        speculate(record, models["ours"], read_prompts(args.prompt_ids, cfg.vocab_size), 168)
    for n_heads in [parse_width(w, cfg.n_heads) for w in args.widths] if args.widths else cfg.widths:
        measure_width(record, args, state, models, n_heads)
        free()
    print(table(record.content["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
