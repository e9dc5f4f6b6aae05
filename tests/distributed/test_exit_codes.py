"""What a run ends with: 2 where the same command can never work, so that nobody starts it again; 1 where it broke."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.config_io import config_to_yaml
from pretrain.config_sections import ConfigError
from pretrain.distributed import RankError, _read_launcher, init_ranks
from pretrain.restarts import main as restarts
from pretrain.train import main as train
from tests.datasets import write_image_dataset
from tests.distributed.harness import run_ranks, start_ranks
from tests.distributed.toy_run import damage, run_config


@pytest.fixture(scope="module")
def config(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that has a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("run")
    cfg = run_config(dataset, folder / "run", optim={"steps": 3})
    run_ranks(1, train, cfg)
    (folder / "run.yaml").write_text(config_to_yaml(cfg))
    return folder / "run.yaml"


def ended_with(config: Path, *overrides: str) -> list[int]:
    ranks = start_ranks(2, main, [str(config), *overrides])
    for rank in ranks:
        rank.join(60)
    return [rank.exitcode for rank in ranks]


@pytest.mark.parametrize("script", [True, False], ids=["asked by a script", "on the ranks"])
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.path=nowhere"], "data.path=nowhere has no folder train"),
        (["data.tokenizer=nofile"], "data.tokenizer=nofile: no such file"),
        (["checkpoint.resume=nofolder"], "checkpoint.resume=nofolder is no checkpoint"),
        (["run_dir={tmp}", "checkpoint.init_from=nofolder"], "checkpoint.init_from=nofolder is neither"),
    ],
    ids=str,
)
def test_paths_that_are_not_there_are_misuse(
    overrides: list[str], says: str, script: bool, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = [text.format(tmp=tmp_path / "run") for text in overrides]
    if script:
        assert restarts(["check", str(config), *overrides]) == 2
    else:
        assert ended_with(config, *overrides) == [2, 2]
    assert says in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.steps=2", "optim.warmup_steps=0"], "the checkpoint is at step 3, optim.steps=2"),
        (["model.d_state=16"], "is of another model"),
        (["seed=5"], "seed=5, but"),
        (["checkpoint.resume=never"], "holds 1 checkpoints after step 0"),
        (["data.seq_len=24", "data.tokens_per_step=192"], "does not divide the dataset's rows"),
        (["data.path={images}"], "is of images, not of tokens"),
        (["run_dir={tmp}", "logging.wandb=online"], "logging.wandb=online: WANDB_API_KEY invalid"),
    ],
    ids=str,
)
def test_what_only_the_ranks_find_is_misuse_too(
    overrides: list[str],
    says: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    images = write_image_dataset(tmp_path / "images")
    overrides = [text.format(tmp=tmp_path / "run", images=images) for text in overrides]
    assert ended_with(config, *overrides) == [2, 2]
    assert says in capfd.readouterr().err


def test_what_broke_is_none(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = config.parent / "run" / "checkpoints" / "step_00000003" / "rank_00000.safetensors"
    damage(file)
    assert ended_with(config) == [1, 1]
    assert "is damaged" in capfd.readouterr().err
    damage(file)


@pytest.mark.parametrize(("name", "value"), [("HANG_SECONDS", "abc"), ("LOST_SECONDS", "0"), ("ALLREDUCE_GB_S", "nan")])
def test_a_setting_that_is_no_number_is_misuse(
    name: str, value: str, config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert restarts(["check", str(config)]) == 2
    assert ended_with(config) == [2, 2]
    assert capfd.readouterr().err.count(f"{name}={value}: must be a ") == 3
    monkeypatch.setenv(name, "")
    assert restarts(["check", str(config)]) == 0


def misused(broken: list[bool]) -> bool:
    ranks = init_ranks(1)

    def work() -> None:
        raise OSError("a disk") if broken[ranks.rank] else ConfigError("a key")

    with pytest.raises(RankError) as caught:
        ranks.attempt(work, (OSError, ConfigError))
    return caught.value.misused


def test_one_rank_that_broke_is_worth_another_start() -> None:
    assert run_ranks(2, misused, [False, False]) == [True, True]
    assert run_ranks(2, misused, [False, True]) == [False, False]


@pytest.mark.parametrize(
    ("of_srun", "world_size"),
    [({}, "1"), ({"SLURM_STEP_NUM_TASKS": "1"}, "1"), ({"SLURM_STEP_NUM_TASKS": "2"}, "2")],
    ids=["the batch script itself", "a step of one task", "a step of two"],
)
def test_only_a_step_of_several_tasks_has_ranks(
    of_srun: dict[str, str], world_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation at the end of a batch script of four tasks would wait for three that nobody started."""
    job = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29511"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    monkeypatch.setattr(os, "environ", {**environment, **job, **of_srun})
    _read_launcher()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", world_size)
