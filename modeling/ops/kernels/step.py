"""A few steps of every sequence of a batch from its state, as decoding needs them: two kernels a layer beside its products,
and one for so few tokens that step_products.py's products take the other's work on.

`mix_step` convolves, moves the recurrence on and gates; the gated norm's scale, one number a token, comes out of the output
projection's product as it would go in, so `finish_step` applies it where it adds the branch to the residual stream and takes
the next norm. B's and C's inputs of the convolution are read by every head's programs and therefore moved on by
`finish_step`, after all of them. At batch 1 a layer is a handful of kernels of a few microseconds: fewer is faster.

Letters: b batch, t time (a few steps), d model, c channels (B, C, then x), h heads, p headdim, n state, i inner (h x p). The
projection's columns are B and C (2 n), one dt for each head that the model holds, then x and z (p each) of head 0, of head
1, ...: any width's are the first ones. States are stored as they are after the first `absorb_b` steps of a row, and left
alone where that is 0.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALL_BATCH = 8
SMALL_ROWS, LARGE_ROWS = 16, 32
"""Channels of a head in one program up to SMALL_BATCH sequences, and beyond: more programs mean more of the state in flight,
fewer convolve B and C less often."""


@functools.cache
def begins_early(device: torch.device) -> bool:
    """Whether kernels of a chain may begin before those before have ended (CUDA's programmatic dependent launch: Hopper and
    later). Each is then launched with `launch_pdl` and calls both functions below."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """Let the next kernel of the chain begin where there is room, once all programs of this one have."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(EARLY: tl.constexpr):
    """Wait until the kernels before have ended and what they wrote can be read.

    Before this a program may read only what no kernel of the step writes before it, and write nothing. Every program of
    every kernel of the chain comes here, so that the end of one kernel means the end of all before it. Nor should it use
    what it reads before: the compiler would have it wait for that first.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _taps(weight_ptr, bias_ptr, channel, live):
    """The convolution's weights of these channels, for the oldest input first, and biases."""
    tap = weight_ptr + channel * 4
    w0 = tl.load(tap, mask=live, other=0.0)
    w1 = tl.load(tap + 1, mask=live, other=0.0)
    w2 = tl.load(tap + 2, mask=live, other=0.0)
    w3 = tl.load(tap + 3, mask=live, other=0.0)
    return w0, w1, w2, w3, tl.load(bias_ptr + channel, mask=live, other=0.0)


@triton.jit
def _convolved(x0, x1, x2, x3, taps, dtype: tl.constexpr):
    """silu(convolution) of one step, rounded to the compute dtype as the chunked path rounds it, float32."""
    total = taps[4] + x0 * taps[0]
    total += x1 * taps[1] + x2 * taps[2]
    total += x3 * taps[3]
    return (total * tl.sigmoid(total)).to(dtype).to(tl.float32)


@triton.jit
def _past(conv_ptr, C, channel, live):
    """The last three inputs of these channels, oldest first."""
    x0 = tl.load(conv_ptr + channel, mask=live, other=0.0).to(tl.float32)
    x1 = tl.load(conv_ptr + C + channel, mask=live, other=0.0).to(tl.float32)
    x2 = tl.load(conv_ptr + 2 * C + channel, mask=live, other=0.0).to(tl.float32)
    return x0, x1, x2


@triton.jit
def _mix_step(
    projected_ptr, row_stride, weight_ptr, bias_ptr, A_ptr, D_ptr, dt_bias_ptr, norm_ptr, conv_ptr, state_ptr,
    absorb_ptr, out_ptr, squares_ptr, T, heads, held,
    N: tl.constexpr, P: tl.constexpr, STATE: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    part = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    p = part * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, STATE)
    in_head = p < P
    in_state = n < N
    C = 2 * N + heads * P
    x_channel = 2 * N + h * P + p
    mask = in_head[:, None] & in_state[None, :]
    state_ptr += (b * heads + h) * (P * N)
    place = p[:, None] * N + n[None, :]  # 32 bits: a pointer an entry would be most of the registers
    state = tl.load(state_ptr + place, mask=mask, other=0.0).to(tl.float32)
    conv_ptr += b * 3 * C
    B0, B1, B2 = _past(conv_ptr, C, n, in_state)
    C0, C1, C2 = _past(conv_ptr, C, N + n, in_state)
    x0, x1, x2 = _past(conv_ptr, C, x_channel, in_head)
    B_taps = _taps(weight_ptr, bias_ptr, n, in_state)
    C_taps = _taps(weight_ptr, bias_ptr, N + n, in_state)
    x_taps = _taps(weight_ptr, bias_ptr, x_channel, in_head)
    A = tl.load(A_ptr + h)
    D = tl.load(D_ptr + h)
    dt_bias = tl.load(dt_bias_ptr + h)
    weight = tl.load(norm_ptr + h * P + p, mask=in_head, other=0.0)
    wait_for_last(EARLY)
    absorb = tl.load(absorb_ptr + b)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for t in range(T):
        row = b * T + t
        projected = projected_ptr + row * row_stride
        B3 = tl.load(projected + n, mask=in_state, other=0.0).to(tl.float32)
        C3 = tl.load(projected + N + n, mask=in_state, other=0.0).to(tl.float32)
        own = projected + 2 * N + held + h * 2 * P + p
        x3 = tl.load(own, mask=in_head, other=0.0).to(tl.float32)
        z = tl.load(own + P, mask=in_head, other=0.0).to(tl.float32)
        B = _convolved(B0, B1, B2, B3, B_taps, dtype)
        C_n = _convolved(C0, C1, C2, C3, C_taps, dtype)
        x = _convolved(x0, x1, x2, x3, x_taps, dtype)
        dt = tl.load(projected + 2 * N + h).to(tl.float32) + dt_bias
        # log(1 + e^v) without overflow, and without losing a small e^v beside the 1, as in scan_common.
        small = tl.exp(-tl.abs(dt))
        one = 1.0 + small
        log1p = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0)))
        delta = tl.maximum(dt, 0.0) + log1p
        state = tl.exp(delta * A) * state + (delta * x)[:, None] * B[None, :]
        y = tl.sum(state * C_n[None, :], axis=1) + D * x
        # The scan's output has the compute dtype before it is gated, here as in the chunked path.
        u = tl.where(in_head, y.to(dtype).to(tl.float32) * z * tl.sigmoid(z), 0.0)
        tl.store(out_ptr + (row * heads + h) * P + p, (u * weight).to(dtype), mask=in_head)
        tl.store(squares_ptr + (row * heads + h) * tl.num_programs(0) + part, tl.sum(u * u, axis=0))
        if absorb == t + 1:
            tl.store(state_ptr + place, state.to(state_ptr.dtype.element_ty), mask=mask)
            kept = conv_ptr + x_channel
            tl.store(kept, x1.to(conv_ptr.dtype.element_ty), mask=in_head)
            tl.store(kept + C, x2.to(conv_ptr.dtype.element_ty), mask=in_head)
            tl.store(kept + 2 * C, x3.to(conv_ptr.dtype.element_ty), mask=in_head)
        B0, B1, B2 = B1, B2, B3
        C0, C1, C2 = C1, C2, C3
        x0, x1, x2 = x1, x2, x3


@triton.jit
def _input(conv_ptr, projected_ptr, row_stride, step, C, channel, groups):
    """Input `step` of the convolution: 0 to 2 are of the past, later ones of this projection."""
    of_past = channel < tl.where(step < 3, groups, 0)
    of_now = channel < tl.where(step < 3, 0, groups)
    old = tl.load(conv_ptr + tl.minimum(step, 2) * C + channel, mask=of_past, other=0.0)
    new = tl.load(projected_ptr + tl.maximum(step - 3, 0) * row_stride + channel, mask=of_now, other=0.0)
    return tl.where(of_past, old, new.to(old.dtype))


@triton.jit
def shift(conv_ptr, projected_ptr, row_stride, absorb_ptr, b, T, C, groups, GROUPS: tl.constexpr):
    """Move B's and C's past of sequence b on. Each thread reads all of its channels' inputs before it writes one."""
    channel = tl.arange(0, GROUPS)
    live = channel < groups
    absorb = tl.load(absorb_ptr + b)
    conv_ptr += b * 3 * C
    projected_ptr += b * T * row_stride
    x0 = _input(conv_ptr, projected_ptr, row_stride, absorb, C, channel, groups)
    x1 = _input(conv_ptr, projected_ptr, row_stride, absorb + 1, C, channel, groups)
    x2 = _input(conv_ptr, projected_ptr, row_stride, absorb + 2, C, channel, groups)
    tl.store(conv_ptr + channel, x0, mask=live)
    tl.store(conv_ptr + C + channel, x1, mask=live)
    tl.store(conv_ptr + 2 * C + channel, x2, mask=live)


@triton.jit
def _shift_groups(conv_ptr, projected_ptr, row_stride, absorb_ptr, T, C, groups, GROUPS: tl.constexpr):
    shift(conv_ptr, projected_ptr, row_stride, absorb_ptr, tl.program_id(0).to(tl.int64), T, C, groups, GROUPS)


@triton.jit
def _finish_step(
    x_ptr, branch_ptr, squares_ptr, weight_ptr, sum_ptr, out_ptr, conv_ptr, projected_ptr, row_stride, absorb_ptr,
    width, partials, inner, eps, T, C, groups,
    BLOCK: tl.constexpr, PARTIALS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PARTIALS)
    squares = tl.sum(tl.load(squares_ptr + row * partials + i, mask=i < partials, other=0.0), axis=0)
    column = tl.arange(0, BLOCK)
    live = column < width
    x = tl.load(x_ptr + row * width + column, mask=live, other=0.0)
    branch = tl.load(branch_ptr + row * width + column, mask=live, other=0.0).to(tl.float32)
    x += branch * (1.0 / tl.sqrt(squares / inner + eps))
    tl.store(sum_ptr + row * width + column, x, mask=live)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    out = x * scale * tl.load(weight_ptr + column, mask=live, other=0.0)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=live)
    if row % T == 0:
        shift(conv_ptr, projected_ptr, row_stride, absorb_ptr, row // T, T, C, groups, GROUPS)


def mix_step(
    projected_btr: Tensor,
    conv_ck: Tensor,
    conv_bias_c: Tensor,
    A_h: Tensor,
    D_h: Tensor,
    dt_bias_h: Tensor,
    norm_i: Tensor,
    conv_state_bkc: Tensor,
    ssm_state_bhpn: Tensor,
    absorb_b: Tensor,
    *,
    held: int,
    early: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gated outputs times the norm's weight but not its scale (compute dtype, b t i), and sums of squares of parts of them
    before the weight (float32, b t parts). Moves the scan's states and x's past on; `finish_step` moves B's and C's.

    The arguments are those of modeling.ops.step.mixer_step. `early` is for a chain of `project`, this and `add_branch`: it
    reads the states before the kernel before it has ended, which must not have written them.
    """
    b, t, _ = projected_btr.shape
    heads, p, n = ssm_state_bhpn.shape[1:]
    rows = min(SMALL_ROWS if b <= SMALL_BATCH else LARGE_ROWS, triton.next_power_of_2(p))
    parts = triton.cdiv(p, rows)
    out = projected_btr.new_empty(b, t, heads * p)
    squares = torch.empty(b, t, heads * parts, dtype=torch.float32, device=projected_btr.device)
    _mix_step[(parts, heads, b)](
        projected_btr, projected_btr.stride(1), conv_ck, conv_bias_c, A_h, D_h, dt_bias_h, norm_i, conv_state_bkc,
        ssm_state_bhpn, absorb_b, out, squares, t, heads, held,
        N=n, P=p, STATE=triton.next_power_of_2(n), ROWS=rows, EARLY=early, launch_pdl=early,
    )  # fmt: skip
    return out, squares


def finish_step(
    x_btd: Tensor,
    branch_btd: Tensor,
    squares_btq: Tensor,
    norm_d: Tensor,
    conv_state_bkc: Tensor,
    projected_btr: Tensor,
    absorb_b: Tensor,
    *,
    inner: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x + branch / sqrt(squares / inner + eps), float32, and its RMSNorm in `dtype`; and B's and C's past moved on.

    `branch_btd` is the output projection of `mix_step`'s first result, `squares_btq` its second; `inner` counts its channels.
    """
    b, t, d = x_btd.shape
    partials, channels = squares_btq.shape[-1], conv_state_bkc.shape[-1]
    total, out = torch.empty_like(x_btd), torch.empty(b, t, d, dtype=dtype, device=x_btd.device)
    groups = channels - inner
    _finish_step[(b * t,)](
        x_btd, branch_btd, squares_btq, norm_d, total, out, conv_state_bkc, projected_btr, projected_btr.stride(1),
        absorb_b, d, partials, inner, eps, t, channels, groups,
        BLOCK=triton.next_power_of_2(d), PARTIALS=triton.next_power_of_2(partials),
        GROUPS=triton.next_power_of_2(groups), num_warps=8,
    )  # fmt: skip
    return total, out


def shift_groups(conv_state_bkc: Tensor, projected_btr: Tensor, absorb_b: Tensor, *, inner: int) -> None:
    """Move B's and C's past on, where no `finish_step` follows."""
    channels = conv_state_bkc.shape[-1]
    groups = channels - inner
    _shift_groups[(conv_state_bkc.shape[0],)](
        conv_state_bkc, projected_btr, projected_btr.stride(1), absorb_b, projected_btr.shape[1], channels, groups,
        GROUPS=triton.next_power_of_2(groups),
    )  # fmt: skip
