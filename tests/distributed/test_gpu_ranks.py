"""On two and four GPUs, through torchrun and NCCL: every layout trains as one GPU does, and a killed rank's run goes on on
other numbers of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling import tensor_parallel
from pretrain import train
from pretrain.config_io import config_to_yaml, load_config
from pretrain.metrics import read_metrics
from tests.distributed.harness import run_python
from tests.distributed.toy_run import losses, run_config, signal_in_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="waits for two CUDA GPUs"),
]

MODEL = {"d_model": 128, "headdim": 16, "d_state": 16, "chunk_size": 64, "widths": [16, 8, 4]}
DATA = {"micro_batch": 4, "tokens_per_step": 512}
LAYOUTS = [
    pytest.param(["parallel.tensor=2"], id="tp 2"),
    pytest.param(["parallel.tensor=2", "parallel.sequence=true"], id="tp 2, sequence"),
    pytest.param(
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.gathered_width=0"], id="tp 2, sequence, split"
    ),
    pytest.param(["parallel.tensor=2", "parallel.activation_checkpointing=block"], id="tp 2, block"),
    pytest.param([], id="dp 2"),
    pytest.param(["parallel.zero_stage=2"], id="dp 2, ZeRO 2"),
]
FOUR = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="waits for four CUDA GPUs")
LAYOUTS_OF_FOUR = [
    pytest.param(["parallel.tensor=4", "parallel.sequence=true"], id="tp 4, sequence"),
    pytest.param(
        ["parallel.tensor=4", "parallel.sequence=true", "parallel.gathered_width=0"], id="tp 4, sequence, split"
    ),
    pytest.param(["parallel.tensor=2", "parallel.sequence=true"], id="tp 2, sequence, dp 2"),
    pytest.param([], id="dp 4"),
]


def start_run(gpus: int, module: str, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """A run on the first `gpus` GPUs: under torchrun, or as one plain process."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m"] if gpus > 1 else []
    settings |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus))), "LOST_SECONDS": "5", "OMP_NUM_THREADS": "1"}
    return run_python("-m", *launcher, module, *arguments, timeout_s=400, **settings)


def said(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module", params=["bf16", "fp32", "fp8"])
def config(request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16 runs on our kernels, fp32 on the plain path, fp8 with their projections in float8."""
    folder = tmp_path_factory.mktemp("run")
    cfg = run_config(
        dataset, folder / "unused", model=MODEL, data=DATA, precision=request.param, checkpoint={"every_steps": 5}
    )
    path = folder / "run.yaml"
    path.write_text(config_to_yaml(cfg))
    return path


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one GPU."""
    folder = tmp_path_factory.mktemp("alone")
    done = start_run(1, "pretrain", config, f"run_dir={folder}")
    assert done.returncode == 0, said(done)
    return folder


def assert_trained_alike(config: Path, folder: Path, alone: Path) -> None:
    """Ten steps of a large learning rate, on other shares of heads or sequences: the same but for rounding."""
    runs = [load_config(config, [f"run_dir={path}"]) for path in (folder, alone)]
    found, expected = (losses(run) for run in runs)
    assert [key for *key, _ in found] == [key for *key, _ in expected]
    bound = {"fp32": 1e-4, "bf16": 1e-2, "fp8": 3e-2}[runs[0].precision]
    for (*key, mine), (*_, theirs) in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=bound), key
    first, theirs = (read_metrics(path / "metrics.jsonl")[0]["grad_norm"] for path in (folder, alone))
    assert first == pytest.approx(theirs, rel=bound), "the gradient before any update"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_one_gpu(layout: list[str], config: Path, alone: Path, tmp_path: Path) -> None:
    train_on(2, layout, config, alone, tmp_path)


@FOUR
@pytest.mark.parametrize("layout", LAYOUTS_OF_FOUR)
def test_a_layout_of_four_trains_as_one_gpu(layout: list[str], config: Path, alone: Path, tmp_path: Path) -> None:
    train_on(4, layout, config, alone, tmp_path)


def train_on(gpus: int, layout: list[str], config: Path, alone: Path, tmp_path: Path) -> None:
    done = start_run(gpus, "tests.distributed.test_gpu_ranks", config, f"run_dir={tmp_path}", *layout)
    assert done.returncode == 0, said(done)
    captured = "parallel.zero_stage=2" not in layout
    assert ("passes: CUDA graphs" in done.stdout + done.stderr) is captured
    assert "capturing one failed" not in done.stdout + done.stderr
    assert_trained_alike(config, tmp_path, alone)


SEQUENCE = ["parallel.tensor=2", "parallel.sequence=true"]


@pytest.mark.parametrize(
    ("layout", "gpus", "onward"),
    [
        pytest.param(["parallel.tensor=2"], 1, [], id="tp 2 to one"),
        pytest.param([], 1, [], id="dp 2 to one"),
        pytest.param(SEQUENCE, 1, [], id="tp 2, sequence, to one"),
        pytest.param(SEQUENCE, 4, ["parallel.tensor=4", "parallel.sequence=true"], id="tp 2 to tp 4", marks=FOUR),
    ],
)
def test_a_killed_ranks_run_goes_on_on_other_gpus(
    layout: list[str], gpus: int, onward: list[str], config: Path, alone: Path, tmp_path: Path
) -> None:
    """Rank 1 dies in step 8, after the save at 5; others take it from there, on the same data."""
    # Three steps take a GPU milliseconds: a save that is written meanwhile may not be whole when the rank dies.
    saved = "checkpoint.asynchronous=false"
    arguments = [config, f"run_dir={tmp_path}", saved, *layout]
    killed = start_run(2, "tests.distributed.test_gpu_ranks", *arguments, DIE_IN_STEP="7")
    assert killed.returncode != 0, "a rank was killed"
    assert "Signal 9 (SIGKILL)" in said(killed)
    assert max(record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")) < 8
    done = start_run(gpus, "pretrain", config, f"run_dir={tmp_path}", *onward)
    assert done.returncode == 0, said(done)
    assert "step_00000005: step 5," in "".join(said(done).splitlines()), "resumed from the save, not from the start"
    assert_trained_alike(config, tmp_path, alone)


if __name__ == "__main__":
    # A run as `python -m pretrain` starts it, but that mixers' outputs go out in halves at a test's size as well.
    tensor_parallel.LEAST_SPLIT = 2
    if "DIE_IN_STEP" in os.environ:
        signal_in_step(signal.SIGKILL, int(os.environ["DIE_IN_STEP"]), rank=1)
    sys.exit(train.main(load_config(sys.argv[1], sys.argv[2:])))
