"""Next-token loss and distillation over a vocabulary that tensor parallelism may split, a piece of the tokens at a time.

Float32 logits of a whole micro-batch would be the largest tensor of the step (13 GB for 64 x 1024 tokens of a 50k
vocabulary), so logits exist for `TOKENS_PER_PIECE` tokens only: each piece's gradient is taken at once, in the forward
pass, and backward only scales it.

Letters: m tokens (batch and time flattened), d model, v vocabulary (this rank's rows).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.language import LanguageModel
from modeling.ops.kernels.cross_entropy import softmax_statistics, write_gradient
from modeling.ops.products import add_product
from modeling.tensor_parallel import TensorParallel

TOKENS_PER_PIECE = 8192


class Loss(NamedTuple):
    """Means over the tokens or images of a micro-batch, float32 scalars, equal on all ranks of tp."""

    total: Tensor
    """What to minimise: cross_entropy + distill_weight * distillation."""
    cross_entropy: Tensor
    """With the targets alone, of the next token or of an image's class, in nats; carries no gradient of its own."""


def next_token_loss(
    model: LanguageModel,
    hidden_btd: Tensor,
    targets_bt: Tensor,
    *,
    teacher_btd: Tensor | None = None,
    distill_weight: float = 0.0,
    temperature: float = 1.0,
) -> Loss:
    """Loss of `targets_bt` (int64 ids) given final hidden states; with a teacher's, its soft targets are added.

    `teacher_btd` holds the full width's final hidden states; no gradient flows into them, nor through the head into the
    teacher's logits. All ranks of tp must call.
    """
    tp = model.tp
    hidden_md = hidden_btd.flatten(0, 1)
    teacher_md = None if teacher_btd is None else teacher_btd.detach().flatten(0, 1)
    total, cross_entropy = _PiecewiseLoss.apply(
        hidden_md,
        model.embedding,
        targets_bt.flatten() - model.vocab.start,
        teacher_md,
        distill_weight,
        temperature,
        tp,
        model.embedding.grad if model.in_place_gradients else None,
        torch.is_grad_enabled(),
    )
    return Loss(total, cross_entropy)


def cross_entropy_sum(logits_mv: Tensor, local_targets_m: Tensor, tp: TensorParallel) -> Tensor:
    """Sum over tokens of -log softmax(logits)[target], float32, where each rank holds a part of the vocabulary.

    `local_targets_m` counts from this rank's first row; a target outside its rows belongs to another rank.
    """
    mine_m = (local_targets_m >= 0) & (local_targets_m < logits_mv.shape[1])
    picked_m = logits_mv.gather(1, torch.where(mine_m, local_targets_m, 0)[:, None])[:, 0] * mine_m
    peak_m = tp.maximum(logits_mv.amax(-1))
    # Every rank takes the same loss from the sums, so their gradients are complete on each: `sum`, not `total`.
    sum_m, picked_m = tp.sum(torch.stack([torch.exp(logits_mv - peak_m[:, None]).sum(-1), picked_m])).unbind()
    return (peak_m + torch.log(sum_m) - picked_m).sum()


def distillation_sum(student_mv: Tensor, teacher_mv: Tensor, temperature: float, tp: TensorParallel) -> Tensor:
    """Sum over tokens of temperature^2 * KL(teacher || student), both softened by `temperature` (Hinton et al. 2015)."""
    student_mv, teacher_mv = student_mv / temperature, teacher_mv / temperature
    log_student_mv = student_mv - _log_sum_exp(student_mv, tp)
    log_teacher_mv = teacher_mv - _log_sum_exp(teacher_mv, tp)
    kl_m = (log_teacher_mv.exp() * (log_teacher_mv - log_student_mv)).sum(-1)
    return temperature**2 * tp.sum(kl_m).sum()


def _log_sum_exp(logits_mv: Tensor, tp: TensorParallel) -> Tensor:
    peak_m1 = tp.maximum(logits_mv.amax(-1, keepdim=True))
    # Each rank subtracts it from its own rows alone, so that its gradient is partial on each: `total`, not `sum`.
    return peak_m1 + torch.log(tp.total(torch.exp(logits_mv - peak_m1).sum(-1, keepdim=True)))


def _cross_entropy_piece(
    hidden_md: Tensor,
    head_vd: Tensor,
    local_targets_m: Tensor,
    n_tokens: int,
    tp: TensorParallel,
    grad_hidden_md: Tensor | None,
    grad_head_vd: Tensor | None,
) -> Tensor:
    """This piece's share of the mean cross-entropy by our Triton kernels; gradients written to, and added to, the last
    two. The logits' gradient takes the place of the logits."""
    logits_mv = F.linear(hidden_md, head_vd)
    peak_m, sum_m, picked_m = softmax_statistics(logits_mv, local_targets_m)
    highest_m = tp.maximum(peak_m)
    sum_m, picked_m = tp.sum(torch.stack([sum_m * torch.exp(peak_m - highest_m), picked_m])).unbind()
    if grad_hidden_md is not None and grad_head_vd is not None:
        write_gradient(logits_mv, local_targets_m, highest_m, sum_m, 1.0 / n_tokens)
        torch.mm(logits_mv, head_vd, out=grad_hidden_md)
        add_product(grad_head_vd, logits_mv.T, hidden_md)
    return (highest_m + torch.log(sum_m) - picked_m).sum() / n_tokens


class _PiecewiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_md: Tensor,
        embedding_vd: Tensor,
        local_targets_m: Tensor,
        teacher_md: Tensor | None,
        distill_weight: float,
        temperature: float,
        tp: TensorParallel,
        head_sum_vd: Tensor | None,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        n_tokens, head_vd = hidden_md.shape[0], embedding_vd.to(hidden_md.dtype)
        # Gradients are always off in here, and needs_input_grad does not know whether they were on outside.
        needs_grad = grad_enabled and any(ctx.needs_input_grad[:2])
        total, cross_entropy = torch.zeros((2, 1), device=hidden_md.device).unbind()
        grad_hidden_md = torch.empty_like(hidden_md) if needs_grad else None
        grad_head_vd = torch.zeros_like(embedding_vd) if needs_grad else None
        for start in range(0, n_tokens, TOKENS_PER_PIECE):
            piece = slice(start, start + TOKENS_PER_PIECE)
            if hidden_md.is_cuda and teacher_md is None:
                total += _cross_entropy_piece(
                    hidden_md[piece],
                    head_vd,
                    local_targets_m[piece],
                    n_tokens,
                    tp,
                    None if grad_hidden_md is None else grad_hidden_md[piece],
                    grad_head_vd,
                )
                cross_entropy.copy_(total)
                continue
            with torch.set_grad_enabled(needs_grad):
                hidden, head = hidden_md[piece].detach(), head_vd.detach()
                if needs_grad:
                    hidden, head = hidden.requires_grad_(), head.requires_grad_()
                logits_mv = F.linear(hidden, head).float()
                ce = cross_entropy_sum(logits_mv, local_targets_m[piece], tp) / n_tokens
                loss = ce
                if teacher_md is not None:
                    with torch.no_grad():
                        teacher_mv = F.linear(teacher_md[piece], head_vd).float()
                    loss = ce + distill_weight * distillation_sum(logits_mv, teacher_mv, temperature, tp) / n_tokens
                if needs_grad:
                    assert grad_hidden_md is not None
                    assert grad_head_vd is not None
                    grad_hidden_md[piece], grad_head = torch.autograd.grad(loss, (hidden, head))
                    grad_head_vd += grad_head
            total += loss.detach()
            cross_entropy += ce.detach()
        ctx.save_for_backward(grad_hidden_md, grad_head_vd)
        ctx.head_sum_vd = head_sum_vd
        cross_entropy = cross_entropy.squeeze(0)
        ctx.mark_non_differentiable(cross_entropy)
        return total.squeeze(0), cross_entropy

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_md, grad_head_vd = ctx.saved_tensors
        grad_hidden_md = (grad_hidden_md * grad_total).to(grad_hidden_md.dtype)
        if ctx.head_sum_vd is None:
            grad_head_vd = grad_head_vd * grad_total
        else:
            ctx.head_sum_vd.addcmul_(grad_head_vd, grad_total)
            grad_head_vd = None
        return grad_hidden_md, grad_head_vd, *(None,) * 7
