"""RandAugment and colour jitter on one PIL image, drawn from a generator that the caller seeds.

RandAugment (https://arxiv.org/abs/1909.13719) with the operations, ranges and nearest-neighbour geometry of the public
MatMamba's loader: torchvision's fourteen and Invert. PIL, because on 224-pixel uint8 images its operations cost a third
of torchvision's on tensors (docs/benchmarks/image_loader_2core_202611.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

TOP_MAGNITUDE = 30
GREY_WEIGHTS = (0.299, 0.587, 0.114)

Operation = Callable[[Image.Image, float], Image.Image]


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Pixel (x, y) of the result is pixel (a x + b y + c, d x + e y + f) of `image`, black outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


OPERATIONS: dict[str, tuple[float, bool, Operation]] = {
    # name: amount at magnitude 30, whether its sign is drawn, the operation of an amount
    "Identity": (0.0, False, lambda image, _: image),
    "ShearX": (0.3, True, lambda image, x: _moved(image, (1, x, 0, 0, 1, 0))),
    "ShearY": (0.3, True, lambda image, x: _moved(image, (1, 0, 0, x, 1, 0))),
    "TranslateX": (150 / 331, True, lambda image, x: _moved(image, (1, 0, -int(x * image.width), 0, 1, 0))),
    "TranslateY": (150 / 331, True, lambda image, x: _moved(image, (1, 0, 0, 0, 1, -int(x * image.height)))),
    "Rotate": (30.0, True, lambda image, degrees: image.rotate(degrees, Image.Resampling.NEAREST)),
    "Brightness": (0.9, True, lambda image, x: ImageEnhance.Brightness(image).enhance(1 + x)),
    "Color": (0.9, True, lambda image, x: ImageEnhance.Color(image).enhance(1 + x)),
    "Contrast": (0.9, True, lambda image, x: ImageEnhance.Contrast(image).enhance(1 + x)),
    "Sharpness": (0.9, True, lambda image, x: ImageEnhance.Sharpness(image).enhance(1 + x)),
    "Posterize": (4.0, False, lambda image, x: ImageOps.posterize(image, 8 - round(x))),
    "Solarize": (255.0, False, lambda image, x: ImageOps.solarize(image, math.ceil(255 - x))),
    "AutoContrast": (0.0, False, lambda image, _: ImageOps.autocontrast(image)),
    "Equalize": (0.0, False, lambda image, _: ImageOps.equalize(image)),
    "Invert": (0.0, False, lambda image, _: ImageOps.invert(image)),
}
_NAMES = tuple(OPERATIONS)


def apply(name: str, image: Image.Image, magnitude: int, sign: int = 1) -> Image.Image:
    """The RGB `image` after one operation at `magnitude`, 0 to 30; `sign` turns an operation that has a direction."""
    amount, is_signed, operation = OPERATIONS[name]
    return operation(image, amount * magnitude / TOP_MAGNITUDE * (sign if is_signed else 1))


def rand_augment(image: Image.Image, n_ops: int, magnitude: int, draw: Random) -> Image.Image:
    """The RGB `image` after `n_ops` operations drawn evenly, each way round with even chance."""
    for _ in range(n_ops):
        name = _NAMES[int(draw.random() * len(_NAMES))]
        image = apply(name, image, magnitude, sign=1 if draw.random() < 0.5 else -1)
    return image


def color_jitter(image: Image.Image, strength: float, draw: Random) -> Image.Image:
    """The RGB `image` with brightness, then contrast, then saturation times factors in 1 - strength .. 1 + strength.

    The three are linear in the pixel once the mean grey is known, so they are one matrix, rounded and clipped once.
    """
    brightness, contrast, saturation = (1 + strength * (2 * draw.random() - 1) for _ in range(3))
    mean_grey = float(np.asarray(image.convert("L")).mean())
    scale = brightness * contrast
    offset = brightness * (1 - contrast) * mean_grey
    rows = [
        [scale * ((1 - saturation) * GREY_WEIGHTS[j] + saturation * (i == j)) for j in range(3)] + [offset]
        for i in range(3)
    ]
    return image.convert("RGB", tuple(x for row in rows for x in row))
