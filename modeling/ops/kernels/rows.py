"""How kernels that take whole rows of a matrix are launched: the residual norm's and the gated norm's."""

from __future__ import annotations

import triton

THREADS = 132 * 2048
"""What an H200 holds at once."""
BYTES_AHEAD = 2**16
"""Shared memory that a program may fill with rows to come."""


def row_tiles(rows: int, width: int) -> tuple[int, dict[str, int]]:
    """Programs that take all of `rows` a tile each, and the tile: some rows of `width` numbers, rounded up to a power of two."""
    block = triton.next_power_of_2(width)
    each = max(1, 256 // block)
    return triton.cdiv(rows, each), {"ROWS": each, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def stages_of(tile_bytes: int, most: int) -> int:
    """Tiles that a program which walks over them has under way, at most `most`."""
    return max(1, min(most, BYTES_AHEAD // tile_bytes + 1))
