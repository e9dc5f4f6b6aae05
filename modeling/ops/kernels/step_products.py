"""The two products of a decoding step for FEW_TOKENS tokens or fewer, as products of a matrix and a vector: what is around
them rides along, so that a layer is three kernels, `project`, `mix_step` of step.py, and `add_branch`.

Such a step takes as long as reading its weights. A program holds some rows of the matrix whole, in registers: all of its
loads are under way at once, and begin before it waits for the kernel before it (`wait_for_last`), so that weights are on
their way while the small kernel between two products runs. `project` takes the norm of its input, which every program needs,
by itself: 8 kB out of the cache at d = 2,048. More tokens than that take torch's products and `finish_step`.

Sums are float32, and so is what goes into the product: the norm's output is not rounded to the compute dtype before it, nor
the branch behind it, where torch's products need both. Any sizes will do; loads are of 16 bytes where d, i and the distance
of rows are multiples of 16 entries, and of single entries elsewhere, which is slow: an odd number of heads of 24 channels.

Letters: b batch, t time, d model, r rows of the packed projection, c channels (B, C, then x), n state, i inner, k conv taps,
q parts that `mix_step` sums squares over.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from modeling.ops.kernels.step import begins_early, let_next_begin, shift, wait_for_last

FEW_TOKENS = 2
TILE_BYTES = 32 * 1024
"""Of weights in a program: four programs fill an SM's registers with 128 kB of loads."""
PROGRAMS = 2 * 132
"""Narrow matrices take fewer rows a program, so that each SM of an H100 has about two programs at least."""


@triton.jit
def _tile(weight_ptr, stride, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows of a matrix, each whole: their numbers, the columns', which of these there are, and the weights.

    Nothing else wants the weights: what all programs share stays in the cache instead.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = column < width
    place = row[:, None] * stride + column[None, :]
    mask = (row < rows)[:, None] & live[None, :]
    return row, column, live, tl.load(weight_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _as_float(weight, EARLY: tl.constexpr):
    """Float32. The compiler would take bfloat16 pairs apart where they are loaded, and wait for them too early."""
    if EARLY and weight.dtype == tl.bfloat16:
        exact = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [weight], tl.float32, is_pure=False, pack=2
        )  # fmt: skip
    else:
        exact = weight.to(tl.float32)
    return exact


@triton.jit
def _project(
    x_ptr, norm_ptr, weight_ptr, out_ptr, rows, width, eps,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    row, column, live, weight = _tile(weight_ptr, width, rows, width, ROWS, BLOCK)
    norm = tl.load(norm_ptr + column, mask=live, other=0.0)
    wait_for_last(EARLY)
    weight = _as_float(weight, EARLY)
    for token in tl.static_range(TOKENS):
        x = tl.load(x_ptr + token * width + column, mask=live, other=0.0)
        # The norm's scale is a number a token: it goes in behind the product, and neither sum waits for the other.
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
        out = tl.sum(weight * (x * norm)[None, :], axis=1) * scale
        tl.store(out_ptr + token * rows + row, out.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _add_branch(
    gated_ptr, squares_ptr, weight_ptr, weight_stride, x_ptr, conv_ptr, projected_ptr, row_stride, absorb_ptr,
    width, inner, partials, eps, B, T, C, groups,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr, GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    row, column, live, weight = _tile(weight_ptr, weight_stride, width, inner, ROWS, BLOCK)
    part = tl.arange(0, PARTIALS)
    wait_for_last(EARLY)
    weight = _as_float(weight, EARLY)
    for token in tl.static_range(TOKENS):
        place = x_ptr + token * width + row
        x = tl.load(place, mask=row < width, other=0.0)
        gated = tl.load(gated_ptr + token * inner + column, mask=live, other=0.0).to(tl.float32)
        squares = tl.sum(tl.load(squares_ptr + token * partials + part, mask=part < partials, other=0.0), axis=0)
        branch = tl.sum(weight * gated[None, :], axis=1)
        tl.store(place, x + branch * (1.0 / tl.sqrt(squares / inner + eps)), mask=row < width)
    b = tl.program_id(0)
    if b < B:
        shift(conv_ptr, projected_ptr, row_stride, absorb_ptr, b.to(tl.int64), T, C, groups, GROUPS)


def launch_of(rows: int, block: int, itemsize: int, tokens: int) -> tuple[int, int]:
    """Rows in a program and its warps, for a matrix of `rows` rows in blocks of `block` entries of `itemsize` bytes.

    Four warps are 4% faster than eight (1.4B on an H200); two tokens need a whole tile in twice as many registers.
    """
    most = min(TILE_BYTES // (block * itemsize), rows // PROGRAMS)
    in_program = 1 << max(most.bit_length() - 1, 0)
    return in_program, 8 if tokens > 1 and in_program * block * itemsize >= TILE_BYTES else 4


def project(x_btd: Tensor, norm_d: Tensor, into_rd: Tensor, *, eps: float) -> Tensor:
    """RMSNorm(x) times the transposed `into_rd`, in its dtype, shape b t r. `x_btd` and `norm_d` are float32, all contiguous."""
    b, t, d = x_btd.shape
    rows, block = into_rd.shape[0], triton.next_power_of_2(d)
    in_program, warps = launch_of(rows, block, into_rd.element_size(), b * t)
    out, early = into_rd.new_empty(b, t, rows), begins_early(x_btd.device)
    _project[(triton.cdiv(rows, in_program),)](
        x_btd, norm_d, into_rd, out, rows, d, eps,
        TOKENS=b * t, ROWS=in_program, BLOCK=block, EARLY=early, num_warps=warps, launch_pdl=early,
    )  # fmt: skip
    return out


def add_branch(
    x_btd: Tensor,
    gated_bti: Tensor,
    squares_btq: Tensor,
    out_di: Tensor,
    conv_state_bkc: Tensor,
    projected_btr: Tensor,
    absorb_b: Tensor,
    *,
    eps: float,
) -> None:
    """Add the branch to `x_btd` (float32) in place, and move B's and C's past on.

    The branch is `gated_bti` times the transposed `out_di`, whose rows may lie further apart than they are long, over
    sqrt(squares / i + eps). `gated_bti` and `squares_btq` are what `mix_step` returned, the rest what it was given.
    """
    b, t, d = x_btd.shape
    inner, partials, channels = gated_bti.shape[-1], squares_btq.shape[-1], conv_state_bkc.shape[-1]
    block, groups = triton.next_power_of_2(inner), channels - inner
    in_program, warps = launch_of(d, block, out_di.element_size(), b * t)
    early = begins_early(x_btd.device)
    _add_branch[(max(triton.cdiv(d, in_program), b),)](
        gated_bti, squares_btq, out_di, out_di.stride(0), x_btd, conv_state_bkc, projected_btr, projected_btr.stride(1),
        absorb_b, d, inner, partials, eps, b, t, channels, groups,
        TOKENS=b * t, ROWS=in_program, BLOCK=block, PARTIALS=triton.next_power_of_2(partials),
        GROUPS=triton.next_power_of_2(groups), EARLY=early, num_warps=warps, launch_pdl=early,
    )  # fmt: skip
