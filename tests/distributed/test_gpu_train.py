"""On a GPU: the trainer with its passes as CUDA graphs trains as the one that launches them, through DeepSpeed's updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.config_io import config_to_yaml
from tests.distributed.harness import run_python
from tests.distributed.toy_run import losses, run_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU")]


@pytest.mark.timeout(900)
def test_graphed_passes_train_as_launched_ones(dataset: Path, tmp_path: Path) -> None:
    """Ten steps of four micro-batches and three widths: inputs, gradients and updated weights reach the replays."""
    cfg = run_config(
        dataset,
        tmp_path / "unused",
        model={"d_model": 64, "headdim": 16, "d_state": 16, "chunk_size": 64},
        precision="bf16",
        deterministic=True,
    )
    (tmp_path / "run.yaml").write_text(config_to_yaml(cfg))
    found = {}
    for mode, says in (("auto", "passes: CUDA graphs"), ("never", "cuda_graphs=never")):
        overrides = [f"run_dir={tmp_path / mode}", f"cuda_graphs={mode}"]
        done = run_python("-m", "pretrain", tmp_path / "run.yaml", *overrides)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-2000:]
        assert says in said
        assert "capturing one failed" not in said
        found[mode] = losses(run_config(dataset, tmp_path / mode))
    assert [key for *key, _ in found["auto"]] == [key for *key, _ in found["never"]]
    for (*_, graphed), (*_, launched) in zip(found["auto"], found["never"], strict=True):
        # The same kernels on the same numbers; a product may be picked anew, which moves bfloat16's last bits.
        assert graphed == pytest.approx(launched, rel=2e-3)
    first, last = (found["auto"][i][2]["1"] for i in (0, -1))
    assert last < first - 0.1, "it learns, or the comparison says nothing"
