"""The scripts that users submit, on a real Slurm: geometry, a run interrupted in every way, and what must not go on.

The training inside is a two-layer model on CPU ranks; scripts, signals, requeueing and node names are the real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from data_prep.image_schema import ImageManifest
from data_prep.shard_schema import read_manifest
from pretrain.metrics import read_metrics
from pretrain.restarts import read_events
from tests.datasets import write_image_dataset, write_token_dataset
from tests.slurm.cluster import Cluster, missing, wait_for
from tests.unit.corpus import byte_level_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name != "common.sh")
PRETRAIN = [name for name in SCRIPTS if name.startswith("pretrain_")]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm here: {missing()}"),
    pytest.mark.timeout(560),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's folder: munge wants a path to its socket that everybody may enter.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder), 4)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with spaces in its name: token shards and a run's config."""
    site = tmp_path_factory.mktemp("my site") / "with spaces"
    site.mkdir()
    write_token_dataset(site / "shards", vocab_size=64, row_tokens=32, n_rows=48)
    config = {
        "run_dir": str(site / "run"),
        "model": {
            "n_layers": 2, "d_model": 32, "headdim": 8, "d_state": 8, "widths": [8, 4], "chunk_size": 16, "vocab_size": 64,
        },
        "data": {"path": "nowhere", "seq_len": 32, "tokens_per_step": 256, "micro_batch": 2, "n_workers": 0},
        "optim": {"lr": 1e-2, "steps": 240, "warmup_steps": 2},
        "checkpoint": {"every_steps": 40, "keep_last": 3},
        "logging": {"every_steps": 1, "eval_every_steps": 120, "eval_sequences": 8},
    }  # fmt: skip
    (site / "tiny run.yaml").write_text(yaml.safe_dump(config))
    return site


def variables(site: Path, run_dir: Path) -> dict[str, str]:
    """What a user exports to run the 1.4B script's own file on two nodes of CPU ranks."""
    return {
        "MATMAMBA_ROOT": str(ROOT),
        "VENV": sys.prefix,
        "CONFIG": str(site / "tiny run.yaml"),
        "DATA": str(site / "shards"),
        "RUN_DIR": str(run_dir),
        "NODES": "2",
        "TASKS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }


def submit(
    cluster: Cluster, site: Path, run_dir: Path, *overrides: str, options: tuple[str, ...] = (), **more: str
) -> str:
    script = ROOT / "slurm" / "pretrain_1b4.sh"
    return cluster.sbatch(
        script,
        *overrides,
        options=options,
        cwd=site,
        TMPDIR=str(cluster.scratch),
        **{**variables(site, run_dir), **more},
    )


def called_by_bash(site: Path, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """What the script says outside a job."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / script), *arguments],
        cwd=site, env=environment | settings, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def log(site: Path, job: str) -> str:
    return (site / f"slurm-{job}.out").read_text()


def losses(run_dir: Path) -> dict[int, dict[str, float]]:
    return {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train"}


def step_of(run_dir: Path) -> int:
    try:
        return max(losses(run_dir), default=-1)
    except FileNotFoundError:
        return -1


def ranks_of(job: str) -> list[int]:
    """Process numbers of the job's training ranks."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            env = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            f"SLURM_JOB_ID={job}".encode() in env
            and command[1:3] == [b"-m", b"pretrain"]
            and b"SLURM_PROCID=" in b" ".join(env)
        ):
            found.append(int(process.name))
    return found


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, site: Path) -> dict[int, dict[str, float]]:
    """The loss curve of a run that nothing disturbs, at two ranks on two nodes."""
    job = submit(cluster, site, site / "whole run")
    try:
        cluster.wait_job(job)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log(site, job)}") from None
    assert "on n[1-4]" in log(site, job)
    curve = losses(site / "whole run")
    assert sorted(curve) == list(range(1, 241))
    return curve


@pytest.mark.parametrize("script", SCRIPTS)
def test_geometry_is_accepted(cluster: Cluster, script: str) -> None:
    command = ["sbatch", "--test-only", str(ROOT / "slurm" / script)]
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    files = sorted(str(path) for path in (ROOT / "slurm").glob("*.sh"))
    done = subprocess.run(
        ["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout


def by_time_limit(cluster: Cluster, job: str, run_dir: Path) -> None:
    """What --signal=B:USR1@300 does: USR1 to the batch shell alone."""
    cluster.run("scancel", "--signal=USR1", "--batch", job)


def by_preemption(cluster: Cluster, job: str, run_dir: Path) -> None:
    urgent = cluster.run(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 3",
    )
    cluster.wait_job(urgent.strip(), timeout_s=120)


def by_requeue(cluster: Cluster, job: str, run_dir: Path) -> None:
    cluster.run("scontrol", "requeue", job)


def by_killing_a_rank(cluster: Cluster, job: str, run_dir: Path) -> None:
    wait_for("a checkpoint", (run_dir / "checkpoints" / "latest").exists, 60)
    subprocess.run(["kill", f"-{signal.SIGKILL.value}", str(ranks_of(job)[0])], check=True)


def by_killing_a_node(cluster: Cluster, job: str, run_dir: Path) -> None:
    node = cluster.job(job)["BatchHost"]
    cluster.kill_node(node)
    wait_for("the job to leave the node", lambda: cluster.job(job)["JobState"] != "RUNNING", 90)
    cluster.start_node(node)


Interruption = Callable[[Cluster, str, Path], None]


@pytest.mark.parametrize(
    "interrupt",
    [
        by_time_limit,
        by_killing_a_rank,
        pytest.param(by_preemption, marks=pytest.mark.slow),
        pytest.param(by_requeue, marks=pytest.mark.slow),
        pytest.param(by_killing_a_node, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_with_the_same_curve(
    cluster: Cluster, site: Path, uninterrupted: dict[int, dict[str, float]], interrupt: Interruption
) -> None:
    run_dir = site / interrupt.__name__
    job = submit(cluster, site, run_dir)
    wait_for("some steps", lambda: step_of(run_dir) >= 45, 120)
    interrupt(cluster, job, run_dir)
    wait_for("the second start", lambda: int(cluster.job(job)["Restarts"]) >= 1, 120)
    cluster.wait_job(job)
    starts = [event["step"] for event in read_events(run_dir) if event["event"] == "start"]
    # Slurm may preempt the second start too, while the urgent job is still being placed.
    assert len(starts) == 2 or (interrupt is by_preemption and len(starts) > 2), log(site, job)
    assert starts[1] >= 40, "the second start began from nothing"
    assert losses(run_dir) == uninterrupted


def test_every_task_of_an_array_requeues_itself(cluster: Cluster, site: Path, tmp_path: Path) -> None:
    """At the time limit; one of them has the array's own number, which names them all."""
    config = tmp_path / "tiny.yaml"  # a grid's words are separated by spaces, so a config's path has none
    shutil.copyfile(site / "tiny run.yaml", config)
    runs = [site / "array" / name for name in ("first", "second")]
    (tmp_path / "grid.txt").write_text("".join(f"{run.name} {config} optim.steps=100000\n" for run in runs))
    settings = {**variables(site, site), "GRID": str(tmp_path / "grid.txt"), "SWEEP_DIR": str(runs[0].parent)}
    del settings["CONFIG"], settings["RUN_DIR"]
    array = cluster.sbatch(
        ROOT / "slurm" / "scaling_sweep.sh",
        options=["--array=0-1", "--nodes=1"],
        cwd=site,
        TMPDIR=str(cluster.scratch),
        **{**settings, "NODES": "1"},
    )
    tasks = [f"{array}_{i}" for i in range(len(runs))]
    try:
        wait_for("some steps", lambda: min(map(step_of, runs)) >= 3, 120)
        assert array in [cluster.job(task)["JobId"] for task in tasks]
        for task, run in zip(tasks, runs, strict=True):
            by_time_limit(cluster, task, run)
        wait_for("the second starts", lambda: all(len(read_events(run)) >= 3 for run in runs), 120)
        assert [cluster.job(task)["Restarts"] for task in tasks] == ["1", "1"]
    finally:
        cluster.run("scancel", array)
    for run in runs:
        first, end, second = read_events(run)[:3]
        assert (end["code"], end["requeue"]) == (75, True)
        assert second["step"] == end["step"] > first["step"]
    wait_for("the array", lambda: not cluster.run("squeue", "-h", "-j", array, "-o", "%i"), 60)


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, site: Path) -> None:
    run_dir = site / "cancelled"
    job = submit(cluster, site, run_dir, "optim.steps=100000")
    wait_for("some steps", lambda: step_of(run_dir) >= 3, 120)
    cluster.run("scancel", job)
    assert cluster.wait_job(job, ["CANCELLED"])["Restarts"] == "0"
    wait_for("its ranks to end", lambda: not ranks_of(job), 60)
    time.sleep(2)
    assert cluster.job(job)["JobState"] == "CANCELLED"


def test_a_run_that_crashes_at_once_stops(cluster: Cluster, site: Path) -> None:
    run_dir = site / "crashing"
    shards = site / "broken shards"
    shutil.copytree(site / "shards", shards)
    for index in (shards / "train").glob("index.json"):
        index.unlink()
    job = submit(cluster, site, run_dir, DATA=str(shards))
    ended = cluster.wait_job(job, ["FAILED"])
    assert ended["Restarts"] == "1", "one more try, then no more"
    assert "crash loop: 2 starts in a row" in log(site, job)


@pytest.mark.parametrize(
    ("more", "overrides", "says"),
    [
        ({"CONFIG": "no such.yaml"}, (), "no such.yaml"),
        ({"DATA": "/no/such/shards"}, (), "has no folder train"),
        ({}, ("optim.lrr=1",), "lrr"),
        ({"VENV": "/no/venv"}, (), "no Python at /no/venv/bin/python"),
        ({"CONTAINER": "/no/image.sif"}, (), "CONTAINER=/no/image.sif: no such image"),
        ({"TASKS_PER_NODE": "many"}, (), "TASKS_PER_NODE=many: must be a positive whole number"),
        ({"LAUNCHER": "mpirun"}, (), "LAUNCHER=mpirun: must be srun or torchrun"),
        ({"MATMAMBA_ROOT": "/tmp"}, (), "no slurm/common.sh in /tmp"),
        ({}, ("data.seq_len=64", "data.tokens_per_step=512"), "does not divide the dataset's rows of 32 tokens"),
        ({}, ("data.tokens_per_step=288",), "not a multiple of data-parallel size 2 x data.micro_batch=2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("submitted", [True, False], ids=["submitted", "checked first"])
def test_misuse_is_said_before_anything_runs(
    cluster: Cluster, site: Path, more: dict[str, str], overrides: tuple[str, ...], says: str, submitted: bool
) -> None:
    if not submitted:
        done = called_by_bash(site, "pretrain_1b4.sh", *overrides, **{**variables(site, site / "never"), **more})
        assert done.returncode == 2
        assert says in done.stderr
        assert not (site / "never").exists()
        return
    job = submit(cluster, site, site / "never", *overrides, **more)
    ended = cluster.wait_job(job, ["FAILED"], timeout_s=60)
    assert says in log(site, job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")


def test_what_is_fine_is_said_without_submitting(site: Path, tmp_path: Path) -> None:
    done = called_by_bash(site, "pretrain_1b4.sh", "optim.lr=3e-4", **variables(site, tmp_path / "run"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "settings are fine: sbatch" in done.stdout
    assert not (tmp_path / "run").exists()
    unset = variables(site, tmp_path / "run")
    unset["DATA"] = str(
        write_token_dataset(tmp_path / "shards", row_tokens=1024, n_rows=1, tokenizer_name="tiktoken:gpt2")
    )
    del unset["CONFIG"]  # the script's own 1.4B: 32 ranks, as its #SBATCH lines ask for
    del unset["NODES"], unset["TASKS_PER_NODE"]
    assert called_by_bash(site, "pretrain_1b4.sh", **unset).returncode == 0
    done = called_by_bash(site, "pretrain_1b4.sh", "data.micro_batch=32", **unset)
    assert done.returncode == 2
    assert "not a multiple of data-parallel size 32 x data.micro_batch=32" in done.stderr
    del unset["RUN_DIR"]
    assert "settings are fine" in called_by_bash(site, "scaling_sweep.sh", **unset).stdout
    done = called_by_bash(site, "evaluate.sh", **unset)
    assert (done.returncode, "MODEL is not set" in done.stderr) == (2, True)


def imagenets_manifest(folder: Path) -> Path:
    """A dataset's folder of which the manifest alone is there, with ImageNet's classes."""
    (folder / "train").mkdir(parents=True)
    per_class = {"train": 1281, "val": 50}
    manifest = ImageManifest(
        classes=[f"n{i:08}" for i in range(1000)],
        n_images={split: 1000 * n for split, n in per_class.items()},
        images_per_class={split: [n] * 1000 for split, n in per_class.items()},
        policy={split: {} for split in per_class},
        resize_short=0,
        source_sha256="0" * 64,
        extra={},
    )
    (folder / "manifest.json").write_text(manifest.text())
    return folder


@pytest.mark.parametrize("size", ["35m", "135m"])
def test_the_vision_scripts_check_their_own_configs(size: str, site: Path, tmp_path: Path) -> None:
    script = f"pretrain_vision_{size}.sh"
    settings = variables(site, tmp_path / "run")
    settings["DATA"] = str(imagenets_manifest(tmp_path / "imagenet"))
    for name in ("CONFIG", "NODES", "TASKS_PER_NODE"):  # the script's own config, on the 8 ranks that it asks for
        del settings[name]
    done = called_by_bash(site, script, "optim.ema_decay=0.9999", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    done = called_by_bash(site, script, "data.micro_batch=384", **settings)
    assert done.returncode == 2
    assert "not a multiple of data-parallel size 8 x data.micro_batch=384" in done.stderr
    done = called_by_bash(site, script, **{**settings, "DATA": "/no/such/images"})
    assert "a folder that prepare_imagenet.py wrote" in done.stderr
    done = called_by_bash(site, script, "model.n_classes=10", **settings)
    assert (done.returncode, "model.n_classes=10, but" in done.stderr) == (2, True)
    done = called_by_bash(site, script, **{**settings, "DATA": str(site / "shards")})
    assert (done.returncode, "is of tokens, not of images" in done.stderr) == (2, True)
    assert "did you mean data.image_size" in called_by_bash(site, script, "data.image_siez=192", **settings).stderr
    del settings["RUN_DIR"]
    done = called_by_bash(site, "scaling_sweep.sh", **{**settings, "GRID": str(ROOT / "slurm" / "vision_grid.txt")})
    assert (done.returncode, "settings are fine" in done.stdout) == (0, True)


def test_a_classifier_trains_by_its_script(cluster: Cluster, site: Path) -> None:
    """On two nodes; its own file, with a small model."""
    images = write_image_dataset(site / "images", n_classes=4, n_train=40)
    config = yaml.safe_load((ROOT / "configs" / "vision_35m.yaml").read_text())
    config["model"] |= {
        "n_layers": 2,
        "d_model": 32,
        "headdim": 8,
        "d_state": 8,
        "widths": [8, 4],
        "n_classes": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    config["data"] |= {"image_size": 16, "images_per_step": 8, "micro_batch": 2, "n_workers": 1}
    config["optim"] |= {"steps": 20, "warmup_steps": 2}
    (site / "tiny vision.yaml").write_text(yaml.safe_dump(config))
    settings = {**variables(site, site / "vision"), "CONFIG": str(site / "tiny vision.yaml"), "DATA": str(images)}
    job = cluster.sbatch(
        ROOT / "slurm" / "pretrain_vision_35m.sh",
        options=("--nodes=2",),
        cwd=site,
        TMPDIR=str(cluster.scratch),
        **settings,
    )
    cluster.wait_job(job)
    records = read_metrics(site / "vision" / "metrics.jsonl")
    assert {record["kind"] for record in records} == {"train", "eval", "event"}
    assert set(records[-1]["top1"]) == {"1", "1/2"}


def test_torchrun_launches_the_same_script(
    cluster: Cluster, site: Path, uninterrupted: dict[int, dict[str, float]]
) -> None:
    run_dir = site / "by torchrun"
    job = submit(cluster, site, run_dir, "optim.steps=240", LAUNCHER="torchrun", NODES="1", TASKS_PER_NODE="2")
    wait_for("some steps", lambda: step_of(run_dir) >= 45, 120)
    steps = cluster.run("squeue", "-h", "-s", "-j", job, "-o", "%i").split()
    (ranks,) = [step for step in steps if not step.endswith(".batch")]
    assert " CPUs=16 " in cluster.run("scontrol", "show", "step", ranks, "-o"), "two ranks of the script's 8 cores each"
    by_time_limit(cluster, job, run_dir)  # its agent knows no exit code 75: a stop by signal is taken for one
    wait_for("the second start", lambda: int(cluster.job(job)["Restarts"]) >= 1, 120)
    cluster.wait_job(job)
    assert losses(run_dir) == uninterrupted
    assert [event["code"] for event in read_events(run_dir) if event["event"] == "end"] == [75, 0]


def test_an_array_tokenizes_and_its_last_task_joins(cluster: Cluster, site: Path, tmp_path: Path) -> None:
    source = tmp_path / "raw text"
    source.mkdir()
    for i in range(4):
        lines = [json.dumps({"text": f"document {j} of file {i} says a few words"}) for j in range(40)]
        (source / f"part-{i}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = byte_level_tokenizer(tmp_path)
    settings = {"MATMAMBA_ROOT": str(ROOT), "VENV": sys.prefix, "OMP_NUM_THREADS": "1", "TMPDIR": str(cluster.scratch)}
    settings |= {"INPUT": f"{source}/*.jsonl", "TOKENIZER": str(tokenizer), "OUTPUT": str(site / "array shards")}
    job = cluster.sbatch(
        ROOT / "slurm" / "tokenize_fineweb.sh",
        "--row-tokens",
        "32",
        "--workers",
        "1",
        "--val-fraction",
        "0.2",
        options=["--array=0-1", "--cpus-per-task=1"],
        cwd=site,
        **settings,
    )
    wait_for("the array", lambda: not cluster.run("squeue", "-h", "-j", job, "-o", "%i"), 240, 1)
    said = "".join(path.read_text() for path in sorted(site.glob("slurm-*.out"))[-2:])
    assert (site / "array shards" / "manifest.json").exists(), said
    manifest = read_manifest(site / "array shards")
    assert sum(manifest.n_documents.values()) == 160, said
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.verify_shards", str(site / "array shards")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_and_it_goes_on(
    cluster: Cluster, site: Path, uninterrupted: dict[int, dict[str, float]]
) -> None:
    run_dir = site / "hanging"
    job = submit(cluster, site, run_dir, HANG_SECONDS="5")
    wait_for("some steps", lambda: step_of(run_dir) >= 45, 120)
    for rank in ranks_of(job):  # of rank 0, in whose process everybody listens to everybody
        if b"SLURM_PROCID=0\0" in Path(f"/proc/{rank}/environ").read_bytes():
            os.kill(rank, signal.SIGSTOP)
    wait_for("the second start", lambda: int(cluster.job(job)["Restarts"]) >= 1, 120)
    cluster.wait_job(job)
    assert "no step for" in log(site, job)
    assert list((run_dir / "hang").glob("rank_*.txt"))
    assert losses(run_dir) == uninterrupted


@pytest.mark.slow
def test_a_toy_sweep_makes_one_table_and_one_plot(cluster: Cluster, site: Path, tmp_path: Path) -> None:
    config = tmp_path / "toy.yaml"  # a grid's words are separated by spaces, so a config's path has none
    shutil.copyfile(site / "tiny run.yaml", config)
    short = "optim.steps=20 logging.eval_every_steps=10"
    grid = tmp_path / "grid.txt"
    grid.write_text(f"# runs\nnested {config} {short}\n\nhalf {config} {short} model.n_heads=4 model.widths=[4]\n")
    settings = {**variables(site, site), "GRID": str(grid), "SWEEP_DIR": str(site / "sweep"), "NODES": "1"}
    del settings["CONFIG"], settings["RUN_DIR"]
    job = cluster.sbatch(
        ROOT / "slurm" / "scaling_sweep.sh",
        options=["--array=0-2%1"],
        cwd=site,
        TMPDIR=str(cluster.scratch),
        **settings,
    )
    wait_for("the array", lambda: not cluster.run("squeue", "-h", "-j", job, "-o", "%i"), 240, 1)
    states = {
        word.partition("=")[2]
        for line in cluster.run("scontrol", "show", "job", job, "-o").splitlines()
        for word in line.split()
        if word.startswith("JobState=")
    }
    assert states == {"COMPLETED", "FAILED"}, "two runs, and a task that the grid has no line for"
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.sweep", str(site / "sweep")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    rows = [line for line in done.stdout.splitlines() if line.startswith("| nested | 1/2")]
    assert len(rows) == 1
    assert rows[0].count("|") == 8
    assert rows[0].split("|")[-2].strip()[0] in "+-", "the difference from the separately trained model"
    assert (site / "sweep" / "sweep.png").exists()


@pytest.mark.slow
def test_half_the_nodes_go_on_with_the_same_data(
    cluster: Cluster, site: Path, uninterrupted: dict[int, dict[str, float]]
) -> None:
    run_dir = site / "elastic"
    job = submit(cluster, site, run_dir)
    wait_for("some steps", lambda: step_of(run_dir) >= 45, 120)
    cluster.run("scancel", "--signal=TERM", "--batch", job)
    cluster.run("scontrol", "update", f"JobId={job}", "Requeue=0")
    wait_for("the stop", lambda: cluster.job(job)["JobState"] != "RUNNING", 60)
    cluster.run("scancel", job)
    half = submit(cluster, site, run_dir, NODES="1")
    cluster.wait_job(half)
    curve = losses(run_dir)
    assert sorted(curve) == sorted(uninterrupted)
    for step, by_width in curve.items():
        for width, loss in by_width.items():
            assert loss == pytest.approx(uninterrupted[step][width], rel=1e-4), f"step {step}, width {width}"
