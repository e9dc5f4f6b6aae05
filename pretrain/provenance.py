"""Which code and which libraries made a file, and which config a run has."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from functools import cache
from pathlib import Path

from pretrain.config import RunConfig
from pretrain.config_io import config_to_yaml
from pretrain.config_sections import ConfigError

STACK = ("torch", "deepspeed", "megatron-core", "mamba-ssm", "triton", "mosaicml-streaming")


@cache
def git_commit() -> str:
    """Commit of the code that runs, "-dirty" appended where tracked files differ from it; "unknown" outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@cache
def versions() -> dict[str, str]:
    """Installed version of Python and of each library of the stack."""
    found = {"python": platform.python_version()}
    for name in STACK:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def record_start(cfg: RunConfig) -> None:
    """Write what is about to run into its folder: the resolved config, the code's commit, the libraries' versions.

    One rank calls this, before the first step and once it is known that the run may go on. Raises ConfigError where the folder
    cannot be written.
    """
    folder = Path(cfg.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config_to_yaml(cfg))
        (folder / "provenance.json").write_text(
            json.dumps({"git_commit": git_commit(), "versions": versions()}, indent=1)
        )
    except OSError as error:
        raise ConfigError(f"run_dir={cfg.run_dir} cannot be written: {error}") from None
