"""What an image run reads and how it changes what it reads: frozen dataclasses, checked where each field lives.

Loads without torch. The defaults are the public MatMamba's ImageNet recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config_sections import ConfigError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """Which images, in which order, how many a step."""

    path: str
    """Image dataset made by data_prep/prepare_imagenet.py: a folder or a remote URI that holds train/ and val/."""
    cache_dir: str = ""
    """Local folder for shards of a remote `path`; empty where `path` is local."""
    image_size: int = 224
    """Pixels on each side of what the model sees."""
    images_per_step: int = 4096
    """Images the optimizer sees in a step, over all ranks; counted once however many widths see them."""
    micro_batch: int = 64
    """Images in one forward pass on one data-parallel rank."""
    n_workers: int = 8
    """Processes a rank that decode and augment, each on one core; 0 does it in the training process."""
    eval_crop_ratio: float = 0.875
    """Validation takes the central square of this share of the short side (224 of 256 pixels at 0.875)."""

    def __post_init__(self) -> None:
        _require(bool(self.path), "data.path is empty: name a folder made by data_prep/prepare_imagenet.py")
        for name in ("image_size", "images_per_step", "micro_batch"):
            _require(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)}: must be at least 1")
        _require(self.n_workers >= 0, f"data.n_workers={self.n_workers}: must not be negative")
        ratio = self.eval_crop_ratio
        _require(0 < ratio <= 1, f"data.eval_crop_ratio={ratio}: must lie above 0, up to 1")
        remote = "://" in self.path
        _require(not remote or bool(self.cache_dir), f"data.path={self.path} is remote: set data.cache_dir")

    @property
    def sequences_per_step(self) -> int:
        """Images of an optimizer step over all ranks: to the trainer, an image is a sequence."""
        return self.images_per_step


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are varied. Loader processes do the first seven, the device the others.

    Every draw is a function of the run's seed and of the image's place in the training stream.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the image's area that the random crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width over height of the random crop; their logarithm is drawn evenly."""
    hflip_prob: float = 0.5
    """Share of images that are mirrored left to right."""
    rand_augment_ops: int = 2
    """Operations of RandAugment in a row on each image; 0: none."""
    rand_augment_magnitude: int = 9
    """Strength of those operations, 0 to 30."""
    jitter_prob: float = 0.3
    """Share of images whose colours are jittered."""
    jitter_strength: float = 0.3
    """Brightness, contrast and saturation are each multiplied by a factor in 1 - this to 1 + this."""
    erasing_prob: float = 0.25
    """Share of images in which a rectangle becomes noise."""
    erasing_area: tuple[float, float] = (0.02, 0.3)
    """Least and greatest share of the image that the rectangle covers."""
    erasing_min_ratio: float = 0.3
    """Least height over width of the rectangle; the greatest is its inverse."""
    mixup_alpha: float = 0.8
    """Mixing weight ~ Beta(alpha, alpha) of mixup, which blends an image with its neighbour; 0: no mixup."""
    cutmix_alpha: float = 1.0
    """Area ~ Beta(alpha, alpha) of cutmix, which pastes a rectangle of the neighbour; 0: no cutmix."""
    mix_prob: float = 1.0
    """Share of pairs that are mixed at all."""
    switch_prob: float = 0.5
    """Share of mixed pairs that get cutmix where both are on."""
    smoothing: float = 0.1
    """Share of each target that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        for name in ("hflip_prob", "jitter_prob", "erasing_prob", "mix_prob", "switch_prob", "jitter_strength"):
            _require(0 <= getattr(self, name) <= 1, f"augment.{name}={getattr(self, name)}: must lie in 0 to 1")
        _require(0 <= self.smoothing < 1, f"augment.smoothing={self.smoothing}: must lie in [0, 1)")
        for name in ("crop_scale", "erasing_area"):
            low, high = getattr(self, name)
            _require(0 < low <= high <= 1, f"augment.{name}={low, high}: must rise within 0 to 1, 0 left out")
        low, high = self.crop_ratio
        _require(0 < low <= high, f"augment.crop_ratio={low, high}: must be positive and rise")
        ratio = self.erasing_min_ratio
        _require(0 < ratio <= 1, f"augment.erasing_min_ratio={ratio}: must lie above 0, up to 1")
        n_ops, magnitude = self.rand_augment_ops, self.rand_augment_magnitude
        _require(n_ops >= 0, f"augment.rand_augment_ops={n_ops}: must not be negative")
        _require(0 <= magnitude <= 30, f"augment.rand_augment_magnitude={magnitude}: must lie in 0 to 30")
        for name in ("mixup_alpha", "cutmix_alpha"):
            _require(getattr(self, name) >= 0, f"augment.{name}={getattr(self, name)}: must not be negative")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with their neighbours."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def check_micro_batch(self, micro_batch: int) -> None:
        """Raise ConfigError where images of a micro-batch cannot be paired."""
        _require(
            not self.mixes or micro_batch % 2 == 0,
            f"data.micro_batch={micro_batch} is odd, but mixup and cutmix mix images in pairs: make it even, or set "
            "augment.mix_prob=0",
        )
