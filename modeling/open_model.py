"""One way to open whatever a user points at: a run, a checkpoint, or a model folder in our format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from modeling.config import LanguageConfig
from modeling.export import read_source
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.model_folder import CONFIG_NAME, EOS_ID, load_language_model, read_eos_id, tokenizer_beside
from modeling.text import Text, open_text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Opened:
    """A model that can run, and what is known of its text."""

    model: InferenceModel
    tokenizer: str
    """FILE or tiktoken:NAME, empty where neither the folder nor the run's config names one."""
    eos_id: int | None
    """What ended a document in what it was trained on, where that is known."""

    def text(self, tokenizer: str = "") -> Text:
        """Its text, by another `tokenizer` where one is named. Raises ValueError or OSError as `open_text`."""
        return open_text(tokenizer or self.tokenizer, self.model.cfg.vocab_size, self.eos_id)


def open_model(
    path: Path, *, dtype: str | None = None, device: str = "cpu", state_dtype: torch.dtype = torch.float32
) -> Opened:
    """The model at `path`. `dtype` is one of DTYPES; None is bf16 on a GPU and fp32 elsewhere.

    Raises CheckpointError, ModelFolderError or ValueError, with what to do, where `path` is nothing of that or damaged.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    try:
        where = torch.device(device)
    except RuntimeError:
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: must be cpu, cuda or cuda:N")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} GPUs, use one of them or cpu"
        )
    if (path / CONFIG_NAME).exists():
        model, tokenizer, eos_id = load_language_model(path), tokenizer_beside(path), read_eos_id(path)
    else:
        source = read_source(path)
        tokenizer, eos_id = str(source.data.get("tokenizer", "")), source.data[EOS_ID]
        if not isinstance(source.cfg, LanguageConfig):
            raise ValueError(f"{path} is an image classifier: only language models are opened to generate text")
        with torch.device("meta"):
            model = LanguageModel(source.cfg)
        model.load_state_dict(source.state, assign=True)
    chosen = torch.bfloat16 if dtype is None and device.startswith("cuda") else DTYPES[dtype or "fp32"]
    return Opened(InferenceModel(model, dtype=chosen, device=device, state_dtype=state_dtype), tokenizer, eos_id)
