"""A cut-out mix whose norms are fitted: nothing else moves, held-out loss falls, and the run stays as it was."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.shard_schema import MANIFEST_NAME, file_sha256, read_manifest
from modeling.model_folder import load_language_model as load_folder
from modeling.open_model import open_model
from pretrain import calibrate, train
from pretrain.checkpoint_model import load_language_model
from pretrain.data import validation_batches
from pretrain.distributed import init_ranks
from pretrain.language_task import submodel_losses
from tests.distributed.harness import run_ranks
from tests.distributed.toy_run import run_config

MIX = (8, 2)


@pytest.fixture(scope="module")
def run_dir(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("calibrate")
    tokenizer = folder / "bytes.model"  # nothing is encoded here: that it goes along is what is asked
    tokenizer.write_bytes(b"pieces")
    shards = shutil.copytree(dataset, folder / "shards")
    manifest = replace(read_manifest(shards), tokenizer_sha256=file_sha256(tokenizer))
    (shards / MANIFEST_NAME).write_text(manifest.text())
    cfg = run_config(shards, folder / "run", data={"tokenizer": str(tokenizer)})
    assert run_ranks(1, train.main, cfg) == [0]
    return folder / "run"


def plain_losses(run_dir: Path, folder: Path) -> tuple[float, float]:
    """Of the mix in place in the run's model, and of the folder's model."""
    ranks = init_ranks(1)
    whole, cfg = load_language_model(run_dir)
    batches = validation_batches(cfg.data, vocab_size=64, dp_rank=0, dp_size=1, n_sequences=8)
    return tuple(submodel_losses(model, batches, [MIX], ranks)[0] for model in (whole, load_folder(folder)))  # type: ignore[return-value]


def test_norms_alone_are_fitted_and_the_loss_falls(
    run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    arguments = [str(run_dir), "--width", "1,1/4", "-o", str(tmp_path / "mix"), "--steps", "20", "--batch", "8"]
    assert run_ranks(1, calibrate.main, [*arguments, "--sequences", "8"]) == [0]
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    said = re.search(r"held-out loss ([\d.]+) before, ([\d.]+) after 20 steps", capfd.readouterr().out)
    assert said is not None
    losses = run_ranks(1, plain_losses, run_dir, tmp_path / "mix")[0]
    assert [float(loss) for loss in said.groups()] == pytest.approx(losses, abs=1e-4)
    assert losses[1] < losses[0] - 0.01

    fitted = load_folder(tmp_path / "mix")
    assert fitted.held == MIX
    untouched = calibrate.cut_out(load_language_model(run_dir)[0], MIX)
    moved = {
        name
        for (name, new), old in zip(fitted.named_parameters(), untouched.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert moved == {"final_norm", *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("norm", "mixer.gated_norm"))}
    opened = open_model(tmp_path / "mix")
    assert opened.model.own_width == "8h,2h"
    assert Path(opened.tokenizer).read_bytes() == b"pieces"
    assert opened.eos_id == read_manifest(run_dir.parent / "shards").eos_id, (
        "what ended the documents it was trained on"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "1,1,1"], "3 widths for 2 layers"),
        (["--width", "1,1/4", "--steps", "0"], "out of range"),
        (["--width", "1,1/4", "--sequences", "-1"], "--sequences -1"),
        (["--width", "1,1/4", "--batch", "3"], "multiple of the run's data.micro_batch=2"),
        (["--width", "1,1/4", "--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_named(
    run_dir: Path, tmp_path: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(1, calibrate.main, [str(run_dir), "-o", str(tmp_path / "mix"), *arguments]) == [2]
    assert message in capfd.readouterr().err
    assert not (tmp_path / "mix").exists()


def disk_fills_up(arguments: list[str]) -> int:
    """calibrate, where half of the folder can be written."""

    def half(folder: Path, *_: object, **__: object) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    calibrate.save_model = half  # type: ignore[assignment]  # in a process of its own
    return calibrate.main(arguments)


def test_the_folder_appears_whole_or_not_at_all(run_dir: Path, tmp_path: Path) -> None:
    arguments = [str(run_dir), "--width", "1,1/4", "-o", str(tmp_path / "mix"), "--steps", "1", "--batch", "2"]
    assert run_ranks(1, disk_fills_up, [*arguments, "--sequences", "2"]) == [2]
    assert list(tmp_path.iterdir()) == []
