"""Preparation of images in parallel and again: order, workers, jobs, interruption, verification."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep import prepare_imagenet, verify_shards
from data_prep.image_listing import Listing
from data_prep.image_plan import plan
from data_prep.image_sources import ImageRef
from tests.unit.corpus import tree
from tests.unit.imagenet import (
    WHOLE,
    contents,
    prepare,
    write_tree,
)


def listing(n_classes: int, per_class: int, group: int = -1) -> Listing:
    """Class-sorted images of 100 bytes; `group` images a row group where it is given."""
    refs = [
        ImageRef(f"{i}", i // per_class, "f", 100, *((i % group, i // group) if group > 0 else (i + 1, -1)))
        for i in range(n_classes * per_class)
    ]
    return Listing([str(c) for c in range(n_classes)], {"train": refs, "val": refs[:: per_class // 2]})


@pytest.mark.parametrize("group", [-1, 25], ids=["files", "row_groups"])
def test_shards_of_a_class_sorted_source_mix_its_classes(group: int) -> None:
    tasks = plan(listing(100, 50, group), shard_bytes=10_000, seed=0)
    train = [refs for task in tasks if task.split == "train" for refs in task.shards]
    assert sorted(int(ref.name) for refs in train for ref in refs) == list(range(5000))
    assert {len(refs) for refs in train} <= set(range(92, 109))
    n_classes = [len({ref.label for ref in refs}) for refs in train]
    # 100 images of 100 classes drawn without order have about 63 of them; row groups are mixed 32 at a time
    assert min(n_classes) > (45 if group < 0 else 20)
    numbers = [task.first_shard + i for task in tasks if task.split == "train" for i in range(len(task.shards))]
    assert numbers == list(range(len(train)))
    val = [ref for task in tasks if task.split == "val" for refs in task.shards for ref in refs]
    assert [ref.name for ref in val] == [str(i) for i in range(0, 5000, 25)]


def test_a_row_group_is_read_by_one_task_alone() -> None:
    tasks = [task for task in plan(listing(10, 100, 20), shard_bytes=2_000, seed=1) if task.split == "train"]
    groups = [{ref.group for refs in task.shards for ref in refs} for task in tasks]
    assert len(tasks) > 3
    assert sum(map(len, groups)) == len(set.union(*groups)) == 50


def test_another_seed_gives_another_order_of_the_same_images(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("one", "0"), ("two", "1")):
        assert prepare(tmp_path / name, "--input", str(folder), "--seed", seed) == 0
    one, two = (contents(tmp_path / name, "train") for name in ("one", "two"))
    assert one != two
    assert sorted(one) == sorted(two)
    assert contents(tmp_path / "one", "val") == contents(tmp_path / "two", "val")


def test_workers_jobs_and_interruption_change_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["--input", str(folder), "--output"]
    small = ["--shard-bytes", "3000", "--resize-short", "20"]
    outputs = [tmp_path / name for name in ("one", "two", "array")]
    assert prepare_imagenet.main([*plain, str(outputs[0]), *small, "--workers", "1"]) == 0
    assert prepare_imagenet.main([*plain, str(outputs[1]), *small, "--workers", "2"]) == 0
    array = [*plain, str(outputs[2]), *small, "--workers", "1"]
    assert prepare_imagenet.main([*array, "--merge"]) == 2
    assert "holds no prepared part" in capsys.readouterr().err
    assert prepare_imagenet.main([*array, "--world-size", "3", "--rank", "1"]) == 0
    assert prepare_imagenet.main([*array, "--merge"]) == 2
    assert "shards are not made, shard.00000.mds of train among them" in capsys.readouterr().err
    made = len(list(outputs[2].rglob("shard.*.mds")))
    assert made == -(-(len(list(outputs[0].rglob("shard.*.mds"))) - 1) // 3)
    assert prepare_imagenet.main(array) == 2
    assert "was begun by 3 jobs, this is one of 1: to run one of them again, say --rank N --world-size 3" in (
        capsys.readouterr().err
    )
    for rank in ("0", "2"):
        assert prepare_imagenet.main([*array, "--world-size", "3", "--rank", rank]) == 0
    assert prepare_imagenet.main([*array, "--merge"]) == 0
    assert tree(outputs[0]) == tree(outputs[1]) == tree(outputs[2])
    assert not (outputs[0] / ".progress").exists()
    assert prepare_imagenet.main([*array, "--merge"]) == 0
    before = {path: path.stat().st_mtime_ns for path in outputs[0].rglob("*")}
    assert prepare_imagenet.main([*plain, str(outputs[0]), *small]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in outputs[0].rglob("*")} == before
    assert prepare_imagenet.main([*plain, str(outputs[0]), *small, "--quality", "91"]) == 2
    assert "quality: 90 there, 91 asked" in capsys.readouterr().err


def test_a_job_makes_only_what_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after three shards by an error; a shard whose file went missing, or is cut, is made again."""
    from data_prep import image_preparation

    made: list[tuple[str, int]] = []
    limit = 3
    really = image_preparation.make_shards

    def counting(task: Any, *job: Any) -> Any:
        if len(made) == limit:
            raise OSError(28, "No space left on device")
        made.append((task.split, task.first_shard))
        return really(task, *job)

    monkeypatch.setattr(image_preparation, "make_shards", counting)
    assert prepare(tmp_path / "out", "--input", str(folder)) == 2
    assert "No space left" in capsys.readouterr().err
    assert made == [("train", 0), ("train", 1), ("train", 2)]
    assert prepare(tmp_path / "out", "--input", str(folder), "--seed", "5") == 2
    assert "begun with other settings (seed: 0 there, 5 asked)" in capsys.readouterr().err
    (tmp_path / "out" / "train" / "shard.00001.mds").unlink()
    shard = tmp_path / "out" / "train" / "shard.00002.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    made.clear()
    limit = 99
    assert prepare(tmp_path / "out", "--input", str(folder)) == 0
    assert made[:3] == [("train", 1), ("train", 2), ("train", 3)]
    assert ("train", 0) not in made
    assert prepare(tmp_path / "whole", "--input", str(folder)) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_an_input_that_changed_is_noticed(
    originals: dict[str, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from data_prep.image_listing import SourceOptions, list_images
    from data_prep.image_sources import read_images

    write_tree(tmp_path / "train", originals["train"])
    listed = list_images(SourceOptions(train=(str(tmp_path / "train"),), val_fraction=0.2))
    ref = listed.images["train"][0]
    Path(ref.path).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"5 bytes.*were listed: the input changed"):
        list(read_images([ref], "image"))
    os.unlink(ref.path)
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_images([ref], "image"))


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tree(tmp_path / "in" / split, {f"ant/{split}.jpg": WHOLE})
        (Path(os.fsdecode(os.fsencode(tmp_path / "in" / split / "ant") + b"/\xff\xfe.jpg"))).write_bytes(WHOLE)
    assert prepare(tmp_path / "out", "--input", str(tmp_path / "in")) == 0
    assert {name for _, _, name in contents(tmp_path / "out", "train")} == {"ant/train.jpg", "ant/��.jpg"}


# --------------------------------------------------------------------------- verification


def test_verification_finds_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare(out, "--input", str(folder)) == 0
    assert verify_shards.main([str(out), "--workers", "2", "--picture", str(tmp_path / "p.png")]) == 0
    assert "a class has 8 to 8" in capsys.readouterr().out
    assert Image.open(tmp_path / "p.png").size > (500, 500)
    shard = out / "train" / "shard.00001.mds"
    whole = shard.read_bytes()
    for damaged, message in ((whole[:-9], r"bytes, the index says"), (whole[:-9] + b"\0" * 9, "checksum")):
        shard.write_bytes(damaged)
        assert verify_shards.main([str(out), "--workers", "1"]) == 1
        assert (
            f"shard.00001.mds: {len(whole) - 9} {message}" if "bytes" in message else message in capsys.readouterr().out
        )
    shard.write_bytes(whole)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["images_per_class"]["train"] = [7, 9, 8]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert verify_shards.main([str(out), "--workers", "1"]) == 1
    assert "not those that the manifest counts" in capsys.readouterr().out


def test_a_killed_decoder_is_an_error_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel kills one for want of memory."""
    out = tmp_path / "out"
    assert prepare(out, "--input", str(folder)) == 0
    real = ProcessPoolExecutor.map

    def and_a_kill(pool: ProcessPoolExecutor, *arguments: Any) -> Iterator[Any]:
        reports = real(pool, *arguments)
        for worker in multiprocessing.active_children():
            worker.kill()
        return reports

    monkeypatch.setattr(ProcessPoolExecutor, "map", and_a_kill)
    assert verify_shards.main([str(out), "--workers", "2"]) == 2
    assert "error: train: a process that decodes images was killed" in capsys.readouterr().err


def test_verification_decodes_every_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.unit.test_image_loader import write_bad

    path = write_bad(tmp_path, WHOLE[:-300], label=7)
    assert verify_shards.main([str(path), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "row 7 (bad.JPEG): label 7 of 2 classes" in out
    assert "row 7 (bad.JPEG): Premature end" in out
