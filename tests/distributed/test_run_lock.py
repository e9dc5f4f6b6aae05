"""The same command twice: the second start is refused on all ranks, and the first one never notices."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain import train
from pretrain.__main__ import main
from pretrain.checkpoint import checkpoint_dir
from pretrain.config import RunConfig
from pretrain.config_io import config_to_yaml
from tests.distributed.harness import RankFailedError, run_ranks, start_ranks
from tests.distributed.toy_run import losses, run_config


def train_until_told(cfg: RunConfig, go_on: str) -> None:
    """Train, but stand before the third step until the file `go_on` is there."""
    accumulate = train.accumulate_gradients

    def waiting(run: train.Run, micro_batches: Any) -> float:
        while run.state.step == 2 and not Path(go_on).exists():
            time.sleep(0.05)
        return accumulate(run, micro_batches)

    train.accumulate_gradients = waiting
    assert train.main(cfg) == 0


def test_a_second_run_in_the_same_folder_is_refused(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path / "run", optim={"steps": 4}, checkpoint={"every_steps": 1})
    config = tmp_path / "run.yaml"
    config.write_text(config_to_yaml(cfg))
    (first,) = start_ranks(1, train_until_told, cfg, str(tmp_path / "go on"))
    end = time.monotonic() + 60
    while not ((tmp_path / "run" / "metrics.jsonl").exists() and losses(cfg)):
        assert first.is_alive()
        assert time.monotonic() < end
        time.sleep(0.05)
    with pytest.raises(RankFailedError, match=rf"in use by process {first.pid} on ") as failed:
        run_ranks(2, train.main, cfg)
    assert str(failed.value).count("RankError: rank 0: run_dir=") == 2
    second = start_ranks(2, main, [str(config)])
    for rank in second:
        rank.join(60)
    assert [rank.exitcode for rank in second] == [2, 2]
    (tmp_path / "go on").touch()
    first.join(60)
    assert first.exitcode == 0
    assert [step for kind, step, _ in losses(cfg) if kind == "train"] == [1, 2, 3, 4]
    assert run_ranks(1, train.main, cfg) == [0]


def train_and_read_the_log(cfg: RunConfig) -> str:
    """What rank 0 said on the way."""
    said = []
    logging.getLogger("pretrain.train").addFilter(lambda record: bool(said.append(record.getMessage())) or True)
    assert train.main(cfg) == 0
    return "\n".join(said)


def test_what_a_killed_run_left_half_written_is_removed_at_the_start(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path, optim={"steps": 3}, checkpoint={"every_steps": 1})
    run_ranks(1, train.main, cfg)
    root = checkpoint_dir(cfg.run_dir)
    left = [root / ".writing-step_00000002", root / ".writing-step_00000777"]
    for folder in left:
        folder.mkdir()
        (folder / "rank_00000.safetensors").write_bytes(b"half")
    (said,) = run_ranks(1, train_and_read_the_log, cfg)
    assert "removed what interrupted saves left: .writing-step_00000002, .writing-step_00000777" in said
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == [f"step_0000000{n}" for n in (1, 2, 3)]
