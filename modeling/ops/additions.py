"""What several ranks have sent, added up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modeling.ops.kernels.additions import add_all_at_once


def add_all(total: Tensor, parts: Sequence[Tensor]) -> None:
    """total += each of `parts`, all contiguous and of one shape and dtype. On a GPU three parts a pass, each pass rounded once."""
    if total.is_cuda:
        add_all_at_once(total, parts)
        return
    for part in parts:
        total += part
