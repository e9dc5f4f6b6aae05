"""Walks cut into segments against walks in one piece and against a loop over steps; small ones in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeling.ops.kernels import tiles
from modeling.ops.kernels.scan_common import TimeSteps, time_steps
from modeling.ops.kernels.scan_walks import scan_states, state_gradients
from tests.parity.kernel_checks import DEVICE, GPU, LOW, poison

CHUNK = tiles.CHUNK
BATCH, HEADS = 2, 3


def by_steps(
    rows_bthp: Tensor, group_btn: Tensor, weight_bht: Tensor, decay_bht: Tensor, documents_bt: Tensor | None
) -> Tensor:
    """The state before each chunk (b chunk h n p), step by step in float64: what is before a chunk decays with its last step,
    and of another document than a step's nothing is left."""
    b, t, h, p = rows_bthp.shape
    n = group_btn.shape[-1]
    state = torch.zeros(b, h, n, p, dtype=torch.float64)
    found = []
    for start in range(0, t, CHUNK):
        end = min(start + CHUNK, t)
        found.append(state)
        last = decay_bht[:, :, start + CHUNK - 1]
        kept = torch.exp2(last)
        weight = weight_bht[:, :, start:end]
        if documents_bt is not None:
            of_end = documents_bt[:, end - 1]
            kept = kept * (documents_bt[:, max(start - 1, 0)] == of_end)[:, None]
            weight = weight * (documents_bt[:, start:end] == of_end[:, None])[:, None]
        added = torch.einsum("bsn,bhs,bshp->bhnp", group_btn[:, start:end], weight, rows_bthp[:, start:end])
        state = kept[..., None, None] * state + added
    return torch.stack(found, dim=1)


def problem(t: int, headdim: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, TimeSteps]:
    """[x | B | C], dy, and time steps of heads that forget little within a whole sequence."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(BATCH, t, HEADS * headdim + 2 * n, generator=generator).to(DEVICE, dtype)
    grad_y = torch.randn(BATCH, t, HEADS * headdim, generator=generator).to(DEVICE, dtype)
    dt = torch.randn(BATCH, t, HEADS, generator=generator).to(DEVICE, dtype)
    poison()
    return (
        mixed,
        grad_y,
        time_steps(dt, torch.full((HEADS,), -4.0, device=DEVICE), torch.full_like(dt[0, 0].float(), -1.0)),
    )


def documents(t: int) -> Tensor:
    """Two or three in each sequence, on other steps; one of the ends lies inside a chunk, one between two segments."""
    ends = torch.tensor([[CHUNK * 2, t // 2 + 3], [t // 4 + 1, t]])
    return (torch.arange(t)[None, :, None] >= ends[:, None]).sum(-1).int()


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(
    ("t", "headdim", "n", "dtype"),
    [
        (500, 24, 16, torch.float32),
        (500, 24, 16, LOW),
        (449, 32, 32, LOW),
        (480, 56, 16, LOW),
        pytest.param(8192, 24, 128, LOW, marks=pytest.mark.gpu),
        pytest.param(8191, 48, 128, LOW, marks=pytest.mark.gpu),
        pytest.param(4097, 64, 128, LOW, marks=pytest.mark.gpu),
        pytest.param(4096, 64, 128, torch.float32, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_cut_walks_end_where_whole_ones_do(
    t: int, headdim: int, n: int, dtype: torch.dtype, with_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if t > 500 and not GPU:
        pytest.skip("a real length: waits for a CUDA GPU")
    mixed, grad_y, steps = problem(t, headdim, n, dtype)
    seq_idx_bt = documents(t) if with_documents else None
    on_device = None if seq_idx_bt is None else seq_idx_bt.to(DEVICE)
    how = {"heads": HEADS, "headdim": headdim, "seq_idx_bt": on_device}
    n_chunks = tiles.chunks_of(t)
    found = []
    for wanted in (0, 10**6):
        monkeypatch.setattr(tiles, "WALKS_AT_ONCE", {32: wanted, 64: wanted})
        monkeypatch.setattr(tiles, "LEAST_SEGMENT", 2)
        each = tiles.segment_chunks(BATCH * HEADS, n_chunks, tiles.columns_of(headdim))
        assert (each < n_chunks) is (wanted > 0)
        forward = scan_states(mixed, steps, **how)  # type: ignore[arg-type]
        backward = state_gradients(grad_y, mixed, steps, **how)  # type: ignore[arg-type]
        if tiles.states_turned(headdim, dtype):
            forward, backward = forward.transpose(-1, -2), backward.transpose(-1, -2)
        found.append((forward.double().cpu(), backward.double().cpu()))

    def apart(rows: Tensor) -> Tensor:
        return rows.double().cpu().unflatten(-1, (HEADS, headdim))

    inner = HEADS * headdim
    x, B, C = (
        apart(mixed[..., :inner]),
        mixed[..., inner : inner + n].double().cpu(),
        mixed[..., inner + n :].double().cpu(),
    )
    sending, decay = steps.sending.double().cpu(), steps.decay.double().cpu()
    forward = by_steps(x, B, sending, decay, seq_idx_bt)
    assert float(forward[:, -1].norm()) > 0.1 * float(forward.norm()) / n_chunks**0.5, "what is carried must matter"
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for name, expected, place in (
        ("states", forward, 0),
        ("gradients", backwards(apart(grad_y), C, decay, seq_idx_bt), 1),
    ):
        for cut, pair in zip(("whole", "cut"), found, strict=True):
            error = float((pair[place] - expected).norm() / expected.norm())
            assert error < bound, f"{name}, {cut}: {error}"


def backwards(dy_bthp: Tensor, C_btn: Tensor, decay_bht: Tensor, documents_bt: Tensor | None) -> Tensor:
    """The gradient by the state after each chunk, in float64."""
    b, t, h, p = dy_bthp.shape
    grad = torch.zeros(b, h, C_btn.shape[-1], p, dtype=torch.float64)
    found = []
    for start in reversed(range(0, t, CHUNK)):
        end = min(start + CHUNK, t)
        found.append(grad)
        weight, kept = torch.exp2(decay_bht[:, :, start:end]), torch.exp2(decay_bht[:, :, start + CHUNK - 1])
        if documents_bt is not None:
            before = documents_bt[:, max(start - 1, 0)]
            weight = weight * (documents_bt[:, start:end] == before[:, None])[:, None]
            kept = kept * (documents_bt[:, end - 1] == before)[:, None]
        added = torch.einsum("bln,bhl,blhp->bhnp", C_btn[:, start:end], weight, dy_bthp[:, start:end])
        grad = kept[..., None, None] * grad + added
    return torch.stack(found[::-1], dim=1)


@pytest.mark.parametrize(
    ("walks", "n_chunks", "columns", "segments"),
    [
        (2048, 16, 32, 1),  # the 130M's full width
        (128, 16, 64, 1),  # the 1.4B's eighth at 1,024 steps: two segments would be walked twice
        (128, 128, 32, 1),  # three would take as long as one
        (128, 128, 64, 1),
        (64, 128, 32, 6),
        (64, 128, 64, 4),
        (32, 128, 16, 12),
        (32, 64, 32, 8),  # no segment of less than eight chunks
        (8, 1024, 64, 32),
        (1, 1, 64, 1),
    ],
)
def test_walks_are_cut_where_few_are_long(walks: int, n_chunks: int, columns: int, segments: int) -> None:
    each = tiles.segment_chunks(walks, n_chunks, columns)
    assert -(-n_chunks // each) == segments
    assert segments == 1 or each >= tiles.LEAST_SEGMENT


@pytest.mark.parametrize(
    ("walks", "heads", "stages"),
    [
        (64 * 64, 2, 2),  # the 130M's full width: more programs than there is room for
        (64 * 16, 2, 2),
        (32 * 16, 2, 3),
        (32 * 12, 1, 3),
        (4 * 8, 1, 3),
    ],
)
def test_walks_that_fit_at_once_load_further_ahead(walks: int, heads: int, stages: int) -> None:
    launch = tiles.walk_of("states", 32, torch.bfloat16, walks // 4, 4)
    assert (launch["HEADS"], launch["num_stages"]) == (heads, stages)
    assert tiles.walk_of("states", 64, torch.bfloat16, walks // 4, 4) == tiles.LAUNCH["states"][64]
