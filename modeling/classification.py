"""Loss of a classifier against soft targets, with a teacher's if there is one. Everything in float32.

Letters: b images, d model, k classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from modeling.loss import Loss
from modeling.vision import VisionModel


def classification_loss(
    model: VisionModel,
    features_bd: Tensor,
    target_bk: Tensor,
    *,
    teacher_bk: Tensor | None = None,
    distill_weight: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Loss, Tensor]:
    """Mean cross-entropy with `target_bk` (float32 rows that sum to 1), and the logits, float32.

    With a teacher's logits, distill_weight * temperature^2 * KL(teacher || student) is added, both softened by the
    temperature (Hinton et al. 2015); no gradient flows into the teacher.
    """
    logits_bk = model.logits(features_bd)
    cross_entropy = F.cross_entropy(logits_bk, target_bk)
    total = cross_entropy
    if teacher_bk is not None:
        student, teacher = (F.log_softmax(x / temperature, -1) for x in (logits_bk, teacher_bk.detach()))
        divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        total = cross_entropy + distill_weight * temperature**2 * divergence
    return Loss(total, cross_entropy.detach()), logits_bk
