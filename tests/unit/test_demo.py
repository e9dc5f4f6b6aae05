"""`make demo` in a folder that holds more than it made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain import demo


def test_a_new_demo_removes_what_the_last_one_made_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")
    demo.clear()
    for name in ("text/a.parquet", "shards/train/index.json", "run/metrics.jsonl", "tokenizer.model", "losses.png"):
        path = tmp_path / "demo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("digits", "vision_run"):  # docs/images.md and docs/vision.md make them
        (tmp_path / "demo" / name).mkdir()
    demo.clear()
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"digits", "vision_run"}
