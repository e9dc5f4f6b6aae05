"""Preparation of images: every kind of input, the policy for every kind of image, order, resumption, errors, verification."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from streaming import MDSWriter, StreamingDataset

from data_prep import make_demo_images, prepare_imagenet, verify_shards
from data_prep.image_codec import decode_rgb, jpeg_header
from data_prep.image_listing import Listing
from data_prep.image_plan import plan
from data_prep.image_policy import ImagePolicy, prepare_image
from data_prep.image_preparation import MDS_CONFIG, sample_bytes
from data_prep.image_schema import IMAGE_COLUMNS, read_image_manifest
from data_prep.image_sources import ImageRef
from data_prep.shard_reader import read_image_shard, split_index
from data_prep.shard_writer import mds_file
from pretrain.image_config import ImageDataConfig
from pretrain.images import check_image_dataset
from tests.datasets import blob_image, jpeg
from tests.unit.corpus import tree

CLASSES = ["ant", "bee", "cat"]
N_TRAIN, N_VAL = 8, 3  # of each class


@pytest.fixture(scope="module")
def originals() -> dict[str, dict[str, bytes]]:
    """By split, CLASS/NAME to JPEG bytes."""
    rng = np.random.default_rng(0)
    return {
        split: {
            f"{name}/{name}_{i}.JPEG": jpeg(blob_image(label, rng, height=24, width=32), quality=85)
            for label, name in enumerate(CLASSES)
            for i in range(n)
        }
        for split, n in (("train", N_TRAIN), ("val", N_VAL))
    }


@pytest.fixture(scope="module")
def folder(originals: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder tree: train/CLASS/NAME, val/CLASS/NAME."""
    root = tmp_path_factory.mktemp("imagefolder")
    for split, images in originals.items():
        write_tree(root / split, images)
    return root


def write_tree(root: Path, images: dict[str, bytes]) -> Path:
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def prepare(output: Path, *arguments: str) -> int:
    return prepare_imagenet.main(["--output", str(output), "--workers", "1", "--shard-bytes", "4000", *arguments])


def contents(output: Path, split: str) -> list[tuple[bytes, int, str]]:
    return [image for entry in split_index(output, split) for image in read_image_shard(output / split, entry)]


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
    (tmp_path / "names").write_text("ant\nbee\n")
    assert prepare(tmp_path / "few", "--input", str(source), "--class-names", str(tmp_path / "names")) == 2
    assert "has label 2, but there are 2 class names" in capsys.readouterr().err
    assert prepare(tmp_path / "col", "--input", str(source), "--label-column", "fine_label") == 2
    assert "no column 'fine_label'; it has image, label" in capsys.readouterr().err


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


# --------------------------------------------------------------------------- what becomes of an image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PIXELS = blob_image(1, np.random.default_rng(3), height=40, width=60)
PICTURE = Image.fromarray(PIXELS)
WHOLE = jpeg(PIXELS, quality=90)


def exif(turn: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = turn
    return found


@pytest.mark.parametrize(
    "data",
    [
        WHOLE,
        jpeg(PIXELS, quality=90, progressive=True),
        jpeg(PIXELS, quality=90, subsampling=0),
        WHOLE + b"trailing bytes",
        encoded(PICTURE, "JPEG", exif=exif(1)),
        encoded(PICTURE, "JPEG", exif=b"Exif\x00\x00damaged"),
    ],
    ids=["baseline", "progressive", "444", "trailing", "upright", "damaged_exif"],
)
def test_a_jpeg_that_decodes_is_kept_byte_for_byte(data: bytes) -> None:
    outcome = prepare_image(data, ImagePolicy())
    assert outcome.jpeg == data
    assert outcome.what == {}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (WHOLE[: len(WHOLE) // 2], "skipped_damaged"),
        (WHOLE[:50], "skipped_damaged"),
        (b"", "skipped_not_an_image"),
        (b"<html>not found</html>", "skipped_not_an_image"),
        (encoded(PICTURE, "PNG")[:-200], "skipped_damaged"),
        (jpeg(PIXELS[:1, :1]), "skipped_too_small"),
        (jpeg(PIXELS[:7, :60]), "skipped_too_small"),
        (encoded(PICTURE.crop((0, 0, 1, 1)), "PNG"), "skipped_too_small"),
        (encoded(Image.new("1", (20_000, 10_000)), "PNG"), "skipped_too_large"),
        (encoded(Image.fromarray(PIXELS[:, :, 0].astype(np.float32)), "TIFF"), "skipped_depth"),
    ],
    ids=["truncated", "header", "empty", "html", "cut_png", "1x1", "flat", "1x1_png", "bomb", "float"],
)
def test_what_is_left_out(data: bytes, reason: str) -> None:
    outcome = prepare_image(data, ImagePolicy())
    assert outcome.jpeg is None
    assert list(outcome.what) == [reason]


def test_sizes_are_settings() -> None:
    assert prepare_image(WHOLE, ImagePolicy(max_pixels=2399)).what == {"skipped_too_large": "60x40"}
    assert prepare_image(WHOLE, ImagePolicy(max_pixels=2400)).jpeg == WHOLE
    assert prepare_image(WHOLE, ImagePolicy(min_side=41)).what == {"skipped_too_small": "60x40"}
    one = jpeg(PIXELS[:1, :1])
    assert prepare_image(one, ImagePolicy(min_side=1)).jpeg == one


def palette_with_a_hole() -> Image.Image:
    image = PICTURE.quantize(16)
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("data", "reasons"),
    [
        (encoded(PICTURE, "PNG"), {"converted_format"}),
        (encoded(PICTURE, "WEBP", lossless=True), {"converted_format"}),
        (encoded(PICTURE, "BMP"), {"converted_format"}),
        (encoded(PICTURE.convert("CMYK"), "JPEG", quality=95), {"converted_cmyk"}),
        (encoded(PICTURE.quantize(200), "PNG"), {"converted_format", "converted_palette"}),
        (encoded(PICTURE.convert("RGBA"), "PNG"), {"converted_format", "converted_alpha"}),
        (WHOLE.replace(b"\xff\xdb", b"\0\0\0\xff\xdb", 1), {"converted_warning"}),
    ],
    ids=["png", "webp", "bmp", "cmyk", "palette", "alpha", "stray_bytes"],
)
def test_what_is_converted_looks_the_same(data: bytes, reasons: set[str]) -> None:
    outcome = prepare_image(data, ImagePolicy(quality=95))
    assert set(outcome.what) == reasons
    assert outcome.jpeg is not None
    assert jpeg_header(outcome.jpeg) == (40, 60, "YCbCr")
    assert np.abs(decode_rgb(outcome.jpeg).astype(int) - PIXELS).mean() < 12  # noise, and chroma at half resolution


def test_grey_is_kept_and_depth_reduced() -> None:
    grey = jpeg(PIXELS[:, :, 1])
    assert prepare_image(grey, ImagePolicy()).what == {"kept_greyscale": ""}
    assert prepare_image(grey, ImagePolicy()).jpeg == grey
    upper = PIXELS[:, :, 1].astype(np.uint16)
    deep = Image.fromarray(upper << 8 | (255 - upper))
    outcome = prepare_image(encoded(deep, "PNG"), ImagePolicy(quality=95))
    assert set(outcome.what) == {"converted_format", "converted_16_bit", "converted_greyscale"}
    assert outcome.jpeg is not None
    assert np.abs(decode_rgb(outcome.jpeg)[:, :, 0].astype(int) - PIXELS[:, :, 1]).mean() < 4


def test_what_is_transparent_becomes_white() -> None:
    seen = np.dstack([np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), np.uint8)])
    seen[:, 30:, 3] = 255
    for image in (Image.fromarray(seen), Image.fromarray(seen[:, :, [0, 3]], "LA")):
        outcome = prepare_image(encoded(image, "PNG"), ImagePolicy())
        assert outcome.jpeg is not None
        pixels = decode_rgb(outcome.jpeg)
        assert pixels[:, :25].min() > 245
        assert pixels[:, 35:].max() < 10
    outcome = prepare_image(encoded(palette_with_a_hole(), "PNG", transparency=0), ImagePolicy())
    assert {"converted_palette", "converted_alpha"} <= set(outcome.what)


@pytest.mark.parametrize("turn", range(2, 9))
def test_orientation_is_ignored_or_applied(turn: int) -> None:
    data = encoded(PICTURE, "JPEG", quality=95, exif=exif(turn))
    ignored = prepare_image(data, ImagePolicy())
    assert ignored.jpeg == data
    assert ignored.what == {"kept_orientation": str(turn)}
    applied = prepare_image(data, ImagePolicy(orientation="apply", quality=95))
    assert applied.what == {"converted_orientation": str(turn)}
    assert applied.jpeg is not None
    by_hand = {  # what EXIF says of each: rows and columns as the camera wrote them
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: PIXELS[::-1].transpose(1, 0, 2),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: PIXELS[:, ::-1].transpose(1, 0, 2),
    }[turn]
    pixels = decode_rgb(applied.jpeg)
    assert pixels.shape == by_hand.shape
    assert np.abs(pixels.astype(int) - by_hand).mean() < 14
    again = prepare_image(applied.jpeg, ImagePolicy(orientation="apply"))
    assert again.what == {}


@pytest.mark.parametrize("format_", ["JPEG", "WEBP"])
def test_damaged_exif_stops_nothing(format_: str) -> None:
    """Every byte of EXIF broken in turn: the image comes out, turned or not."""
    whole = encoded(PICTURE, format_, exif=exif(6))
    start = whole.index(b"II*\x00") if b"II*\x00" in whole else whole.index(b"MM\x00*")
    seen = set()
    for place in range(start, start + len(exif(6).tobytes()) - 6):
        data = bytearray(whole)
        data[place] ^= 0xFF
        outcome = prepare_image(bytes(data), ImagePolicy(orientation="apply"))
        assert outcome.jpeg is not None
        seen.add("converted_orientation" in outcome.what)
    assert seen == {True, False}


def test_short_sides_are_reduced_and_never_enlarged() -> None:
    policy = ImagePolicy(resize_short=20, quality=95)
    for data, kept in ((WHOLE, "converted_size"), (encoded(PICTURE, "PNG"), "converted_size")):
        outcome = prepare_image(data, policy)
        assert kept in outcome.what
        assert outcome.jpeg is not None
        assert jpeg_header(outcome.jpeg)[:2] == (20, 30)
        expected = np.asarray(PICTURE.resize((30, 20), Image.Resampling.BICUBIC))
        assert np.abs(decode_rgb(outcome.jpeg).astype(int) - expected).mean() < 12
    assert prepare_image(WHOLE, ImagePolicy(resize_short=40)).jpeg == WHOLE
    tall = jpeg(np.repeat(PIXELS, 8, axis=0))  # 320 x 60
    outcome = prepare_image(tall, ImagePolicy(resize_short=15))
    assert outcome.jpeg is not None
    assert jpeg_header(outcome.jpeg)[:2] == (80, 15)


@pytest.mark.parametrize(
    "change",
    [{"resize_short": 5}, {"quality": 0}, {"min_side": 0}, {"max_pixels": 10**9}, {"resize_short": -1}],
    ids=str,
)
def test_policies_that_cannot_be_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="--"):
        ImagePolicy(**change)  # type: ignore[arg-type]


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
        (["--train", "train", "--val", "flat"], "give the classes with --val-labels"),
        (["--train", "train", "--val", "flat", "--val-labels", "two"], "2 classes for 1 images"),
        (["--train", "train", "--val", "flat", "--val-labels", "other"], "says nothing of 1 images, a.jpg"),
        (["--train", "train", "--val", "flat", "--val-labels", "number"], "use a list of synsets"),
        (["--train", "train", "--val-fraction", "1.0"], "above 0 and below 1"),
        (["--val", "train"], "--input or --train is required"),
        (["--input", ".", "--train", "train"], "--input and --train"),
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
    assert prepare(tmp_path / "out", *arguments) == 2
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


def test_archives_beside_class_folders_are_not_guessed_about(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    write_tar(tmp_path / "train" / "old.tar", {"ant/a.jpg": WHOLE})
    assert prepare(tmp_path / "out", "--train", str(tmp_path / "train"), "--val-fraction", "0.2") == 2
    assert "holds archives or parquet files (old.tar) and image files (" in capsys.readouterr().err


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    images = {f"{name}/{i}.jpg": WHOLE for name in ("train", "bus") for i in range(4)}
    write_tree(tmp_path / "vehicles", images)
    assert prepare(tmp_path / "out", "--input", str(tmp_path / "vehicles"), "--val-fraction", "0.25") == 0
    assert read_image_manifest(tmp_path / "out").classes == ["bus", "train"]


# --------------------------------------------------------------------------- order, resumption, jobs


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


def test_verification_decodes_every_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.unit.test_image_loader import write_bad

    path = write_bad(tmp_path, WHOLE[:-300], label=7)
    assert verify_shards.main([str(path), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "row 7 (bad.JPEG): label 7 of 2 classes" in out
    assert "row 7 (bad.JPEG): Premature end" in out
