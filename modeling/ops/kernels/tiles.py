"""How heads lie in the tiles of the scan kernels, and what those kernels can take.

A tile is as wide as `columns` channels and holds `heads` whole heads, each in `columns // heads` places of which the
first headdim are used: two heads of 24 or 32 share a tile of 64, a head of 48 or 64 has one to itself. Triton's shapes
are powers of two, so a head of 24 or 48 leaves a quarter of its places empty; they cost arithmetic, never bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

CHUNK = 64
"""Steps that one tile of the scan covers. Element-wise work a step grows with it, state traffic falls with it; 64 is
what the matrix units take in one instruction."""
MIN_COLUMNS = 32
"""Narrowest tile. Measured on an H200 at headdim 24: tiles of one head beat tiles of two, 44 ms a step against 53."""
MAX_HEADDIM = 64
STATES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Tiles:
    """Geometry of one scan: passed to every kernel as compile-time constants."""

    headdim: int
    columns: int
    """Channels a tile has room for."""
    heads: int
    """Heads a tile holds."""

    @property
    def place(self) -> int:
        """Channels there is room for in one head's place."""
        return self.columns // self.heads

    @classmethod
    def of(cls, headdim: int) -> Tiles:
        """The geometry for this headdim."""
        place = max(16, triton.next_power_of_2(headdim))
        columns = max(MIN_COLUMNS, place)
        return cls(headdim, columns, columns // place)

    def count(self, n_heads: int) -> int:
        """Tiles that `n_heads` heads fill."""
        return triton.cdiv(n_heads, self.heads)


LAUNCH: dict[str, dict[int, dict[str, int]]] = {
    "scan_forward": {32: {"num_warps": 4, "num_stages": 2}, 64: {"num_warps": 4, "num_stages": 2}},
    "state_gradients": {32: {"num_warps": 4, "num_stages": 2}, 64: {"num_warps": 4, "num_stages": 2}},
    "inputs_gradients": {32: {"num_warps": 4, "num_stages": 3}, 64: {"num_warps": 4, "num_stages": 3}},
    "group_gradients": {32: {"num_warps": 4, "num_stages": 3}, 64: {"num_warps": 4, "num_stages": 3}},
}
"""How each kernel is launched, by the channels of a head's place. Fixed, so that no run starts by tuning; the best of a
sweep over warps, stages and register limits on an H200 (tests/perf/kernels.py). Never one stage in bfloat16: Triton 3.6
then reads shared memory out of bounds at headdim 24 (found by compute-sanitizer)."""


def launch_of(kernel: str, place: int, dtype: torch.dtype) -> dict[str, int]:
    """Warps and pipeline stages; float32 tiles are twice as large and leave no room for a second stage."""
    chosen = LAUNCH[kernel][max(32, place)]
    return {"num_warps": chosen["num_warps"], "num_stages": 1} if dtype == torch.float32 else chosen


def refusal(headdim: int, d_state: int, d_conv: int) -> str | None:
    """Why the kernels cannot run this mixer, or None where they can."""
    if headdim > MAX_HEADDIM:
        return f"headdim {headdim} is over {MAX_HEADDIM}"
    if d_state not in STATES:
        return f"d_state {d_state} is not one of {', '.join(map(str, STATES))}"
    if d_conv != 4:
        return f"d_conv {d_conv} is not 4"
    return None


def chunks_of(t: int) -> int:
    """Chunks that `t` steps fill."""
    return triton.cdiv(t, CHUNK)
