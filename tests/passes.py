"""Forward and backward of one width outside the trainer, for tests and benchmarks of passes."""

from __future__ import annotations

from modeling.classification import classification_loss
from modeling.language import LanguageModel
from modeling.loss import Loss, next_token_loss
from modeling.nesting import LayerWidths
from modeling.noise import Noise
from modeling.vision import VisionModel
from pretrain.passes import Pass, PassInputs
from pretrain.vision_task import VisionInputs


def language_pass(model: LanguageModel) -> Pass:
    """Adds the gradients of scale * next-token loss."""

    def run(widths: LayerWidths, inputs: PassInputs) -> Loss:
        hidden_btd = model(inputs.tokens_bt, widths, seq_idx_bt=inputs.seq_idx_bt, embedded_md=inputs.embedded_md)
        loss = next_token_loss(model, hidden_btd, inputs.targets_bt)
        (loss.total * inputs.scale).backward()
        return Loss(loss.total.detach(), loss.cross_entropy)

    return run


def classifier_pass(model: VisionModel, seed: int) -> Pass:
    """Adds the gradients of scale * classification loss, with the drops of `seed`."""

    def run(widths: LayerWidths, inputs: VisionInputs) -> Loss:
        features_bd = model(inputs.images_bchw, widths, noise=Noise(seed, inputs.number_b))
        loss, _ = classification_loss(model, features_bd, inputs.target_bk)
        (loss.total * inputs.scale).backward()
        return Loss(loss.total.detach(), loss.cross_entropy)

    return run
