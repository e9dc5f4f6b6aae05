"""Training an image classifier: image shards, soft targets, dropout whose masks are a function of the image.

Letters: b images, c colours, h and w pixels, k classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from modeling.classification import classification_loss
from modeling.loss import Loss
from modeling.nesting import LayerWidths
from modeling.noise import Noise
from modeling.tensor_parallel import filled_up
from modeling.vision import VisionModel
from pretrain.augment import normalised, training_inputs
from pretrain.distributed import Ranks
from pretrain.engine import Engine
from pretrain.hardware import compute_dtype
from pretrain.images import ImageBatch, ImageLoader, ValidationImages, check_image_dataset, validation_images
from pretrain.task import Scores
from pretrain.vision_config import VisionRunConfig


class VisionInputs(NamedTuple):
    """What a pass reads, on the device."""

    images_bchw: Tensor
    """Normalised, in the compute dtype; erased and mixed."""
    target_bk: Tensor
    """Smoothed and mixed, float32."""
    number_b: Tensor
    """Each image's number in the training stream, int64: what dropout is drawn by."""
    scale: Tensor
    """What the loss is multiplied by before backward: float32, no dims."""


@dataclass(frozen=True)
class VisionTask:
    """See Task."""

    cfg: VisionRunConfig

    def check_data(self, *, training: bool = True) -> dict[str, Any]:
        """See Task."""
        check_image_dataset(self.cfg.data, self.cfg.model.n_classes, training=training)
        return {}

    def loader(self, ranks: Ranks, *, start: int) -> ImageLoader:
        """See Task."""
        return ImageLoader(
            self.cfg.data,
            self.cfg.augment,
            seed=self.cfg.seed,
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
            n_sequences_per_step=self.cfg.samples_per_step,
            start_sequence=start,
        )

    def validation(self, ranks: Ranks) -> ValidationImages:
        """See Task."""
        return validation_images(
            self.cfg.data, n_images=self.cfg.n_eval_sequences, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size
        )

    def inputs(self, batch: ImageBatch) -> VisionInputs:
        """See Task: erasing, mixup, cutmix and smoothing are done here, once for all widths that share the batch."""
        device = batch.labels_b.device
        images_bchw, target_bk = training_inputs(
            batch,
            self.cfg.augment,
            n_classes=self.cfg.model.n_classes,
            seed=self.cfg.seed,
            dtype=compute_dtype(self.cfg, device),
        )
        return VisionInputs(images_bchw, target_bk, batch.numbers_b, torch.ones((), device=device))

    def loss(
        self, engine: Engine, widths: LayerWidths, inputs: VisionInputs, teacher: Tensor | None
    ) -> tuple[Loss, Tensor]:
        """See Task; a teacher is its logits."""
        features_bd = engine(inputs.images_bchw, widths, noise=Noise(self.cfg.seed, inputs.number_b))
        return classification_loss(
            engine.model,
            features_bd,
            inputs.target_bk,
            teacher_bk=teacher,
            distill_weight=self.cfg.nesting.distill_weight,
            temperature=self.cfg.nesting.distill_temperature,
        )

    def scores(
        self, model: VisionModel, batches: Iterable[ImageBatch], submodels: Sequence[LayerWidths], ranks: Ranks
    ) -> list[Scores]:
        """See Task: cross-entropy in nats, and the shares whose class is the likeliest, or among the five likeliest."""
        return submodel_scores(model, batches, submodels, ranks)


@torch.no_grad()
def submodel_scores(
    model: VisionModel, batches: Iterable[ImageBatch], submodels: Sequence[LayerWidths], ranks: Ranks
) -> list[Scores]:
    """Loss, top1 and top5 of each submodel over all ranks' batches, each image counted once.

    `batches` is this data-parallel rank's share. All ranks must call. Ranks may hold different numbers of batches.
    """
    sums = torch.zeros(len(submodels), 3, dtype=torch.float64, device=ranks.device)
    n_images = 0
    for batch in batches:
        label_b = batch.labels_b.to(ranks.device)
        images_bchw = normalised(batch.images_bchw.to(ranks.device), model.dtype)
        n_images += len(label_b)
        for i, widths in enumerate(submodels):
            sums[i] += _sums(features(model, images_bchw, widths), model, label_b)
    counted = torch.cat([sums.flatten().cpu(), torch.tensor([n_images], dtype=torch.float64)])
    # Ranks of one replica hold the same sums; adding all of them leaves the ratio as it is.
    dist.all_reduce(counted, group=ranks.cpu_group)
    means = (counted[:-1] / counted[-1]).view(-1, 3).tolist()
    return [dict(zip(("loss", "top1", "top5"), row, strict=True)) for row in means]


def _sums(features_bd: Tensor, model: VisionModel, label_b: Tensor) -> Tensor:
    """Cross-entropy, hits and hits among the five likeliest, summed over the images, float64."""
    logits_bk = model.logits(features_bd)
    loss = torch.nn.functional.cross_entropy(logits_bk, label_b, reduction="sum")
    # How many classes are not less likely than the right one, itself left out: a tie counts as a miss, and so does NaN.
    ahead_b = (~(logits_bk < logits_bk.gather(1, label_b[:, None]))).sum(-1) - 1
    return torch.stack([loss, (ahead_b < 1).sum(), (ahead_b < 5).sum()]).double()


def features(model: VisionModel, images_bchw: Tensor, widths: LayerWidths) -> Tensor:
    """The pooled embeddings of any number of images, also where sequence parallelism wants whole shares of tokens."""
    multiple = model.tp.size if model.tp.sequence else 1
    return model(filled_up(images_bchw, multiple), widths)[: len(images_bchw)]
