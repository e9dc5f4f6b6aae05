"""Records, peaks, progress lines, the picture and the doctor."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import doctor
from pretrain.config import RunConfig
from pretrain.config_io import config_from_dict
from pretrain.config_sections import ConfigError
from pretrain.hardware import memory_gib, peak_tflops
from pretrain.metrics import MetricsWriter, read_metrics
from pretrain.plot import plot_losses
from pretrain.progress import TrainingProgress


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return config_from_dict(
        {
            "run_dir": str(tmp_path),
            "model": {"n_layers": 1, "d_model": 32, "headdim": 4, "widths": [16, 8], "vocab_size": 64},
            "data": {"path": "shards", "seq_len": 32, "tokens_per_step": 256},
            "optim": {"lr": 1e-3, "steps": 50, "warmup_steps": 5},
        }
    )


def write_steps(cfg: RunConfig, start: int, steps: range) -> None:
    writer = MetricsWriter(cfg, start_step=start, enabled=True)
    for step in steps:
        writer.write("train", {"step": step, "tokens": 256 * step, "loss": {"1": 4.0 - step / 10, "1/2": 4.5}})
    writer.write("eval", {"step": steps[-1], "tokens": 256 * steps[-1], "loss": {"1": 3.0, "1/2": 3.5}})
    writer.close()


def test_a_resumed_curve_has_one_value_a_step(cfg: RunConfig, tmp_path: Path) -> None:
    write_steps(cfg, 0, range(1, 6))
    write_steps(cfg, 3, range(4, 8))
    train = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
    assert train == [1, 2, 3, 4, 5, 6, 7]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_line_cut_short_by_a_crash_is_dropped(cfg: RunConfig, tmp_path: Path) -> None:
    write_steps(cfg, 0, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as f:
        f.write('{"kind": "train", "st')
    write_steps(cfg, 2, range(3, 4))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2, 3, 3]


def test_other_ranks_write_nothing(cfg: RunConfig, tmp_path: Path) -> None:
    writer = MetricsWriter(cfg, start_step=0, enabled=False)
    writer.write("train", {"step": 1})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_wandb_gets_flat_records_under_a_kept_run_id(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    calls: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []

    class FakeRun:
        def define_metric(self, name: str, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, values: dict[str, Any]) -> None:
            logged.append(values)

        def finish(self) -> None:
            pass

    def fake_init(**kwargs: Any) -> FakeRun:
        calls.append(kwargs)
        return FakeRun()

    monkeypatch.setattr(wandb, "init", fake_init)
    offline = replace(cfg, logging=replace(cfg.logging, wandb="offline"))
    (tmp_path / "wandb_id").write_text("abc12345")
    write_steps(offline, 0, range(1, 2))
    assert (calls[0]["id"], calls[0]["resume"], calls[0]["mode"]) == ("abc12345", "allow", "offline")
    assert logged[0] == {"step": 1, "train/tokens": 256, "train/loss_1": 3.9, "train/loss_1/2": 4.5}


def test_wandb_without_a_login_is_misuse(cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    online = replace(cfg, logging=replace(cfg.logging, wandb="online"))
    for key in ("", "short"):
        monkeypatch.setenv("WANDB_API_KEY", key)
        with pytest.raises(ConfigError, match=r"logging\.wandb=online: .* Log in \(WANDB_API_KEY"):
            write_steps(online, 0, range(1, 2))


def test_a_wandb_that_does_not_answer_stops_no_run(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def no_answer(**kwargs: Any) -> None:
        raise wandb.errors.CommError("connection refused")

    monkeypatch.setattr(wandb, "init", no_answer)
    write_steps(replace(cfg, logging=replace(cfg.logging, wandb="online")), 0, range(1, 3))
    assert "cannot be reached (connection refused)" in caplog.text
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2]


def test_wandb_offline_writes_a_run_that_can_be_synced_later(cfg: RunConfig, tmp_path: Path) -> None:
    write_steps(replace(cfg, logging=replace(cfg.logging, wandb="offline")), 0, range(1, 4))
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 0
    assert (tmp_path / "wandb_id").read_text() in runs[0].name


def wandb_records(data: bytes) -> Iterator[Any]:
    """The protobuf records in a file of W&B's, which has LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, parts = 7, b""
    while position + 7 <= len(data):
        block_left = 32768 - position % 32768
        if block_left < 7:
            position += block_left
            continue
        size, part = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if part in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """What was logged, once W&B's own process has written the file to its end."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        records = list(wandb_records(path.read_bytes()))
        if records and records[-1].WhichOneof("record_type") == "exit":
            rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
            return [
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows
            ]
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written to its end")


def test_wandb_gets_the_steps_that_are_trained_again(cfg: RunConfig, tmp_path: Path) -> None:
    writer = MetricsWriter(replace(cfg, logging=replace(cfg.logging, wandb="offline")), start_step=0, enabled=True)
    for attempt in (1.0, 2.0):
        for step in range(2, 5):
            writer.write("train", {"step": step, "loss": {"1": attempt + step / 10}})
        writer.go_back(1)
    writer.close()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    seen = [(row["step"], row["train/loss_1"]) for row in wandb_history(path)]
    assert seen == [(2, 1.2), (3, 1.3), (4, 1.4), (2, 2.2), (3, 2.3), (4, 2.4)]


@pytest.mark.parametrize(
    ("name", "stated", "peak"),
    [
        ("NVIDIA H200", 0.0, 989.0),
        ("NVIDIA H100 PCIe", 0.0, 756.0),
        ("NVIDIA H100 80GB HBM3", 0.0, 989.0),
        ("NVIDIA A100-SXM4-80GB", 0.0, 312.0),
        ("NVIDIA A10", 0.0, 125.0),
        ("NVIDIA L40S", 0.0, 362.0),
        ("NVIDIA H200", 700.0, 700.0),
        ("NVIDIA L40", 0.0, None),  # not an L4
        ("NVIDIA RTX A1000", 0.0, None),  # not an A100
        ("Unheard-of GPU", 0.0, None),
        (None, 0.0, None),
    ],
)
def test_peak_is_known_stated_or_absent(name: str | None, stated: float, peak: float | None) -> None:
    found, source = peak_tflops(name, stated)
    assert found == peak
    assert source


def test_memory_is_positive() -> None:
    assert memory_gib(torch.device("cpu")) > 0


def test_plain_lines_in_a_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    record = {
        "step": 5, "loss": {"1": 3.25, "1/2": 3.5}, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1234.0,
        "tflops_per_device": 0.01, "mfu": None, "memory_gib": 1.0, "eta_s": 3700.0,
    }  # fmt: skip
    with caplog.at_level(logging.INFO), TrainingProgress(start_step=0, n_steps=10, enabled=True) as progress:
        progress.show("train", record)
        progress.show("eval", {"step": 5, "loss": {"1": 3.0}})
        progress.show("event", {"step": 5, "event": "saved"})
    text = caplog.text
    assert "step 5/10" in text
    assert "[1/2] 3.5000" in text
    assert "1h01m left" in text
    assert "MFU" not in text
    assert "validation" in text


def test_plot_draws_a_png_and_refuses_an_empty_run(cfg: RunConfig, tmp_path: Path) -> None:
    write_steps(cfg, 0, range(1, 4))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training record"):
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")


def test_doctor_fails_on_a_missing_requirement(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", {"no-such-distribution": "no_such_module"})
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    level = logging.getLogger().level
    assert doctor.main() == 1
    assert logging.getLogger().level == level, "what runs after it in this process is not silenced"
    out = capsys.readouterr().out
    assert "missing no-such-distribution" in out
    assert "-> make setup" in out


def test_doctor_survives_what_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libsomething.so: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    checks, healthy = doctor.report()
    assert not healthy
    assert any("libsomething.so" in check.detail and check.mend for check in checks)
