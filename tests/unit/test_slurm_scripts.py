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

    def container(self, then: str) -> dict[str, str]:
        """A stand-in of apptainer, which refuses as the real one does, and the settings that ask for it."""
        (self.folder / "image.sif").touch()
        refuse = """IFS=, read -ra binds <<< "$4"
for bind in "${binds[@]}"; do
  source=${bind%%:*}
  [[ $source == /* && ${bind#*:} == "$source" && -e $source ]] || { echo "no mount $bind" >&2; exit 255; }
done
"""
        self.stand_in("apptainer", refuse + then)
        return {"CONTAINER": str(self.folder / "image.sif")}

    def mounts(self) -> list[set[Path]]:
        """What each container that was started had mounted."""
        calls = [call.split(" --bind ")[1].split(" --pwd ")[0] for call in self.calls("apptainer exec")]
        return [{Path(bind.split(":")[0]) for bind in call.split(",")} for call in calls]

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


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_that_ends_ranks_that_do_not_listen_yet_is_no_crash(site: Site, name: str) -> None:
    site.stand_in("srun", f"kill -{name} $PPID\nexec sleep 30")  # handed on, it ends this
    site.stand_in("scontrol", 'echo "JobId=70 JobState=RUNNING Reason=None"')
    for _ in range(3):
        done = site.run("pretrain_1b4.sh", CONFIG=str(site.config), **JOB)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(site.calls("scontrol requeue")) == 3
    assert "told to stop before it could save" in read_events(site.run_dir)[-1]["why"]


@pytest.mark.parametrize(("launcher", "n_cores"), [("srun", 8), ("torchrun", 32)])
def test_a_rank_has_as_many_cores_by_either_launcher(site: Site, launcher: str, n_cores: int) -> None:
    """torchrun's one task a node holds all of the node's ranks: 4 of 8 cores."""
    site.stand_in("srun", f'echo "cores $SRUN_CPUS_PER_TASK" >> "{site.folder}/calls.txt"')
    site.stand_in("scontrol", 'echo "JobId=70 JobState=RUNNING Reason=None"')
    job = {**JOB, "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "8", "LAUNCHER": launcher}
    done = site.run("pretrain_1b4.sh", "data.tokens_per_step=512", CONFIG=str(site.config), **job)
    assert done.returncode == 0, done.stderr
    assert site.calls("cores") == [f"cores {n_cores}"]


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


def from_root(path: Path) -> str:
    """Relative paths in settings are the repository's."""
    return os.path.relpath(path, ROOT)


def test_a_container_gets_config_data_and_a_new_runs_folder(site: Site) -> None:
    inside = site.container(f'exec "{sys.executable}" "${{@:9}}"')
    site.stand_in("srun")
    site.stand_in("scontrol", 'echo "JobId=70 JobState=RUNNING Reason=None"')
    run_dir, scratch = site.folder / "new" / "run", site.folder / "scratch"
    scratch.mkdir()
    settings = {"CONFIG": from_root(site.config), "DATA": from_root(site.shards), "RUN_DIR": from_root(run_dir)}
    settings["TMPDIR"] = str(scratch)
    checked = site.run("pretrain_1b4.sh", **settings, **inside, NODES="1", TASKS_PER_NODE="1")
    assert checked.returncode == 0, checked.stderr
    assert site.mounts() == [{ROOT, site.shards, site.config}]
    assert not run_dir.exists(), "a check writes nothing"
    done = site.run("pretrain_1b4.sh", **settings, **inside, **JOB)
    assert done.returncode == 0, done.stderr
    job = {ROOT, site.shards, site.config, run_dir, scratch}
    assert site.mounts()[1:] == [job] * 2  # begin and end; srun starts the ranks
    (ranks,) = site.calls("srun")
    assert f"-m pretrain {site.config} data.path={site.shards} run_dir={run_dir}" in ranks
    assert f"--bind {ROOT}:{ROOT},{site.shards}:{site.shards}," in ranks


def test_a_container_gets_what_each_script_reads_and_writes(site: Site) -> None:
    inside = {**site.container("exit 0"), **JOB}
    site.stand_in("scontrol")
    model, out, scratch = site.run_dir, site.folder / "exports" / "quarter", site.folder / "scratch"
    model.mkdir()
    scratch.mkdir()
    inside["TMPDIR"] = str(scratch)
    for script, arguments in (("evaluate.sh", ()), ("export.sh", ("-o", from_root(out), "--width", "1/4"))):
        done = site.run(script, *arguments, MODEL=from_root(model), DATA=str(site.shards), **inside)
        assert done.returncode == 0, done.stderr
    assert site.mounts() == [{ROOT, site.shards, model, scratch}, {ROOT, site.shards, model, out.parent, scratch}]
    evaluate, export = site.calls("apptainer")
    assert evaluate.endswith(f"-m pretrain.evaluate {model} --data {site.shards}")
    assert export.endswith(f"-m modeling.export {model} --width 1/4 -o {out}")


def test_a_container_gets_the_texts_the_tokenizer_and_the_output(site: Site) -> None:
    inside = {**site.container("exit 0"), **JOB, "TMPDIR": ""}
    site.stand_in("scontrol")
    texts, cache, out = (site.folder / name for name in ("texts", "cache", "tokens"))
    (texts / "a").mkdir(parents=True)
    (texts / "a" / "some.parquet").touch()
    cache.mkdir()
    (cache / "0123abcd").touch()
    (cache / "tokenizer.json").symlink_to("0123abcd")
    settings = {"INPUT": from_root(texts) + "/[ab]/*.parquet", "TOKENIZER": from_root(cache / "tokenizer.json")}
    assert "settings are fine" in site.run("tokenize_fineweb.sh", OUTPUT=from_root(out), **settings).stdout
    assert not out.exists()
    done = site.run("tokenize_fineweb.sh", OUTPUT=from_root(out), **settings, **inside)
    assert done.returncode == 0, done.stderr
    job = {ROOT, Path("/tmp")}
    assert site.mounts() == [{*job, texts, cache / "tokenizer.json", out}] * 2
    encode, merge = site.calls("apptainer")
    assert encode.endswith(f"--input {texts}/[ab]/*.parquet --tokenizer {cache}/tokenizer.json --output {out}")
    assert merge.endswith(f"--output {out} --merge")
    hub = {"INPUT": "HuggingFaceFW/fineweb", "TOKENIZER": "tiktoken:gpt2", "OUTPUT": str(out)}
    assert site.run("tokenize_fineweb.sh", **hub, **inside).returncode == 0
    assert site.mounts()[2] == {*job, out}
    assert " --input HuggingFaceFW/fineweb --tokenizer tiktoken:gpt2 " in site.calls("apptainer")[2]


def test_what_cannot_be_mounted_is_said(site: Site) -> None:
    inside = site.container("exit 0")
    (site.folder / "a,b").mkdir()
    done = site.run("evaluate.sh", MODEL=str(site.folder / "a,b"), **inside)
    assert (done.returncode, "a path with a comma or a colon cannot be mounted" in done.stderr) == (2, True)
    done = site.run("evaluate.sh", MODEL=str(site.folder / "none"), **inside)
    assert (done.returncode, "no such folder" in done.stderr) == (2, True)
    done = site.run("export.sh", MODEL=str(site.folder), **inside)
    assert (done.returncode, "-o DIR is not given" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("there", "asked", "found"),
    [
        ("a.parquet", "texts", True),
        ("a.parquet", "texts/*.parquet", True),
        ("a.parquet", "texts/**/*.parquet", True),  # no folder between them is one of the ways to match
        ("two words.jsonl", "texts/two *.jsonl", True),
        ("a.parquet", "texts/*.jsonl", False),
        ("a.parquet", "texts/b.parquet", False),  # its folder is there, so it is no name of the hub's
        ("a.parquet", "elsewhere/*.parquet", False),
        ("a.parquet", "/none/b.parquet", False),
        ("a.parquet", "OWNER/name", True),
        ("a.parquet", "hf://datasets/OWNER/name", True),
    ],
)
def test_an_input_that_is_not_there_is_said_before_the_job(site: Site, there: str, asked: str, found: bool) -> None:
    """What corpus_files finds, the script takes, and nothing else."""
    (site.folder / "texts").mkdir()
    (site.folder / "texts" / there).touch()
    (site.folder / "slurm").symlink_to(ROOT / "slurm")
    settings = {"INPUT": asked, "TOKENIZER": "tiktoken:gpt2", "OUTPUT": str(site.folder / "out")}
    done = site.run("tokenize_fineweb.sh", **settings, MATMAMBA_ROOT=str(site.folder))
    assert (done.returncode, f"INPUT={asked}: no such file" in done.stderr) == ((0, False) if found else (2, True))


def test_a_tokenizer_or_data_that_is_not_there_is_said_before_the_job(site: Site) -> None:
    settings = {"INPUT": str(site.folder), "OUTPUT": str(site.folder / "out"), "TOKENIZER": "/none/tokenizer.json"}
    done = site.run("tokenize_fineweb.sh", **settings)
    assert (done.returncode, "TOKENIZER=/none/tokenizer.json: no such file" in done.stderr) == (2, True)
    done = site.run("evaluate.sh", MODEL=str(site.folder), DATA="/none/shards")
    assert (done.returncode, "DATA=/none/shards: no such folder" in done.stderr) == (2, True)
    assert site.run("evaluate.sh", MODEL=str(site.folder), DATA="s3://bucket/shards").returncode == 0


def test_the_sweep_refuses_a_run_dir(site: Site) -> None:
    done = site.run("scaling_sweep.sh", RUN_DIR=str(site.run_dir))
    assert (done.returncode, f"RUN_DIR={site.run_dir}: every run of the sweep has its own" in done.stderr) == (2, True)
    assert "SWEEP_DIR" in done.stderr
