"""A search of launch settings on a real GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modeling.ops.kernels import launches
from tests.distributed.harness import run_python

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU"),
]


def test_a_search_is_no_slower_than_what_is_shipped_and_ends(tmp_path: Path) -> None:
    out = tmp_path / "launches.json"
    done = run_python("-m", "modeling.ops.kernels.tune", "--seconds", "30", "--out", str(out), timeout_s=200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    table = launches.read(out)
    assert "group_gradients" in table
    assert json.loads(out.read_text())["gpu"] == torch.cuda.get_device_name()
    for line in done.stdout.splitlines():
        if " as shipped" in line and " ms with " in line:
            best, shipped = line.partition(": ")[2].split(" ms with ")[0], line.rsplit(", ", 1)[1].split()[0]
            assert float(best) <= float(shipped), line
