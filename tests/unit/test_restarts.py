"""When a job is requeued, from the record of its starts and ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pretrain.config_io import config_to_yaml
from pretrain.restarts import Event, crashes_without_progress, decide, latest_step, main, read_events
from tests.datasets import write_image_dataset, write_token_dataset
from tests.distributed.toy_run import run_config


def start(step: int) -> Event:
    return {"event": "start", "step": step}


def end(step: int, code: int, **more: object) -> Event:
    return {"event": "end", "step": step, "code": code, **more}


@pytest.mark.parametrize(
    ("events", "step", "count"),
    [
        ([], -1, 0),
        ([start(-1), end(-1, 1)], -1, 1),
        ([start(-1), end(-1, 1), start(-1), end(-1, 137)], -1, 2),
        ([start(-1), end(40, 1), start(40), end(40, 1)], 40, 1),
        ([start(-1), end(40, 137)], 40, 0),
        ([start(-1), start(-1)], -1, 2),  # lost with their nodes: no end was recorded
        ([start(-1), end(-1, 75), start(-1)], -1, 1),
        ([start(-1), end(-1, 75)], -1, 0),
        ([start(-1), end(-1, 2), start(-1), end(-1, 2)], -1, 0),  # mended, it may start
        ([start(-1), end(-1, 143, state="COMPLETING"), start(-1), end(-1, 143, state="CANCELLED")], -1, 0),
        ([start(-1), end(-1, 138, state="RUNNING", told=True), start(-1)], -1, 1),
        ([start(-1), end(-1, 138, state="RUNNING", told=False), start(-1)], -1, 2),
        ([start(-1), end(-1, 1, state="", told=True)], -1, 1),
    ],
)
def test_crashes_without_progress(events: list[Event], step: int, count: int) -> None:
    assert crashes_without_progress(events, step) == count


@pytest.mark.parametrize(
    ("code", "events", "step", "restarts", "state", "requeue", "says"),
    [
        (0, [start(0), end(9, 0)], 9, 0, "RUNNING", False, "ended in order; the newest checkpoint is of step 9"),
        (2, [start(0), end(0, 2)], 0, 0, "RUNNING", False, "misused"),
        (75, [start(0), end(9, 75)], 9, 0, "RUNNING", True, "stopped in order; the newest checkpoint is of step 9"),
        (75, [start(0), end(9, 75)], 9, 0, "CANCELLED", False, "CANCELLED"),
        (
            75,
            [start(0), end(9, 75)],
            9,
            0,
            "",
            True,
            "stopped in order; the newest checkpoint is of step 9",
        ),  # the controller did not answer
        (75, [start(0), end(9, 75)], 9, 3, "RUNNING", False, "MAX_RESTARTS=3"),
        (137, [start(0), end(9, 137)], 9, 0, "RUNNING", True, "code 137"),
        (1, [start(0), end(0, 1)], 0, 0, "RUNNING", True, "code 1"),
        (1, [start(0), end(0, 1), start(0), end(0, 1)], 0, 1, "RUNNING", False, "crash loop"),
    ],
)
def test_decision(
    code: int, events: list[Event], step: int, restarts: int, state: str, requeue: bool, says: str
) -> None:
    actual, why = decide(events, step, code=code, restarts=restarts, max_restarts=3, state=state)
    assert actual is requeue
    assert says in why


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.vocab_size=50"], "model.vocab_size=50, but"),
        (
            ["data.seq_len=128", "data.micro_batch=1"],
            "data.seq_len=128 does not divide the dataset's rows of 64 tokens",
        ),
        (["data.tokenizer={other}"], "name that one, or prepare the data again"),
        (["data.tokenizer=tiktoken:gpt2"], "was tokenized with counting: name that one, or none"),
        (["data.path={images}"], "is of images, not of tokens"),
        (["data.path={empty}"], "manifest.json is missing"),
    ],
    ids=str,
)
def test_data_that_the_config_does_not_fit_is_misuse(
    overrides: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("tokens", "images", "empty", "other")}
    write_token_dataset(places["tokens"])
    write_image_dataset(places["images"])
    (places["empty"] / "train").mkdir(parents=True)
    places["other"].write_text("another tokenizer")
    cfg = run_config(places["tokens"], tmp_path / "run")
    (tmp_path / "run.yaml").write_text(config_to_yaml(cfg))
    command = ["check", "--world-size", "2", str(tmp_path / "run.yaml")]
    assert main(command) == 0
    assert main([*command, *(text.format(**places) for text in overrides)]) == 2
    assert says in capsys.readouterr().err


def test_an_encoding_of_tiktokens_is_compared_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking tiktoken, which may want the network."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    shards = write_token_dataset(tmp_path / "shards", tokenizer_name="tiktoken:gpt2")
    (tmp_path / "run.yaml").write_text(config_to_yaml(run_config(shards, tmp_path / "run")))
    command = ["check", "--world-size", "2", str(tmp_path / "run.yaml")]
    assert main([*command, "data.tokenizer=tiktoken:gpt2"]) == 0
    assert main([*command, "data.tokenizer=tiktoken:cl100k_base"]) == 2


def test_a_run_that_is_told_to_stop_before_it_listens_is_requeued(tmp_path: Path) -> None:
    """As often as it happens: each start was preempted while its ranks imported torch."""
    (tmp_path / "restarts.jsonl").write_text("")
    for _ in range(3):
        with (tmp_path / "restarts.jsonl").open("a") as file:
            file.write('{"event": "start", "step": -1}\n')
        ended = ["end", str(tmp_path), "--code", "143", "--max-restarts", "20", "--job-state", "RUNNING", "--told"]
        assert main(ended) == 0
    assert "told to stop before it could save" in read_events(tmp_path)[-1]["why"]


def test_files_that_are_absent_or_cut_short(tmp_path: Path) -> None:
    assert latest_step(tmp_path) == -1
    assert read_events(tmp_path) == []
    (tmp_path / "restarts.jsonl").write_text('{"event": "start", "step": 3}\n{"event": "en')
    assert read_events(tmp_path) == [start(3)]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000040\n")
    assert latest_step(tmp_path) == 40
