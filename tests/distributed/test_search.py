"""The Mix'n'Match search on a small trained run, on one rank and on two: presets, held-out losses, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from modeling.loss import next_token_loss
from modeling.search import read_widths
from pretrain import calibrate, evaluate, search, train
from pretrain.checkpoint_model import load_language_model
from pretrain.data import validation_batches
from tests.datasets import write_token_dataset
from tests.distributed.harness import RankFailedError, run_ranks
from tests.distributed.toy_run import damage, run_config


@pytest.fixture(scope="module")
def run_dir(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir: Path = tmp_path_factory.mktemp("search") / "run"
    assert run_ranks(1, train.main, run_config(dataset, run_dir)) == [0]
    return run_dir


def searched(n_ranks: int, run_dir: Path, presets: Path, *more: str) -> dict[str, dict[str, object]]:
    arguments = [str(run_dir), "--sequences", "8", "--points", "1", "--trials", "2", "-o", str(presets), *more]
    assert run_ranks(n_ranks, search.main, arguments) == [0] * n_ranks
    found: dict[str, dict[str, object]] = json.loads(presets.read_text())["presets"]
    return found


def test_presets_hold_mixes_and_their_held_out_losses(run_dir: Path, tmp_path: Path) -> None:
    presets, png = tmp_path / "presets.json", tmp_path / "curve.png"
    found = searched(1, run_dir, presets, "--plot", str(png))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert [name for name, point in found.items() if point["trained"]] == ["8h", "4h", "2h"]
    assert sum(not point["trained"] for point in found.values()) == 2
    model, cfg = load_language_model(run_dir)
    batches = validation_batches(cfg.data, vocab_size=64, dp_rank=0, dp_size=1, n_sequences=8)
    tokens, targets = (torch.cat([getattr(b, name) for b in batches])[1::2] for name in ("tokens_bt", "targets_bt"))
    for name, point in found.items():
        widths = read_widths(f"@{presets}:{name}", 8, 2)
        with torch.no_grad():
            loss = next_token_loss(model, model(tokens, widths), targets).cross_entropy
        assert point["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_two_ranks_search_together(run_dir: Path, tmp_path: Path) -> None:
    """They halve their own shares of the sequences, so the losses are of other ones, and near."""
    one, two = (searched(n, run_dir, tmp_path / f"{n}.json", "--sequences", "16") for n in (1, 2))
    for name in ("8h", "4h", "2h"):
        assert one[name]["cost"] == two[name]["cost"]
        assert two[name]["loss"] == pytest.approx(one[name]["loss"], rel=0.1)


def test_latency_is_measured(run_dir: Path, tmp_path: Path) -> None:
    found = searched(1, run_dir, tmp_path / "presets.json", "--cost", "latency")
    costs = [float(str(point["cost"])) for point in found.values() if point["trained"]]
    assert costs == sorted(costs, reverse=True)
    assert 0 < costs[-1] < 10


def test_other_data_is_read_where_it_lies(dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The run's cache holds shards of the run's own dataset."""
    cfg = run_config(dataset, tmp_path / "run", data={"cache_dir": str(tmp_path / "cache")}, optim={"steps": 3})
    assert run_ranks(1, train.main, cfg) == [0]
    other = write_token_dataset(tmp_path / "other", row_tokens=32, n_rows=60)
    shutil.rmtree(other / "train")  # which neither reads
    given = [cfg.run_dir, "--data", str(other)]
    few = ["--sequences", "4"]
    assert run_ranks(1, evaluate.main, [*given, *few]) == [0]
    assert run_ranks(1, search.main, [*given, *few, "--points", "1", "--trials", "0"]) == [0]
    fit = ["--width", "1,1/4", "--steps", "1", "--batch", "2", "-o", str(tmp_path / "mix")]
    small = write_token_dataset(tmp_path / "small", row_tokens=32, n_rows=4)  # half a step of the run's
    assert run_ranks(1, calibrate.main, [cfg.run_dir, "--data", str(small), *few, *fit]) == [0]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"manifest.json", "train", "val"}
    assert (tmp_path / "cache" / "manifest.json").read_bytes() == (dataset / "manifest.json").read_bytes()


def test_what_an_evaluation_finds_on_the_ranks_is_said_in_a_line(
    run_dir: Path, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankFailedError, match=r"exit codes \[2, 2\]\n$"):
        run_ranks(2, evaluate.main, [str(run_dir), "--samples", "1"])
    damaged = shutil.copytree(dataset, tmp_path / "damaged")
    damage(next((damaged / "val").glob("*.mds")))
    with pytest.raises(RankFailedError, match=r"exit codes \[1\]\n$"):
        run_ranks(1, evaluate.main, [str(run_dir), "--data", str(damaged)])
    said = capfd.readouterr().err
    assert "error: validation: 1 sequences" in said
    assert "the file is damaged" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--points", "0"], "too small"),
        (["--data", "nowhere"], "nowhere"),
        (["--budget", "1"], "already costs"),
        (["-o", "no folder/p.json"], "there is no folder no folder"),
    ],
)
def test_mistakes_are_named(
    run_dir: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(1, search.main, [str(run_dir), "--sequences", "8", *arguments]) == [2]
    assert message in capfd.readouterr().err
