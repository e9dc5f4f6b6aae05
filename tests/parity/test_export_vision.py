"""What is exported of an image classifier computes what the nested model computes in place, where this project is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling import export_vision
from modeling.config import VisionConfig
from modeling.convert import from_matmamba_vision
from modeling.export import export, main, read_source
from modeling.import_model import main as import_model
from modeling.model_folder import ImageUse, ModelFolderError, load_language_model, load_model, save_model
from modeling.open_model import open_model
from modeling.vision import VisionModel
from tests.parity.test_vision import CFG, VARIANTS, model_of, relative, some_images

TOLERANCE = 1e-5
NAMES = [f"class {i}" for i in range(10)]
WIDTHS = {"1": (8, 8), "1/4": (2, 2), "1h": (1, 1), "1,1/2": (8, 4), "3h,1/8": (3, 1)}
ALONE = """
import json, sys, torch
sys.modules["timm"] = None  # as where it is not installed
sys.path.insert(0, sys.argv[1])
from matmamba_vision import load
model, images = load(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    found = {width: model(images, width) for width in json.loads(sys.argv[3])}
    found["features"] = model.forward_head(model.forward_features(images), pre_logits=True)
assert (model.num_classes, model.num_features) == (10, 48)
assert model.default_cfg["input_size"] == [3, 32, 32]
assert not any(name.split(".")[0] in ("modeling", "pretrain") for name in sys.modules), "this project was imported"
torch.save(found, sys.argv[4])
"""


def state_of(model: VisionModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@torch.no_grad()
def in_place(model: VisionModel, images: Tensor, widths: tuple[int, ...]) -> Tensor:
    return model.logits(model(images, widths))


@pytest.fixture(scope="module")
def carried() -> ModuleType:
    """The file that timm folders carry."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("matmamba_vision", export_vision.TIMM_CODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["matmamba_vision"] = module  # timm looks there for what it registers
    spec.loader.exec_module(module)
    return module


def test_it_loads_where_this_project_is_not(tmp_path: Path) -> None:
    model, images = model_of(), some_images()
    export(state_of(model), CFG, (8, 8), "timm", tmp_path / "whole", images=ImageUse(classes=NAMES))
    torch.save(images, tmp_path / "images.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    arguments = [
        str(tmp_path / "whole"),
        str(tmp_path / "images.pt"),
        json.dumps(list(WIDTHS)),
        str(tmp_path / "out.pt"),
    ]
    command = [sys.executable, "-c", ALONE, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for width, widths in WIDTHS.items():
        assert relative(found[width], in_place(model, images, widths)) < TOLERANCE, width
    with torch.no_grad():
        assert relative(found["features"], model(images, (8, 8))) < TOLERANCE
    about = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert about["pretrained_cfg"]["label_names"][3] == "class 3"
    assert about["model_args"]["widths"] == [8, 4, 2, 1]


@pytest.mark.parametrize("cfg", VARIANTS, ids=["cls", "avg", "rms"])
@pytest.mark.parametrize("widths", [(4, 4), (8, 2)], ids=str)
def test_a_cut_model_is_what_it_runs_and_no_more(
    cfg: VisionConfig, widths: tuple[int, ...], carried: ModuleType, tmp_path: Path
) -> None:
    model = model_of(cfg)
    export(state_of(model), cfg, widths, "timm", tmp_path / "cut")
    cut = carried.load(tmp_path / "cut")
    for size in ((32, 32), (48, 24)):
        images = some_images(2, *size)
        with torch.no_grad():
            assert relative(cut(images), in_place(model, images, widths)) < TOLERANCE
            assert relative(cut(images, "1h"), in_place(model, images, (1, 1))) < TOLERANCE
    layer = next(layer for layer, n in enumerate(widths) if n < 8)
    with pytest.raises(ValueError, match=f"layer {layer}: width 8, but this model was cut to {widths[layer]} heads"):
        cut(images, width="1")
    with pytest.raises(ValueError, match="multiple of 8"):
        cut(some_images(1, 30, 32))


def test_gradients_of_the_carried_model_are_ours_also_when_blocks_are_computed_again(
    carried: ModuleType, tmp_path: Path
) -> None:
    model, images = model_of(), some_images()
    export(state_of(model), CFG, (8, 8), "timm", tmp_path / "whole")
    labels = torch.tensor([1, 7, 2])
    F.cross_entropy(model.logits(model(images, (4, 4))), labels).backward()
    expected = export_vision.timm_state({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, CFG)
    for again in (False, True):
        theirs = carried.load(tmp_path / "whole").train()
        theirs.set_grad_checkpointing(again)
        F.cross_entropy(theirs(images, "1/2"), labels).backward()
        for name, parameter in theirs.named_parameters():
            error = float((parameter.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-3))
            assert error < 1e-4, name


def test_it_is_fine_tuned_as_timms_models_are(carried: ModuleType, tmp_path: Path) -> None:
    export(state_of(model_of()), CFG, (4, 4), "timm", tmp_path / "half")
    model = carried.load(tmp_path / "half", proj_drop_rate=0.1, drop_path_rate=0.2).train()
    model.reset_classifier(3)
    assert model(some_images()).shape == (3, 3)
    assert not torch.equal(model(some_images()), model(some_images())), "it drops in training"
    model.eval()
    assert torch.equal(model(some_images()), model(some_images()))
    model.reset_classifier(0)
    assert model(some_images()).shape == (3, 48)
    decayed = {name for name, p in model.named_parameters() if p.dim() > 1} - model.no_weight_decay()
    assert "pos_embed" not in decayed
    assert "blocks.0.mixer.in_z" in decayed
    fresh = carried.MatMambaVision(
        img_size=32, patch_size=8, num_classes=5, embed_dim=32, depth=2, num_heads=4, head_dim=8, d_state=8
    )
    assert torch.isfinite(fresh(some_images())).all()


def test_timm_creates_and_fine_tunes_it(carried: ModuleType, tmp_path: Path) -> None:
    """The carried file registers itself with timm, whose factories then read the folder and change the head."""
    import timm
    from timm.data import resolve_model_data_config
    from timm.optim import create_optimizer_v2

    model, images = model_of(), some_images()
    export(state_of(model), CFG, (8, 2), "timm", tmp_path / "mix", images=ImageUse(crop_ratio=0.9))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'mix'}", pretrained=True).eval()
    with torch.no_grad():
        assert relative(theirs(images), in_place(model, images, (8, 2))) < TOLERANCE
    assert resolve_model_data_config(theirs)["crop_pct"] == 0.9
    tuned = timm.create_model(f"local-dir:{tmp_path / 'mix'}", pretrained=True, num_classes=3, drop_path_rate=0.1)
    assert tuned(images).shape == (3, 3)
    assert torch.equal(tuned.blocks[1].mixer.in_z, model.blocks[1].mixer.in_z[: 2 * 12])
    groups = create_optimizer_v2(tuned, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5).param_groups
    assert sorted({group["lr_scale"] for group in groups}) == [0.125, 0.25, 0.5, 1.0], "stem, two blocks, head"


@pytest.mark.parametrize("cfg", VARIANTS[:2], ids=["cls", "avg"])
def test_the_public_codes_folder_has_every_weight_back(cfg: VisionConfig, tmp_path: Path) -> None:
    fitting = replace(cfg, d_model=64, headdim=2, n_heads=64, widths=(64, 32))  # as that code has it: d_model / 32
    model = VisionModel(fitting)
    model.init_weights(0)
    export(state_of(model), fitting, (64, 64), "matmamba_vision", tmp_path / "public")
    theirs = torch.load(tmp_path / "public" / "pytorch_model.bin", weights_only=True)
    again = from_matmamba_vision(theirs, fitting)
    assert all(torch.equal(again[name], tensor) for name, tensor in state_of(model).items())
    about = json.loads((tmp_path / "public" / "config.json").read_text())
    assert (about["pool"], about["rms_norm"], about["n_layer"], about["ssm_cfg"]["d_state"]) == (cfg.pool, False, 2, 16)
    with pytest.raises(ValueError, match="holds the whole nested model"):
        export(state_of(model), fitting, (32, 32), "matmamba_vision", tmp_path / "half")
    with pytest.raises(ValueError, match="cannot have this model's headdim"):
        export(state_of(model_of(cfg)), cfg, (8, 8), "matmamba_vision", tmp_path / "other")


@pytest.mark.parametrize("cfg", VARIANTS, ids=["cls", "avg", "rms"])
def test_a_public_model_comes_in_as_it_went_out(
    cfg: VisionConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitting = replace(cfg, d_model=64, headdim=2, n_heads=64, widths=(64, 32), chunk_size=256)
    model = VisionModel(fitting)
    model.init_weights(0)
    export(state_of(model), fitting, (64, 64), "matmamba_vision", tmp_path / "public")
    folder = tmp_path / "imported"
    assert import_model([str(tmp_path / "public"), "--widths", "1,1/2", "-o", str(folder)]) == 0
    assert f"pool: {cfg.pool}" in capsys.readouterr().out
    source = read_source(folder)
    assert source.cfg == fitting
    assert all(torch.equal(source.state[name], tensor) for name, tensor in state_of(model).items())
    file = str(tmp_path / "public" / "pytorch_model.bin")
    assert import_model([file, "--reorder-heads", "-o", str(tmp_path / "other")]) == 2
    assert "never nested" in capsys.readouterr().err
    weights = torch.load(file, weights_only=True)
    del weights["layers.1.mixer.D"]
    torch.save({"module." + name: tensor for name, tensor in weights.items()}, tmp_path / "short.pt")
    assert import_model([str(tmp_path / "short.pt"), "-o", str(tmp_path / "other")]) == 2
    assert "layers.1.mixer.D: shape absent" in capsys.readouterr().err


@pytest.mark.parametrize("widths", [(8, 8), (4, 4), (8, 2)], ids=str)
def test_our_own_folder_is_bit_exact(widths: tuple[int, ...], tmp_path: Path) -> None:
    model, images = model_of(), some_images()
    export(state_of(model), CFG, widths, "matmamba", tmp_path / "own")
    again = load_model(tmp_path / "own")
    assert isinstance(again, VisionModel)
    assert torch.equal(in_place(again, images, widths), in_place(model, images, widths))
    with pytest.raises(ModelFolderError, match="image classifier, not a language model"):
        load_language_model(tmp_path / "own")
    with pytest.raises(ValueError, match="image classifier"):
        open_model(tmp_path / "own")
    if widths == (8, 8):
        source = read_source(tmp_path / "own")
        assert source.cfg == CFG
        assert all(torch.equal(source.state[name], tensor) for name, tensor in state_of(model).items())


def test_the_command_line_says_which_formats_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "own", state_of(model_of()), CFG, (8, 8))
    arguments = [str(tmp_path / "own"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--format", "hf"]) == 2
    assert "an image classifier's must be one of timm, matmamba_vision, matmamba" in capsys.readouterr().err
    assert main([*arguments, "--format", "timm", "--tokenizer", "x.json"]) == 2
    assert "an image classifier has none" in capsys.readouterr().err
    assert main([*arguments, "--format", "timm", "--width", "1/2", "--dtype", "bf16"]) == 0
    assert (tmp_path / "out" / "matmamba_vision.py").read_bytes() == export_vision.TIMM_CODE.read_bytes()


def test_a_folder_of_ours_keeps_what_its_images_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exported to our format and from there to timm's, as from the run at once."""
    own, again = tmp_path / "own", tmp_path / "again"
    export(state_of(model_of()), CFG, (8, 8), "matmamba", own, images=ImageUse(crop_ratio=0.95, classes=NAMES))
    assert main([str(own), "--format", "matmamba", "-o", str(again)]) == 0
    assert main([str(again), "--format", "timm", "--width", "1/2", "-o", str(tmp_path / "timm")]) == 0
    shown = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert (shown["crop_pct"], shown["label_names"]) == (0.95, NAMES)
    about = json.loads((own / "config.json").read_text())
    for images, message in (
        ({"crop_ratio": 7.0}, "crop_ratio=7.0: must lie above 0"),
        ({"crop_ratio": "1"}, "crop_ratio='1'"),
        ({"classes": NAMES[:3]}, "images has 3 names of 10 classes"),
        ({"classes": [1] * 10}, "no list of names"),
        ({"run": "rm"}, "run"),
        ([], "images"),
    ):
        (own / "config.json").write_text(json.dumps({**about, "images": images}))
        assert main([str(own), "--format", "timm", "-o", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err
    del about["images"]  # as of earlier code
    (own / "config.json").write_text(json.dumps(about))
    assert main([str(own), "--format", "timm", "-o", str(tmp_path / "early")]) == 0
    shown = json.loads((tmp_path / "early" / "config.json").read_text())["pretrained_cfg"]
    assert shown["crop_pct"] == 0.875
    assert "label_names" not in shown


def test_what_was_cut_out_is_exported_again(
    carried: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = model_of(), some_images()
    export(state_of(model), CFG, (8, 2), "matmamba", tmp_path / "mix", images=ImageUse(classes=NAMES))
    assert main([str(tmp_path / "mix"), "--format", "timm", "-o", str(tmp_path / "timm")]) == 0
    theirs = carried.load(tmp_path / "timm")
    with torch.no_grad():
        assert relative(theirs(images), in_place(model, images, (8, 2))) < TOLERANCE
    assert main([str(tmp_path / "mix"), "--format", "matmamba_vision", "-o", str(tmp_path / "public")]) == 2
    assert "use --format timm or matmamba for what was cut out" in capsys.readouterr().err


def test_class_names_come_from_the_dataset_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    assert export_vision.classes_of(str(tmp_path), 2) == ["cat", "dog"]
    assert export_vision.classes_of(str(tmp_path), 3) is None, "the folder holds another dataset now"
    assert export_vision.classes_of(str(tmp_path / "absent"), 2) is None
    broken: Any = [{"classes": 3}, [], {}]
    for content in broken:
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        assert export_vision.classes_of(str(tmp_path), 2) is None
