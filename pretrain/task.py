"""What a run does that depends on what it trains. The order of a step, and all else, is the same (pretrain.train)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from modeling.loss import Loss
from modeling.nesting import LayerWidths
from pretrain.distributed import Ranks
from pretrain.engine import Engine

Scores = dict[str, float]
"""What validation says of one submodel, by the measure's name; "loss" is among them."""


class Loader(Protocol):
    """One data-parallel rank's training batches, step by step, without end; its position is one integer."""

    def next_step(self) -> list[Any]:
        """This rank's micro-batches of the next optimizer step."""

    def state_dict(self) -> dict[str, int]:
        """{"sequence": samples consumed over all ranks}."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""

    def close(self) -> None:
        """End the loader's processes."""


class Task(Protocol):
    """One kind of model and of data. A batch is whatever its loader makes, with `to(device)`."""

    def check_data(self, *, training: bool = True) -> dict[str, Any]:
        """Raise ValueError or OSError where the data is not what the run needs, or its validation alone. Touches no shared
        memory.

        What it returns each checkpoint says of the data beside the config: whoever uses the model may not have the data.
        """

    def loader(self, ranks: Ranks, *, start: int) -> Loader:
        """Training batches after the first `start` samples. Every rank must call."""

    def validation(self, ranks: Ranks) -> Iterable[Any]:
        """This rank's validation batches, the same ones each time it is gone through. Every rank must call."""

    def inputs(self, batch: Any) -> Any:
        """What a pass reads of a batch on the device: a named tuple of tensors, among them `scale`, a float32 one."""

    def loss(self, engine: Engine, widths: LayerWidths, inputs: Any, teacher: Tensor | None) -> tuple[Loss, Tensor]:
        """Forward of a submodel: its loss, and what it has for a narrower one to learn from."""

    def scores(
        self, model: Any, batches: Iterable[Any], submodels: Sequence[LayerWidths], ranks: Ranks
    ) -> list[Scores]:
        """What validation says of each submodel over all ranks' batches, each sample counted once. Every rank must call."""
