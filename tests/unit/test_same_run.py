"""What may change between two starts of a run, and where in the data the second one stands."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from modeling.checkpoint_reader import RunState
from pretrain.config import RunConfig
from pretrain.config_io import config_to_plain
from pretrain.config_sections import ConfigError
from pretrain.dataset_check import dataset_sha256
from pretrain.same_run import DATASET, state_to_go_on_from
from tests.datasets import write_image_dataset, write_token_dataset
from tests.distributed.toy_run import run_config

STATE = RunState(step=5, tokens=1280, sequence=40)
ROOT = Path("/data/shards")


def manifest(cfg: RunConfig, **more: Any) -> dict[str, Any]:
    return {"config": config_to_plain(cfg), DATASET: "a" * 64, **more}


def test_another_seed_is_refused_with_both_values_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed=5, but .* with seed=1337, .* checkpoint\.init_from"):
        state_to_go_on_from(run_config(ROOT, tmp_path, seed=5), manifest(run_config(ROOT, tmp_path)), STATE, "a" * 64)


def test_less_than_is_done_is_refused(tmp_path: Path) -> None:
    cfg = run_config(ROOT, tmp_path, optim={"steps": 4})
    with pytest.raises(ConfigError, match=r"at step 5, optim\.steps=4: nothing is left to do"):
        state_to_go_on_from(cfg, manifest(cfg), STATE)


@pytest.mark.parametrize(("seq_len", "sequence"), [(32, 40), (16, 80), (64, 20), (256, 5)], ids=str)
def test_the_position_follows_the_length_of_a_sequence(seq_len: int, sequence: int, tmp_path: Path) -> None:
    cfg = run_config(ROOT, tmp_path, data={"seq_len": seq_len, "micro_batch": 1})
    state = state_to_go_on_from(cfg, manifest(run_config(ROOT, tmp_path)), STATE, "a" * 64)
    assert (state.sequence, state.tokens, state.step) == (sequence, STATE.tokens, STATE.step)


def test_a_position_that_does_not_come_out_whole_is_refused(tmp_path: Path) -> None:
    cfg = run_config(ROOT, tmp_path, data={"seq_len": 512, "tokens_per_step": 1024, "micro_batch": 1})
    with pytest.raises(ConfigError, match=r"data\.seq_len=512, .* data\.seq_len=32 and stands after 1280 tokens"):
        state_to_go_on_from(cfg, manifest(run_config(ROOT, tmp_path)), STATE, "a" * 64)


def test_another_dataset_is_refused_and_the_same_one_elsewhere_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    here, other = (write_token_dataset(tmp_path / str(n), n_rows=n) for n in (40, 48))
    there = tmp_path / "there"
    shutil.copytree(here, there)
    written = manifest(run_config(here, tmp_path), **{DATASET: dataset_sha256(run_config(here, tmp_path).data)})
    moved, changed = run_config(there, tmp_path), run_config(other, tmp_path)
    assert state_to_go_on_from(moved, written, STATE, dataset_sha256(moved.data)) == STATE
    assert caplog.messages == [f"data.path={there} from here on; the checkpoint was trained with {here}"]
    with pytest.raises(ConfigError, match=rf"data\.path={other} .* another dataset .* data\.path={here} "):
        state_to_go_on_from(changed, written, STATE, dataset_sha256(changed.data))
    assert len(dataset_sha256(run_config(write_image_dataset(tmp_path / "images"), tmp_path).data)) == 64


def test_what_else_changes_is_a_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = run_config(ROOT, tmp_path / "a")
    after = run_config(
        ROOT,
        tmp_path / "b",
        data={"micro_batch": 1},
        optim={"lr": 2e-2, "steps": 20},
        nesting={"draw": "separate"},
        checkpoint={"resume": str(tmp_path / "a")},
    )
    assert state_to_go_on_from(after, manifest(before), STATE, "a" * 64) == STATE
    assert caplog.messages == [
        "data.micro_batch=1 from here on; the checkpoint was trained with 2",
        "optim.lr=0.02 from here on; the checkpoint was trained with 0.01",
        "optim.steps=20 from here on; the checkpoint was trained with 10",
        "nesting.draw=separate from here on; the checkpoint was trained with shared",
    ]
    caplog.clear()
    state_to_go_on_from(after, manifest(before), STATE, "a" * 64, log=False)
    assert not caplog.messages


def test_a_checkpoint_from_before_a_key_existed_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    cfg = run_config(ROOT, tmp_path)
    old = {"config": config_to_plain(run_config(Path("/old/shards"), tmp_path))}
    del old["config"]["stability"], old["config"]["parallel"]["peer_copies"], old["config"]["data"]["n_workers"]
    old["config"]["optim"]["gone"] = 1
    assert state_to_go_on_from(cfg, old, STATE, "a" * 64) == STATE
    assert any("too old to tell" in message for message in caplog.messages)
