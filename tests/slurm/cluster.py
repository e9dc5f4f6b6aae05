"""A real Slurm of several nodes on this machine, under a temporary folder: munged, slurmctld and one slurmd a node.

Each slurmd lives in a mount and UTS namespace of its own, with a hosts file and a host name, so that scripts resolve
node names as they do on a cluster. GPUs are character devices that only Slurm's bookkeeping sees. Needs root and
Debian's slurm-wlm.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")


def missing() -> str | None:
    """Why no cluster can run here, or None."""
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "needs root, to start slurmd in a namespace"


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for(what: str, ready: Callable[[], bool], timeout_s: float, every_s: float = 0.2) -> None:
    """Poll `ready`; raise TimeoutError naming `what` after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(every_s)


class Cluster:
    """Nodes n1, n2, ... of 112 CPUs and 8 GPUs (a DGX H100 has as many), partition main and a preempting one, urgent."""

    def __init__(self, folder: Path, n_nodes: int) -> None:
        self.folder, self.nodes = folder, [f"n{i}" for i in range(1, n_nodes + 1)]
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.env[name]
        self.scratch = folder / "scratch"
        """A folder that is each node's own: jobs take it as TMPDIR."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration, start every daemon, wait until all nodes are idle."""
        self._write_files()
        munge = self.folder / "munge"
        self._spawn(
            "munged",
            ["munged", "--foreground", f"--socket={munge}/munge.sock", f"--key-file={munge}/munge.key",
             f"--pid-file={munge}/munged.pid", f"--log-file={munge}/munged.log", f"--seed-file={munge}/munged.seed",
             "--num-threads=2"],
        )  # fmt: skip
        wait_for("munge's socket", (munge / "munge.sock").exists, 20)
        self._spawn("slurmctld", ["slurmctld", "-D", "-i"])
        for node in self.nodes:
            self.start_node(node)
        wait_for("idle nodes", lambda: self.run("sinfo", "-h", "-o", "%t").split() == ["idle"], 60)

    def start_node(self, node: str) -> None:
        """Start (again) the slurmd of one node."""
        # Nodes share neither memory nor local scratch.
        inside = f"mount -t tmpfs none /dev/shm && mount -t tmpfs none {self.scratch} && "
        inside += f"mount --bind {self.folder}/hosts /etc/hosts && hostname {node} && exec slurmd -D -N {node}"
        self._spawn(node, ["unshare", "--mount", "--uts", "sh", "-c", inside])

    def kill_node(self, node: str) -> None:
        """SIGKILL a node's slurmd and all that runs on it, as a power cut would: nothing lives to report another's end."""
        daemon = self._daemons.pop(node)
        namespace = os.readlink(f"/proc/{daemon.pid}/ns/uts")
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it ended meanwhile
                    if os.readlink(process / "ns" / "uts") == namespace:
                        os.kill(int(process.name), number)
        daemon.wait(10)

    def stop(self) -> None:
        """Cancel everything, end the daemons, and sweep what outlived them."""
        subprocess.run(["scancel", "-u", "root"], env=self.env, check=False, capture_output=True, timeout=30)
        for name in [*self.nodes, "slurmctld", "munged"]:
            daemon = self._daemons.pop(name, None)
            if daemon is not None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
        self._sweep()

    def run(self, *command: str, **variables: str) -> str:
        """A Slurm command's standard output; raises CalledProcessError with what it said."""
        env = {**self.env, **variables}
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60).stdout

    def sbatch(self, script: Path, *arguments: str, options: Sequence[str] = (), cwd: Path, **variables: str) -> str:
        """Submit; returns the job's number. Output goes to cwd/slurm-JOB.out."""
        command = ["sbatch", "--parsable", "--output=slurm-%j.out", *options, str(script), *arguments]
        env = {**self.env, **variables}
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip().partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", number, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_job(self, number: str, states: Sequence[str] = ("COMPLETED",), timeout_s: float = 240) -> dict[str, str]:
        """Wait until the job is in one of `states`; raises where it ended in another."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        wait_for(f"job {number}", lambda: self.job(number)["JobState"] in (*ended, *states), timeout_s, 0.3)
        job = self.job(number)
        if job["JobState"] not in states:
            raise AssertionError(f"job {number} is {job['JobState']}, not {states}")
        return job

    def _spawn(self, name: str, command: list[str]) -> None:
        log = (self.folder / "log" / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            command, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def _sweep(self) -> None:
        """SIGKILL whatever was started under this cluster's configuration."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                env = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if f"SLURM_CONF={self.folder}/slurm.conf" in env and int(process.name) != os.getpid():
                try:
                    os.kill(int(process.name), signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _write_files(self) -> None:
        for name in ("munge", "state", "spool", "run", "log", "dev", "scratch"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        addresses = [f"127.0.0.{10 + i}" for i in range(1, len(self.nodes) + 1)]
        lines = [f"127.0.0.1 localhost {host}", *(f"{a} {n}" for a, n in zip(addresses, self.nodes, strict=True))]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "plugstack.conf").write_text("")
        for i in range(8):
            os.mknod(self.folder / "dev" / f"nvidia{i}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu Type=h100 File={self.folder}/dev/nvidia[0-7] Flags=nvidia_gpu_env\n"
        )
        control, *ports = _free_ports(len(self.nodes) + 1)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={port}"
            for name, address, port in zip(self.nodes, addresses, ports, strict=True)
        )
        # Scripts derive their port from the job's number: two clusters on one machine must not number their jobs alike.
        (self.folder / "slurm.conf").write_text(
            CONF.format(d=self.folder, host=host, control=control, first_job=100 * control, nodes=nodes)
        )


CONF = """ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={d}/munge/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
SlurmctldPidFile={d}/run/slurmctld.pid
SlurmdPidFile={d}/run/slurmd.%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd.%n.log
PlugStackConfig={d}/plugstack.conf
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_setup_env_fail
PriorityType=priority/basic
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=300
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=112 Boards=1 SocketsPerBoard=2 CoresPerSocket=56 ThreadsPerCore=1 RealMemory=512000 Gres=gpu:h100:8 State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
"""
