"""What becomes of one image on the CPU, against torchvision's transforms and arithmetic by hand."""

from __future__ import annotations

import dataclasses
import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from data_prep.image_codec import JpegError, decode_rgb, jpeg_header
from pretrain.image_config import AugmentConfig
from pretrain.image_transform import evaluation_pixels, random_crop, resized, training_pixels
from pretrain.rand_augment import OPERATIONS, apply, color_jitter, rand_augment
from tests.datasets import jpeg

PLAIN: dict[str, Any] = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (4 / 3, 4 / 3),
    "hflip_prob": 0.0,
    "rand_augment_ops": 0,
    "jitter_prob": 0.0,
}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours and edges, so that resizing and geometry show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(-3, 3, (3, 3))]
    pixels = 127 + 90 * np.stack(waves, axis=-1)
    pixels[height // 3 : height // 2, width // 4 : width // 2] += 70
    return pixels.clip(0, 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 20 * math.log10(255 / (np.sqrt(np.mean((a.astype(float) - b.astype(float)) ** 2)) + 1e-9))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "Invert"])
@pytest.mark.parametrize("sign", [1, -1])
def test_each_operation_is_torchvisions(name: str, sign: int) -> None:
    theirs = v2.RandAugment()
    image = Image.fromarray(picture(60, 60))
    for magnitude in (0, 5, 9, 17, 30):
        magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
        table = magnitudes(31, 60, 60)
        amount = float(table[magnitude]) if table is not None else 0.0
        expected = theirs._apply_image_or_video_transform(
            image, name, amount * (sign if signed else 1), InterpolationMode.NEAREST, {Image.Image: None}
        )
        found = apply(name, image, magnitude, sign)
        differing = np.mean(np.asarray(found) != np.asarray(expected))
        # torchvision's shear turns the magnitude into degrees and back: a pixel on the border of two may go either way
        assert differing <= (0.005 if name.startswith("Shear") else 0), f"{name} at {magnitude}: {differing:.4f} differ"


def test_invert_is_torchvisions() -> None:
    image = Image.fromarray(picture(20, 20))
    assert np.array_equal(np.asarray(apply("Invert", image, 9)), np.asarray(functional.invert(image)))


def test_rand_augment_draws_every_operation_evenly() -> None:
    image = Image.fromarray(picture(8, 8))  # magnitude 20, since at 30 to solarize is to invert
    outcomes: dict[bytes, int] = {}
    for seed in range(3000):
        outcome = rand_augment(image, 1, 20, Random(seed)).tobytes()
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    expected = {apply(name, image, 20, sign).tobytes() for name in OPERATIONS for sign in (1, -1)}
    assert set(outcomes) == expected
    assert outcomes[apply("Invert", image, 20).tobytes()] == pytest.approx(3000 / 15, rel=0.3)
    assert outcomes[apply("ShearX", image, 20).tobytes()] == pytest.approx(3000 / 30, rel=0.4)


def test_jitter_is_torchvisions_where_nothing_clips() -> None:
    pixels = (picture(40, 40) // 3 + 70).astype(np.uint8)
    for seed in range(6):
        draw = Random(seed)
        brightness, contrast, saturation = (1 + 0.2 * (2 * draw.random() - 1) for _ in range(3))
        found = np.asarray(color_jitter(Image.fromarray(pixels), 0.2, Random(seed)))
        expected = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        expected = functional.adjust_brightness(expected, brightness)
        expected = functional.adjust_saturation(functional.adjust_contrast(expected, contrast), saturation)
        expected_hwc = (expected[0] * 255).permute(1, 2, 0).numpy()
        assert np.abs(found - expected_hwc).max() < 1.0  # one rounding, and theirs weighs red by 0.2989


def test_crops_are_distributed_as_torchvisions() -> None:
    draw, cfg = Random(0), AugmentConfig()
    ours = np.array([random_crop(375, 500, cfg, draw) for _ in range(4000)])
    torch.manual_seed(0)
    image = torch.zeros(3, 375, 500)
    crop = v2.RandomResizedCrop(224, antialias=True)
    theirs = [crop.make_params([image]) for _ in range(4000)]
    their_boxes = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    for place, size in ((0, 375), (1, 500), (2, 375), (3, 500)):
        quantiles = [np.quantile(boxes[:, place], np.linspace(0.05, 0.95, 19)) for boxes in (ours, their_boxes)]
        assert np.abs(quantiles[0] - quantiles[1]).max() < 0.035 * size
    assert (ours[:, 0] + ours[:, 2]).max() <= 375
    assert (ours[:, 1] + ours[:, 3]).max() <= 500


def test_a_shape_that_no_crop_fits_gives_the_central_one() -> None:
    cfg = AugmentConfig(crop_scale=(1.0, 1.0))
    assert random_crop(100, 1000, cfg, Random(0)) == (0, 433, 100, 133)
    assert random_crop(1000, 100, cfg, Random(0)) == (433, 0, 133, 100)
    assert random_crop(1, 1, cfg, Random(0)) == (0, 0, 1, 1)


def test_resizing_is_torchvisions() -> None:
    pixels = picture(301, 402)
    expected = functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), [224, 224], antialias=True)
    assert np.array_equal(np.asarray(resized(pixels, 224)), expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (256, 256), (600, 300)])
def test_evaluation_is_resize_and_centre_crop(shape: tuple[int, int]) -> None:
    encoded = jpeg(picture(*shape), quality=95)
    found = evaluation_pixels(encoded, 224, 0.875)
    whole = torch.from_numpy(decode_rgb(encoded)).permute(2, 0, 1)
    expected = functional.center_crop(functional.resize(whole, [256], antialias=True), [224, 224])
    assert psnr(found, expected.permute(1, 2, 0).numpy()) > 35  # the crop's border falls between pixels


def test_a_picture_that_is_small_enough_to_halve_is_halved_by_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain import image_transform

    shrinks: list[int] = []

    def recording(encoded: bytes, shrink: int = 1) -> np.ndarray:
        shrinks.append(shrink)
        return decode_rgb(encoded, shrink)

    monkeypatch.setattr(image_transform, "decode_rgb", recording)
    encoded = jpeg(picture(450, 600), quality=95)
    cfg = AugmentConfig(**PLAIN)
    for size, expected in ((56, 8), (112, 4), (224, 2), (226, 1)):
        found = training_pixels(encoded, size, cfg, Random(0))
        whole = np.asarray(resized(decode_rgb(encoded), size))
        assert shrinks.pop() == expected
        assert psnr(found, whole) > 30, f"size {size}"


def test_a_crop_of_a_halved_picture_lies_where_it_lies_in_the_whole() -> None:
    encoded = jpeg(picture(900, 1200), quality=95)
    cfg = AugmentConfig(**(PLAIN | {"crop_scale": (0.3, 0.3)}))
    places = set()
    for seed in range(5):
        top, left, height, width = random_crop(900, 1200, cfg, Random(seed))
        assert min(height, width) >= 4 * 112
        found = training_pixels(encoded, 112, cfg, Random(seed))
        whole = resized(decode_rgb(encoded)[top : top + height, left : left + width], 112)
        assert psnr(found, np.asarray(whole)) > 28
        places.add((top, left))
    assert len(places) == 5


def test_grey_becomes_three_equal_channels() -> None:
    grey = jpeg(picture(50, 60)[:, :, 0])
    assert jpeg_header(grey) == (50, 60, "Gray")
    pixels = decode_rgb(grey)
    assert pixels.shape == (50, 60, 3)
    assert np.array_equal(pixels[:, :, 0], pixels[:, :, 2])


def test_damage_is_an_error() -> None:
    whole = jpeg(picture(50, 60))
    for damaged in (whole[: len(whole) // 2], whole[:-2], b"", b"\x89PNG\r\n\x1a\n" + whole):
        with pytest.raises(JpegError):
            decode_rgb(damaged)
    with pytest.raises(JpegError):
        training_pixels(whole[:30], 32, AugmentConfig(), Random(0))


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": (0.1, 0.2)},
        {"crop_ratio": (0.5, 0.6)},
        {"hflip_prob": 1.0},
        {"rand_augment_ops": 2},
        {"jitter_prob": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_field_of_the_cpus_share_changes_pixels(change: dict[str, Any]) -> None:
    encoded = jpeg(picture(60, 80))
    plain = AugmentConfig(**PLAIN)
    before = training_pixels(encoded, 32, plain, Random(5))
    assert not np.array_equal(training_pixels(encoded, 32, dataclasses.replace(plain, **change), Random(5)), before)


def test_strengths_change_pixels() -> None:
    encoded = jpeg(picture(60, 80))
    for fixed, change in (
        ({"rand_augment_ops": 2}, {"rand_augment_magnitude": 20}),
        ({"jitter_prob": 1.0}, {"jitter_strength": 0.9}),
    ):
        base = AugmentConfig(**(PLAIN | fixed))
        seeds = range(8)  # one draw may be of an operation without a strength
        before = [training_pixels(encoded, 32, base, Random(s)) for s in seeds]
        after = [training_pixels(encoded, 32, dataclasses.replace(base, **change), Random(s)) for s in seeds]
        assert not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_flip_mirrors() -> None:
    encoded = jpeg(picture(48, 64))
    plain, mirrored = (
        training_pixels(encoded, 24, AugmentConfig(**(PLAIN | {"hflip_prob": p})), Random(1)) for p in (0.0, 1.0)
    )
    assert np.array_equal(mirrored, plain[:, ::-1])
