"""Small image sets without a network, as class folders of JPEGs: for demos, tests and experiments.

    python data_prep/make_demo_images.py digits demo/digits          # 1,797 scans of handwritten digits, from scikit-learn
    python data_prep/make_demo_images.py drawn demo/drawn --classes 200 --images 60

Drawn classes are recipes: a family of texture or shape, colours, and ranges within which each image draws its own size,
place, turn, colours, light and noise. A family has many classes. The same arguments give the same pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Run by its path, a script finds its own folder first on sys.path and not the repository: make both ways work.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data_prep.image_codec import Pixels

Floats = NDArray[np.float64]

DIGIT_SCALE = 4
"""scikit-learn's digits are 8 x 8; each pixel becomes a square of this many."""
HELD_OUT = 0.2
"""Share of each class that is val."""


def digits() -> list[tuple[str, int, Pixels]]:
    """(class, number, pixels [32, 32, 3]) of scikit-learn's 1,797 digits. Raises ImportError where it is absent."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = []
    for number, (image, label) in enumerate(zip(found.images, found.target, strict=True)):
        grey = np.kron(image * (255 / 16), np.ones((DIGIT_SCALE, DIGIT_SCALE))).astype(np.uint8)
        images.append((str(label), number, np.repeat(grey[:, :, None], 3, axis=2)))
    return images


def drawn(n_classes: int, n_images: int, size: int, seed: int = 0) -> list[tuple[str, int, Pixels]]:
    """(class, number, pixels [size, size, 3]) of `n_images` images of each of `n_classes` recipes.

    Raises ValueError where they would not be two splits of images, or the seed is none of numpy's.
    """
    least = {"--classes": (n_classes, 1), "--images": (n_images, 2), "--size": (size, 2)}
    for option, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"{option} {value}: must be at least {bound}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: must lie in 0 to {2**32 - 1}")
    width = len(str(n_classes - 1))
    images = []
    for label in range(n_classes):
        recipe = Recipe(np.random.RandomState([seed, label]), label)
        for number in range(n_images):
            rng = np.random.RandomState([seed, label, number])
            images.append((f"{label:0{width}}_{recipe.family}", number, recipe.draw(rng, size)))
    return images


class Recipe:
    """One class: what all its images have in common."""

    def __init__(self, rng: np.random.RandomState, label: int) -> None:
        self.family = FAMILIES[label % len(FAMILIES)]
        self._pattern = PATTERNS[self.family]
        self._frequency = rng.uniform(2.0, 7.0)
        self._turn = rng.uniform(0, np.pi)
        self._detail = rng.uniform(0.15, 0.85)
        self._colours = rng.uniform(30, 225, (3, 3))
        self._count = rng.randint(1, 5)

    def draw(self, rng: np.random.RandomState, size: int) -> Pixels:
        """One image: [size, size, 3]."""
        y, x = np.mgrid[:size, :size] / size - 0.5
        turn = self._turn + rng.normal(0, 0.15)
        zoom = self._frequency * np.exp(rng.normal(0, 0.12))
        x, y = x - rng.uniform(-0.15, 0.15), y - rng.uniform(-0.15, 0.15)
        u = (x * np.cos(turn) + y * np.sin(turn)) * zoom
        v = (y * np.cos(turn) - x * np.sin(turn)) * zoom
        inside = self._pattern(u, v, self._detail, self._count)[..., None]
        ground = _clouds(rng, size)[..., None]
        colours = self._colours + rng.normal(0, 18, (3, 3))
        pixels = inside * colours[0] + (1 - inside) * (ground * colours[1] + (1 - ground) * colours[2])
        light = 1 + rng.normal(0, 0.1) + rng.uniform(-0.5, 0.5) * x[..., None]
        finished: Pixels = (pixels * light + rng.normal(0, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
        return finished


def _soft(distance: Floats) -> Floats:
    """1 where `distance` is below 0, 0 above, with a soft edge."""
    return 1 / (1 + np.exp(np.clip(distance * 18, -50, 50)))


def _stripes(u: Floats, v: Floats, detail: float, count: int) -> Floats:
    return _soft(np.sin(np.pi * u * 2) - 1.4 * (detail - 0.5))


def _checks(u: Floats, v: Floats, detail: float, count: int) -> Floats:
    return _soft(np.sin(np.pi * u) * np.sin(np.pi * v * (0.5 + detail)))


def _rings(u: Floats, v: Floats, detail: float, count: int) -> Floats:
    return _soft(np.sin(2 * np.pi * np.hypot(u, v * (0.6 + detail))))


def _dots(u: Floats, v: Floats, detail: float, count: int) -> Floats:
    return _soft(np.hypot(u - np.round(u), v - np.round(v)) - 0.15 - 0.25 * detail)


def _spokes(u: Floats, v: Floats, detail: float, count: int) -> Floats:
    return _soft(np.sin((2 + count) * np.arctan2(v, u) + detail * 3 * np.hypot(u, v)))


def _polygon(u: Floats, v: Floats, detail: float, count: int) -> Floats:
    """A star or polygon with 2 + count points."""
    angle = np.arctan2(v, u) * (2 + count)
    return _soft(np.hypot(u, v) - 1.1 - 0.8 * detail * np.cos(angle))


def _waves(u: Floats, v: Floats, detail: float, count: int) -> Floats:
    return _soft(np.sin(np.pi * (u + detail * np.sin(np.pi * v * 0.5 * count)) * 2))


def _bars(u: Floats, v: Floats, detail: float, count: int) -> Floats:
    return _soft(np.minimum(np.abs(u) - 0.25, np.abs(np.abs(v) - count * 0.3) - 0.4 * detail))


PATTERNS: dict[str, Callable[[Floats, Floats, float, int], Floats]] = {
    "stripes": _stripes,
    "checks": _checks,
    "rings": _rings,
    "dots": _dots,
    "spokes": _spokes,
    "polygon": _polygon,
    "waves": _waves,
    "bars": _bars,
}
FAMILIES = tuple(PATTERNS)


def _clouds(rng: np.random.RandomState, size: int) -> Floats:
    """[size, size] in 0..1 with a spectrum that falls as one over frequency, as photographs have."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = 1
    waves = rng.normal(size=(*frequency.shape, 2)) @ np.array([1, 1j]) / frequency**1.2
    field = np.fft.irfft2(waves, (size, size))
    return np.asarray(1 / (1 + np.exp(-field / field.std())), np.float64)


def write(images: list[tuple[str, int, Pixels]], folder: Path, quality: int = 92) -> dict[str, int]:
    """Write train/CLASS/NUMBER.jpg and val/CLASS/NUMBER.jpg into `folder`; images of each split.

    Every fifth image of a class is val.
    """
    counts = {"train": 0, "val": 0}
    seen: dict[str, int] = {}
    for name, number, pixels in images:
        place = seen[name] = seen.get(name, -1) + 1
        split = "val" if place % round(1 / HELD_OUT) == 0 else "train"
        path = folder / split / name / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(pixels, quality, colorspace="RGB", colorsubsampling="444"))
        counts[split] += 1
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("what", choices=("digits", "drawn"), help="scikit-learn's digits, or classes drawn here")
    parser.add_argument("output", type=Path, help="folder for train/ and val/")
    parser.add_argument("--classes", type=int, default=200, help="drawn classes")
    parser.add_argument("--images", type=int, default=60, help="images of each drawn class, a fifth of them val")
    parser.add_argument("--size", type=int, default=64, help="pixels on each side of drawn images")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn classes")
    args = parser.parse_args(argv)
    try:
        images = digits() if args.what == "digits" else drawn(args.classes, args.images, args.size, args.seed)
        counts = write(images, args.output)
    except ImportError:
        print("error: the digits are in scikit-learn: pip install scikit-learn, or make drawn images", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {counts['train']:,} images for train, {counts['val']:,} for val")
    return 0


if __name__ == "__main__":
    sys.exit(main())
