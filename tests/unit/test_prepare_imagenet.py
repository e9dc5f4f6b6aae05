"""Preparation of images: every kind of input, what the manifest says of them, classes, errors."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import MDSWriter, StreamingDataset

from data_prep import make_demo_images, verify_shards
from data_prep.image_listing import Listing
from data_prep.image_plan import plan
from data_prep.image_preparation import MDS_CONFIG, sample_bytes
from data_prep.image_schema import IMAGE_COLUMNS, read_image_manifest
from data_prep.image_sources import ImageRef, in_tar
from data_prep.shard_writer import mds_file
from pretrain.image_config import ImageDataConfig
from pretrain.images import check_image_dataset
from tests.datasets import jpeg
from tests.unit.corpus import tree
from tests.unit.imagenet import (
    CLASSES,
    N_TRAIN,
    N_VAL,
    PICTURE,
    PIXELS,
    WHOLE,
    contents,
    encoded,
    prepare,
    write_tar,
    write_tree,
)


def assert_is(output: Path, originals: dict[str, dict[str, bytes]]) -> None:
    """The dataset holds exactly the original bytes, with their classes, and everything that reads it says so."""
    manifest = read_image_manifest(output)
    assert manifest.classes == CLASSES
    assert manifest.n_images == {"train": 3 * N_TRAIN, "val": 3 * N_VAL}
    assert manifest.images_per_class == {"train": [N_TRAIN] * 3, "val": [N_VAL] * 3}
    assert manifest.policy == {"train": {}, "val": {}}
    for split, images in originals.items():
        found = sorted((data, CLASSES[label]) for data, label, _ in contents(output, split))
        assert found == sorted((data, name.split("/")[0]) for name, data in images.items())
    assert verify_shards.main([str(output), "--workers", "1"]) == 0
    check_image_dataset(ImageDataConfig(path=str(output), images_per_step=24), n_classes=3)


# --------------------------------------------------------------------------- kinds of input


def test_an_imagefolder_tree(folder: Path, originals: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    assert prepare(tmp_path / "out", "--input", str(folder)) == 0
    assert_is(tmp_path / "out", originals)
    assert {name for _, _, name in contents(tmp_path / "out", "train")} == set(originals["train"])
    assert [name for _, _, name in contents(tmp_path / "out", "val")] == sorted(originals["val"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "policy.jsonl", "train", "val"]


def test_streaming_reads_what_was_written(folder: Path, originals: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    assert prepare(tmp_path / "out", "--input", str(folder)) == 0
    dataset = StreamingDataset(local=str(tmp_path / "out"), split="train", predownload=1)
    found = {dataset.get_item(i)["name"]: dataset.get_item(i) for i in range(len(dataset))}
    assert {name: sample["image"] for name, sample in found.items()} == originals["train"]
    assert all(CLASSES[sample["label"]] == name.split("/")[0] for name, sample in found.items())


def test_a_shard_is_streamings_own_byte_for_byte(tmp_path: Path) -> None:
    samples = [(b"\xff\xd8 one", 3, "a/é.jpg"), (b"", 0, ""), (b"x" * 999, 12345, "b")]
    with MDSWriter(out=str(tmp_path), columns=IMAGE_COLUMNS, hashes=["sha256"], size_limit=None) as writer:
        for image, label, name in samples:
            writer.write({"image": image, "label": label, "name": name})
    raw = [sample_bytes(*sample) for sample in samples]
    assert mds_file(MDS_CONFIG, [len(r) for r in raw], b"".join(raw)) == (tmp_path / "shard.00000.mds").read_bytes()


@pytest.mark.parametrize("labels", ["synsets", "kaggle"])
def test_ilsvrcs_archives(originals: dict[str, dict[str, bytes]], tmp_path: Path, labels: str) -> None:
    """Train: an archive of one archive a class. Val: a flat archive, its classes in a file."""
    source = tmp_path / "ilsvrc"
    source.mkdir()
    per_class = {
        f"{name}.tar": write_tar(
            tmp_path / f"{name}.tar",
            {n.split("/")[1]: data for n, data in originals["train"].items() if n.startswith(name)},
        ).read_bytes()
        for name in CLASSES
    }
    write_tar(source / "ILSVRC2012_img_train.tar", per_class)
    flat = {f"ILSVRC2012_val_{i:08}.JPEG": item for i, item in enumerate(originals["val"].items(), 1)}
    write_tar(source / "ILSVRC2012_img_val.tar", {name: data for name, (_, data) in reversed(flat.items())})
    if labels == "synsets":
        text = "".join(f"{original.split('/')[0]}\n" for original, _ in flat.values())
    else:
        rows = (f"{name[:-5]},{original.split('/')[0]} 10 20 30 40 \n" for name, (original, _) in flat.items())
        text = "ImageId,PredictionString\n" + "".join(rows)
    # What usually lies beside: labels, whose name says val too, boxes, and the dogs, which are in the whole archive.
    (source / "LOC_val_solution.csv").write_text(text)
    (source / "ILSVRC2012_bbox_train_v2.tar.gz").write_bytes(b"")
    (source / "ILSVRC2012_img_train_t3.tar").write_bytes((source / "ILSVRC2012_img_train.tar").read_bytes())
    assert prepare(tmp_path / "no", "--input", str(source)) == 2
    labels_of = str(source / "LOC_val_solution.csv")
    assert prepare(tmp_path / "out", "--input", str(source), "--val-labels", labels_of) == 0
    assert_is(tmp_path / "out", originals)


def test_labels_are_of_whole_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name has dots in it, as scanned.1.jpg has; one that two images share, or two classes, is refused."""
    monkeypatch.chdir(tmp_path)
    names = [f"scanned.{i}.jpg" for i in range(6)]
    write_tree(Path("val"), {name: WHOLE for name in names})
    Path("labels").write_text("".join(f"{name} {CLASSES[i % 3]}\n" for i, name in enumerate(names)))
    arguments = ("--train", str(folder / "train"), "--val", "val", "--val-labels", "labels")
    assert prepare(tmp_path / "out", *arguments) == 0
    assert [(name, label) for _, label, name in contents(tmp_path / "out", "val")] == [
        (name, i % 3) for i, name in enumerate(names)
    ]
    with open("labels", "a") as file:
        file.write("scanned.4 cat\n")
    assert prepare(tmp_path / "two", *arguments) == 2
    assert "scanned.4 is of class bee and of cat" in capsys.readouterr().err
    write_tree(Path("val"), {"more/scanned.4.jpg": WHOLE})
    assert prepare(tmp_path / "two", *arguments) == 2
    assert "two images of val are called scanned.4" in capsys.readouterr().err


def test_a_byte_order_mark_is_part_of_no_name(folder: Path, tmp_path: Path) -> None:
    """Windows' editors and spreadsheets write one before the first line."""
    train = {f"{label}-{i}.{kind}": data for label in range(3) for i in range(2) for kind, data in _numbered(label)}
    write_tar(tmp_path / "train.tar", train)
    (tmp_path / "names").write_text("".join(f"{name}\r\n" for name in CLASSES), encoding="utf-8-sig")
    named = ("--class-names", str(tmp_path / "names"))
    numbered = ("--train", str(tmp_path / "train.tar"), "--val-fraction", "0.5")
    assert prepare(tmp_path / "numbered", *numbered, *named) == 0
    assert read_image_manifest(tmp_path / "numbered").classes == CLASSES
    write_tree(tmp_path / "val", {f"{i}.jpg": WHOLE for i in range(3)})
    (tmp_path / "labels").write_text("\n".join(CLASSES), encoding="utf-8-sig")
    labelled = ("--val", str(tmp_path / "val"), "--val-labels", str(tmp_path / "labels"))
    assert prepare(tmp_path / "labelled", "--train", str(folder / "train"), *labelled) == 0
    assert [label for _, label, _ in contents(tmp_path / "labelled", "val")] == [0, 1, 2]


def _numbered(label: int) -> list[tuple[str, bytes]]:
    return [("jpg", WHOLE), ("cls", str(label).encode())]


def test_archives_of_class_folders_and_of_one_class_each(
    originals: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "train").mkdir()
    for name in CLASSES:
        write_tar(
            tmp_path / "train" / f"{name}.tar",
            {n.split("/")[1]: data for n, data in originals["train"].items() if n.startswith(name)},
        )
    val = write_tar(tmp_path / "v.tar", {f"./x/{name}": data for name, data in originals["val"].items()})
    assert prepare(tmp_path / "out", "--train", str(tmp_path / "train"), "--val", str(val)) == 0
    assert_is(tmp_path / "out", originals)


def test_what_is_hidden_beside_archives_and_in_them_is_left_out(
    originals: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """What a Mac knows of a file lies beside it as ._NAME, whatever NAME ends in."""
    inner, flat = {}, {}
    for label, name in enumerate(CLASSES):
        images = {n.split("/")[1]: data for n, data in originals["train"].items() if n.startswith(name)}
        inner[f"{name}.tar"] = write_tar(tmp_path / "train" / f"{name}.tar", images).read_bytes()
        inner[f"._{name}.tar"] = WHOLE
        (tmp_path / "train" / f"._{name}.tar").write_bytes(WHOLE)
        (tmp_path / "train" / f"._{name}.parquet").write_bytes(WHOLE)
        flat |= {f"{name}.jpg": WHOLE, f"{name}.cls": str(label).encode(), f"._{name}.cls": WHOLE}
    whole = write_tar(tmp_path / "whole.tar", inner)
    val = write_tar(tmp_path / "val.tar", {f"{name}/a.jpg": WHOLE for name in CLASSES})
    for number, train in enumerate((tmp_path / "train", whole)):
        assert prepare(tmp_path / f"{number}", "--train", str(train), "--val", str(val)) == 0
        assert read_image_manifest(tmp_path / f"{number}").images_per_class["train"] == [N_TRAIN] * len(CLASSES)
    numbered = in_tar(str(write_tar(tmp_path / "numbered.tar", flat)))
    assert [(found.class_name, found.ref.name) for found in numbered] == [
        (0, "ant.jpg"),
        (1, "bee.jpg"),
        (2, "cat.jpg"),
    ]


def test_webdataset_archives(originals: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    for split, images in originals.items():
        members: dict[str, bytes] = {}
        for i, (name, data) in enumerate(images.items()):
            members |= {f"{i:06}.jpg": data, f"{i:06}.cls": str(CLASSES.index(name.split("/")[0])).encode()}
        write_tar(tmp_path / f"{split}-000000.tar", members)
    (tmp_path / "names").write_text("\n".join(CLASSES))
    assert prepare(tmp_path / "out", "--input", str(tmp_path), "--class-names", str(tmp_path / "names")) == 0
    assert_is(tmp_path / "out", originals)
    assert prepare(tmp_path / "numbered", "--input", str(tmp_path)) == 0
    assert read_image_manifest(tmp_path / "numbered").classes == ["0", "1", "2"]


def write_parquet(
    folder: Path, originals: dict[str, dict[str, bytes]], *, names: bool = True, group: int = 5, paths: bool = True
) -> Path:
    """The hub's layout: data/train-00000-of-00002.parquet, ...; class names in the schema's metadata."""
    (folder / "data").mkdir(parents=True)
    feature = {"label": {"names": CLASSES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": feature}})} if names else None
    for split, images in originals.items():
        items = list(images.items())
        for part in range(2):
            some = items[part::2]
            values: list[Any] = [{"bytes": data, "path": name if paths else None} for name, data in some]
            labels = [CLASSES.index(name.split("/")[0]) for name, _ in some]
            table = pa.table({"image": values, "label": pa.array(labels, pa.int64())})
            name = {"train": "train", "val": "validation"}[split]
            pq.write_table(
                table.replace_schema_metadata(metadata),
                folder / "data" / f"{name}-{part:05}-of-00002.parquet",
                row_group_size=group,
            )
    return folder


def test_the_hubs_parquet(originals: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "hub", originals)
    assert prepare(tmp_path / "out", "--input", str(source)) == 0
    assert_is(tmp_path / "out", originals)


def test_parquet_without_names_or_paths(
    originals: dict[str, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_parquet(tmp_path / "hub", originals, names=False, paths=False)
    (tmp_path / "names").write_text("\n".join(CLASSES))
    assert prepare(tmp_path / "out", "--input", str(source), "--class-names", str(tmp_path / "names")) == 0
    assert_is(tmp_path / "out", originals)
    assert contents(tmp_path / "out", "val")[0][2] == "validation-00000-of-00002/0/0"
    (tmp_path / "nowhere").mkdir()
    for path in (source / "data").iterdir():  # nor a place for paths
        table = pq.read_table(path)
        bare = pa.array([{"bytes": value["bytes"]} for value in table["image"].to_pylist()])
        pq.write_table(table.set_column(0, "image", bare), tmp_path / "nowhere" / path.name, row_group_size=5)
    named = ("--class-names", str(tmp_path / "names"))
    assert prepare(tmp_path / "bare", "--input", str(tmp_path / "nowhere"), *named) == 0
    assert_is(tmp_path / "bare", originals)
    arguments = ("--train", *(str(tmp_path / name) for name in ("hub/data/train-*", "more")), "--val-fraction", "0.1")
    write_tree(tmp_path / "more", {"dog/a.jpg": WHOLE})
    assert prepare(tmp_path / "stray", *arguments, "--class-names", str(tmp_path / "names")) == 2
    assert "dog/a.jpg is of class 'dog', which is not among the names of the numbered" in capsys.readouterr().err
    (tmp_path / "names").write_text("ant\nbee\nant\n")
    assert prepare(tmp_path / "twice", "--input", str(source), "--class-names", str(tmp_path / "names")) == 2
    assert "two classes are called 'ant'" in capsys.readouterr().err
    (tmp_path / "names").write_text("ant\nbee\n")
    assert prepare(tmp_path / "few", "--input", str(source), "--class-names", str(tmp_path / "names")) == 2
    assert "has label 2, but there are 2 class names" in capsys.readouterr().err
    assert prepare(tmp_path / "col", "--input", str(source), "--label-column", "fine_label") == 2
    assert "no column 'fine_label'; it has image, label" in capsys.readouterr().err


@pytest.mark.parametrize("parquet_first", [True, False])
def test_row_groups_and_images_of_an_archive_are_mixed_each_in_its_way(parquet_first: bool) -> None:
    """A row group is read once; an archive, however large, is no row group."""
    rows = [ImageRef(f"p{i}", i % 3, "a.parquet", 100, i % 10, i // 10) for i in range(1000)]
    members = [ImageRef(f"t{i}", i % 3, "b.tar", 100, 512 + i * 512) for i in range(1000)]
    images = [*rows, *members] if parquet_first else [*members, *rows]
    tasks = plan(Listing(["0", "1", "2"], {"train": images, "val": rows[:3]}), 1000, 0)
    made = [[ref for refs in task.shards for ref in refs] for task in tasks if task.split == "train"]
    assert sorted(ref for refs in made for ref in refs) == sorted(images)
    assert max(map(len, made)) < 200
    read = [{ref.group for ref in refs if ref.group >= 0} for refs in made]
    assert sum(map(len, read)) == 100


def test_a_share_of_each_class_becomes_val(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of any folder of class folders: stratified, seeded, and no image on both sides."""
    outputs = [tmp_path / name for name in ("one", "same", "other")]
    for output, seed in zip(outputs, ("1", "1", "2"), strict=True):
        assert prepare(output, "--train", str(folder / "train"), "--val-fraction", "0.25", "--seed", seed) == 0
        assert read_image_manifest(output).images_per_class == {"train": [6] * 3, "val": [2] * 3}
        names = [[name for _, _, name in contents(output, split)] for split in ("train", "val")]
        assert len(set(names[0]) | set(names[1])) == 3 * N_TRAIN
    assert tree(outputs[0]) == tree(outputs[1])
    assert {n for _, _, n in contents(outputs[0], "val")} != {n for _, _, n in contents(outputs[2], "val")}
    assert prepare(tmp_path / "none", "--train", str(folder / "train")) == 2
    assert "there is no val source" in capsys.readouterr().err
    assert prepare(tmp_path / "both", "--input", str(folder), "--val-fraction", "0.1") == 2
    assert "leave one out" in capsys.readouterr().err


def test_demo_images_are_images_of_classes(tmp_path: Path) -> None:
    counts = make_demo_images.write(make_demo_images.drawn(9, 5, 32), tmp_path / "drawn")
    assert counts == {"train": 36, "val": 9}
    again = make_demo_images.drawn(9, 5, 32)
    assert all(np.array_equal(a, b) for (*_, a), (*_, b) in zip(again, make_demo_images.drawn(9, 5, 32), strict=True))
    assert len({pixels.tobytes() for *_, pixels in again}) == 45
    pytest.importorskip("sklearn", reason="the digits are in scikit-learn")
    make_demo_images.write(make_demo_images.digits()[:200], tmp_path / "digits")
    for name, n_classes in (("drawn", 9), ("digits", 10)):
        assert prepare(tmp_path / f"out_{name}", "--input", str(tmp_path / name)) == 0
        assert len(read_image_manifest(tmp_path / f"out_{name}").classes) == n_classes


@pytest.mark.parametrize(
    ("option", "value"),
    [("--size", 0), ("--size", -3), ("--classes", 0), ("--images", 1), ("--seed", -1), ("--seed", 2**32)],
)
def test_demo_images_that_cannot_be_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: int
) -> None:
    assert make_demo_images.main(["drawn", str(tmp_path / "drawn"), option, str(value)]) == 2
    assert f"error: {option} {value}: must " in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


def test_the_manifest_counts_and_the_log_names(
    originals: dict[str, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = {
        "ant/cut.JPEG": WHOLE[:300],
        "ant/cmyk.JPEG": encoded(PICTURE.convert("CMYK"), "JPEG"),
        "bee/grey.jpg": jpeg(PIXELS[:, :, 0]),
        "bee/really_a_png.JPEG": encoded(PICTURE, "PNG"),
        "bee/tiny.JPEG": jpeg(PIXELS[:1, :1]),
        "cat/.hidden.jpg": b"x",
        "cat/notes.txt": b"x",
    }
    write_tree(tmp_path / "in" / "train", originals["train"] | hostile)
    write_tree(tmp_path / "in" / "val", originals["val"])
    assert prepare(tmp_path / "out", "--input", str(tmp_path / "in")) == 0
    manifest = read_image_manifest(tmp_path / "out")
    assert manifest.policy["train"] == {
        "converted_cmyk": 1,
        "converted_format": 1,
        "kept_greyscale": 1,
        "skipped_damaged": 1,
        "skipped_too_small": 1,
    }
    assert manifest.images_per_class["train"] == [N_TRAIN + 1, N_TRAIN + 2, N_TRAIN]
    lines = [json.loads(line) for line in (tmp_path / "out" / "policy.jsonl").read_text().splitlines()]
    assert {(line["split"], line["name"], line["what"]) for line in lines} == {
        ("train", "ant/cut.JPEG", "skipped_damaged"),
        ("train", "ant/cmyk.JPEG", "converted_cmyk"),
        ("train", "bee/grey.jpg", "kept_greyscale"),
        ("train", "bee/really_a_png.JPEG", "converted_format"),
        ("train", "bee/tiny.JPEG", "skipped_too_small"),
    }
    assert verify_shards.main([str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "'skipped_damaged': 1" in capsys.readouterr().out


# --------------------------------------------------------------------------- classes


def test_classes_of_one_split_alone_are_an_error(
    originals: dict[str, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "train", originals["train"])
    val = {name: data for name, data in originals["val"].items() if not name.startswith("bee")}
    write_tree(tmp_path / "val", val)
    assert prepare(tmp_path / "out", "--input", str(tmp_path)) == 2
    assert "split val has no image of 1 of 3 classes, 'bee' among them: add images of it" in capsys.readouterr().err
    write_tree(tmp_path / "val", {"dog/a.jpg": WHOLE, "bee/a.jpg": WHOLE})
    assert prepare(tmp_path / "out", "--input", str(tmp_path)) == 2
    assert "dog/a.jpg is of class 'dog', which train does not have" in capsys.readouterr().err
    write_tree(tmp_path / "single" / "train", {"ant/a.jpg": WHOLE, "ant/b.jpg": WHOLE, "bee/a.jpg": WHOLE})
    assert prepare(tmp_path / "out", "--train", str(tmp_path / "single" / "train"), "--val-fraction", "0.5") == 2
    assert "split train has no image of 1 of 2 classes, 'bee'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_class_whose_images_were_all_left_out_is_an_error(
    originals: dict[str, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "train", originals["train"])
    damaged = {name: data[:200] if name.startswith("cat") else data for name, data in originals["val"].items()}
    write_tree(tmp_path / "val", damaged)
    assert prepare(tmp_path / "out", "--input", str(tmp_path)) == 2
    assert "every image of 1 classes in val, cat among them, was left out; policy.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert (tmp_path / "out" / "policy.jsonl").read_text().count("skipped_damaged") == N_VAL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none/at-all"], "none/at-all"),
        (["--train", "images.zip"], "decompress it to .tar"),
        (["--train", "x.txt"], "unknown kind"),
        (["--train", "flat", "--val-fraction", "0.1"], "lies in no class folder"),
        (["--train", "empty", "--val-fraction", "0.1"], "no image there"),
        (["--train", "cut.tar", "--val-fraction", "0.1"], "cut short or damaged"),
        (["--train", "cut.parquet", "--val-fraction", "0.1"], "cut short or damaged"),
        (["--train", "train", "train", "--val-fraction", "0.1"], "is named twice"),
        (["--train", "train", "--val", "train"], "is named twice"),
        (["--train", "train", "--val", "../{here}/train"], "is named twice"),
        (["--train", "train", "--val", "flat"], "give the classes with --val-labels"),
        (["--train", "train", "--val", "flat", "--val-labels", "two"], "2 classes for 1 images"),
        (["--train", "train", "--val", "flat", "--val-labels", "other"], "says nothing of 1 images, a.jpg"),
        (["--train", "train", "--val", "flat", "--val-labels", "number"], "use a list of synsets"),
        (["--train", "train", "--val-fraction", "1.0"], "above 0 and below 1"),
        (["--val", "train"], "--input or --train is required"),
        (["--train", "train", "--val-fraction", "0.5", "--shard-bytes", "4294967296"], "at most 2147483648 (2 GiB)"),
        (["--input", ".", "--train", "train"], "--input and --train"),
        (["--input", "none", "--seed", "-1"], "--seed -1: must lie in 0 to 4294967295"),
        (["--input", "none", "--seed", "4294967296"], "--seed 4294967296: must lie in"),
    ],
)
def test_inputs_that_cannot_be_are_named(
    folder: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "train", "train")
    write_tree(Path("flat"), {"a.jpg": WHOLE})
    Path("empty").mkdir()
    for name, text in (
        ("images.zip", ""),
        ("x.txt", ""),
        ("two", "ant\nbee\n"),
        ("other", "b ant\n"),
        ("number", "1\n"),
    ):
        Path(name).write_text(text)
    whole = write_tar(tmp_path / "cut.tar", {"ant/a.jpg": WHOLE, "ant/b.jpg": WHOLE}).read_bytes()
    Path("cut.tar").write_bytes(whole[:2000])
    Path("cut.parquet").write_bytes(b"PAR1")
    assert prepare(tmp_path / "out", *(argument.format(here=tmp_path.name) for argument in arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("damage", ["between_members", "in_a_header", "a_bit_of_a_header"])
def test_an_archive_that_stops_early_is_noticed(
    nested: bool, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tarfile` takes a header that it cannot read for the end of the archive."""
    members = {(f"{i}.jpg" if nested else f"{'ab'[i % 2]}/{i}.jpg"): WHOLE for i in range(12)}
    data = bytearray(write_tar(tmp_path / "a.tar", members).read_bytes())
    each = 512 + -(-len(WHOLE) // 512) * 512
    if damage == "a_bit_of_a_header":
        data[6 * each + 5] ^= 1
    else:
        data = data[: 6 * each + (100 if damage == "in_a_header" else 0)]
    if nested:
        (tmp_path / "a.tar").unlink()
        write_tar(tmp_path / "train.tar", {"a.tar": bytes(data), "b.tar": bytes(data)})
    else:
        (tmp_path / "train.tar").write_bytes(data)
    assert prepare(tmp_path / "out", "--train", str(tmp_path / "train.tar"), "--val-fraction", "0.2") == 2
    said = capsys.readouterr().err
    assert "train.tar: a.tar: cannot be read" in said if nested else "train.tar: cannot be read" in said
    assert f"no header at byte {6 * each:,}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_a_link_in_an_archive_is_no_image_left_out_in_silence(
    nested: bool, kind: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "ant.tar", {f"ant/{i}.jpg": WHOLE for i in range(4)})
    with tarfile.open(tmp_path / "ant.tar", "a") as archive:
        link = tarfile.TarInfo("ant/5.jpg")
        link.type, link.linkname = kind, "ant/1.jpg"
        archive.addfile(link)
    source = tmp_path / "ant.tar"
    if nested:
        source = write_tar(tmp_path / "train.tar", {"ant.tar": source.read_bytes()})
    assert prepare(tmp_path / "out", "--train", str(source), "--val-fraction", "0.2") == 2
    assert "ant.tar: ant/5.jpg is a link to ant/1.jpg" in capsys.readouterr().err


def test_archives_beside_class_folders_are_not_guessed_about(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    write_tar(tmp_path / "train" / "old.tar", {"ant/a.jpg": WHOLE})
    assert prepare(tmp_path / "out", "--train", str(tmp_path / "train"), "--val-fraction", "0.2") == 2
    assert "holds archives or parquet files (old.tar) and image files (" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_a_test_split_beside_train_is_neither_classes_nor_images_of_train(
    folder: Path, originals: dict[str, dict[str, bytes]], tmp_path: Path, kind: str
) -> None:
    """As data sets come that have no val: train/CLASS and test/CLASS, or the hub's train- and test- files."""
    source = tmp_path / "source"
    if kind == "parquet":
        for path in (write_parquet(source, originals) / "data").glob("validation-*"):
            path.rename(path.with_name(path.name.replace("validation", "test")))
    else:
        for split in ("train", "test"):
            shutil.copytree(folder / split.replace("test", "val"), source / split)
    assert prepare(tmp_path / "out", "--input", str(source), "--val-fraction", "0.25") == 0
    manifest = read_image_manifest(tmp_path / "out")
    assert manifest.classes == CLASSES
    assert sum(manifest.n_images.values()) == 3 * N_TRAIN


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    images = {f"{name}/{i}.jpg": WHOLE for name in ("train", "bus") for i in range(4)}
    write_tree(tmp_path / "vehicles", images)
    assert prepare(tmp_path / "out", "--input", str(tmp_path / "vehicles"), "--val-fraction", "0.25") == 0
    assert read_image_manifest(tmp_path / "out").classes == ["bus", "train"]
