"""Our own format for a model on its own: config.json that describes itself, and model.safetensors. No pickle.

It holds the whole nested model, a width, or a mix of widths per layer; a cut model has no more than its own heads.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling import nesting
from modeling.backbone import Backbone
from modeling.config import CROP_RATIO, BackboneConfig, LanguageConfig, VisionConfig
from modeling.language import LanguageModel
from modeling.models import build_model

FORMATS: dict[str, type[BackboneConfig]] = {
    "matmamba-language-model": LanguageConfig,
    "matmamba-vision-model": VisionConfig,
}
"""What config.json calls the network, and its sizes."""
VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
EOS_ID = "eos_id"
"""The id that ends a document in what a language model was trained on: in its config.json, and in a checkpoint's manifest."""


class ModelFolderError(ValueError):
    """A folder that is no model of ours, or a damaged one; the message says which file and what is wrong."""


def check_new(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is a new or an empty one: asked before the work that fills it."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is {'not empty' if folder.is_dir() else 'a file'}: name a new folder")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` (new or empty) at the end; where something is raised nothing of it stays.

    Raises OSError where nothing can be made there, before anything is written.
    """
    check_new(folder)
    folder = folder.resolve()  # "." has no name to rename to, and a link would be replaced by what it points at
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        work = Path(aside) / "model"
        work.mkdir()
        yield work
        if folder.exists():
            folder.rmdir()
        work.rename(folder)


@dataclass(frozen=True, kw_only=True)
class ImageUse:
    """What a classifier's images and outputs are, beyond its sizes."""

    crop_ratio: float = CROP_RATIO
    """Side of the central square that it is shown over the short side of the image."""
    classes: list[str] | None = None
    """Names of its outputs, where they are known."""

    def __post_init__(self) -> None:
        if not isinstance(self.crop_ratio, float | int) or not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio={self.crop_ratio!r}: must lie above 0 and at most at 1")
        if self.classes is not None and not (
            isinstance(self.classes, list) and all(isinstance(name, str) for name in self.classes)
        ):
            raise ValueError("classes is no list of names")


def write_config(
    folder: Path,
    cfg: BackboneConfig,
    held: nesting.LayerWidths,
    images: ImageUse | None = None,
    eos_id: int | None = None,
) -> None:
    """Write config.json of a model whose layers hold `held` heads; `images` is of a classifier, `eos_id` of a language model."""
    name = next(name for name, kind in FORMATS.items() if isinstance(cfg, kind))
    about = {"format": name, "version": VERSION, "layer_heads": list(held), "model": asdict(cfg)}
    if images is not None:
        about["images"] = asdict(images)
    if eos_id is not None:
        about[EOS_ID] = eos_id
    (folder / CONFIG_NAME).write_text(json.dumps(about, indent=1) + "\n")


def save_model(
    folder: Path,
    state: Mapping[str, Tensor],
    cfg: BackboneConfig,
    held: nesting.LayerWidths,
    images: ImageUse | None = None,
    eos_id: int | None = None,
) -> None:
    """Write the model whose parameters (logical names, cut to `held`) are `state`; the rest is as in `write_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_NAME)
    write_config(folder, cfg, held, images, eos_id)


def read_config(folder: Path) -> tuple[BackboneConfig, nesting.LayerWidths]:
    """What config.json says: the whole model's sizes, and the heads that each layer holds. Raises ModelFolderError."""
    path = folder / CONFIG_NAME
    try:
        about = json.loads(path.read_text())
        kind = FORMATS.get(about.get("format"))
        if "format" not in about and ("model_type" in about or "ssm_cfg" in about):
            raise ModelFolderError(
                f"{path} is another library's: python -m modeling.import_model {folder} -o NEW_FOLDER makes it one of ours"
            )
        if kind is None or about.get("version") != VERSION:
            raise ModelFolderError(
                f"{path}: format {about.get('format')!r} version {about.get('version')!r}; this code reads "
                f"{' and '.join(FORMATS)} {VERSION}"
            )
        known = {field.name for field in fields(kind)}
        raw = about["model"]
        if not isinstance(raw, dict) or not set(raw) <= known:
            raise ModelFolderError(f"{path}: model has unknown fields: {sorted(set(raw) - known)}")
        cfg = kind(**{**raw, "widths": tuple(raw["widths"])})
        held = tuple(int(n) for n in about["layer_heads"])
        nesting.check_layer_widths(held, cfg.n_heads, cfg.n_layers, 1)
    except ModelFolderError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFolderError(f"{path} does not describe a model: {error}") from None
    return cfg, held


def read_eos_id(folder: Path) -> int | None:
    """The id that ends a document, where config.json says one. Raises ModelFolderError."""
    path = folder / CONFIG_NAME
    try:
        eos_id = json.loads(path.read_text()).get(EOS_ID)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelFolderError(f"{path}: {error}") from None
    return checked_eos_id(eos_id, path)


def checked_eos_id(value: object, path: Path) -> int | None:
    """`value`, read from the file `path`, where it is an id or None. Raises ModelFolderError."""
    if value is not None and (type(value) is not int or value < 0):
        raise ModelFolderError(f"{path}: {EOS_ID}={str(value)[:80]} is no token id")
    return value


def put_tokenizer(folder: Path, tokenizer: Path) -> None:
    """Copy a tokenizer's file into a model's folder, under a name by which `tokenizer_beside` and others find it."""
    shutil.copyfile(tokenizer, folder / ("tokenizer.json" if tokenizer.suffix == ".json" else tokenizer.name))


def tokenizer_beside(folder: Path) -> str:
    """The tokenizer file in a model's folder, empty where there is none."""
    files = [folder / "tokenizer.json", *sorted(folder.glob("*.model"))]
    return next((str(file) for file in files if file.is_file()), "")


def read_images(folder: Path, n_classes: int) -> ImageUse:
    """What config.json of a classifier says of its images; the defaults where it is of earlier code. Raises ModelFolderError."""
    path = folder / CONFIG_NAME
    try:
        images = ImageUse(**json.loads(path.read_text()).get("images", {}))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelFolderError(f"{path}: images: {error}") from None
    if images.classes is not None and len(images.classes) != n_classes:
        raise ModelFolderError(f"{path}: images has {len(images.classes)} names of {n_classes} classes")
    return images


def load_language_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LanguageModel:
    """As `load_model`, of a language model. Raises ModelFolderError."""
    model = load_model(folder, dtype=dtype, device=device)
    if not isinstance(model, LanguageModel):
        raise ModelFolderError(f"{folder} holds an image classifier, not a language model")
    return model


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Backbone:
    """The model in `folder`, computing in `dtype`. Raises ModelFolderError."""
    cfg, held = read_config(folder)
    try:
        with torch.device("meta"):
            model = build_model(cfg, dtype=dtype, held=held)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ModelFolderError(f"{folder / CONFIG_NAME} does not describe a model: {error}") from None
    try:
        state = load_file(folder / WEIGHTS_NAME, device=device)
    except (OSError, SafetensorError) as error:
        raise ModelFolderError(f"{folder / WEIGHTS_NAME} cannot be read ({error}): export it again") from None
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ModelFolderError(
                f"{folder / WEIGHTS_NAME}: {name} is {found.get(name, 'absent')}, {CONFIG_NAME} says "
                f"{expected.get(name, 'absent')}"
            )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.eval()
