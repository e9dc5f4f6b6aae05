"""The image loader among real ranks: stop at one size, go on at others, mid-epoch, with bitwise the same pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from pretrain.augment import training_inputs
from pretrain.image_config import AugmentConfig, ImageDataConfig
from pretrain.images import ImageLoader, validation_images
from tests.datasets import write_image_dataset
from tests.distributed.harness import run_ranks

PER_STEP, N_TRAIN, N_VAL, N_CLASSES = 16, 40, 7, 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_dataset(tmp_path_factory.mktemp("images") / "remote", n_train=N_TRAIN, n_val=N_VAL)


def read(path: str, cache: str, micro_batch: int, start: int, n_steps: int) -> dict[str, Any]:
    """What one of the ranks sees: the model's inputs and targets of each step, and its share of validation."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    cfg = ImageDataConfig(
        path=path, cache_dir=cache, image_size=16, images_per_step=PER_STEP, micro_batch=micro_batch, n_workers=1
    )
    loader = ImageLoader(
        cfg,
        AugmentConfig(),
        seed=7,
        dp_rank=rank,
        dp_size=size,
        n_sequences_per_step=PER_STEP,
        start_sequence=start,
    )
    steps = []
    for _ in range(n_steps):
        inputs = [
            training_inputs(batch, AugmentConfig(), n_classes=N_CLASSES, seed=7, dtype=torch.float32)
            for batch in loader.next_step()
        ]
        steps.append([torch.cat([x[i] for x in inputs]).numpy() for i in range(2)])
    state = loader.state_dict()
    loader.close()
    val = list(validation_images(cfg, n_images=0, dp_rank=rank, dp_size=size))
    numbers = [number for batch in val for number in batch.numbers_b.tolist()]
    distributed.destroy_process_group()
    return {"steps": steps, "state": state, "val": numbers}


def test_two_and_four_ranks_go_on_where_one_stopped(source: Path, tmp_path: Path) -> None:
    (alone,) = run_ranks(1, read, str(source), str(tmp_path / "1"), 8, 0, 7)  # into the third epoch
    assert alone["state"] == {"sequence": 7 * PER_STEP}
    assert alone["val"] == list(range(N_VAL))
    for size, micro_batch, first, n_steps in ((2, 4, 1, 3), (4, 2, 4, 3)):
        ranks = run_ranks(size, read, str(source), str(tmp_path / str(size)), micro_batch, first * PER_STEP, n_steps)
        for k in range(n_steps):
            for i, what in enumerate(("pixels", "targets")):
                seen = torch.cat([torch.from_numpy(rank["steps"][k][i]) for rank in ranks])
                expected = torch.from_numpy(alone["steps"][first + k][i])
                assert torch.equal(seen, expected), f"{what} of step {first + k} at {size} ranks"
        assert [number for rank in ranks for number in rank["val"]] == list(range(N_VAL))
        assert {rank["state"]["sequence"] for rank in ranks} == {(first + n_steps) * PER_STEP}
