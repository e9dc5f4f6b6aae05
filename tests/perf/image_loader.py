"""How fast one core makes training images of JPEGs: by decoder, by operation, by number of loader processes, and by shards.

    python tests/perf/image_loader.py --record docs/benchmarks/image_loader_X.md

CPU seconds (user + system, of all processes) are what is compared, so other load on the machine disturbs little. Writes a
record; gates on nothing. A scratch folder of some 100 MB is made and removed.

The images are drawn: leaves of random size, place and colour that hide each other ("dead leaves", whose statistics of edges
and spectrum are those of photographs), each with a texture that falls as 1 / frequency, and noise of a sensor. They have
ImageNet's usual 500 x 375 pixels and are encoded with 4:2:0 chroma at the quality that gives its average file, 110 kB. That
takes a higher quality than most of ImageNet's files have: where the bytes are as many, entropy decoding, most of the work at
this size, takes as long. Two real photographs that scikit-learn carries stand beside them as a check.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, v2

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from data_prep import prepare_imagenet  # noqa: E402 - after the path
from data_prep.image_codec import SHRINKS, decode_rgb, jpeg_header  # noqa: E402
from pretrain.image_config import AugmentConfig, ImageDataConfig  # noqa: E402
from pretrain.image_transform import evaluation_pixels, random_crop, resized, training_pixels  # noqa: E402
from pretrain.images import PREFETCH_MICRO_BATCHES, ImageLoader  # noqa: E402
from pretrain.rand_augment import OPERATIONS, apply, color_jitter  # noqa: E402

WIDTH, HEIGHT, FILE_BYTES, SIZE = 500, 375, 110_000, 224
N_IMAGES, N_CLASSES, REPEATS = 320, 10, 5
PLAIN = AugmentConfig(rand_augment_ops=0, jitter_prob=0.0)


def photograph(rng: np.random.Generator, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """[height, width, 3] uint8; see the head of this file."""
    y, x = np.mgrid[:height, :width]
    pixels = 110 + 40 * _clouds(rng, height, width)[..., None] + np.zeros(3)
    texture = _clouds(rng, height, width)[..., None]
    scale = width / WIDTH
    for _ in range(70):
        radius = scale * np.exp(rng.uniform(np.log(6), np.log(110)))
        centre_y, centre_x, stretch = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.5, 2)
        inside = (y - centre_y) ** 2 * stretch + (x - centre_x) ** 2 / stretch < radius**2
        pixels[inside] = rng.uniform(20, 235, 3) + rng.uniform(5, 30) * texture[inside]
    return (pixels + rng.normal(0, 4, (height, width, 1))).clip(0, 255).astype(np.uint8)


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    waves = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency
    field = np.fft.irfft2(waves, (height, width))
    return (field - field.mean()) / field.std()


def encode(pixels: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def encode_to(pixels: np.ndarray, n_bytes: int) -> bytes:
    """At the first quality whose file has `n_bytes` (or at 100)."""
    low, high = 50, 100
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(encode(pixels, middle)) >= n_bytes else (middle + 1, high)
    return encode(pixels, low)


def real_photographs(width: int, height: int) -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    images = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    return [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images]


def cost_ms(work: Callable[[int], Any], n: int = 96) -> float:
    """CPU milliseconds of a call, the least of some repetitions of `n`; the argument counts calls."""
    work(0)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.process_time()
        for i in range(n):
            work(i)
        best = min(best, (time.process_time() - started) / n)
    return best * 1000


# --------------------------------------------------------------------------- decoders


def with_ours(jpeg: bytes, box: tuple[int, int, int, int]) -> Image.Image:
    shrink = next((k for k in SHRINKS if min(box[2:]) >= k * SIZE), 1)
    top, left, height, width = (side // shrink for side in box)
    return resized(decode_rgb(jpeg, shrink)[top : top + height, left : left + width], SIZE)


def with_torchvision(jpeg: bytes, box: tuple[int, int, int, int]) -> Image.Image:
    top, left, height, width = box
    chw = by_torchvision(jpeg)[None, :, top : top + height, left : left + width]
    planes = interpolate(chw, (SIZE, SIZE), mode="bilinear", antialias=True)[0].numpy()
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def by_torchvision(jpeg: bytes) -> torch.Tensor:
    data = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
    return torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB)


def with_pillow(jpeg: bytes, box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.open(io.BytesIO(jpeg))
    top, left, height, width = box
    whole = image.width
    if min(height, width) >= 2 * SIZE:
        image.draft("RGB", (image.width * SIZE // width, image.height * SIZE // height))
    scale = image.width / whole
    edges = tuple(side * scale for side in (left, top, left + width, top + height))
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=edges)


def decoder_table(sets: dict[str, list[bytes]]) -> str:
    alone: dict[str, Callable[[bytes, Any], Any]] = {
        "decode alone: simplejpeg (ours)": lambda jpeg, _: decode_rgb(jpeg),
        "decode alone: torchvision": lambda jpeg, _: by_torchvision(jpeg),
        "decode alone: Pillow": lambda jpeg, _: Image.open(io.BytesIO(jpeg)).load(),
        "to a PIL image of 224 pixels: simplejpeg, scaled, and torch (ours)": with_ours,
        "the same: torchvision and torch": with_torchvision,
        "the same: Pillow, draft": with_pillow,
    }
    rows = [f"| | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for name, work in alone.items():
        cells = []
        for jpegs in sets.values():
            height, width, _ = jpeg_header(jpegs[0])
            boxes = [random_crop(height, width, PLAIN, Random(i)) for i in range(32)]
            ms = cost_ms(lambda i, work=work, jpegs=jpegs, boxes=boxes: work(jpegs[i % len(jpegs)], boxes[i % 32]))
            cells.append(f"{ms:.2f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def operation_table(pixels: np.ndarray) -> str:
    image = resized(pixels, SIZE)
    chw = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()
    theirs = v2.RandAugment()
    how: tuple[Any, Any] = (InterpolationMode.NEAREST, {torch.Tensor: None})
    rows = ["| operation at magnitude 9 | PIL (ours) | torchvision, uint8 tensor |", "|---|---|---|"]
    sums = [0.0, 0.0]
    for name in OPERATIONS:
        ours = cost_ms(lambda _, name=name: apply(name, image, 9), 200)
        if name == "Invert":
            tensor = cost_ms(lambda _: v2.functional.invert(chw), 200)
        else:
            magnitudes, _ = theirs._AUGMENTATION_SPACE[name]
            table = magnitudes(31, SIZE, SIZE)
            amount = 0.0 if table is None else float(table[9])
            tensor = cost_ms(
                lambda _, name=name, amount=amount: theirs._apply_image_or_video_transform(chw, name, amount, *how),
                200,
            )
        sums = [sums[0] + ours, sums[1] + tensor]
        rows.append(f"| {name} | {ours * 1000:.0f} | {tensor * 1000:.0f} |")
    mean = [x / len(OPERATIONS) * 1000 for x in sums]
    rows.append(f"| mean | {mean[0]:.0f} | {mean[1]:.0f} |")
    draw = Random(0)
    jitter = cost_ms(lambda _: color_jitter(image, 0.3, draw), 200)
    rows.append(f"| colour jitter of one image | {jitter * 1000:.0f} | |")
    return "\n".join(rows)


def image_table(sets: dict[str, list[bytes]]) -> str:
    rows = [f"| images/s of one core | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    kinds: dict[str, Callable[[bytes, int], Any]] = {
        "training, the whole recipe": lambda jpeg, i: training_pixels(jpeg, SIZE, AugmentConfig(), Random(i)),
        "training, crop and flip only": lambda jpeg, i: training_pixels(jpeg, SIZE, PLAIN, Random(i)),
        "validation": lambda jpeg, _: evaluation_pixels(jpeg, SIZE, 0.875),
    }
    for name, work in kinds.items():
        rates = [
            f"{1000 / cost_ms(lambda i, work=work, jpegs=jpegs: work(jpegs[i % len(jpegs)], i), 192):,.0f}"
            for jpegs in sets.values()
        ]
        rows.append(f"| {name} | {' | '.join(rates)} |")
    return "\n".join(rows)


# --------------------------------------------------------------------------- the loader, from shards


def write_folder(folder: Path, jpegs: list[bytes]) -> None:
    for split in ("train", "val"):
        for i, jpeg in enumerate(jpegs if split == "train" else jpegs[: 2 * N_CLASSES]):
            path = folder / split / str(i % N_CLASSES) / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)


def cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def loader_row(dataset: Path, name: str, n_workers: int, n_steps: int, augment: AugmentConfig) -> str:
    """CPU time is of this process and, once they ended, of its workers."""
    cfg = ImageDataConfig(path=str(dataset), images_per_step=256, micro_batch=64, n_workers=n_workers)
    loader = ImageLoader(cfg, augment, seed=0, dp_rank=0, dp_size=1, n_sequences_per_step=256)
    before = cpu_s()
    ahead = 1 + PREFETCH_MICRO_BATCHES * n_workers * cfg.micro_batch // cfg.images_per_step
    for _ in range(ahead):
        loader.next_step()
    started = time.monotonic()
    for _ in range(n_steps):
        loader.next_step()
    wall = time.monotonic() - started
    made = (n_steps + ahead) * cfg.images_per_step
    loader.close()
    per_cpu_s = made / (cpu_s() - before)
    return f"| {name} | {n_workers} | {n_steps * cfg.images_per_step / wall:,.0f} | {per_cpu_s:,.0f} |"


def preparation_row(folder: Path, output: Path, name: str, *arguments: str) -> str:
    started = time.process_time()
    command = ["--input", str(folder), "--output", str(output), "--workers", "1", "--shard-bytes", "4000000"]
    assert prepare_imagenet.main([*command, *arguments]) == 0
    n_bytes = sum(path.stat().st_size for path in (output / "train").glob("*.mds"))
    rate = (N_IMAGES + 2 * N_CLASSES) / (time.process_time() - started)
    return f"| {name} | {rate:,.0f} | {n_bytes / N_IMAGES / 1000:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=24, help="steps of 256 images for each row of the loader's table")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, os.cpu_count() or 1])
    parser.add_argument("--record", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    originals = [encode_to(photograph(rng), FILE_BYTES) for _ in range(N_IMAGES)]
    mean_kb = sum(map(len, originals)) / N_IMAGES / 1000
    small = [encode(np.asarray(Image.fromarray(decode_rgb(j)).resize((341, 256))), 90) for j in originals[:16]]
    large = [encode(photograph(rng, 1600, 1200), 90) for _ in range(4)]
    sets = {
        f"500x375, {mean_kb:.0f} kB": originals,
        "500x375, two photographs, 110 kB": [encode_to(p, FILE_BYTES) for p in real_photographs(WIDTH, HEIGHT)],
        f"341x256, {sum(map(len, small)) / 16_000:.0f} kB": small,
        f"1600x1200, {sum(map(len, large)) / 4000:.0f} kB": large,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        write_folder(folder, originals)
        preparation = [
            preparation_row(folder, Path(scratch) / "original", "original bytes"),
            preparation_row(folder, Path(scratch) / "reduced", "--resize-short 256", "--resize-short", "256"),
        ]
        loader = [
            loader_row(Path(scratch) / shards, name, n_workers, args.steps, augment)
            for shards, name, augment in (
                ("original", "original, whole recipe", AugmentConfig()),
                ("reduced", "--resize-short 256, whole recipe", AugmentConfig()),
                ("original", "original, crop and flip only", PLAIN),
                ("reduced", "--resize-short 256, crop and flip only", PLAIN),
            )
            for n_workers in args.workers
        ]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    libraries = ("torch", "torchvision", "simplejpeg", "pillow", "mosaicml-streaming")
    head = __doc__.split("\n\n")
    text = f"""# Image loader

{head[0]}

Commit {commit.stdout.strip()}, {cpu.split(":")[1].strip()}, {os.cpu_count()} cores, Python {
        platform.python_version()
    }, {", ".join(f"{name} {version(name)}" for name in libraries)}, {time.strftime("%Y-%m-%d")}. `{head[1].strip()}`

{head[2].split(". Writes")[0].strip()}. {head[3].strip()}

## Decoders, CPU ms an image

{decoder_table(sets)}

## One operation, CPU microseconds

{operation_table(decode_rgb(originals[0]))}

## One image from bytes to pixels

{image_table(sets)}

## From shards, through loader processes

{
        args.steps
    } steps of 256 images after as many as were made in advance, micro-batches of 64. images/s is by the wall clock, beside
whatever else ran.

| shards | n_workers | images/s | images / CPU s |
|---|---|---|---|
{chr(10).join(loader)}

## Preparation, one process

| | images / CPU s | kB an image |
|---|---|---|
{chr(10).join(preparation)}
"""
    Path(args.record).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
