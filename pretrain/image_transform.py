"""One JPEG to the pixels that a model sees, on one core: decode, crop, resize, and the augmentation of training.

The crop is drawn before the image is decoded. Where the crop is at least twice the target on both sides the decoder
halves the image (or takes a quarter, an eighth) while it decodes, as long as the crop stays no smaller than the
target; the rest of the way is antialiased bilinear. Validation decodes whole.
"""

from __future__ import annotations

import math
from random import Random

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from data_prep.image_codec import SHRINKS, Pixels, decode_rgb, jpeg_header
from pretrain.image_config import AugmentConfig
from pretrain.rand_augment import color_jitter, rand_augment

CROP_TRIES = 10

Box = tuple[int, int, int, int]
"""top, left, height, width in pixels."""


def training_pixels(jpeg: bytes, size: int, cfg: AugmentConfig, draw: Random) -> Pixels:
    """[size, size, 3]: random crop, flip, RandAugment, colour jitter, in this order. Raises JpegError.

    Everything random comes from `draw`, so its seed decides the result.
    """
    height, width, _ = jpeg_header(jpeg)
    box = random_crop(height, width, cfg, draw)
    shrink = next((k for k in SHRINKS if min(box[2:]) >= k * size), 1)
    image = resized(_cut(decode_rgb(jpeg, shrink), box, shrink), size)
    if draw.random() < cfg.hflip_prob:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = rand_augment(image, cfg.rand_augment_ops, cfg.rand_augment_magnitude, draw)
    if draw.random() < cfg.jitter_prob:
        image = color_jitter(image, cfg.jitter_strength, draw)
    return np.asarray(image)


def evaluation_pixels(jpeg: bytes, size: int, crop_ratio: float) -> Pixels:
    """[size, size, 3]: the central square of `crop_ratio` of the short side, resized. Raises JpegError.

    What resizing the short side to size / crop_ratio and cutting out the centre gives, without resizing what is cut off.
    """
    pixels = decode_rgb(jpeg)
    height, width = pixels.shape[:2]
    side = max(1, round(min(height, width) * crop_ratio))
    return np.asarray(resized(_cut(pixels, ((height - side) // 2, (width - side) // 2, side, side), 1), size))


def random_crop(height: int, width: int, cfg: AugmentConfig, draw: Random) -> Box:
    """A box of drawn area, shape and place, as torchvision's RandomResizedCrop draws it.

    Where ten draws do not fit, the largest central box whose shape is allowed.
    """
    log_low, log_high = (math.log(ratio) for ratio in cfg.crop_ratio)
    for _ in range(CROP_TRIES):
        area = height * width * _between(*cfg.crop_scale, draw)
        ratio = math.exp(_between(log_low, log_high, draw))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw.random() * (height - h + 1)), int(draw.random() * (width - w + 1)), h, w
    ratio = min(max(width / height, cfg.crop_ratio[0]), cfg.crop_ratio[1])
    w = min(width, max(1, round(height * ratio)))
    h = min(height, max(1, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def resized(pixels: Pixels, size: int) -> Image.Image:
    """An RGB image of size x size of [h, w, 3], antialiased bilinear."""
    if pixels.shape[:2] == (size, size):
        return Image.fromarray(np.ascontiguousarray(pixels))
    # torch's vectorised uint8 path takes half of PIL's time from interleaved pixels; its result is three planes.
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    planes = interpolate(chw[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0].numpy()
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def _cut(pixels: Pixels, box: Box, shrink: int) -> Pixels:
    """The part of `pixels`, an image decoded at 1 / shrink, that `box` names in pixels of the whole image."""
    top, left, height, width = box
    y, x = round(top / shrink), round(left / shrink)
    return pixels[y : y + max(1, round(height / shrink)), x : x + max(1, round(width / shrink))]


def _between(low: float, high: float, draw: Random) -> float:
    return low + (high - low) * draw.random()
