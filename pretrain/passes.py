"""Passes, the forward and backward of one width on one micro-batch, replayed as CUDA graphs.

A pass has thousands of kernels, and the narrow widths' are shorter than launching them takes: on one H200 the 1.4B's
eighth width spends two fifths of its time waiting for the host. A pass is launched the first time (which compiles what it
needs), captured the second, replayed from then on. All graphs share one memory pool: they run one after another, and none
keeps anything but its losses. Tensor parallelism's collectives are captured with the rest. NCCL wants a collective captured by
all of its ranks or by none, so ranks vote after each capture: where one could not, all launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling.loss import Loss
from modeling.nesting import LayerWidths
from pretrain.config import RunConfig

logger = logging.getLogger(__name__)


class PassInputs(NamedTuple):
    """What a language model's pass reads, on the device. Other tasks have named tuples of their own, with `scale` too."""

    tokens_bt: Tensor
    targets_bt: Tensor
    seq_idx_bt: Tensor | None
    scale: Tensor
    """What the loss is multiplied by before backward: float32, no dims."""
    embedded_md: Tensor | None = None
    """The embedded tokens where all widths share them: a leaf whose `.grad` all of them add to, at one address for good."""


Pass = Callable[[LayerWidths, Any], Loss]
"""Adds the gradients of scale * loss, and returns the loss; gradients lie at fixed addresses, and nothing waits for the GPU."""


def why_launched(cfg: RunConfig, device: torch.device) -> str | None:
    """Why passes are launched kernel by kernel, or None where they are captured."""
    if device.type != "cuda":
        return "no GPU"
    if cfg.cuda_graphs == "never":
        return "cuda_graphs=never"
    if not cfg.parallel.keeps_gradients:
        return "ZeRO 2 takes gradients away in each backward"
    if cfg.nesting.distill_weight:
        return "distillation hands a teacher's states from pass to pass"
    if cfg.nesting.mix_rate:
        return "mixes differ from step to step"
    return None


class GraphedPasses:
    """`run` as CUDA graphs, one for each submodel and shape of inputs.

    `on_any_rank` says whether its argument is true on any rank (Ranks.agree_any); all ranks must then call alike.
    """

    def __init__(self, run: Pass, on_any_rank: Callable[[bool], bool] = bool) -> None:
        self._run, self._on_any_rank = run, on_any_rank
        self._refused = False
        self._pool = torch.cuda.graph_pool_handle()
        self._launched: set[tuple[object, ...]] = set()
        self._captured: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Any, Loss]] = {}

    def __call__(self, widths: LayerWidths, inputs: Any) -> Loss:
        """As `run`; what it returns is overwritten by the next call, of whatever submodel: graphs share their memory."""
        key = (widths, *(None if x is None else x.shape for x in inputs))
        if key not in self._launched or self._refused:
            self._launched.add(key)
            return self._run(widths, inputs)
        if key not in self._captured:
            refused = self._capture(key, widths, inputs)
            if self._on_any_rank(refused is not None):  # nothing of the pass has run: it is launched instead
                self._refused = True
                self.clear()
                why = refused or "on another rank"
                logger.warning("passes: launched kernel by kernel from here on, capturing one failed: %s", why)
                return self._run(widths, inputs)
        graph, fixed, loss = self._captured[key]
        for mine, given in zip(fixed, inputs, strict=True):
            if mine is not None and mine is not given:
                mine.copy_(given)
        graph.replay()
        return loss

    def _capture(self, key: tuple[object, ...], widths: LayerWidths, inputs: Any) -> str | None:
        """Capture a pass; None, or why it cannot be."""
        # A leaf is where it was, with its gradient: a clone would get one of its own.
        fixed = type(inputs)(*(x if x is None or x.requires_grad else x.clone() for x in inputs))
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (a loader that pins memory, a checkpoint being written) may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss = self._run(widths, fixed)
        except RuntimeError as error:
            return str(error)
        self._captured[key] = graph, fixed, loss
        return None

    def clear(self) -> None:
        """Let go of all graphs, and of the memory that they hold."""
        self._captured.clear()
        torch.cuda.empty_cache()
