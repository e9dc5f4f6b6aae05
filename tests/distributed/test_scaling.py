"""The scaling benchmark, tried out on CPU ranks: what it compares must agree, and its sums must be right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.config import RunConfig
from pretrain.config_io import config_to_plain
from tests.distributed.test_layouts import small_run
from tests.perf import scaling


@pytest.mark.timeout(280)
def test_layouts_of_one_step_agree_and_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, record = tmp_path / "toy.yaml", tmp_path / "record.json"
    config.write_text(yaml.safe_dump(config_to_plain(small_run(data={"micro_batch": 2}))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = [
        "scaling",
        str(config),
        *("--layouts", "1x1", "2x1"),
        "--steps",
        "2",
        "--scaling",
        *("strong", "weak", "filled"),
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "-o", str(record)])
    scaling.main()
    rows = json.loads(record.read_text())["rows"]
    laid = [(row["scaling"], row["world_size"], row["tensor"], row["dp"]) for row in rows]
    expected = [(how, *ranks) for ranks in ((1, 1, 1), (2, 2, 1)) for how in ("strong", "weak")]
    assert laid == [*expected, ("filled", 2, 2, 1)]
    assert [row["micro_batch"] for row in rows] == [2] * 4 + [4]
    for row in rows[2:]:
        assert row["losses_off"] < 1e-5, "the same tokens"
        assert row["norms_off"] < 1e-5
        assert row["planned_step_s"] > 0
        assert row["of_one_device"] > 0


def test_only_the_layouts_that_are_named_are_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "toy.yaml"
    config.write_text(yaml.safe_dump(config_to_plain(small_run())))
    launched = []

    def record(layouts: dict[str, RunConfig], world_size: int, steps: int) -> list[scaling.Row]:
        launched.append(
            (world_size, {how: (cfg.parallel.tensor, cfg.data.tokens_per_step) for how, cfg in layouts.items()})
        )
        return []

    monkeypatch.setattr(scaling, "launch", record)
    monkeypatch.setattr(sys, "argv", ["scaling", str(config), "--layouts", "1x1", "2x2"])
    scaling.main()
    assert launched == [(1, {"strong": (1, 64), "weak": (1, 16)}), (4, {"strong": (2, 64), "weak": (2, 32)})]
    launched.clear()
    monkeypatch.setattr(
        sys, "argv", ["scaling", str(config), "--layouts", "1x1", "2x2", "--scaling", "strong", "filled"]
    )
    scaling.main()
    assert launched == [(1, {"strong": (1, 64)}), (4, {"strong": (2, 64)}), (4, {"filled": (2, 64)})]


def test_overlap_is_counted_once() -> None:
    assert scaling.covered(0, 10, []) == 0
    assert scaling.covered(0, 10, [(-5, 2), (1, 3), (8, 20)]) == 5
    assert scaling.covered(4, 6, [(0, 10), (1, 2)]) == 2
    assert scaling.covered(0, 10, [(10, 12)]) == 0
