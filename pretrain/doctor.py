"""`python -m pretrain --doctor`: what this machine has, what it lacks, and how to mend it.

Every import is guarded: the doctor must be able to run where the installation is what is broken.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

REQUIRED = {
    # Distribution name to the module that proves it works.
    "torch": "torch",
    "deepspeed": "deepspeed",
    "megatron-core": "megatron.core",
    "mosaicml-streaming": "streaming",
    "einops": "einops",
    "numpy": "numpy",
    "pyyaml": "yaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "tokenizers": "tokenizers",
    "pyarrow": "pyarrow",
}
OPTIONAL = {
    "triton": ("triton", "without it a GPU runs the plain PyTorch scan"),
    "mamba-ssm": ("modeling.ops.upstream", "without it a GPU runs the plain PyTorch scan"),
    "simplejpeg": ("simplejpeg", "needed to train on images"),
    "pillow": ("PIL", "needed to train on images"),
    "wandb": ("wandb", "needed for logging.wandb=online or offline"),
    "matplotlib": ("matplotlib", "needed to draw loss curves"),
}
REINSTALL = "make setup (docs/install.md)"
MIN_SHARED_GIB = 1.0
MIN_DISK_GIB = 10.0


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "note", "missing"]
    """missing: training cannot run. note: it can, and something is worth knowing."""
    detail: str
    mend: str = ""
    """What to do about it; empty where nothing is to be done."""


def report() -> tuple[list[Check], bool]:
    """Every check, and whether nothing required is missing. Raises nothing: a check that breaks is itself a finding."""
    checks = [_guarded("python", _python)]
    checks += [_package(name, module, required=True) for name, module in REQUIRED.items()]
    checks += [_package(name, module, required=False, use=use) for name, (module, use) in OPTIONAL.items()]
    for name, check in (
        ("scan", _scan),
        ("device", _device),
        ("nccl", _nccl),
        ("compiler", _compiler),
        ("triton cache", _triton_cache),
        ("shared memory", _shared_memory),
        ("disk", _disk),
    ):
        checks.append(_guarded(name, check))
    return checks, all(check.status != "missing" for check in checks)


def main() -> int:
    """Print the report. Returns 1 where something required is missing, else 0."""
    root = logging.getLogger()
    level = root.level
    # Libraries warn at import of what the report then says in its own words.
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checks, healthy = report()
    finally:
        root.setLevel(level)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:8}{check.name:{width}}  {check.detail}")
        if check.mend:
            print(f"{'':8}{'':{width}}  -> {check.mend}")
    print("ready to train" if healthy else "cannot train yet: mend what is marked missing")
    return 0 if healthy else 1


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return Check(name, "note", f"could not be looked at: {_short(error)}")


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _python() -> Check:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        return Check("python", "missing", detail, "use Python 3.11 or 3.12: make setup PYTHON=/path/to/python3.11")
    return Check("python", "ok", detail)


def _package(name: str, module: str, *, required: bool, use: str = "") -> Check:
    """Whether the distribution is installed and its module can be imported."""
    absent: Literal["missing", "note"] = "missing" if required else "note"
    why = f"; {use}" if use else ""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, absent, f"not installed{why}", REINSTALL)
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken native library raises anything
        return Check(name, absent, f"{version} is installed but cannot be imported: {_short(error)}{why}", REINSTALL)
    return Check(name, "ok", version)


def _scan() -> Check:
    """Whether the Triton scan, which a GPU run is fast by, can be imported."""
    from modeling.ops.upstream import CUDA_EXTENSION, chunk_scan

    # The import below may put a stand-in of the extension in place, so look for the real one by its file.
    built = importlib.machinery.PathFinder.find_spec(CUDA_EXTENSION) is not None
    if chunk_scan() is None:
        return Check("scan", "note", "mamba-ssm is not installed: plain PyTorch scan", REINSTALL)
    extension = "built" if built else "not built; nothing here needs it"
    return Check("scan", "ok", f"mamba-ssm's Triton scan imports; its Mamba-1 CUDA extension is {extension}")


def _device() -> Check:
    torch = _torch()
    if torch is None:
        return Check("device", "note", "torch cannot be imported, so devices cannot be listed")
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            detail = "nvidia-smi is there, but torch sees no GPU: plain PyTorch path on CPU"
            mend = "compare the driver with torch.version.cuda, and look at CUDA_VISIBLE_DEVICES"
            return Check("device", "note", detail, mend)
        return Check("device", "ok", f"no GPU: plain PyTorch path on CPU, {os.cpu_count()} cores")
    names = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        names.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}")
    kinds = "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    detail = f"{kinds}; driver {_driver()}, CUDA {torch.version.cuda}"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Check("device", "note", f"{detail}; no native bf16", "set precision=fp32")
    return Check("device", "ok", detail)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        return lines[0] if lines else "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _nccl() -> Check:
    torch = _torch()
    if torch is None or not torch.cuda.is_available():
        return Check("nccl", "ok", "not needed without a GPU; ranks on CPU talk through gloo")
    if not torch.distributed.is_nccl_available():
        return Check("nccl", "missing", "torch was built without NCCL", REINSTALL)
    return Check("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def _compiler() -> Check:
    """Triton compiles its launchers with a C compiler at run time."""
    name = os.environ.get("CC") or next((cc for cc in ("gcc", "clang", "cc") if shutil.which(cc)), "")
    path = shutil.which(name) if name else None
    if path is None:
        torch = _torch()
        needed = torch is not None and torch.cuda.is_available()
        detail = f"CC={name} is not on PATH" if name else "no gcc or clang on PATH"
        return Check("compiler", "missing" if needed else "note", f"{detail}; Triton needs one", "apt-get install gcc")
    return Check("compiler", "ok", path)


def _triton_cache() -> Check:
    stated = os.environ.get("TRITON_CACHE_DIR")
    folder = stated or os.path.join(os.environ.get("TRITON_HOME", os.path.expanduser("~")), ".triton", "cache")
    parent = folder
    while not os.path.exists(parent) and os.path.dirname(parent) != parent:
        parent = os.path.dirname(parent)
    if not os.access(parent, os.W_OK):
        return Check("triton cache", "note", f"{folder} cannot be written", "set TRITON_CACHE_DIR to a local folder")
    if not stated and "SLURM_JOB_ID" in os.environ:
        mend = "set TRITON_CACHE_DIR to a folder of this job: a cache shared by jobs can be read half-written"
        return Check("triton cache", "note", f"{folder}, shared by all jobs", mend)
    return Check("triton cache", "ok", folder)


def _shared_memory() -> Check:
    """NCCL and the data loader's workers exchange data through /dev/shm."""
    if not os.path.isdir("/dev/shm"):
        return Check("shared memory", "note", "this system has no /dev/shm", "set data.n_workers=0")
    usage = shutil.disk_usage("/dev/shm")
    detail = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in /dev/shm"
    if usage.free < MIN_SHARED_GIB * 2**30:
        return Check("shared memory", "note", detail, "give the container more (--shm-size), or set data.n_workers=0")
    return Check("shared memory", "ok", detail)


def _disk() -> Check:
    free_gib = shutil.disk_usage(os.getcwd()).free / 2**30
    detail = f"{free_gib:.0f} GiB free here"
    if free_gib < MIN_DISK_GIB:
        return Check("disk", "note", detail, "point run_dir at a larger disk: a checkpoint takes 12 bytes a parameter")
    return Check("disk", "ok", detail)


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except Exception:
        return None
