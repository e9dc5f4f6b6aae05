"""The scripts of slurm/ as bash runs them, with stand-ins for what a cluster has: each notes how it was called.

tests/slurm submits the same files to real daemons.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config_io import config_to_yaml
from pretrain.restarts import read_events
from tests.datasets import write_token_dataset
from tests.distributed.toy_run import run_config

ROOT = Path(__file__).resolve().parents[2]


class Site:
    """A folder with a run's config, its shards, and stand-ins of programs in `bin`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.shards = write_token_dataset(folder / "shards")
        self.config = folder / "run.yaml"
        self.config.write_text(config_to_yaml(run_config(self.shards, self.run_dir)))

    def stand_in(self, program: str, body: str = "") -> None:
        """`program` notes its arguments in calls.txt and runs `body`."""
        path = self.bin / program
        path.write_text(f'#!/usr/bin/env bash\necho "{program} $*" >> "{self.folder}/calls.txt"\n{body}\n')
        path.chmod(0o755)

    def calls(self, beginning: str) -> list[str]:
        """Calls so far that begin so."""
        lines = (self.folder / "calls.txt").read_text().splitlines()
        return [line for line in lines if line.startswith(beginning)]

    def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """`script` called by bash in the site's folder."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        environment |= {"PATH": f"{self.bin}:{environment['PATH']}", "MATMAMBA_ROOT": str(ROOT), "VENV": sys.prefix}
        return subprocess.run(
            ["bash", str(ROOT / "slurm" / script), *arguments],
            cwd=self.folder, env=environment | settings, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


JOB = {"SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
ARRAY = """if [[ $* == "show job 70 -o" ]]; then
  echo "JobId=70 ArrayJobId=70 ArrayTaskId=1 JobState=RUNNING Reason=None"
  echo "JobId=71 ArrayJobId=70 ArrayTaskId=0 JobState=PENDING Reason=None"
elif [[ $* == "show job 70_1 -o" ]]; then
  echo "JobId=70 ArrayJobId=70 ArrayTaskId=1 JobState=RUNNING Reason=None"
fi"""


def test_the_task_that_has_the_arrays_number_requeues_itself_alone(site: Site) -> None:
    site.stand_in("srun", "exit 75")
    site.stand_in("scontrol", ARRAY)
    settings = {"CONFIG": str(site.config), "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}
    done = site.run("pretrain_1b4.sh", **JOB, **settings)
    assert done.returncode == 0, done.stderr
    assert site.calls("scontrol requeue") == ["scontrol requeue 70_1"]


@pytest.mark.parametrize("answers_at", [3, 99])
def test_a_controller_that_does_not_answer_is_asked_again(site: Site, answers_at: int) -> None:
    site.stand_in("srun", "exit 75")
    site.stand_in("sleep")
    asked = f'[[ $1 == show ]] && (( $(grep -c "^scontrol show job" "{site.folder}/calls.txt") >= {answers_at} ))'
    site.stand_in("scontrol", f'{asked} && echo "JobId=70 JobState=CANCELLED Reason=None"; [[ $1 != show ]]')
    done = site.run("pretrain_1b4.sh", CONFIG=str(site.config), **JOB)
    # Cancelled, it stays so; without any answer, the requeue is tried.
    assert done.returncode == (75 if answers_at == 3 else 0), done.stderr
    assert len(site.calls("scontrol show job")) == min(answers_at, 5)
    assert len(site.calls("scontrol requeue")) == (0 if answers_at == 3 else 1)
    assert read_events(site.run_dir)[-1]["requeue"] is (answers_at == 99)


@pytest.mark.parametrize("job", [{}, {**JOB, "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "0"}], ids=len)
def test_a_config_in_the_environment_does_not_replace_the_grids(site: Site, job: dict[str, str]) -> None:
    site.stand_in("srun", "exit 75")
    site.stand_in("scontrol", ARRAY)
    grid = site.folder / "grid.txt"
    grid.write_text(f"only {site.config}\n")
    settings = {"GRID": str(grid), "SWEEP_DIR": str(site.run_dir), "NODES": "1", "TASKS_PER_NODE": "1"}
    if not job:
        assert site.run("scaling_sweep.sh", **settings).returncode == 0
    done = site.run("scaling_sweep.sh", CONFIG=str(site.config), **settings, **job)
    assert done.returncode == 2
    assert f"CONFIG={site.config} would replace the config of every run" in done.stderr
    assert not site.run_dir.exists()
