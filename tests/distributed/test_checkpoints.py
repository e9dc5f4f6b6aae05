"""Checkpoints under hard conditions: written while training goes on, pruned, damaged, hostile, killed at any moment."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling.checkpoint_reader import KINDS, CheckpointError, Reader, file_sha256, manifest_sha256
from pretrain import checkpoint, checkpoint_tool, language_task, train
from pretrain.checkpoint import candidates, checkpoint_dir
from pretrain.config import RunConfig
from pretrain.config_io import config_to_yaml
from pretrain.metrics import MetricsWriter, read_metrics
from pretrain.restarts import EXIT_REQUEUE
from pretrain.retention import BEST, note_losses, read_best
from pretrain.stopping import Stop, StopWatch
from tests.distributed.harness import RankFailedError, run_python, run_ranks, start_ranks
from tests.distributed.toy_run import damage, losses, run_config, train_until


def events(cfg: RunConfig) -> list[tuple[int, str]]:
    records = read_metrics(Path(cfg.run_dir) / "metrics.jsonl")
    return [(record["step"], record["event"]) for record in records if record["kind"] == "event"]


def steps_on_disk(cfg: RunConfig) -> list[int]:
    return sorted(int(folder.name.removeprefix("step_")) for folder in candidates(checkpoint_dir(cfg.run_dir)))


def assert_same_checkpoint(first: Path, second: Path) -> None:
    a, b = Reader(first), Reader(second)
    a.verify()
    b.verify()
    assert a.state == b.state
    for name in a.shapes:
        for kind in KINDS:
            assert torch.equal(a.full(name, kind, 8), b.full(name, kind, 8)), (name, kind)


def train_with_a_slow_disk(cfg: RunConfig) -> int:
    """Each write takes half a second, many steps; returns the largest number of writes at a time on this rank."""
    write = checkpoint.write_rank_file
    lock, now, most = threading.Lock(), [0], [0]

    def slowly(folder: Path, rank: int, tensors: Any) -> Any:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.5)
        result = write(folder, rank, tensors)
        with lock:
            now[0] -= 1
        return result

    checkpoint.write_rank_file = slowly
    assert train.main(cfg) == 0
    return most[0]


def test_training_goes_on_while_a_checkpoint_is_written(dataset: Path, tmp_path: Path) -> None:
    waiting = run_config(dataset, tmp_path / "waiting", checkpoint={"every_steps": 4, "asynchronous": False})
    run_ranks(2, train.main, waiting)
    going_on = run_config(dataset, tmp_path / "going_on", checkpoint={"every_steps": 4})
    assert run_ranks(2, train_with_a_slow_disk, going_on) == [1, 1], "one write at a time"
    assert losses(going_on) == losses(waiting)
    assert steps_on_disk(going_on) == steps_on_disk(waiting) == [4, 8, 10]
    for a, b in zip(*(sorted(checkpoint_dir(c.run_dir).glob("step_*")) for c in (going_on, waiting)), strict=True):
        assert_same_checkpoint(a, b)
    saved_at = [step for step, event in events(going_on) if event.startswith("saved") and "step_00000004" in event]
    assert saved_at[0] > 4, "it was whole only after more steps had been trained"
    assert saved_at[0] <= 8, "and before the next one began"


def train_worse_from_step(cfg: RunConfig, step: int) -> int:
    """Validation is honest up to `step` and a nat worse after it."""
    validate = language_task.submodel_losses

    def worse_later(model: Any, batches: Any, submodels: Any, ranks: Any) -> list[float]:
        steps.append(len(steps) + 1)
        losses = validate(model, batches, submodels, ranks)
        return [loss + (steps[-1] > step + layers[0] / 8) for layers, loss in zip(submodels, losses, strict=True)]

    steps: list[int] = []
    language_task.submodel_losses = worse_later
    return train.main(cfg)


def test_the_newest_the_nth_and_the_best_are_kept(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(
        dataset,
        tmp_path,
        checkpoint={"every_steps": 1, "keep_last": 2, "keep_every_steps": 3, "keep_best": True},
        logging={"eval_every_steps": 1},
    )
    run_ranks(2, train_worse_from_step, cfg, 4)
    records = read_metrics(tmp_path / "metrics.jsonl")
    validation = {record["step"]: record["loss"] for record in records if record["kind"] == "eval"}
    best = {min(validation, key=lambda step: validation[step][width]) for width in ("1", "1/2", "1/4")}
    assert best == {4, 5}, "the best are none of the newest, nor a third one"
    assert steps_on_disk(cfg) == sorted({3, 6, 9, 10} | best)


def test_a_loss_that_is_not_finite_is_no_best(tmp_path: Path) -> None:
    for step, losses_by_width in enumerate(({"1": float("nan"), "1/2": 3.0}, {"1": 2.0, "1/2": float("inf")}), start=1):
        note_losses(tmp_path, step, losses_by_width)
    assert read_best(tmp_path) == {"1": {"step": 2, "loss": 2.0}, "1/2": {"step": 1, "loss": 3.0}}
    (tmp_path / BEST).write_text('{"1": {"step": 1, "loss": NaN}}')  # as earlier versions may have left it
    note_losses(tmp_path, 2, {"1": 5.0})
    assert read_best(tmp_path) == {"1": {"step": 2, "loss": 5.0}}


def test_touching_a_file_saves_and_ends_the_run_for_good(dataset: Path, tmp_path: Path) -> None:
    whole = run_config(dataset, tmp_path / "whole")
    run_ranks(2, train.main, whole)
    cfg = run_config(dataset, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert run_ranks(2, train.main, cfg) == [0, 0], "0: not to be started again"
    assert steps_on_disk(cfg) == [1]
    assert not (tmp_path / "run" / "stop").exists()
    assert run_ranks(2, train.main, cfg) == [0, 0]
    assert losses(cfg) == losses(whole)


def train_until_with_slow_records(cfg: RunConfig, stop_after: int) -> bool:
    """Whether rank 0's records, which take two seconds to close, were closed when this rank left."""
    close, closed = MetricsWriter.close, Path(cfg.run_dir) / "closed"

    def slowly(self: MetricsWriter) -> None:
        close(self)
        if self._file is not None:
            time.sleep(2)
            closed.touch()

    MetricsWriter.close = slowly  # type: ignore[method-assign]  # in a process of its own
    assert train_until(cfg, stop_after) == EXIT_REQUEUE
    return closed.exists()


def test_no_rank_leaves_while_another_closes_its_records(dataset: Path, tmp_path: Path) -> None:
    """srun --kill-on-bad-exit would end that one."""
    assert run_ranks(2, train_until_with_slow_records, run_config(dataset, tmp_path), 3) == [True, True]


def touch_stop_in_the_last_step(cfg: RunConfig) -> int:
    evaluate = train.evaluate

    def touching(run: train.Run) -> dict[str, float]:
        (Path(cfg.run_dir) / "stop").touch()
        return evaluate(run)

    train.evaluate = touching
    return train.main(cfg)


def test_a_finished_run_leaves_no_stop_to_one_with_more_steps(dataset: Path, tmp_path: Path) -> None:
    assert run_ranks(1, touch_stop_in_the_last_step, run_config(dataset, tmp_path, optim={"steps": 4})) == [0]
    assert not (tmp_path / "stop").exists()


def touch_stop_while_a_signal_is_obeyed(cfg: RunConfig) -> int:
    save = train.save

    def touching(run: train.Run, *, wait: bool) -> None:
        (Path(cfg.run_dir) / "stop").touch()
        save(run, wait=wait)

    train.save = touching
    return train_until(cfg, 0)


def test_a_stop_that_a_signal_came_before_ends_the_next_start(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path)
    assert run_ranks(1, touch_stop_while_a_signal_is_obeyed, cfg) == [EXIT_REQUEUE]
    assert run_ranks(1, train.main, cfg) == [0]
    assert steps_on_disk(cfg) == [1, 2]
    assert not (tmp_path / "stop").exists()


def test_a_run_saves_before_the_jobs_time_limit(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = run_config(dataset, tmp_path)
    now = time.time()
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(now - 10_000)))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now + 100)))
    assert run_ranks(2, train.main, cfg) == [EXIT_REQUEUE] * 2
    assert steps_on_disk(cfg) == [1]
    assert (1, "stopped before the time limit") in events(cfg)
    # A job of a minute keeps a tenth of it back, not two minutes: it must still train.
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(time.time())))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 60)))
    assert run_ranks(2, train.main, cfg) == [0, 0]
    assert steps_on_disk(cfg) == [1, 10]


def test_a_clock_that_is_set_ahead_is_no_slow_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.stopping.signal.signal", lambda *_: None)
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(time.time())))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 10 * 3600)))
    alone = SimpleNamespace(is_main=True, agree_max=int)
    watch = StopWatch(tmp_path, alone, margin_s=120)  # type: ignore[arg-type]
    assert watch.ask(0) is Stop.NO
    wall_clock = time.time
    monkeypatch.setattr("pretrain.stopping.time.time", lambda: wall_clock() + 6 * 3600)
    assert watch.ask(0) is Stop.NO  # four hours are left, and steps take no time
    monkeypatch.setattr("pretrain.stopping.time.time", lambda: wall_clock() + 10 * 3600)
    assert watch.ask(0) is Stop.TIME_LIMIT


def train_over_bad_data(cfg: RunConfig, first: int, n: int) -> int:
    """The loss is not finite on sequences first .. first + n - 1, whenever they come."""
    accumulate = train.accumulate_gradients

    def poisoned(run: train.Run, micro_batches: Any) -> float:
        loss = accumulate(run, micro_batches)
        end = run.loader.state_dict()["sequence"]
        return float("nan") if end > first and end - cfg.data.sequences_per_step < first + n else loss

    train.accumulate_gradients = poisoned
    return train.main(cfg)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"zero_stage": 2}], ids=["ZeRO 1", "tp 2", "ZeRO 2"])
def test_a_bad_step_updates_nothing_and_the_run_goes_on(
    parallel: dict[str, int], dataset: Path, tmp_path: Path
) -> None:
    cfg = run_config(dataset, tmp_path, checkpoint={"every_steps": 1, "keep_last": 20}, parallel=parallel)
    assert run_ranks(2, train_over_bad_data, cfg, 4 * 8, 8) == [0, 0]
    root = checkpoint_dir(cfg.run_dir)
    before, after, last = (Reader(root / checkpoint.step_name(step)) for step in (4, 5, 10))
    for name in before.shapes:
        for kind in KINDS:
            assert torch.equal(before.full(name, kind, 8), after.full(name, kind, 8)), (name, kind)
    assert (after.state.bad_steps, after.state.bad_in_a_row, after.state.n_updates) == (1, 1, 4)
    assert (last.state.bad_steps, last.state.bad_in_a_row, last.state.n_updates) == (1, 0, 9)
    assert (5, "step 4: a loss is not finite; nothing was updated (1 in a row)") in events(cfg)
    curve = {step: loss for kind, step, loss in losses(cfg) if kind == "train"}
    assert curve[5] == {}
    assert curve[10]["1"] < curve[1]["1"]


def test_after_too_many_bad_steps_the_run_goes_back_and_leaves_their_data_out(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path / "a", checkpoint={"every_steps": 2}, stability={"max_skips": 2})
    bad = (5 * 8, 3 * 8)  # the data of steps 5, 6 and 7: one more than may be skipped
    assert run_ranks(2, train_over_bad_data, cfg, *bad) == [0, 0]
    said = [event for _, event in events(cfg)]
    assert sum("nothing was updated" in event for event in said) == 3
    assert "rolled back from step 8 to 4; sequences 32 to 64 are left out" in said
    state = Reader(candidates(checkpoint_dir(cfg.run_dir))[0]).state
    assert (state.step, state.rollbacks, state.bad_steps, state.n_updates) == (10, 1, 3, 10)
    assert state.sequence == (8 + 6) * 8, "eight steps of data, then six for steps 4 to 9"
    assert [step for kind, step, _ in losses(cfg) if kind == "train"] == list(range(1, 11))
    assert all(loss for _, _, loss in losses(cfg)), "no step of the final curve is a skipped one"
    again = run_config(dataset, tmp_path / "b", checkpoint={"every_steps": 2}, stability={"max_skips": 2})
    run_ranks(2, train_over_bad_data, again, *bad)
    assert losses(again) == losses(cfg), "the same decisions, bitwise"


def train_over_bad_data_with_validations(cfg: RunConfig, values: list[float]) -> int:
    """The data of steps 5, 6 and 7 is bad; one validation after another says `values`, at every width."""
    left = iter(values)

    def told(model: Any, batches: Any, submodels: Any, ranks: Any) -> list[float]:
        return [next(left)] * len(submodels)

    language_task.submodel_losses = told
    return train_over_bad_data(cfg, 5 * 8, 3 * 8)


def test_what_the_run_went_back_over_takes_no_earlier_checkpoints_place(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(
        dataset,
        tmp_path,
        checkpoint={"every_steps": 2, "keep_last": 1, "keep_best": True},
        stability={"max_skips": 2},
        logging={"eval_every_steps": 2},
    )
    values = [9.0, 5.0, 1.0, 7.0, 8.0, 6.0]  # of steps 2, 4, 6, and again 6, 8, 10
    assert run_ranks(2, train_over_bad_data_with_validations, cfg, values) == [0, 0]
    best = {"step": 4, "loss": 5.0}
    assert read_best(checkpoint_dir(cfg.run_dir)) == {"1": best, "1/2": best, "1/4": best}
    assert steps_on_disk(cfg) == [4, 10]


def test_a_run_that_cannot_get_past_bad_steps_ends_on_all_ranks(dataset: Path, tmp_path: Path) -> None:
    stability = {"max_skips": 1, "max_rollbacks": 1}
    cfg = run_config(dataset, tmp_path, checkpoint={"every_steps": 2}, stability=stability)
    with pytest.raises(RankFailedError, match=r"2 bad steps in a row .* after 1 roll-backs") as caught:
        run_ranks(2, train_over_bad_data, cfg, 5 * 8, 1000)
    assert str(caught.value).count("NonFiniteError: step") == 2
    early = run_config(dataset, tmp_path / "early", checkpoint={"every_steps": 2}, stability=stability)
    with pytest.raises(RankFailedError, match="no checkpoint before them"):
        run_ranks(2, train_over_bad_data, early, 0, 1000)


@pytest.fixture(scope="module")
def one_checkpoint(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = run_config(dataset, tmp_path_factory.mktemp("one"), optim={"steps": 3}, parallel={"tensor": 2})
    run_ranks(2, train.main, cfg)
    return candidates(checkpoint_dir(cfg.run_dir))[0]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"])
def test_one_flipped_bit_in_any_file_is_noticed(name: str, one_checkpoint: Path) -> None:
    path = one_checkpoint / name
    draw = random.Random(name)
    for bit in [0, *(draw.randrange(path.stat().st_size * 8) for _ in range(60)), path.stat().st_size * 8 - 1]:
        flip(path, bit)
        if name != "manifest.json" or not _same_json(path):
            with pytest.raises(CheckpointError, match=name):
                Reader(one_checkpoint).verify()
        flip(path, bit)
    Reader(one_checkpoint).verify()


def _same_json(path: Path) -> bool:
    """Whether the manifest still means the same: a flipped bit may turn one white space into another."""
    try:
        manifest = json.loads(path.read_text())
        return bool(manifest["sha256"] == manifest_sha256(manifest))
    except (ValueError, KeyError):
        return False


def test_a_manifest_of_a_newer_version_is_refused(one_checkpoint: Path, tmp_path: Path) -> None:
    manifest = json.loads((one_checkpoint / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
    with pytest.raises(CheckpointError, match=r"format version 3, this code reads 1 to 2: use the code that wrote it"):
        Reader(tmp_path)


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_hostile_file_runs_nothing(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path, optim={"steps": 3})
    run_ranks(1, train.main, cfg)
    folder = candidates(checkpoint_dir(cfg.run_dir))[0]
    marker, weights = tmp_path / "code ran", folder / "rank_00000.safetensors"
    weights.write_bytes(pickle.dumps(Hostile(marker)) + bytes(weights.stat().st_size))  # as large as its pieces ask for
    with pytest.raises(FileNotFoundError):  # it does what it is made for
        pickle.loads(pickle.dumps(Hostile(marker / "x")))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0].update(bytes=weights.stat().st_size, sha256=file_sha256(weights))
    manifest["sha256"] = manifest_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    Reader(folder).verify()  # its author made it look whole
    again = run_config(dataset, tmp_path, optim={"steps": 4})
    with pytest.raises(RankFailedError, match=r"rank_00000.safetensors: .* cannot be read"):
        run_ranks(1, train.main, again)
    assert checkpoint_tool.main(["verify", str(folder)]) == 1
    assert not marker.exists()


def test_the_tool_inspects_verifies_and_consolidates(
    one_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    from modeling.language import LanguageModel
    from pretrain.checkpoint_model import load_language_model

    run_dir = one_checkpoint.parent.parent
    assert checkpoint_tool.main(["inspect", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    for part in ("step_00000003", "blocks.1.mixer.conv_bc", "rank_00001.safetensors", "tp 2 x dp 1"):
        assert part in shown
    assert checkpoint_tool.main(["verify", str(run_dir)]) == 0
    assert checkpoint_tool.main(["consolidate", str(run_dir), "-o", str(tmp_path), "--width", "1/4"]) == 0
    model, cfg = load_language_model(run_dir)
    small = LanguageModel(type(cfg.model)(**{**cfg.model.__dict__, "n_heads": 2, "widths": (2,)}))
    small.load_state_dict(load_file(tmp_path / "width_1of4.safetensors"))
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        expected = model.logits(model(ids, cfg.model.layer_widths(2)))
        assert torch.allclose(small.logits(small(ids, (2, 2))), expected, rtol=1e-5, atol=1e-6)
    capsys.readouterr()
    assert checkpoint_tool.main(["consolidate", str(run_dir), "-o", str(tmp_path), "--width", "1/3"]) == 2
    assert "1/3" in capsys.readouterr().err
    assert checkpoint_tool.main(["inspect", str(tmp_path)]) == 1
    damage(one_checkpoint / "rank_00001.safetensors")
    assert checkpoint_tool.main(["verify", str(run_dir)]) == 1
    assert "rank_00001.safetensors: contents do not match" in capsys.readouterr().out
    damage(one_checkpoint / "rank_00001.safetensors")


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (4, {"parallel": {"tensor": 2}}),
        (1, {}),
        (2, {"parallel": {"tensor": 2, "zero_stage": 2}}),
    ],
    ids=["dp 2 to tp 2 x dp 2", "dp 2 to 1", "dp 2 to tp 2, ZeRO 1 to 2"],
)
def test_the_loss_curve_goes_on_at_another_layout(
    world_size: int, changes: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    # Adam's eps is large enough that an update is smooth in the gradient: otherwise rounding flips its sign.
    common: dict[str, Any] = {"model": {"widths": [8, 4]}, "optim": {"lr": 1e-2, "steps": 10, "eps": 1e-3}}
    whole = run_config(dataset, tmp_path / "whole", **common, checkpoint={"every_steps": 5})
    run_ranks(2, train.main, whole)
    source = checkpoint_dir(whole.run_dir) / checkpoint.step_name(5)
    other = run_config(dataset, tmp_path / "other", **common, **changes, checkpoint={"resume": str(source)})
    run_ranks(world_size, train.main, other)
    expected = [entry for entry in losses(whole) if entry[1] > 5]
    assert [entry[:2] for entry in losses(other)] == [entry[:2] for entry in expected]
    for (_, step, actual), (_, _, wanted) in zip(losses(other), expected, strict=True):
        assert actual == pytest.approx(wanted, rel=1e-6), step


def test_compute_in_bf16_keeps_float32_state(dataset: Path, tmp_path: Path) -> None:
    first = run_config(dataset, tmp_path / "fp32", optim={"steps": 3}, precision="fp32")
    run_ranks(2, train.main, first)
    source = candidates(checkpoint_dir(first.run_dir))[0]
    loaded = run_config(
        dataset, tmp_path / "bf16", precision="bf16", checkpoint={"resume": str(source)}, optim={"steps": 3}
    )
    run_ranks(1, train.main, loaded)  # nothing left to do: what was loaded is saved by nobody
    assert steps_on_disk(loaded) == []
    further = run_config(dataset, tmp_path / "bf16", precision="bf16", checkpoint={"resume": str(source)})
    run_ranks(2, train.main, further)
    back = run_config(
        dataset, tmp_path / "back", precision="fp32", optim={"steps": 11},
        checkpoint={"resume": str(candidates(checkpoint_dir(further.run_dir))[0])},
    )  # fmt: skip
    run_ranks(1, train.main, back)
    assert losses(back)[-1][1] == 11


LOAD_AND_SAVE = """
import sys
from pretrain.config_io import load_config
from tests.distributed.test_train import state_after_loading
state_after_loading(load_config(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_from_cpu_to_gpu_and_back_no_bit_changes(dataset: Path, tmp_path: Path) -> None:
    """Trained in float32 on a CPU, loaded and saved with bfloat16 compute on a GPU, then on a CPU again."""
    config = tmp_path / "run.yaml"
    config.write_text(config_to_yaml(run_config(dataset, tmp_path / "cpu", optim={"steps": 3})))

    def python(*arguments: str, gpus: str) -> None:
        done = run_python(*arguments, timeout_s=200, CUDA_VISIBLE_DEVICES=gpus)
        assert done.returncode == 0, done.stderr[-2000:]

    python("-m", "pretrain", str(config), gpus="")
    first = newest = candidates(checkpoint_dir(tmp_path / "cpu"))[0]
    for name, gpus in (("gpu", "0"), ("cpu again", "")):
        overrides = [f"run_dir={tmp_path / name}", f"checkpoint.resume={newest}"]
        python("-c", LOAD_AND_SAVE, str(config), *overrides, gpus=gpus)
        newest = candidates(checkpoint_dir(tmp_path / name))[0]
        assert_same_checkpoint(first, newest)


def kill_at_random(cfg: RunConfig, draw: random.Random) -> bool:
    """Start two ranks and kill them with SIGKILL at a random moment after their first step; False if they finished."""
    metrics = Path(cfg.run_dir) / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    processes = start_ranks(2, train.main, cfg)
    while all(process.is_alive() for process in processes):
        if metrics.exists() and metrics.stat().st_mtime_ns > before and metrics.read_text():
            break
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 1.5))
    killed = any(process.is_alive() for process in processes)
    for process in draw.sample(processes, 2):
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    return killed


@pytest.mark.parametrize("n_rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.timeout(1200)
def test_killed_at_any_moment_the_run_goes_on_bitwise(n_rounds: int, dataset: Path, tmp_path: Path) -> None:
    steps, every = 40 * n_rounds, 3
    settings: dict[str, Any] = {
        "optim": {"lr": 1e-3, "steps": steps},
        "checkpoint": {"every_steps": every, "keep_last": 2},
        "logging": {"eval_every_steps": 0},
    }
    whole, parts = (run_config(dataset, tmp_path / name, **settings) for name in ("whole", "parts"))
    run_ranks(2, train.main, whole, timeout_s=600)
    draw = random.Random(n_rounds)
    n_killed = 0
    for _ in range(n_rounds):
        n_killed += kill_at_random(parts, draw)
        root = checkpoint_dir(parts.run_dir)
        for folder in candidates(root):
            Reader(folder).verify()  # what bears a checkpoint's name is whole
        trained = max((record["step"] for record in read_metrics(tmp_path / "parts" / "metrics.jsonl")), default=0)
        newest = steps_on_disk(parts)[-1] if steps_on_disk(parts) else 0
        assert trained - newest <= 2 * every, "one interval, and the one whose checkpoint was being written"
    assert n_killed >= n_rounds // 2, "too few rounds were killed for this to mean anything"
    assert run_ranks(2, train.main, parts, timeout_s=600) == [0, 0]
    assert losses(parts) == losses(whole)
