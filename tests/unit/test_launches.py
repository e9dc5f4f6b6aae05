"""Launch settings: which GPU reads which, what a search keeps, and what is no such file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modeling.ops.kernels import launches, tiles, tune

OTHER = {"outputs": {32: {"num_warps": 8, "num_stages": 5}}}
GPU = "NVIDIA B200"


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine with a GPU that no settings are shipped for, and nothing kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    launches._found.cache_clear()
    yield
    launches._found.cache_clear()


def outputs_launch() -> dict[str, int]:
    return tiles.launch_of("outputs", 32, torch.bfloat16)


def test_what_a_search_kept_is_read_where_it_was_made() -> None:
    assert outputs_launch() == tiles.LAUNCH["outputs"][32]
    assert "modeling.ops.kernels.tune" in launches.origin()
    launches.write(launches.kept_at(GPU), OTHER, gpu=GPU)
    launches._found.cache_clear()
    assert outputs_launch() == OTHER["outputs"][32]
    assert tiles.launch_of("outputs", 64, torch.bfloat16) == tiles.LAUNCH["outputs"][64], "what was not reached"
    assert str(launches.kept_at(GPU)) in launches.origin()


def test_gpus_with_shipped_settings_read_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "NVIDIA H200"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    launches.write(launches.kept_at(name), OTHER, gpu=name)
    assert outputs_launch() == tiles.LAUNCH["outputs"][32]
    assert "tune" not in launches.origin()


def test_settings_are_kept_by_gpu_and_by_the_kernels_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    here = launches.kept_at(GPU)
    assert launches.kept_at("NVIDIA B300") != here
    monkeypatch.setattr(launches, "SOURCES", launches.SOURCES[:1])
    assert launches.kept_at(GPU) != here


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"launches": {"outputs": {"32": {"warps": 4}}}}',
        '{"launches": {"outputs": {"32": {"num_warps": "4"}}}}',
        '{"launches": {"outputs": {"32": {"num_warps": -4}}}}',
        '{"launches": {"outputs": {"wide": {"num_warps": 4}}}}',
    ],
)
def test_what_is_no_such_file_is_refused_by_name(text: str) -> None:
    path = launches.kept_at(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: no launch settings .*: delete it"):
        launches.origin()


class Kernel:
    """Runs that take what `seconds` says of the settings in use, and make `results`."""

    def __init__(self, seconds: dict[int, float], results: dict[int, float]) -> None:
        self.seconds, self.results, self.tried = seconds, results, list[int]()

    def run(self) -> Tensor:
        stages = outputs_launch()["num_stages"]
        if stages not in self.results:
            raise RuntimeError("out of shared memory")
        return torch.full((3,), self.results[stages])

    def timed(self, _: object) -> float:
        stages = outputs_launch()["num_stages"]
        self.tried.append(stages)
        return self.seconds[stages]


def settings(*stages: int) -> list[dict[str, int]]:
    return [{"num_warps": 4, "num_stages": n} for n in stages]


def test_the_fastest_that_is_right_and_runs_is_kept() -> None:
    kernel = Kernel({1: 3.0, 2: 1.0, 4: 2.0, 5: 2.5}, {1: 1.0, 2: 1.1, 4: 1.001, 5: 1.0})  # 2 is wrong, 3 does not run
    best = tune.best_of("outputs", 32, kernel.run, settings(1, 2, 3, 4, 5), lambda: False, kernel.timed)
    assert best == ({"num_warps": 4, "num_stages": 4}, 2.0, 3.0)
    assert outputs_launch() == tiles.LAUNCH["outputs"][32], "a trial is over"


def test_a_search_ends_in_time() -> None:
    kernel = Kernel(dict.fromkeys((1, 2, 3), 1.0), dict.fromkeys((1, 2, 3), 1.0))
    tune.best_of("outputs", 32, kernel.run, settings(1, 2, 3), lambda: len(kernel.tried) >= 2, kernel.timed)
    assert kernel.tried == [1, 2]


def test_every_kernel_that_has_settings_is_searched() -> None:
    assert tune.CANDIDATES.keys() == tiles.LAUNCH.keys()
    assert all(choice.keys() <= launches.SETTINGS for choices in tune.CANDIDATES.values() for choice in choices)
