"""When a job is requeued, from the record of its starts and ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.restarts import Event, crashes_without_progress, decide, latest_step, read_events


def start(step: int) -> Event:
    return {"event": "start", "step": step}


def end(step: int, code: int) -> Event:
    return {"event": "end", "step": step, "code": code}


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
    ],
)
def test_crashes_without_progress(events: list[Event], step: int, count: int) -> None:
    assert crashes_without_progress(events, step) == count


@pytest.mark.parametrize(
    ("code", "events", "step", "restarts", "state", "requeue", "says"),
    [
        (0, [start(0), end(9, 0)], 9, 0, "RUNNING", False, "finished"),
        (2, [start(0), end(0, 2)], 0, 0, "RUNNING", False, "misused"),
        (75, [start(0), end(9, 75)], 9, 0, "RUNNING", True, "saved at step 9"),
        (75, [start(0), end(9, 75)], 9, 0, "CANCELLED", False, "CANCELLED"),
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


def test_files_that_are_absent_or_cut_short(tmp_path: Path) -> None:
    assert latest_step(tmp_path) == -1
    assert read_events(tmp_path) == []
    (tmp_path / "restarts.jsonl").write_text('{"event": "start", "step": 3}\n{"event": "en')
    assert read_events(tmp_path) == [start(3)]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000040\n")
    assert latest_step(tmp_path) == 40
