"""What becomes of an image when it is prepared: kept byte for byte, converted, or left out, each for a stated reason."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_prep.image_codec import decode_rgb, jpeg_header
from data_prep.image_policy import ImagePolicy, prepare_image
from tests.datasets import jpeg
from tests.unit.imagenet import (
    PICTURE,
    PIXELS,
    WHOLE,
    encoded,
)


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
