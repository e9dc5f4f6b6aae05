"""The image loader: order, split over ranks, position, what is drawn for an image, validation, and what it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.image_schema import IMAGE_COLUMN, IMAGE_COLUMNS, LABEL_COLUMN, NAME_COLUMN, read_image_manifest
from data_prep.shard_schema import SHARD_HASH, read_manifest
from pretrain.config_sections import ConfigError
from pretrain.image_config import AugmentConfig, ImageDataConfig
from pretrain.images import ImageBatch, ImageLoader, check_image_dataset, validation_images
from pretrain.shard_store import DatasetError, RowStore
from tests.datasets import blob_image, jpeg, write_image_dataset

N_CLASSES, N_TRAIN, N_VAL, SIZE = 5, 60, 13, 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_dataset(tmp_path_factory.mktemp("images"), n_classes=N_CLASSES, n_train=N_TRAIN, n_val=N_VAL)


def config(path: Path, **changes: Any) -> ImageDataConfig:
    values = {"path": str(path), "image_size": SIZE, "images_per_step": 16, "micro_batch": 4, "n_workers": 0} | changes
    return ImageDataConfig(**values)


def loader(
    cfg: ImageDataConfig, *, dp_rank: int = 0, dp_size: int = 1, start: int = 0, seed: int = 7, **augment: Any
) -> ImageLoader:
    return ImageLoader(
        cfg,
        AugmentConfig(**augment),
        seed=seed,
        dp_rank=dp_rank,
        dp_size=dp_size,
        n_sequences_per_step=cfg.images_per_step,
        start_sequence=start,
    )


def joined(batches: list[ImageBatch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.cat([getattr(b, name) for b in batches]) for name in ("images_bchw", "labels_b", "numbers_b"))


def same(a: list[ImageBatch], b: list[ImageBatch]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(joined(a), joined(b), strict=True))


@pytest.fixture(scope="module")
def steps(dataset: Path) -> list[list[ImageBatch]]:
    """Eight steps of 16 of the 60 images, by one rank and no processes: into the third epoch."""
    one = loader(config(dataset))
    return [one.next_step() for _ in range(8)]


def test_an_epoch_holds_every_image_once_and_no_two_epochs_are_alike(dataset: Path) -> None:
    one = loader(config(dataset, images_per_step=N_TRAIN, micro_batch=2, image_size=8), rand_augment_ops=0)
    assert one.n_sequences_per_epoch == N_TRAIN
    epochs = [joined(one.next_step()) for _ in range(2)]
    for number, (images_bchw, labels_b, numbers_b) in enumerate(epochs):
        assert images_bchw.dtype == torch.uint8
        assert images_bchw.shape == (N_TRAIN, 3, 8, 8)
        assert numbers_b.tolist() == list(range(number * N_TRAIN, (number + 1) * N_TRAIN))
        assert torch.bincount(labels_b).tolist() == [N_TRAIN // N_CLASSES] * N_CLASSES
    assert epochs[0][1].tolist() != epochs[1][1].tolist()


def test_the_same_image_is_drawn_anew_in_each_epoch(dataset: Path) -> None:
    """By its place in the stream: the store gives the row, and rows come in another order each epoch."""
    store = RowStore(str(dataset), "train")
    one = loader(config(dataset, images_per_step=N_TRAIN, micro_batch=2))
    by_name: dict[str, list[bytes]] = {}
    for epoch in range(2):
        images_bchw, _, _ = joined(one.next_step())
        for position in range(N_TRAIN):
            row = one._reader._row_of(epoch * N_TRAIN + position)  # type: ignore[attr-defined]
            name = store.sample(row)[NAME_COLUMN]
            by_name.setdefault(name, []).append(images_bchw[position].numpy().tobytes())
    assert len(by_name) == N_TRAIN
    assert sum(first == second for first, second in by_name.values()) == 0


@pytest.mark.parametrize("n_workers", [0, 1, 3])
def test_pixels_are_bitwise_the_same_by_workers_ranks_and_point_of_resumption(
    dataset: Path, steps: list[list[ImageBatch]], n_workers: int
) -> None:
    torch.manual_seed(n_workers)  # the global generators must play no part
    np.random.seed(n_workers)
    first = loader(config(dataset, n_workers=n_workers))
    for k in range(3):
        assert same(first.next_step(), steps[k])
    state = first.state_dict()
    first.close()
    assert state == {"sequence": 48}  # mid-epoch
    for dp_size, micro_batch, begin, end in ((2, 2, 3, 5), (4, 4, 5, 8)):
        ranks = [
            loader(config(dataset, n_workers=min(1, n_workers), micro_batch=micro_batch), dp_rank=r, dp_size=dp_size)
            for r in range(dp_size)
        ]
        for rank in ranks:
            rank.load_state_dict({"sequence": 16 * begin})
        for k in range(begin, end):
            assert same([batch for rank in ranks for batch in rank.next_step()], steps[k])
        for rank in ranks:
            rank.close()


def test_another_seed_gives_another_order_and_other_pixels(dataset: Path, steps: list[list[ImageBatch]]) -> None:
    images_bchw, labels_b, numbers_b = joined(loader(config(dataset), seed=8).next_step())
    assert torch.equal(numbers_b, joined(steps[0])[2])
    assert not torch.equal(labels_b, joined(steps[0])[1])
    assert not torch.equal(images_bchw, joined(steps[0])[0])


def test_the_loader_leaves_global_generators_alone(dataset: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    loader(config(dataset)).next_step()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_validation_gives_every_image_once_over_all_ranks(dataset: Path, n_workers: int) -> None:
    cfg = config(dataset, n_workers=n_workers)
    alone = validation_images(cfg, n_images=0, dp_rank=0, dp_size=1)
    images_bchw, labels_b, numbers_b = joined(list(alone))
    assert numbers_b.tolist() == list(range(N_VAL))
    assert labels_b.tolist() == [i % N_CLASSES for i in range(N_VAL)]
    assert torch.equal(joined(list(alone))[0], images_bchw)  # again
    assert [len(b.labels_b) for b in alone] == [4, 4, 4, 1]
    shares = [validation_images(cfg, n_images=0, dp_rank=r, dp_size=4) for r in range(4)]
    assert torch.equal(torch.cat([joined(list(share))[0] for share in shares]), images_bchw)
    assert [len(joined(list(share))[1]) for share in shares] == [3, 3, 3, 4]
    assert not list(validation_images(cfg, n_images=2, dp_rank=0, dp_size=4))
    assert joined(list(validation_images(cfg, n_images=4, dp_rank=0, dp_size=1)))[2].tolist() == [0, 3, 6, 9]


def test_validation_sees_the_centre(dataset: Path) -> None:
    images = [
        joined(list(validation_images(config(dataset, eval_crop_ratio=r), n_images=0, dp_rank=0, dp_size=1)))[0]
        for r in (0.875, 1.0)
    ]
    assert not torch.equal(*images)


def test_batches_move_whole_and_keep_their_memory_layout(dataset: Path) -> None:
    (batch, *_) = loader(config(dataset)).next_step()
    assert batch.images_bchw.is_contiguous(memory_format=torch.channels_last)
    moved = batch.to("meta")
    assert [t.device.type for t in (moved.images_bchw, moved.labels_b, moved.numbers_b)] == ["meta"] * 3


def write_bad(folder: Path, image: bytes, label: int = 0) -> Path:
    """A dataset of 8 images whose last row of train is `image` with `label`."""
    from streaming import MDSWriter

    write_image_dataset(folder, n_classes=2, n_train=8, n_val=4)
    for path in (folder / "train").glob("*"):
        path.unlink()
    rng = np.random.default_rng(0)
    with MDSWriter(out=str(folder / "train"), columns=IMAGE_COLUMNS, hashes=[SHARD_HASH]) as writer:
        for i in range(7):
            good = jpeg(blob_image(i % 2, rng))
            writer.write({IMAGE_COLUMN: good, LABEL_COLUMN: i % 2, NAME_COLUMN: f"good{i}.JPEG"})
        writer.write({IMAGE_COLUMN: image, LABEL_COLUMN: label, NAME_COLUMN: "bad.JPEG"})
    return folder


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_image_that_does_not_decode_is_named(tmp_path: Path, n_workers: int) -> None:
    whole = jpeg(blob_image(0, np.random.default_rng(1)))
    path = write_bad(tmp_path, whole[: len(whole) // 2])
    one = loader(config(path, images_per_step=8, n_workers=n_workers))
    with pytest.raises(DatasetError, match=r"shard\.00000\.mds, row 7 \(bad\.JPEG\): JpegError.*Premature end"):
        one.next_step()
    one.close()


def test_a_label_beyond_the_classes_is_named(tmp_path: Path) -> None:
    path = write_bad(tmp_path, jpeg(blob_image(0, np.random.default_rng(1))), label=2)
    with pytest.raises(DatasetError, match=r"row 7 \(bad\.JPEG\): label 2 is not below the manifest's 2 classes"):
        loader(config(path, images_per_step=8)).next_step()


def test_a_damaged_shard_is_named_whatever_process_reads_it(tmp_path: Path) -> None:
    path = write_image_dataset(tmp_path)
    shard = path / "train" / "shard.00002.mds"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))
    check_image_dataset(config(path), N_CLASSES)  # sizes alone do not show it
    for n_workers in (0, 2):
        one = loader(config(path, n_workers=n_workers))
        with pytest.raises(DatasetError, match=r"shard\.00002\.mds.*checksum"):
            [one.next_step() for _ in range(4)]
        one.close()


def test_a_shard_is_checked_once_for_all_loader_processes(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of checked shards is shared memory: what a process checked, the one it was forked from knows."""
    one = loader(config(dataset, images_per_step=N_TRAIN, micro_batch=2, n_workers=2, image_size=8))
    store = one._reader._store  # type: ignore[attr-defined]
    assert not store._checked.any()
    one.next_step()
    one.close()
    assert store._checked.all()


def test_check_refuses_what_cannot_train(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert check_image_dataset(config(dataset), N_CLASSES).n_images == {"train": N_TRAIN, "val": N_VAL}
    with pytest.raises(ConfigError, match=r"model\.n_classes=1000, but .* has 5 classes"):
        check_image_dataset(config(dataset), 1000)
    with pytest.raises(ConfigError, match="holds 60 images, a step needs 64"):
        check_image_dataset(config(dataset, images_per_step=64), N_CLASSES)
    check_image_dataset(config(dataset, images_per_step=64), N_CLASSES, training=False)
    check_image_dataset(config(dataset), None)
    with pytest.raises(FileNotFoundError, match=r"not an image dataset.*prepare_imagenet\.py again"):
        check_image_dataset(config(tmp_path), N_CLASSES)
    with pytest.raises(ValueError, match="is of images, not of tokens"):
        read_manifest(dataset)
    path = write_image_dataset(tmp_path / "d")
    whole = json.loads((path / "manifest.json").read_text())

    def with_manifest(**changes: Any) -> ImageDataConfig:
        (path / "manifest.json").write_text(json.dumps(whole | changes))
        return config(path)

    moved = {"train": [12] * 5, "val": [13, 0, 0, 0, 0]}
    with pytest.raises(DatasetError, match="val has no image of 4 of 5 classes, class 1, class 2"):
        check_image_dataset(with_manifest(images_per_class=moved), N_CLASSES)
    with pytest.raises(ValueError, match="contradicts itself: split train has 61 images, but 60"):
        check_image_dataset(with_manifest(n_images={"train": 61, "val": 13}), N_CLASSES)
    fewer = {"n_images": {"train": 55, "val": 13}, "images_per_class": {"train": [11] * 5, "val": [3, 3, 3, 2, 2]}}
    with pytest.raises(DatasetError, match="index of train lists 60 images, the manifest says 55"):
        check_image_dataset(with_manifest(**fewer), N_CLASSES)
    with pytest.raises(ValueError, match="schema version 99"):
        check_image_dataset(with_manifest(schema_version=99), N_CLASSES)
    with pytest.raises(ConfigError, match="is of tokens, not of images"):
        check_image_dataset(with_manifest(kind="tokens"), N_CLASSES)
    with caplog.at_level(logging.WARNING):
        check_image_dataset(with_manifest(resize_short=26), N_CLASSES)
    assert "22 pixels, are fewer than data.image_size=24" in caplog.text
    (path / "train" / "shard.00001.mds").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard\.00001\.mds is missing"):
        check_image_dataset(with_manifest(), N_CLASSES)


def test_a_remote_dataset_is_fetched_into_its_cache(
    dataset: Path, steps: list[list[ImageBatch]], tmp_path: Path
) -> None:
    cfg = config(dataset, cache_dir=str(tmp_path / "cache"))
    assert check_image_dataset(cfg, N_CLASSES).classes == read_image_manifest(dataset).classes
    assert same(loader(cfg).next_step(), steps[0])
    other = write_image_dataset(tmp_path / "other", n_train=20)
    with pytest.raises(ConfigError, match="another dataset"):
        check_image_dataset(config(other, cache_dir=str(tmp_path / "cache")), N_CLASSES)


def test_steps_and_micro_batches_that_do_not_fit_are_refused(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"16 sequences a step.*change data\.images_per_step"):
        loader(config(dataset), dp_size=3)
    with pytest.raises(ConfigError, match=r"micro_batch=1 is odd"):
        loader(config(dataset, micro_batch=1))
    loader(config(dataset, micro_batch=1), mix_prob=0.0).next_step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ""}, "data.path is empty"),
        ({"path": "s3://bucket/x"}, "set data.cache_dir"),
        ({"image_size": 0}, "data.image_size=0"),
        ({"images_per_step": 0}, "data.images_per_step=0"),
        ({"micro_batch": 0}, "data.micro_batch=0"),
        ({"n_workers": -1}, "data.n_workers=-1"),
        ({"eval_crop_ratio": 0.0}, "data.eval_crop_ratio=0.0"),
        ({"eval_crop_ratio": 1.1}, "data.eval_crop_ratio=1.1"),
    ],
)
def test_data_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageDataConfig(**({"path": "d"} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, "augment.crop_scale"),
        ({"crop_scale": (0.5, 0.4)}, "augment.crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "augment.crop_ratio"),
        ({"hflip_prob": 1.5}, "augment.hflip_prob=1.5"),
        ({"rand_augment_ops": -1}, "augment.rand_augment_ops=-1"),
        ({"rand_augment_magnitude": 31}, "augment.rand_augment_magnitude=31"),
        ({"jitter_prob": -0.1}, "augment.jitter_prob=-0.1"),
        ({"jitter_strength": 1.1}, "augment.jitter_strength=1.1"),
        ({"erasing_prob": 2.0}, "augment.erasing_prob=2.0"),
        ({"erasing_area": (0.0, 0.3)}, "augment.erasing_area"),
        ({"erasing_min_ratio": 0.0}, "augment.erasing_min_ratio=0.0"),
        ({"mixup_alpha": -1.0}, "augment.mixup_alpha=-1.0"),
        ({"cutmix_alpha": -1.0}, "augment.cutmix_alpha=-1.0"),
        ({"mix_prob": 1.1}, "augment.mix_prob=1.1"),
        ({"switch_prob": 1.1}, "augment.switch_prob=1.1"),
        ({"smoothing": 1.0}, "augment.smoothing=1.0"),
    ],
)
def test_augmentation_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**change)


def test_the_order_is_that_of_tokens(dataset: Path) -> None:
    """RowOrder's rows, by its frozen streams: an image run and a token run of equal shards see equal row numbers."""
    from pretrain.stream import RowOrder

    store = RowStore(str(dataset), "train")
    order = RowOrder(store.rows_per_shard, 7)
    one = loader(config(dataset, images_per_step=N_TRAIN, micro_batch=2, image_size=8))
    _, labels_b, _ = joined(one.next_step())
    assert labels_b.tolist() == [store.sample(order.row(0, i))[LABEL_COLUMN] for i in range(N_TRAIN)]
