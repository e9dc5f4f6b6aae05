"""A manifest that lies: what it asks for is checked against the files before memory, time or other folders are touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.checkpoint_reader import CheckpointError, manifest_sha256
from modeling.config import LanguageConfig
from modeling.export import read_source
from modeling.language import LanguageModel
from modeling.tensor_parallel import layout_of
from pretrain.checkpoint_model import load_model
from tests.unit.one_checkpoint import write_run

CFG = LanguageConfig(n_layers=2, d_model=32, headdim=8, widths=(8, 4), d_state=8, vocab_size=100)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint, as a single rank writes it."""
    model = LanguageModel(CFG)
    model.init_weights(0)
    return write_run(tmp_path / "run", model)


def rewrite(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and sign it anew, as whoever means harm would."""
    path = run / "checkpoints" / "step_00000003" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps({**manifest, "sha256": manifest_sha256(manifest)}))


def test_the_checkpoint_is_good_as_written(run: Path) -> None:
    source = read_source(run)
    assert source.cfg == CFG
    assert all(layout_of(name) and torch.isfinite(t).all() for name, t in source.state.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["files"][0].update(file="../../../etc/passwd"), "not the name of one in this folder"),
        (lambda m: m["files"][0].update(file=7), "lacks or garbles"),
        (lambda m: m["shapes"].update(embedding=[10**12, 32]), "pieces of 4096 numbers"),
        (lambda m: m["shapes"].update(embedding=[-1, -4096]), "pieces of 4096 numbers"),
        (lambda m: m["shapes"].update(embedding="many"), "lacks or garbles"),
        (lambda m: m["files"][0]["pieces"][0].update(numel=10**15), "numbers in"),
        (lambda m: m["files"][0].update(bytes=10**15), "the manifest says"),
        (lambda m: m["config"]["model"].update(n_layers=10**9), "has 2 layers, the config says 1000000000"),
        (lambda m: m["config"]["model"].update(d_model=2**40), "is of another model"),
        (lambda m: m["config"]["model"].update(d_model="64"), "must be a whole number"),
        (lambda m: m["config"]["model"].update(n_layers=2.5), "must be a whole number"),
        (lambda m: m["config"]["model"].update(widths=[8, None]), "must be a whole number"),
        (lambda m: m["config"]["model"].update(norm_eps="tiny"), "norm_eps='tiny'"),
        (lambda m: m["config"]["model"].update(vocab_size=90_000), "embedding is"),
        (lambda m: m["config"].update(model=[]), "describes no model"),
        (lambda m: m.update(config=None), "describes no model"),
        (lambda m: m.update(shapes=[]), "lacks or garbles"),
        (lambda m: m.update(layout={"tensor": "two"}), "lacks or garbles"),
    ],
)
def test_a_manifest_that_lies_is_refused(run: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    rewrite(run, change)
    with pytest.raises(CheckpointError, match=says):
        read_source(run)


def test_latest_names_a_checkpoint_beside_it_and_nothing_else(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match="is not the name of a checkpoint beside it"):
        read_source(run)


def test_a_file_cut_short_is_named(run: Path) -> None:
    path = run / "checkpoints" / "step_00000003" / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors has \d+ bytes, the manifest says"):
        read_source(run)


@pytest.mark.parametrize("load", [read_source, load_model])
def test_a_number_that_changed_on_disk_is_noticed(run: Path, load: Callable[[Path], object]) -> None:
    path = run / "checkpoints" / "step_00000003" / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: contents do not match"):
        load(run)
