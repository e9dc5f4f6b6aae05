"""A run that starts from another model's weights: its first loss is that model's, at every layout, and it resumes as its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.export import export
from modeling.import_model import main as import_main
from modeling.language import LanguageModel
from modeling.loss import next_token_loss
from modeling.model_folder import load_model
from pretrain import train
from pretrain.config import RunConfig
from pretrain.config_sections import ConfigError
from pretrain.data import TokenLoader
from tests.distributed.harness import RankFailedError, run_ranks
from tests.distributed.toy_run import losses, run_config


@pytest.fixture(scope="module")
def folders(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model of far-from-initial weights in mamba-ssm's format, and what it becomes when it is imported."""
    root: Path = tmp_path_factory.mktemp("models")
    cfg = run_config(dataset, root / "run").model
    model = LanguageModel(cfg)
    model.init_weights(3)
    generator = torch.Generator().manual_seed(4)
    state = {name: p + 0.3 * torch.randn(p.shape, generator=generator) for name, p in model.state_dict().items()}
    export(state, cfg, cfg.layer_widths(8), "mamba_ssm", root / "theirs")
    assert import_main([str(root / "theirs"), "-o", str(root / "plain"), "--vocab-size", "64"]) == 0
    arguments = ["--vocab-size", "64", "--widths", "8,4,2", "--reorder-heads"]
    assert import_main([str(root / "theirs"), "-o", str(root / "reordered"), *arguments]) == 0
    return {name: root / name for name in ("plain", "reordered")}


@torch.no_grad()
def first_losses(folder: Path, cfg: RunConfig) -> dict[str, float]:
    """What the imported model's widths lose on the first step's tokens, by plain calls of the model."""
    model = load_model(folder)
    loader = TokenLoader(
        cfg.data,
        split="train",
        vocab_size=64,
        seed=cfg.seed,
        dp_rank=0,
        dp_size=1,
        n_sequences_per_step=cfg.data.sequences_per_step,
        start_sequence=0,
    )
    batches = loader.next_step()
    loader.close()
    found = {}
    for name, n_heads in (("1", 8), ("1/2", 4), ("1/4", 2)):
        total = [
            next_token_loss(model, model(b.tokens_bt, (n_heads,) * 2), b.targets_bt).cross_entropy for b in batches
        ]
        found[name] = float(torch.stack(total).mean())
    return found


@pytest.mark.parametrize(
    ("world_size", "tensor", "source"), [(1, 1, "plain"), (2, 1, "reordered"), (2, 2, "reordered")], ids=str
)
def test_the_first_loss_is_the_imported_models(
    world_size: int, tensor: int, source: str, folders: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    cfg = run_config(
        dataset,
        tmp_path / "run",
        parallel={"tensor": tensor},
        optim={"steps": 3},
        checkpoint={"init_from": str(folders[source])},
    )
    assert run_ranks(world_size, train.main, cfg) == [0] * world_size
    expected, (_, step, found) = first_losses(folders[source], cfg), losses(cfg)[0]
    assert step == 1
    assert found == pytest.approx(expected, rel=1e-5)  # float32, sums in another order
    cold = run_config(dataset, tmp_path / "cold", optim={"steps": 3})
    assert run_ranks(1, train.main, cold) == [0]
    assert abs(losses(cold)[0][2]["1"] - found["1"]) > 0.1


def test_a_run_that_has_a_checkpoint_needs_its_source_no_more(
    folders: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    first = run_config(dataset, tmp_path / "run", optim={"steps": 3}, checkpoint={"init_from": str(folders["plain"])})
    assert run_ranks(1, train.main, first) == [0]
    gone = replace(
        first, optim=replace(first.optim, steps=4), checkpoint=replace(first.checkpoint, init_from="/not/there")
    )
    assert run_ranks(1, train.main, gone) == [0]
    second = run_config(
        dataset, tmp_path / "second", optim={"steps": 3}, checkpoint={"init_from": str(tmp_path / "run")}
    )
    assert run_ranks(2, train.main, second) == [0, 0]
    # The second run starts over, data and optimizer, from where the first one ended.
    trained, fresh = losses(second)[0][2], losses(first)[0][2]
    assert trained["1"] < fresh["1"]


@pytest.mark.parametrize(
    ("source", "overrides", "says"),
    [
        ("plain", {"model": {"n_layers": 3}}, "model.n_layers=3, there 2"),
        ("plain", {"model": {"vocab_size": 70}}, "model.vocab_size=70, there 64"),
        ("cut", {}, "model.safetensors cannot be read"),
    ],
    ids=str,
)
def test_another_model_or_a_damaged_one_is_refused_on_all_ranks(
    source: str, overrides: dict[str, Any], says: str, folders: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    path = folders.get(source, tmp_path / source)
    if source == "cut":
        path.mkdir()
        for file in folders["plain"].iterdir():
            (path / file.name).write_bytes(file.read_bytes()[: -100 if file.suffix == ".safetensors" else None])
    cfg = run_config(dataset, tmp_path / "run", checkpoint={"init_from": str(path)}, **overrides)
    with pytest.raises(RankFailedError) as failed:
        run_ranks(2, train.main, cfg)
    assert says in str(failed.value)
    assert str(failed.value).count("ConfigError: checkpoint.init_from") == 2


def test_weights_come_from_one_place(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights can come from one of them"):
        run_config(dataset, tmp_path, checkpoint={"init_from": "a", "resume": "b"})
