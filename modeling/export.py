"""A submodel out of a checkpoint, in the formats that people's tools load.

    python -m modeling.export CHECKPOINT --width 1/4 --format hf -o DIR [--tokenizer FILE] [--dtype bf16]

CHECKPOINT is a run's folder (its newest checkpoint), one checkpoint, or a folder in our own format, also of what was cut out or
calibrated.

| format | what loads it | widths |
|---|---|---|
| hf | transformers' Mamba2ForCausalLM.from_pretrained | any uniform width |
| mamba_ssm | mamba-ssm's MambaLMHeadModel.from_pretrained | uniform, if its channels are a whole multiple of d_model |
| matmamba | modeling.model_folder.load_model, modeling.generate, modeling.serve | any, per-layer mixes and the whole nested model too |
| remote_code | transformers' AutoModelForCausalLM with trust_remote_code=True, without this package | the same |

Of an image classifier:

| format | what loads it | widths |
|---|---|---|
| timm | the file beside the weights, without this package; timm.create_model("local-dir:DIR") where timm is | any, mixes and the whole nested model too |
| matmamba_vision | the public MatMamba2Vision.from_pretrained | the whole nested model |
| matmamba | modeling.model_folder.load_model | any, mixes and the whole nested model too |
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from modeling import nesting
from modeling.checkpoint_reader import WEIGHTS, WEIGHTS_HELP, CheckpointError, Reader
from modeling.config import CROP_RATIO, BackboneConfig, LanguageConfig, VisionConfig
from modeling.convert import StateDict, cut, cut_mix, to_hf, to_mamba_ssm
from modeling.export_vision import classes_of, write_matmamba_vision, write_timm
from modeling.model_folder import (
    CONFIG_NAME,
    EOS_ID,
    ImageUse,
    check_new,
    checked_eos_id,
    load_model,
    put_tokenizer,
    read_eos_id,
    read_images,
    save_model,
    tokenizer_beside,
    written_whole,
)
from modeling.search import read_widths
from modeling.text import TIKTOKEN, open_text

FORMATS = {
    LanguageConfig: ("hf", "mamba_ssm", "matmamba", "remote_code"),
    VisionConfig: ("timm", "matmamba_vision", "matmamba"),
}
REMOTE_CODE = Path(__file__).parent / "remote_code" / "modeling_matmamba.py"
"""The model that a remote_code folder carries with it."""
KINDS_OF_MODEL: dict[str, type[BackboneConfig]] = {"language": LanguageConfig, "vision": VisionConfig}
"""What a run's `task` says of its model."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A model to export or to open."""

    state: StateDict
    """Logical parameters, float32, on the CPU."""
    cfg: BackboneConfig
    held: nesting.LayerWidths
    """Heads of each layer: all of them, or what is left of a model that was cut out, or calibrated."""
    data: dict[str, Any]
    """What is known of its data: `data` of the run's config, or as much of it as a model folder keeps."""


def read_source(folder: Path, *, weights: str = "auto") -> Source:
    """The model of a run, a checkpoint or a model folder.

    `weights` is one of checkpoint_reader.WEIGHTS. Raises CheckpointError or ModelFolderError.
    """
    if (folder / CONFIG_NAME).exists():
        model = load_model(folder)
        data: dict[str, Any] = {"tokenizer": tokenizer_beside(folder), EOS_ID: read_eos_id(folder)}
        if isinstance(model.cfg, VisionConfig):
            images = read_images(folder, model.cfg.n_classes)
            data = {"eval_crop_ratio": images.crop_ratio, "classes": images.classes}
        return Source({name: p.detach() for name, p in model.named_parameters()}, model.cfg, model.held, data)
    if not (folder / "manifest.json").exists():
        latest = folder / "checkpoints" / "latest"
        if not latest.exists():
            raise CheckpointError(f"{folder} is neither a run with a checkpoint, nor a checkpoint, nor a model folder")
        name = latest.read_text().strip()
        if Path(name).name != name:
            raise CheckpointError(f"{latest}: {name[:80]!r} is not the name of a checkpoint beside it")
        folder = latest.parent / name
    reader = Reader(folder)
    try:
        kind = KINDS_OF_MODEL[reader.manifest["config"].get("task", "language")]
        known = {field.name for field in fields(kind)}
        raw = reader.manifest["config"]["model"]
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items() if key in known}
        cfg = kind(**values)
        data = dict(reader.manifest["config"].get("data", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'manifest.json'}: its config describes no model ({error})") from None
    reader.verify()
    reader.check_model(cfg)
    data[EOS_ID] = checked_eos_id(reader.manifest.get(EOS_ID), folder / "manifest.json")
    return Source(dict(reader.weights(cfg.n_heads, weights)), cfg, nesting.uniform(cfg.n_heads, cfg.n_layers), data)


def export(
    state: StateDict,
    cfg: BackboneConfig,
    widths: nesting.LayerWidths,
    target: str,
    folder: Path,
    *,
    held: nesting.LayerWidths | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
    eos_id: int | None = None,
    images: ImageUse | None = None,
) -> None:
    """Write the submodel `widths` of a model into `folder` (new or empty) in the format `target`; whole or not at all.

    `held` are the heads of each layer of a `state` that was itself cut out of the model `cfg`. `tokenizer` is put beside a
    language model, whose documents ended with `eos_id` where that is known; `images` is said of a classifier where the format has
    words for it.
    Raises ValueError where the format cannot hold the submodel, FileExistsError where the folder has something in it.
    """
    if target not in FORMATS[type(cfg)]:
        kind = "an image classifier" if isinstance(cfg, VisionConfig) else "a language model"
        raise ValueError(f"format {target!r}: {kind}'s must be one of {', '.join(FORMATS[type(cfg)])}")
    if images is None and isinstance(cfg, VisionConfig):
        images = ImageUse()
    with written_whole(folder) as work:
        whole = nesting.uniform(cfg.n_heads, cfg.n_layers)
        if target in ("matmamba", "remote_code", "timm"):
            part = _cast(state if widths == (held or whole) else cut_mix(state, cfg, widths, held), dtype)
            if target == "matmamba":
                save_model(work, part, cfg, widths, images, eos_id)
            elif isinstance(cfg, VisionConfig):
                assert images is not None
                write_timm(work, part, cfg, widths, images)
            else:
                assert isinstance(cfg, LanguageConfig)
                _write_remote_code(work, part, cfg, widths, dtype)
        elif isinstance(cfg, VisionConfig):
            if widths != whole:
                raise ValueError(
                    f"format {target} holds the whole nested model, whose widths that code picks itself: leave --width out, or "
                    "use --format timm or matmamba for what was cut out"
                )
            write_matmamba_vision(work, _cast(state, dtype), cfg)
        else:
            assert isinstance(cfg, LanguageConfig)
            if len(set(widths)) > 1:
                raise ValueError(
                    f"format {target} has one number of heads for all layers, this mix has {sorted(set(widths))}: use "
                    "--format matmamba or remote_code"
                )
            part, small = cut(state, cfg, widths[0], held)
            (_write_hf if target == "hf" else _write_mamba_ssm)(work, part, small, dtype)
        if tokenizer is not None:
            assert isinstance(cfg, LanguageConfig)
            eos_id = open_text(str(tokenizer), cfg.vocab_size, eos_id).eos_id
            put_tokenizer(work, tokenizer)
        if eos_id is not None and target in ("hf", "remote_code"):
            _tell_transformers(work, eos_id, tokenizer)


def _cast(state: StateDict, dtype: torch.dtype) -> StateDict:
    """Matrices in `dtype`; vectors stay float32: A_log, dt_bias and D lose their meaning in fewer bits."""
    return {name: tensor.to(dtype) if tensor.dim() > 1 else tensor.float() for name, tensor in state.items()}


def _tell_transformers(folder: Path, eos_id: int, tokenizer: Path | None) -> None:
    """What ends a text and fills a batch up, and how to load the tokenizer.json beside it."""
    path = folder / CONFIG_NAME
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos_id)
    path.write_text(json.dumps({**json.loads(path.read_text()), **ids}, indent=1) + "\n")
    # It makes nothing of a sentencepiece file, not knowing whose it is.
    if tokenizer is not None and tokenizer.suffix == ".json":
        eos = Tokenizer.from_file(str(tokenizer)).id_to_token(eos_id)
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos}
        # Padding on the right would stand between a prompt and what is generated.
        about |= {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")


def hf_config(cfg: LanguageConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of transformers' Mamba2ForCausalLM for a model of one width.

    `expand` is what says how wide it is. transformers 5 takes whole numbers alone; transformers 4 a fraction too.
    """
    whole, rest = divmod(cfg.d_inner, cfg.d_model)
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "num_heads": cfg.n_heads,
        "head_dim": cfg.headdim,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "state_size": cfg.d_state,
        "num_hidden_layers": cfg.n_layers,
        "layer_norm_epsilon": cfg.norm_eps,
        "expand": cfg.d_inner / cfg.d_model if rest else whole,
        "conv_kernel": cfg.d_conv,
        "n_groups": 1,
        "chunk_size": cfg.chunk_size,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "rms_norm": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Left out, they are 0, 2 and 1: a text would end at the token 2, whatever that is.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _vocabulary_alone(theirs: StateDict, cfg: LanguageConfig) -> StateDict:
    """What is written under another's names: without the embedding's rows past the vocabulary.

    They are padding for tensor parallelism. No token has them, but a sampler that knows the number of rows alone would draw them.
    """
    of_tokens = {"backbone.embedding.weight", "backbone.embeddings.weight", "lm_head.weight", "embedding.weight"}
    cut_off = {name: tensor[: cfg.vocab_size] if name in of_tokens else tensor for name, tensor in theirs.items()}
    return {name: tensor.contiguous() for name, tensor in cut_off.items()}


def _write_hf(folder: Path, state: StateDict, cfg: LanguageConfig, dtype: torch.dtype) -> None:
    save_file(
        _vocabulary_alone(to_hf(_cast(state, dtype), cfg), cfg), folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(hf_config(cfg, dtype), indent=1) + "\n")


def _write_remote_code(
    folder: Path, state: StateDict, cfg: LanguageConfig, widths: nesting.LayerWidths, dtype: torch.dtype
) -> None:
    about = {
        "architectures": ["MatMambaForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_matmamba.MatMambaConfig",
            "AutoModelForCausalLM": "modeling_matmamba.MatMambaForCausalLM",
        },
        "model_type": "matmamba",
        "layer_heads": list(widths),
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{key: value for key, value in asdict(cfg).items() if key != "expand"},  # n_heads and headdim say it
    }
    theirs = {**state, "embedding.weight": state["embedding"]}
    del theirs["embedding"]
    save_file(_vocabulary_alone(theirs, cfg), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(about, indent=1) + "\n")
    shutil.copyfile(REMOTE_CODE, folder / REMOTE_CODE.name)


def _write_mamba_ssm(folder: Path, state: StateDict, cfg: LanguageConfig, dtype: torch.dtype) -> None:
    if cfg.d_inner % cfg.d_model:
        raise ValueError(
            f"mamba-ssm's Mamba2 has a whole multiple of d_model={cfg.d_model} channels inside, this width has "
            f"{cfg.d_inner}: use --format hf or matmamba, or a width of at least 1/2"
        )
    about = {
        "d_model": cfg.d_model,
        "d_intermediate": 0,
        "n_layer": cfg.n_layers,
        "vocab_size": cfg.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba2",
            "headdim": cfg.headdim,
            "d_state": cfg.d_state,
            "d_conv": cfg.d_conv,
            "expand": cfg.d_inner // cfg.d_model,
            "chunk_size": cfg.chunk_size,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": True,
    }
    # The one file here that is a pickle: mamba-ssm loads no other.
    torch.save(_vocabulary_alone(to_mamba_ssm(_cast(state, dtype), cfg), cfg), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a run, a checkpoint, or a folder in our format")
    parser.add_argument(
        "--width", help="1, 1/4, 16h, or one for each layer: 1,1/2,...; default: all that the model holds"
    )
    parser.add_argument(
        "--format", required=True, choices=sorted({name for names in FORMATS.values() for name in names})
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="file to put beside the model; default: the run's, if it is a file, or the folder's",
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help=WEIGHTS_HELP)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the matrices; vectors stay float32")
    args = parser.parse_args(argv)
    lacks_tokenizer = ""
    try:
        check_new(args.output)
        source = read_source(args.checkpoint, weights=args.weights)
        cfg, data, widths = source.cfg, source.data, source.held
        if args.width is not None:
            widths = read_widths(args.width, cfg.n_heads, cfg.n_layers)
        about: dict[str, Any]
        if isinstance(cfg, VisionConfig):
            if args.tokenizer is not None:
                raise ValueError("--tokenizer: an image classifier has none")
            classes = data.get("classes") or classes_of(data.get("path", ""), cfg.n_classes)
            about = {"images": ImageUse(crop_ratio=float(data.get("eval_crop_ratio", CROP_RATIO)), classes=classes)}
        else:
            named = str(data.get("tokenizer", ""))
            tokenizer = args.tokenizer or (Path(named) if Path(named).is_file() else None)
            if str(tokenizer).startswith(TIKTOKEN):
                raise ValueError(f"--tokenizer {tokenizer}: an encoding is no file: name a tokenizer.json of its ids")
            if tokenizer is None:
                lacks_tokenizer = f"{named} of the run is no file here" if named else f"{args.checkpoint} names none"
            about = {"tokenizer": tokenizer, EOS_ID: data[EOS_ID]}
        about |= {"held": source.held, "dtype": DTYPES[args.dtype]}
        export(source.state, cfg, widths, args.format, args.output, **about)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.format == "hf" and widths[0] * cfg.headdim % cfg.d_model:
        print(
            f"note: {widths[0]} heads are {widths[0] * cfg.headdim / cfg.d_model:g} times d_model channels: transformers 4 loads "
            "that, transformers 5 takes whole multiples alone; --format remote_code loads in both"
        )
    if lacks_tokenizer:
        print(f"note: no tokenizer stands beside the model ({lacks_tokenizer}): --tokenizer FILE puts one there")
    heads = ", ".join(str(n) for n in sorted(set(widths), reverse=True))
    print(f"{args.output}: {args.format}, {heads} of {cfg.n_heads} heads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
