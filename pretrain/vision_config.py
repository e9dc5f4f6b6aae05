"""A run that trains an image classifier. Loads without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from modeling.config import VisionConfig
from modeling.flops import training_flops_per_image
from modeling.nesting import LayerWidths
from pretrain.config import RunConfig
from pretrain.config_sections import ConfigError
from pretrain.image_config import AugmentConfig, ImageDataConfig


@dataclass(frozen=True, kw_only=True)
class VisionRunConfig(RunConfig):
    """A run that trains an image classifier on image shards."""

    task: Literal["vision"] = "vision"
    model: VisionConfig
    data: ImageDataConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        try:
            self.model.grid_of(self.data.image_size, self.data.image_size)
        except ValueError as error:
            raise ConfigError(f"data.image_size={self.data.image_size}: {error}") from None
        super().__post_init__()
        self.augment.check_micro_batch(self.data.micro_batch)

    @property
    def tokens_per_sequence(self) -> int:
        """See RunConfig."""
        return self.model.n_tokens(self.data.image_size, self.data.image_size)

    @property
    def step_size(self) -> str:
        """See RunConfig."""
        return f"data.images_per_step={self.data.images_per_step}"

    def training_flops(self, widths: LayerWidths) -> int:
        """See RunConfig."""
        return training_flops_per_image(self.model, widths, self.data.image_size)

    @property
    def n_eval_sequences(self) -> int:
        """See RunConfig."""
        return self.logging.eval_sequences
