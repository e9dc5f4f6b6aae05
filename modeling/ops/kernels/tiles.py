"""The tiles of the scan kernels, how each kernel is launched, and what they can take.

A tile holds one head's channels. Triton's shapes are powers of two, so a head of 24 or 48 leaves a quarter of its tile
empty; that costs arithmetic, never bytes.
"""

from __future__ import annotations

import torch
import triton

from modeling.ops.kernels.launches import settings_of

CHUNK = 64
"""Steps that one tile of the scan covers. Element-wise work a step grows with it, state traffic falls with it; 64 is
what the matrix units take in one instruction."""
MAX_HEADDIM = 64
HEADDIM_STEP = 8
"""Hopper's copy engine wants heads to start at multiples of 16 bytes."""
STATES = (16, 32, 64, 128)


def columns_of(headdim: int) -> int:
    """Width of a head's tile: room for its channels, at least what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(headdim))


def states_turned(headdim: int, dtype: torch.dtype) -> bool:
    """Whether states are kept as p x n instead of n x p.

    The GPU's cache moves sectors of 32 bytes. Rows of 24 channels, 48 bytes, touch two each, and 130M's scan waited for the
    cache at half of the memory's rate; where a head's channels fill sectors, states need no turning.
    """
    return headdim * dtype.itemsize % 32 != 0


LAUNCH: dict[str, dict[int, dict[str, int]]] = {
    "states": {
        32: {"HEADS": 2, "num_warps": 4, "num_stages": 2, "maxnreg": 128},
        64: {"HEADS": 1, "num_warps": 4, "num_stages": 3},
    },
    "outputs": {32: {"num_warps": 4, "num_stages": 3}, 64: {"num_warps": 4, "num_stages": 3}},
    "state_gradients": {
        32: {"HEADS": 2, "num_warps": 4, "num_stages": 2, "maxnreg": 128},
        64: {"HEADS": 1, "num_warps": 4, "num_stages": 3},
    },
    "inputs_gradients": {32: {"num_warps": 4, "num_stages": 3}, 64: {"num_warps": 4, "num_stages": 3}},
    "group_gradients": {32: {"num_warps": 4, "num_stages": 3, "maxnreg": 128}, 64: {"num_warps": 4, "num_stages": 3}},
}
"""How each kernel is launched, by the width of its tile; HEADS are those that one program walks side by side. Fixed, so that
no run starts by tuning; the best of sweeps over warps, stages, heads and register limits on an H100 and an H200. Other GPUs
search theirs with modeling.ops.kernels.tune. With 128 registers a multiprocessor has enough for four programs: where documents
are told apart, walks would take a few more, and do without if told to."""
MULTIPROCESSORS = 132
"""An H200's."""
PROGRAMS_WANTED = MULTIPROCESSORS * 16
"""Several waves of them; where there are fewer chunks, heads are shared out over programs."""

WALKS_WANTED = MULTIPROCESSORS * 3
"""Programs that walk sequences and run at once."""
WALKS_AT_ONCE = {32: WALKS_WANTED, 64: MULTIPROCESSORS * 2}
"""Walks of one head that the GPU has room for at once, by the width of the tile."""
LEAST_SEGMENT = 8
"""Chunks that a segment of a walk should have: starting one and taking over what others left take as long as a few."""
LEAST_SHARE = 8
"""Heads that a program should have if their sum is to be added to others': with one program for B and C those took 26 us on an
H200, adding up 6."""


FULL_ENOUGH = 32
"""Joining more sequences must save more than one chunk in this many, joining any at all twice that: each pair of steps is then
asked whether it is of one document, and fewer programs walk longer sequences."""


def sequences_joined(n_sequences: int, t: int, heads: int) -> int:
    """How many of `n_sequences` sequences of `t` steps the scan sees end to end as the documents of one, so that fewer chunks
    stand partly empty: an image of 197 steps fills four chunks and wants 3.08.

    The smallest divisor of `n_sequences` after which others save next to nothing, as long as `heads` times the sequences
    left give the GPU enough programs that walk them; 1 where too little is saved.
    """
    chunks = {
        k: n_sequences // k * chunks_of(k * t)
        for k in range(1, min(n_sequences, CHUNK) + 1)  # CHUNK sequences leave nothing empty
        if n_sequences % k == 0 and (k == 1 or n_sequences // k * heads >= WALKS_WANTED)
    }
    least = min(chunks.values())
    chosen = next(k for k, n in chunks.items() if n * FULL_ENOUGH <= least * (FULL_ENOUGH + 1))
    return chosen if (chunks[1] - chunks[chosen]) * FULL_ENOUGH >= 2 * chunks[1] else 1


def heads_each(heads: int, chunks: int) -> int:
    """How many heads a program takes where each of `chunks` (of all sequences) has programs of its own."""
    return triton.cdiv(heads, max(1, min(heads, triton.cdiv(PROGRAMS_WANTED, chunks))))


def heads_shared(heads: int, chunks: int) -> int:
    """As `heads_each`, where a chunk has two programs, for B and for C, and what shares leave is added up after.

    One share has them all where those are more than there are multiprocessors: adding up costs a launch.
    """
    wanted = max(1, min(MULTIPROCESSORS // chunks, heads // LEAST_SHARE))
    return triton.cdiv(heads, wanted)


def launch_of(kernel: str, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """What to launch with; float32 tiles are twice as large and leave no room for more stages or a second head."""
    chosen = settings_of(kernel, max(32, columns), LAUNCH)
    if dtype != torch.float32:
        return chosen
    return {"num_warps": 4, "num_stages": 1, **({"HEADS": 1} if "HEADS" in chosen else {})}


def walk_of(kernel: str, columns: int, dtype: torch.dtype, heads: int, batch: int) -> dict[str, int]:
    """`launch_of` a kernel that walks sequences, of tiles that it may walk two of.

    One head a program where the GPU has room for all of them at once: two would leave multiprocessors idle. And where it has
    room for all programs with the tiles of one chunk more, they get those: a walk is as long as its loads take.
    """
    launch = launch_of(kernel, columns, dtype)
    if launch["HEADS"] == 2:
        if heads * batch <= WALKS_WANTED:
            launch = {**launch, "HEADS": 1}
        if triton.cdiv(heads, launch["HEADS"]) * batch <= WALKS_WANTED:
            launch = {**launch, "num_stages": launch["num_stages"] + 1}
    return launch


def segment_chunks(walks: int, n_chunks: int, columns: int) -> int:
    """Chunks of each segment that `walks` walks of `n_chunks` chunks are cut into; all where they are not cut.

    Cut ones are walked twice, so two segments would save nothing, and three take as long as one does.
    """
    segments = min(WALKS_AT_ONCE[max(32, columns)] // walks, n_chunks // LEAST_SEGMENT)
    return triton.cdiv(n_chunks, segments) if segments > 3 else n_chunks


def refusal(headdim: int, d_state: int, d_conv: int) -> str | None:
    """Why the kernels cannot run this mixer, or None where they can."""
    if headdim > MAX_HEADDIM:
        return f"headdim {headdim} is over {MAX_HEADDIM}"
    if headdim % HEADDIM_STEP:
        return f"headdim {headdim} is not a multiple of {HEADDIM_STEP}"
    if d_state not in STATES:
        return f"d_state {d_state} is not one of {', '.join(map(str, STATES))}"
    if d_conv != 4:
        return f"d_conv {d_conv} is not 4"
    return None


def chunks_of(t: int) -> int:
    """Chunks that `t` steps fill."""
    return triton.cdiv(t, CHUNK)
