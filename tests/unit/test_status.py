"""The table, the report and the sweep's table, from files alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain import status, sweep
from pretrain.__main__ import main as pretrain
from pretrain.config_io import config_from_dict, config_to_yaml


def write_run(
    folder: Path,
    *,
    widths: list[int],
    losses: dict[str, float],
    n_heads: int = 0,
    steps: int = 10,
    tokens: int = 640,
    draw: str = "shared",
) -> None:
    raw: dict[str, Any] = {
        "run_dir": str(folder),
        "model": {"n_layers": 2, "d_model": 64, "headdim": 16, "n_heads": n_heads, "widths": widths, "vocab_size": 64},
        "data": {"path": "shards", "seq_len": 32, "tokens_per_step": 64, "micro_batch": 2},
        "optim": {"lr": 1e-2, "steps": 10, "warmup_steps": 2},
        "nesting": {"draw": draw},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(config_from_dict(raw)))
    train = {
        "kind": "train", "time": time.time(), "step": steps, "tokens": tokens, "loss": losses, "tokens_per_s": 1234.0,
        "mfu": None, "eta_s": 60.0, "memory_gib": 1.0,
    }  # fmt: skip
    evaluated = {"kind": "eval", "time": time.time(), "step": steps, "tokens": tokens, "loss": losses}
    (folder / "metrics.jsonl").write_text(json.dumps(train) + "\n" + json.dumps(evaluated) + "\n")


def test_table_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "nested", widths=[8, 4], losses={"1": 2.5, "1/2": 2.75})
    write_run(tmp_path / "runs" / "young", widths=[8], losses={"1": 3.5}, steps=4)
    events = [
        {"time": 0.0, "job": "7", "nodes": "n1", "event": "start", "step": -1},
        {
            "time": 1.0,
            "job": "7",
            "nodes": "n1",
            "event": "end",
            "step": 4,
            "code": 75,
            "requeue": True,
            "why": "a <b>",
        },
        {"time": 2.0, "job": "7", "nodes": "n2", "event": "start", "step": 4},
    ]
    (tmp_path / "runs" / "young" / "restarts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert status.main([str(tmp_path / "runs"), "--html"]) == 0
    shown = capsys.readouterr().out
    nested, young = (next(line for line in shown.splitlines() if f" {name} " in line) for name in ("nested", "young"))
    assert "10/10" in nested
    assert "[1/2] 2.750" in nested
    assert "finished" in nested
    assert "4/10" in young
    assert "training" in young
    assert "│ 1 " in young.rpartition("training")[0][-20:], "one restart"
    page = (tmp_path / "runs" / "young" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "a &lt;b&gt;" in page
    assert "http" not in page, "loads something from elsewhere"


@pytest.mark.parametrize(
    ("ends", "state"),
    [
        ([], "finished"),
        ([{"code": 75, "requeue": True, "why": "stopped in order"}, {"code": 0, "why": "ended in order"}], "finished"),
        ([{"code": 0, "why": "ended in order"}, {}], "finished"),  # a start that finds nothing to do
        ([{"code": 1, "requeue": False, "why": "crash loop: 2 starts"}], "stopped: crash loop: 2 starts"),
        ([{"code": 1, "requeue": True, "why": "crashed with code 1"}], "requeued: crashed with code 1"),
        ([{"code": 1, "requeue": True, "why": "crashed with code 1"}, {}], "training"),
    ],
    ids=["no job", "finished", "started again", "crash loop", "requeued", "running again"],
)
def test_a_run_at_its_last_step_is_finished_where_it_ended_in_order(
    ends: list[dict[str, Any]], state: str, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", widths=[8], losses={"1": 2.5})
    events: list[dict[str, Any]] = []
    for end in ends:
        events.append({"time": 0.0, "event": "start", "step": 0})
        if end:  # else the job is still running
            events.append({"time": 1.0, "event": "end", "step": 10, **end})
    (tmp_path / "run" / "restarts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert status.read_run(tmp_path / "run").state == state


def test_a_run_whose_last_validation_is_not_finite_is_not_finished(tmp_path: Path) -> None:
    """Its last checkpoint was set aside; without a batch script nobody has noted the exit code."""
    write_run(tmp_path / "run", widths=[8, 4], losses={"1": 2.5, "1/2": float("nan")})
    assert status.read_run(tmp_path / "run").state == "stopped: the last validation is not finite"


@pytest.mark.parametrize(("ended_s_ago", "state"), [(60, "training"), (-60, "stopped: misused")])
def test_a_job_that_finds_the_folder_in_use_does_not_stop_the_one_that_trains(
    ended_s_ago: float, state: str, tmp_path: Path
) -> None:
    """Submitted twice by mistake. Without a record since, the first job may have been lost with its node."""
    write_run(tmp_path / "run", widths=[8], losses={"1": 3.5}, steps=4)
    events = [
        {"time": 0.0, "job": "7", "event": "start", "step": -1},
        {"time": 1.0, "job": "8", "event": "start", "step": -1},
        {"time": time.time() - ended_s_ago, "job": "8", "event": "end", "step": -1, "code": 2, "why": "misused"},
    ]
    (tmp_path / "run" / "restarts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert status.read_run(tmp_path / "run").state == state


def test_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err


def test_sweep_puts_separate_models_beside_nested_widths(tmp_path: Path) -> None:
    write_run(tmp_path / "nested", widths=[8, 4], losses={"1": 2.5, "1/2": 2.75})
    write_run(tmp_path / "half", widths=[4], n_heads=4, losses={"1": 2.70})
    assert sweep.main([str(tmp_path)]) == 0
    rows = [line for line in (tmp_path / "sweep.md").read_text().splitlines() if "nested" in line and "1/2" in line]
    assert "2.7000" in rows[0]
    assert "+0.0500" in rows[0]
    parameters = {(r["run"], r["width"]): r["parameters"] for r in json.loads((tmp_path / "sweep.json").read_text())}
    assert parameters["nested", "1/2"] == parameters["half", "1"]
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def differences(folder: Path) -> dict[tuple[str, str], list[str]]:
    """The last two columns of the sweep's table, by run and width."""
    assert sweep.main([str(folder)]) == 0
    cells = [[cell.strip() for cell in line.split("|")] for line in (folder / "sweep.md").read_text().splitlines()]
    return {(row[1], row[2]): row[6:8] for row in cells}


def test_sweep_subtracts_only_what_saw_as_many_tokens(tmp_path: Path) -> None:
    write_run(tmp_path / "nested", widths=[8, 4], losses={"1": 2.5, "1/2": 2.75}, tokens=512)
    write_run(tmp_path / "whole", widths=[8], losses={"1": 2.4}, tokens=640)
    write_run(tmp_path / "half", widths=[4], n_heads=4, losses={"1": 2.70}, tokens=384)
    found = differences(tmp_path)
    assert found["nested", "1"] == ["2.4000", "nested is behind"]
    assert found["nested", "1/2"] == ["2.7000", "half is behind"]


def test_sweep_counts_a_widths_own_tokens(tmp_path: Path) -> None:
    """Of two widths that draw their own, each saw half of the run's."""
    write_run(tmp_path / "nested", widths=[8, 4], losses={"1": 2.5, "1/2": 2.75}, tokens=1280, draw="separate")
    write_run(tmp_path / "half", widths=[4], n_heads=4, losses={"1": 2.70}, tokens=640)
    assert differences(tmp_path)["nested", "1/2"] == ["2.7000", "+0.0500"]


def test_sweep_names_every_separate_run_of_a_shape(tmp_path: Path) -> None:
    write_run(tmp_path / "nested", widths=[8, 4], losses={"1": 2.5, "1/2": 2.75})
    for name, loss, tokens in (("half", 2.70, 640), ("other/half", 2.65, 640), ("young", 2.9, 64)):
        write_run(tmp_path / name, widths=[4], n_heads=4, losses={"1": loss}, tokens=tokens)
    found = differences(tmp_path)
    assert found["nested", "1"] == ["", ""]
    losses, difference = found["nested", "1/2"]
    assert set(losses.split(", ")) == {"2.7000 (half)", "2.6500 (other/half)", "2.9000 (young)"}
    assert set(difference.split(", ")) == {"+0.0500 (half)", "+0.1000 (other/half)", "young is behind (young)"}


def test_a_width_that_is_new_since_the_last_validation_waits_for_the_next(tmp_path: Path) -> None:
    write_run(tmp_path / "nested", widths=[8, 4, 2], losses={"1": 2.5, "1/2": 2.75})
    assert [(row.width, row.loss) for row in sweep.collect(tmp_path)] == [("1/2", 2.75), ("1", 2.5)]


def test_a_classifiers_run_shows_images_and_right_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw: dict[str, Any] = {
        "task": "vision",
        "run_dir": str(tmp_path / "run"),
        "model": {"n_layers": 2, "d_model": 64, "headdim": 16, "widths": [8, 4], "n_classes": 10},
        "data": {"path": "shards", "images_per_step": 64},
        "optim": {"lr": 1e-2, "steps": 10, "warmup_steps": 2},
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config_to_yaml(config_from_dict(raw)))
    common = {"time": time.time(), "step": 10, "tokens": 197 * 640, "loss": {"1": 1.5, "1/2": 1.75}}
    train = {
        "kind": "train",
        "tokens_per_s": 1234.0,
        "images_per_s": 98.7,
        "images": 640,
        "mfu": None,
        "eta_s": 60.0,
        "memory_gib": 1.0,
    }
    right = {"kind": "eval", "top1": {"1": 0.625, "1/2": 0.5}, "top5": {"1": 0.9, "1/2": 0.8}}
    earlier = {**right, "step": 5, "tokens": 197 * 320, "loss": {"1": 2.0}, "top1": {"1": 0.5}, "top5": {"1": 0.8}}
    lines = [json.dumps({**common, **record}) + "\n" for record in (earlier, train, right)]  # a width came later
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    assert status.main([str(tmp_path), "--html"]) == 0
    shown = capsys.readouterr().out
    assert "99 img/s" in shown
    assert "[1/2] 50.00%" in shown
    page = (tmp_path / "run" / "report.html").read_text()
    assert "[1] 62.50%" in page
    assert "<td>640</td>" in page


def test_the_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain(["--help"])
    assert "python -m pretrain status FOLDER" in capsys.readouterr().out
