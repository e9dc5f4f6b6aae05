"""A Mamba2 or MatMamba-Vision that others trained, as a model folder of ours: to warm-start a nested run, to decode, to export again.

    python -m modeling.import_model SOURCE -o DIR [--widths 1,1/2,1/4,1/8] [--reorder-heads] [--vocab-size N]

| SOURCE | |
|---|---|
| a folder of mamba-ssm's | config.json with ssm_cfg.layer Mamba2, and pytorch_model.bin or model.safetensors |
| a folder of transformers' | config.json with model_type mamba2, and model.safetensors or pytorch_model.bin, in one file or several |
| a file | a state dict of mamba-ssm's or the public MatMamba's names: .safetensors, .bin, .pt, .pth |
| a remote_code folder of modeling.export | its widths, as they were, also those of a width that was cut out; a mix is not importable |
| a folder of the public MatMamba2Vision's, or its state dict | what its save_pretrained or training script writes |

Sizes are read off the tensors; a config that disagrees with them is refused, as is what our models do not have: several B/C
groups, attention or MLP layers, biases, a head that is not the embedding. Pickles are read as plain tensors or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modeling.config import LanguageConfig, VisionConfig
from modeling.convert import StateDict, from_hf, from_mamba_ssm
from modeling.export import export
from modeling.head_order import importance_order, reorder_heads
from modeling.import_vision import PATCHES, read_vision
from modeling.language import LanguageModel
from modeling.model_folder import check_new, tokenizer_beside
from modeling.nesting import check_layer_widths, parse_width
from modeling.text import open_text

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before names."""


class ImportModelError(ValueError):
    """A model that cannot be imported; the message says which file, what is wrong, and the way out."""


def read_model(
    source: Path, *, vocab_size: int | None = None
) -> tuple[StateDict, LanguageConfig] | tuple[StateDict, VisionConfig]:
    """Our logical state dict (float32, CPU) of the model at `source`, and its config: with one width, the full one, unless
    the source is one of ours.

    `vocab_size` is the number of tokens where the source does not say it, or counts padding rows. Raises ImportModelError.
    """
    if not source.exists():
        raise ImportModelError(f"{source}: no such file or folder")
    if source.is_dir():
        about, theirs = _read_json(source / "config.json"), _read_folder(source)
    else:
        about, theirs = {}, _read_file(source)
    if PATCHES in theirs:
        try:
            return read_vision(theirs, about)
        except (ValueError, TypeError) as error:
            raise ImportModelError(f"{source}: {error}") from None
    if about.get("model_type") == "matmamba":
        return _read_remote_code(source, about, theirs, vocab_size)
    said = _understand(about, source / "config.json") if source.is_dir() else {}
    if "backbone.embeddings.weight" in theirs:
        theirs = from_hf(theirs)
    rest = {key: value for key, value in said.items() if key not in ("chunk_size", "norm_eps", "vocab_size")}
    try:
        sizes = _sizes(theirs)
        for key, value in rest.items():
            if value != sizes[key]:
                raise ImportModelError(f"{source}: config.json says {key}={value!r}, the tensors say {sizes[key]}")
        rows = theirs["backbone.embedding.weight"].shape[0]
        cfg = LanguageConfig(
            **sizes,
            vocab_size=vocab_size or said.get("vocab_size", rows),
            chunk_size=said.get("chunk_size", 256),
            norm_eps=said.get("norm_eps", 1e-5),
        )
        if not cfg.vocab_size <= rows <= cfg.n_vocab_rows:
            raise ImportModelError(
                f"{source}: the embedding has {rows} rows, vocab_size={cfg.vocab_size} has room in {cfg.n_vocab_rows}: "
                f"pass --vocab-size, at most {rows}"
            )
        state = from_mamba_ssm({name: tensor.float() for name, tensor in theirs.items()}, cfg)
    except ImportModelError:
        raise
    except (ValueError, TypeError) as error:
        raise ImportModelError(f"{source}: {error}") from None
    return {name: tensor.contiguous() for name, tensor in state.items()}, cfg


def _read_remote_code(
    source: Path, about: dict[str, Any], theirs: StateDict, vocab_size: int | None
) -> tuple[StateDict, LanguageConfig]:
    """What modeling.export wrote there: our own names, but for the embedding, which came without its padding rows.

    A uniform width that was cut out is a whole model of fewer heads.
    """
    path = source / "config.json"
    values = {field.name: about[field.name] for field in fields(LanguageConfig) if field.name in about}
    try:
        cfg = LanguageConfig(**{**values, "widths": tuple(values.get("widths", ()))})
        layer_heads = about.get("layer_heads")
        if isinstance(layer_heads, list):
            check_layer_widths(tuple(layer_heads), cfg.n_heads, cfg.n_layers, 1)
        if not isinstance(layer_heads, list) or len(set(layer_heads)) != 1:
            raise ImportModelError(
                f"layer_heads={str(layer_heads)[:80]}, a mix that was cut out: import the whole model's folder"
            )
        (heads,) = set(layer_heads)
        cfg = replace(cfg, n_heads=heads, widths=(heads, *(width for width in cfg.widths if width < heads)))
    except (ValueError, TypeError) as error:
        raise ImportModelError(f"{path}: {error}") from None
    if vocab_size not in (None, cfg.vocab_size):
        raise ImportModelError(f"{path} says vocab_size={cfg.vocab_size}, leave --vocab-size {vocab_size} out")
    state = {name: tensor.float() for name, tensor in theirs.items()}
    embedding = state.pop("embedding.weight", torch.empty(0, cfg.d_model))
    padding = max(0, cfg.n_vocab_rows - embedding.shape[0])
    state["embedding"] = torch.cat([embedding, embedding.new_zeros(padding, *embedding.shape[1:])])
    expected = LanguageModel.logical_shapes(cfg)
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "absent"
        if found != expected.get(name, "absent"):
            raise ImportModelError(f"{source}: {name} is {found}, its config says {expected.get(name, 'absent')}")
    return {name: state[name].contiguous() for name in expected}, cfg


def _sizes(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of a model of mamba-ssm's names; `from_mamba_ssm` then checks every tensor against them."""
    first = "backbone.layers.0.mixer."
    needed = ("norm.weight", "A_log", "conv1d.weight")
    missing = [name for name in ("backbone.embedding.weight", *(first + n for n in needed)) if name not in theirs]
    if missing:
        some = ", ".join(list(theirs)[:3])
        raise ImportModelError(f"no Mamba2 language model: {missing[0]} is missing (there are {some}, ...)")
    numbers = {name.split(".")[2] for name in theirs if name.startswith("backbone.layers.")}
    if numbers != {str(layer) for layer in range(len(numbers))}:
        raise ImportModelError(f"layers {', '.join(sorted(numbers)[:5])}, ...: not numbered 0 to {len(numbers) - 1}")
    d_inner, n_heads = theirs[f"{first}norm.weight"].shape[0], theirs[f"{first}A_log"].shape[0]
    channels, *_, d_conv = theirs[f"{first}conv1d.weight"].shape
    if d_inner % n_heads or channels <= d_inner or (channels - d_inner) % 2:
        raise ImportModelError(f"{n_heads} heads, {d_inner} inner and {channels} convolved channels fit no Mamba2")
    return {
        "n_layers": len(numbers),
        "d_model": theirs["backbone.embedding.weight"].shape[1],
        "n_heads": n_heads,
        "headdim": d_inner // n_heads,
        "d_state": (channels - d_inner) // 2,
        "d_conv": d_conv,
    }


def _understand(about: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a config says, in our names. Raises ImportModelError where it asks for what our models do not have."""
    inner = about.get("ssm_cfg")
    if about.get("model_type") == "mamba2":
        names = {"num_hidden_layers": "n_layers", "hidden_size": "d_model", "num_heads": "n_heads"}
        names |= {"head_dim": "headdim", "state_size": "d_state", "conv_kernel": "d_conv", "chunk_size": "chunk_size"}
        names |= {"layer_norm_epsilon": "norm_eps", "vocab_size": "vocab_size"}
        only: dict[str, tuple[Any, ...]] = {"n_groups": (1,), "use_bias": (False,), "use_conv_bias": (True,)}
        only |= {"hidden_act": ("silu", "swish"), "rms_norm": (True,), "time_step_limit": ([0, math.inf],)}
        required, flat = ("n_groups",), about
    elif isinstance(inner, dict):
        names = {"n_layer": "n_layers", "d_model": "d_model", "headdim": "headdim", "d_state": "d_state"}
        names |= {"d_conv": "d_conv", "chunk_size": "chunk_size", "vocab_size": "vocab_size"}
        only = {"layer": ("Mamba2",), "ngroups": (1,), "attn_layer_idx": ([],), "d_intermediate": (0,)}
        only |= {"rms_norm": (True,), "bias": (False,), "conv_bias": (True,), "norm_before_gate": (False,)}
        only |= {"rmsnorm": (True,), "D_has_hdim": (False,), "activation": ("silu", "swish"), "tie_embeddings": (True,)}
        only |= {"dt_limit": ([0, math.inf],), "d_ssm": (None,)}
        required, flat = ("layer",), {**about, **inner}
    else:
        raise ImportModelError(
            f"{path}: neither mamba-ssm's (ssm_cfg) nor transformers' (model_type mamba2) of a Mamba2"
        )
    for key, allowed in only.items():
        if (key in flat or key in required) and flat.get(key) not in allowed:
            raise ImportModelError(f"{path}: {key}={flat.get(key)!r}, our models have {allowed[0]!r}: not importable")
    said = {ours: flat[theirs] for theirs, ours in names.items() if theirs in flat}
    for key, value in said.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (key == "norm_eps" and isinstance(value, float))) or not 0 < value < math.inf:
            raise ImportModelError(f"{path}: {key}={value!r} is not a positive number")
    return said


def _read_folder(folder: Path) -> StateDict:
    """All tensors of a folder with one weight file, or several and an index."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = _read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise ImportModelError(f"{index}: weight_map does not name a file for each tensor")
            state: StateDict = {}
            for file in sorted(set(files.values())):
                if Path(file).name != file or file in ("", ".", ".."):
                    raise ImportModelError(f"{index}: {file!r} is not the name of a file in this folder")
                state |= _read_file(folder / file)
            return state
    raise ImportModelError(f"{folder} has neither {' nor '.join(WEIGHT_FILES)}")


def _read_file(path: Path) -> StateDict:
    """The tensors in a file, prefixes of wrappers removed."""
    read: Callable[[Path], Any] = load_file if path.suffix == ".safetensors" else _read_pickle
    try:
        content = read(path)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise ImportModelError(
            f"{path} cannot be read as plain tensors ({str(error).splitlines()[0][:200]}). If it is whole and you trust it, "
            "save its state dict alone: torch.save(dict(model.state_dict()), ...)"
        ) from None
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise ImportModelError(f"{path} holds no state dict")
    state = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ImportModelError(f"{path}: {str(name)[:80]!r} is not a tensor of floating-point numbers")
        state[reduce(str.removeprefix, PREFIXES, name)] = tensor
    return state


def _read_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _special_float(value: dict[str, Any]) -> Any:
    """transformers 5 writes infinity, for which JSON has no word, as {"__float__": "Infinity"}."""
    return {"Infinity": math.inf, "-Infinity": -math.inf}.get(str(value.get("__float__")), value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(), object_hook=_special_float)
    except (OSError, ValueError, RecursionError) as error:
        raise ImportModelError(f"{path} cannot be read ({error})") from None
    if not isinstance(about, dict):
        raise ImportModelError(f"{path} is not a JSON object")
    return about


def _tokenizer_of(source: Path, given: Path | None, vocab_size: int) -> Path | None:
    """The file to put beside a model of `vocab_size` tokens: what was `given`, or the source's. Raises ValueError."""
    beside = tokenizer_beside(source)
    tokenizer = given or (Path(beside) if beside else None)
    if tokenizer is not None:
        try:
            open_text(str(tokenizer), vocab_size)
        except ValueError as error:
            raise ValueError(f"{error}; --no-tokenizer imports the model without one") from None
    return tokenizer


def describe(cfg: LanguageConfig | VisionConfig, folder: Path) -> str:
    """The lines of a run's config that start it from the imported model."""
    keys = ["n_layers", "d_model", "headdim", "n_heads", "d_state", "d_conv", "chunk_size"]
    vision = isinstance(cfg, VisionConfig)
    keys += ["n_classes", "image_size", "patch_size", "pool", "norm"] if vision else ["vocab_size"]
    lines = [f"  {key}: {getattr(cfg, key)}" for key in keys]
    lines += [f"  norm_eps: {cfg.norm_eps!r}", f"  widths: {list(cfg.widths)}"]
    task = ["task: vision"] if vision else []
    return "\n".join([*task, "model:", *lines, "checkpoint:", f"  init_from: {folder}"])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling.import_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a folder of mamba-ssm's or transformers', or a state dict's file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder")
    parser.add_argument(
        "--widths", help="widths to be used or trained, widest first: 1,1/2,1/4,1/8; default: the source's, or 1"
    )
    parser.add_argument(
        "--reorder-heads", action="store_true", help="put each layer's most important heads first (modeling.head_order)"
    )
    parser.add_argument("--vocab-size", type=int, help="tokens of the tokenizer, where the source does not say")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file to put beside; default: the source's")
    parser.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="put none beside: the source's is not for these tools, or not its own",
    )
    args = parser.parse_args(argv)
    try:
        check_new(args.output)
        if args.no_tokenizer and args.tokenizer is not None:
            raise ValueError("--no-tokenizer and --tokenizer: say one of them")
        state, cfg = read_model(args.source, vocab_size=args.vocab_size)
        nested = len(cfg.widths) > 1 or not isinstance(cfg, LanguageConfig)
        if args.widths is not None:
            cfg = replace(cfg, widths=tuple(parse_width(part, cfg.n_heads) for part in args.widths.split(",")))
        moved = ""
        if args.reorder_heads:
            if nested or not isinstance(cfg, LanguageConfig):
                raise ValueError(
                    "--reorder-heads is for models that were never nested: in this one the first heads are the narrow models"
                )
            orders = importance_order(state, cfg)
            state = reorder_heads(state, cfg, orders)
            n_moved = sum(place != head for order in orders for place, head in enumerate(order))
            moved = f"; {n_moved} of {cfg.n_layers * cfg.n_heads} heads have a new place"
        tokenizer = None
        if isinstance(cfg, LanguageConfig) and not args.no_tokenizer:
            tokenizer = _tokenizer_of(args.source, args.tokenizer, cfg.vocab_size)
        export(state, cfg, cfg.layer_widths(cfg.n_heads), "matmamba", args.output, tokenizer=tokenizer)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: imported{moved}. To train it further, in a run's config:\n{describe(cfg, args.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
