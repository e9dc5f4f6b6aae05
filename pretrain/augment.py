"""Uint8 images to what a step trains on, on the device: normalise, random erasing, mixup or cutmix, soft targets.

Whatever is drawn is a hash of the run's seed, the image's number and the purpose, computed in integers on the device: the
same on every device, at every data-parallel size and micro-batch, and the host waits for nothing. Images 2i and 2i + 1 of
the stream are mixed with each other, with a weight of their own (timm's mode "pair"); the reference draws one weight for
all pairs of a micro-batch.

Legend: `b` images, `c` channels, `h` and `w` rows and columns of pixels, `k` classes.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from modeling.config import CHANNEL_MEAN, CHANNEL_STD
from pretrain.image_config import AugmentConfig
from pretrain.images import ImageBatch

NOISE_OFFSETS = 1 << 20
BETA_POINTS = 4097


def normalised(images_bchw: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels to zero mean and unit variance over ImageNet, [b, 3, h, w] contiguous in `dtype`."""
    return _normalised_fp32(images_bchw).to(dtype, memory_format=torch.contiguous_format)


def training_inputs(
    batch: ImageBatch, cfg: AugmentConfig, *, n_classes: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(images_bchw in `dtype`, targets_bk float32 that sum to 1), on the batch's device.

    A function of the batch and the seed alone. Where `cfg` mixes, the batch holds whole pairs (numbers 2i and 2i + 1 side
    by side), as ImageLoader's batches do.
    """
    draws = Draws(seed, batch.numbers_b)
    x_bchw = erased(_normalised_fp32(batch.images_bchw), cfg, draws, seed)
    targets_bk = smoothed(batch.labels_b, n_classes, cfg.smoothing)
    if cfg.mixes:
        assert len(batch.numbers_b) % 2 == 0, f"{len(batch.numbers_b)} images do not make pairs"
        pair_draws = Draws(seed, batch.numbers_b // 2)
        weight_b1hw, share_b = mixing_weights(cfg, pair_draws, x_bchw.shape[-1])
        x_bchw = torch.lerp(x_bchw, _partners(x_bchw), weight_b1hw)
        targets_bk = torch.lerp(targets_bk, _partners(targets_bk), share_b[:, None])
    return x_bchw.to(dtype, memory_format=torch.contiguous_format), targets_bk


def smoothed(labels_b: Tensor, n_classes: int, smoothing: float) -> Tensor:
    """[b, k] float32 targets: `smoothing` spread evenly over all classes, the rest on the label."""
    return one_hot(labels_b, n_classes).float() * (1 - smoothing) + smoothing / n_classes


def erased(x_bchw: Tensor, cfg: AugmentConfig, draws: Draws, seed: int) -> Tensor:
    """Normalised images, a share `erasing_prob` of them with a rectangle of Gaussian noise of unit variance.

    https://arxiv.org/abs/1708.04896; timm's mode "pixel". The noise of an image is a window, at a drawn place, of one
    stream of noise: drawing 150,000 numbers an image would cost more than the rest of this file.
    """
    if not cfg.erasing_prob:
        return x_bchw
    _, c, size, _ = x_bchw.shape
    low, high = cfg.erasing_area
    area_b = low + (high - low) * draws.uniform("erase area")
    log_ratio_b = math.log(cfg.erasing_min_ratio) * (2 * draws.uniform("erase ratio") - 1)
    height_b = (size * torch.sqrt(area_b * torch.exp(log_ratio_b))).round().clamp(1, size)
    width_b = (size * torch.sqrt(area_b * torch.exp(-log_ratio_b))).round().clamp(1, size)
    top_b = torch.floor(draws.uniform("erase top") * (size - height_b + 1))
    left_b = torch.floor(draws.uniform("erase left") * (size - width_b + 1))
    height_b = height_b * (draws.uniform("erase") < cfg.erasing_prob)
    inside_b1hw = _rectangles(top_b, left_b, height_b, width_b, size)
    noise = _noise(c * size * size, seed, x_bchw.device)
    windows = noise.as_strided((NOISE_OFFSETS, c * size * size), (1, 1))
    noise_bchw = windows[draws.integer("erase noise", NOISE_OFFSETS)].view(-1, c, size, size)
    return torch.where(inside_b1hw, noise_bchw, x_bchw)


def mixing_weights(cfg: AugmentConfig, draws: Draws, size: int) -> tuple[Tensor, Tensor]:
    """How much of its partner each image gets: [b, 1, size, size] by pixel, and [b], the mean of that.

    mixup (https://arxiv.org/abs/1710.09412): one weight for all pixels. cutmix (https://arxiv.org/abs/1905.04899): 1 in
    a rectangle that is clipped at the border, as in timm, and whose clipped area is the weight of the targets.
    """
    share_b = draws.beta("mixup", cfg.mixup_alpha) if cfg.mixup_alpha else torch.zeros_like(draws.uniform("mix"))
    weight_b1hw = share_b[:, None, None, None].expand(-1, 1, size, size)
    if cfg.cutmix_alpha:
        half_b = torch.floor(torch.floor(size * torch.sqrt(draws.beta("cutmix", cfg.cutmix_alpha))) / 2)
        row_b, column_b = (torch.floor(draws.uniform(f"cut {axis}") * size) for axis in ("row", "column"))
        top_b, left_b = (row_b - half_b).clamp(0, size), (column_b - half_b).clamp(0, size)
        height_b = (row_b + half_b).clamp(0, size) - top_b
        width_b = (column_b + half_b).clamp(0, size) - left_b
        inside_b1hw = _rectangles(top_b, left_b, height_b, width_b, size)
        switch_prob = cfg.switch_prob if cfg.mixup_alpha else 1.0
        cuts_b = draws.uniform("switch") < switch_prob
        share_b = torch.where(cuts_b, height_b * width_b / (size * size), share_b)
        weight_b1hw = torch.where(cuts_b[:, None, None, None], inside_b1hw.float(), weight_b1hw)
    mixed_b = draws.uniform("mix") < cfg.mix_prob
    return weight_b1hw * mixed_b[:, None, None, None], share_b * mixed_b


class Draws:
    """Random numbers of the images `numbers_b`, by purpose: a hash of (seed, number, purpose)."""

    def __init__(self, seed: int, numbers_b: Tensor) -> None:
        self.numbers_b = numbers_b
        self._seed = seed

    def integer(self, purpose: str, below: int) -> Tensor:
        """[b] int64 in 0 .. below - 1, for `below` a power of two up to 2^32."""
        assert below & (below - 1) == 0, f"{below} is no power of two"
        return self._bits(purpose) & (below - 1)

    def uniform(self, purpose: str) -> Tensor:
        """[b] float32 in [0, 1), multiples of 2^-24."""
        return (self._bits(purpose) >> 8).float() * 2.0**-24

    def beta(self, purpose: str, alpha: float) -> Tensor:
        """[b] float32 ~ Beta(alpha, alpha), by inversion of its distribution function."""
        quantiles = _beta_quantiles(alpha, self.numbers_b.device)
        place_b = self.uniform(purpose) * (BETA_POINTS - 1)
        low_b = place_b.long()
        return torch.lerp(quantiles[low_b], quantiles[low_b + 1], place_b - low_b)

    def _bits(self, purpose: str) -> Tensor:
        """[b] int64 in 0 .. 2^32 - 1."""
        key = _key(self._seed, purpose)
        bits_b: Tensor = _mix(_mix(self.numbers_b & _MASK ^ key) ^ (self.numbers_b >> 32))
        return bits_b


_MASK = 0xFFFFFFFF


def _mix(x: Any) -> Any:
    """A bijection of 32 bits in which every bit of `x` moves every bit, of an int or of an int64 tensor.

    lowbias32 of https://nullprogram.com/blog/2018/07/31/, its second factor less 2^32 so that no product passes 63 bits.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * (0x846CA68B - (1 << 32))) & _MASK
    return x ^ (x >> 16)


@lru_cache(maxsize=1024)
def _key(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "little")


@lru_cache(maxsize=8)
def _beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    """[BETA_POINTS + 1] float32: x at which the distribution function of Beta(alpha, alpha) is i / (BETA_POINTS - 1).

    The last is there twice. With u = x^alpha the density becomes (1 - x)^(alpha - 1), which is smooth up to x = 1/2; the
    other half is its mirror image.
    """
    u = np.linspace(0, 0.5**alpha, 1 << 16)
    density = (1 - u ** (1 / alpha)) ** (alpha - 1)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    half = np.interp(np.linspace(0, 1, BETA_POINTS // 2 + 1), below / below[-1], u) ** (1 / alpha)
    whole = np.concatenate([half, 1 - half[-2::-1], [1.0]])
    return torch.from_numpy(whole.astype(np.float32)).to(device)


@lru_cache(maxsize=2)
def _noise(length: int, seed: int, device: torch.device) -> Tensor:
    """[length + NOISE_OFFSETS - 1] float32 of unit variance, the same on every device."""
    generator = torch.Generator().manual_seed(_key(seed, "noise"))
    return torch.randn(length + NOISE_OFFSETS - 1, generator=generator).to(device)


def _rectangles(top_b: Tensor, left_b: Tensor, height_b: Tensor, width_b: Tensor, size: int) -> Tensor:
    """[b, 1, size, size] bool: inside the rectangle of each image."""
    at = torch.arange(size, device=top_b.device)
    rows_bh = (at >= top_b[:, None]) & (at < (top_b + height_b)[:, None])
    columns_bw = (at >= left_b[:, None]) & (at < (left_b + width_b)[:, None])
    return (rows_bh[:, :, None] & columns_bw[:, None, :])[:, None]


def _partners(x_b: Tensor) -> Tensor:
    """Each of a pair in the other's place."""
    return x_b.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _normalised_fp32(images_bchw: Tensor) -> Tensor:
    mean_c11, std_c11 = _channel_constants(images_bchw.device)
    return (images_bchw.float() - mean_c11) / std_c11


@lru_cache(maxsize=2)
def _channel_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixels in 0..255; kept, because copying them to a GPU makes the host wait."""
    mean_c11, std_c11 = (torch.tensor(x)[:, None, None] * 255 for x in (CHANNEL_MEAN, CHANNEL_STD))
    return mean_c11.to(device), std_c11.to(device)
