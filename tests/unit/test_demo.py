"""`make demo` in a folder that holds more than it made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain import demo


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--steps=9", 2)])
def test_what_only_asks_or_is_mistyped_leaves_the_last_demo_alone(
    argument: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_stage(*_: object) -> None:
        raise AssertionError("a stage of the demo ran")

    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")
    monkeypatch.setattr(demo, "step", no_stage)
    (tmp_path / "demo").mkdir()
    picture = tmp_path / "demo" / "losses.png"
    picture.touch()
    with pytest.raises(SystemExit) as end:
        demo.main([argument])
    assert end.value.code == code
    assert picture.exists()


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
