"""What becomes of one image file's bytes on their way into a shard: kept, converted, or left out, and which of these.

A JPEG that the decoder of training takes without complaint, grey or RGB, of a size that can be trained on, is kept byte
for byte. Everything else is listed in docs/images.md; each of its names is a constant below and a count in the manifest.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.image_codec import SHRINKS, JpegError, Pixels, decode_rgb, jpeg_header

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may take a file for; its other decoders are older and rarely what a class folder holds."""
MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs: a quarter of a gigabyte as RGB."""
LEFT_OUT, CHANGED = "skipped_", "converted_"
ORIENTATION_TAG = 0x0112
UPRIGHT = 1


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """The choices that decide what bytes a file becomes."""

    resize_short: int = 0
    """Reduce images whose short side is longer to this many pixels, and never enlarge one; 0: leave sizes alone."""
    quality: int = 90
    """JPEG quality, 1 to 100, of what is encoded anew."""
    min_side: int = 8
    """Images with a side of fewer pixels are left out."""
    max_pixels: int = MAX_PIXELS
    """Images of more pixels are left out before they are decoded."""
    orientation: Literal["ignore", "apply"] = "ignore"
    """Whether images that EXIF calls turned are turned upright. ignore: as torchvision, timm and FFCV do."""

    def __post_init__(self) -> None:
        if self.resize_short < 0:
            raise ValueError(f"--resize-short {self.resize_short}: must not be negative")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality}: must lie in 1 to 100")
        if self.min_side < 1:
            raise ValueError(f"--min-side {self.min_side}: must be at least 1")
        if not 1 <= self.max_pixels <= 2 * MAX_PIXELS:
            raise ValueError(f"--max-pixels {self.max_pixels}: must lie in 1 to {2 * MAX_PIXELS}")
        if self.resize_short and self.resize_short < self.min_side:
            raise ValueError(f"--resize-short {self.resize_short} is below --min-side {self.min_side}")


@dataclass
class Outcome:
    """The JPEG for the shard, or None, and what was done to get it: {reason: detail}."""

    jpeg: bytes | None = None
    what: dict[str, str] = field(default_factory=dict)


class _LeftOut(Exception):  # noqa: N818 - no error: it carries the reason to the one place that counts
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def prepare_image(data: bytes, policy: ImagePolicy) -> Outcome:
    """What `data`, the bytes of one image file, become. Never raises for what the bytes are."""
    outcome = Outcome()
    try:
        if data[:2] == b"\xff\xd8":
            try:
                outcome.jpeg = _from_jpeg(data, policy, outcome.what)
                return outcome
            except JpegError as error:  # Pillow overlooks what the strict decoder does not
                outcome.what["converted_warning"] = str(error)
        image = _open(data, policy)
        if image.format not in ("JPEG", "MPO"):
            outcome.what["converted_format"] = str(image.format)
        outcome.jpeg = _encode(_shortened(_to_rgb(image, policy, outcome.what), policy, outcome.what), policy)
    except _LeftOut as left_out:
        outcome.what = {LEFT_OUT + left_out.reason: left_out.detail}
    except MemoryError:
        raise
    except Exception as error:  # what Pillow decoded it may still not be able to convert
        outcome.what = {LEFT_OUT + "damaged": repr(error)[:200]}
    return outcome


def _from_jpeg(data: bytes, policy: ImagePolicy, what: dict[str, str]) -> bytes:
    """The JPEG itself where it may be kept, else it anew. Raises JpegError where the decoder of training complains."""
    height, width, space = jpeg_header(data)
    _check_size(height, width, policy)
    if space in ("CMYK", "YCCK"):
        what["converted_cmyk"] = space
        return _encode(_shortened(_to_rgb(_open(data, policy), policy, what), policy, what), policy)
    short = min(height, width)
    must_shrink = 0 < policy.resize_short < short
    shrink = next((k for k in SHRINKS if short >= k * policy.resize_short), 1) if must_shrink else 1
    if must_shrink:
        what["converted_size"] = f"{width}x{height}"
    pixels = decode_rgb(data, shrink)
    if space == "Gray":
        what["kept_greyscale"] = ""
    turn = _orientation(data)
    if turn != UPRIGHT and policy.orientation == "apply":
        what["converted_orientation"] = str(turn)
        return _encode(_shortened(_turned(pixels, turn), policy, what), policy)
    if turn != UPRIGHT:
        what["kept_orientation"] = str(turn)
    if must_shrink:
        return _encode(_shortened(pixels, policy, what), policy)
    return data


def _open(data: bytes, policy: ImagePolicy) -> Image.Image:
    """The image of the first frame, decoded by Pillow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image.height, image.width, policy)
            image.load()
    except _LeftOut:
        raise
    except UnidentifiedImageError:
        raise _LeftOut("not_an_image", f"starts with {data[:8].hex(' ') or 'nothing'}") from None
    except Image.DecompressionBombError as error:
        raise _LeftOut("too_large", str(error)) from None
    except Exception as error:  # each of Pillow's decoders raises errors of its own
        raise _LeftOut("damaged", repr(error)[:200]) from None
    return image


def _check_size(height: int, width: int, policy: ImagePolicy) -> None:
    if min(height, width) < policy.min_side:
        raise _LeftOut("too_small", f"{width}x{height}")
    if height * width > policy.max_pixels:
        raise _LeftOut("too_large", f"{width}x{height}")


def _to_rgb(image: Image.Image, policy: ImagePolicy, what: dict[str, str]) -> Pixels:
    """8-bit RGB of any of Pillow's modes; what is transparent becomes white."""
    turn = _turn(image)
    if turn != UPRIGHT:
        what["converted_orientation" if policy.orientation == "apply" else "kept_orientation"] = str(turn)
    if image.mode == "P":
        what["converted_palette"] = ""
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise _LeftOut("depth", f"mode {image.mode} with values {deep.min()} to {deep.max()}")
        what["converted_16_bit"] = image.mode
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    if image.mode == "F":
        raise _LeftOut("depth", "floating-point pixels: their range is not known")
    if image.has_transparency_data:
        what["converted_alpha"] = image.mode
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    elif image.mode in ("L", "1"):
        what["converted_greyscale"] = image.mode
    return _turned(np.asarray(image.convert("RGB")), turn if policy.orientation == "apply" else UPRIGHT)


def _shortened(pixels: Pixels, policy: ImagePolicy, what: dict[str, str]) -> Pixels:
    """The pixels with a short side of at most `resize_short`, antialiased bicubic."""
    height, width = pixels.shape[:2]
    short = policy.resize_short
    if not 0 < short < min(height, width):
        return pixels
    what.setdefault("converted_size", f"{width}x{height}")
    scale = short / min(height, width)
    size = max(short, round(width * scale)), max(short, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _encode(pixels: Pixels, policy: ImagePolicy) -> bytes:
    jpeg: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), policy.quality, colorspace="RGB", colorsubsampling="420"
    )
    return jpeg


def _orientation(jpeg: bytes) -> int:
    """EXIF's word on how the camera was held, of a JPEG; 1 is upright."""
    if b"Exif\x00\x00" not in jpeg[: 1 << 17]:
        return UPRIGHT
    try:
        return _turn(Image.open(io.BytesIO(jpeg), formats=("JPEG",)))
    except Exception:  # what Pillow cannot open but the decoder of training can has no EXIF to go by
        return UPRIGHT


def _turn(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1, upright, where it has none that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = image.getexif().get(ORIENTATION_TAG, UPRIGHT)
    except Exception:  # damaged EXIF is common, and says nothing of the pixels
        return UPRIGHT
    return found if found in range(1, 9) else UPRIGHT


def _turned(pixels: Pixels, turn: int) -> Pixels:
    """The pixels upright. By EXIF of our own making: Pillow, asked to turn an image, writes all of its EXIF anew, damage too."""
    if turn == UPRIGHT:
        return pixels
    image = Image.fromarray(pixels)
    image.getexif()[ORIENTATION_TAG] = turn
    return np.asarray(ImageOps.exif_transpose(image))
