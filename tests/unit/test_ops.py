"""Each op against its float32 reference, which is the definition: outputs and every gradient, odd lengths included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modeling.ops import norm
from modeling.ops.conv import causal_conv_silu, causal_conv_silu_ref
from modeling.ops.kernels import tiles
from modeling.ops.ssd import ssd_chunked, ssd_ref

# Float32 rounding is 6e-8 relative; sums over up to 130 steps in another order cost a few tens of them.
TOLERANCE = 1e-5
DOCUMENT_ENDS = (20, 64, 65)
"""Inside a chunk, on a chunk's border, and a document of one step."""


def documents(b: int, t: int) -> Tensor:
    """Document numbers, int32, shape b t, that rise at each of DOCUMENT_ENDS."""
    steps = torch.arange(t)
    return torch.stack([(steps >= end) for end in DOCUMENT_ENDS]).sum(0).int().expand(b, t).contiguous()


def assert_same(
    fast: Callable[..., tuple[Tensor, ...]], slow: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
) -> None:
    """Compare all outputs, and the gradients of a random projection of them to all inputs."""
    results = []
    for function in (fast, slow):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        loss = sum((torch.randn(o.shape, generator=generator) * o).sum() for o in outputs)
        assert isinstance(loss, Tensor)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert torch.isfinite(actual).all(), f"result {i}"
        error = (actual - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < TOLERANCE, f"result {i} (outputs, then gradients): relative error {error:.2e}"


@pytest.mark.parametrize("with_state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("with_documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("t", "chunk"), [(1, 32), (63, 16), (63, 64), (130, 32)])
def test_chunked_scan_equals_the_recurrence(t: int, chunk: int, with_documents: bool, with_state: bool) -> None:
    torch.manual_seed(0)
    b, h, p, n = 2, 3, 4, 5
    seq_idx = documents(b, t) if with_documents else None
    x, dt = torch.randn(b, t, h, p), torch.randn(b, t, h)
    B, C = torch.randn(b, t, 1, n), torch.randn(b, t, 1, n)
    inputs = [x, dt, -torch.rand(h) - 0.1, B, C, torch.randn(h), torch.randn(h)]
    if with_state:
        inputs.append(torch.randn(b, h, p, n))

    def chunked(*v: Tensor) -> tuple[Tensor, ...]:
        return ssd_chunked(*v[:7], chunk_size=chunk, seq_idx_bt=seq_idx, state_bhpn=v[7] if with_state else None)

    def recurrence(*v: Tensor) -> tuple[Tensor, ...]:
        return ssd_ref(*v[:7], seq_idx_bt=seq_idx, state_bhpn=v[7] if with_state else None)

    assert_same(chunked, recurrence, *inputs)


@pytest.mark.parametrize("with_documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("t", [1, 3, 70])
def test_convolution_equals_its_definition(t: int, with_documents: bool) -> None:
    torch.manual_seed(0)
    seq_idx = documents(2, t) if with_documents else None
    assert_same(
        lambda *v: (causal_conv_silu(*v, seq_idx_bt=seq_idx),),
        lambda *v: (causal_conv_silu_ref(*v, seq_idx_bt=seq_idx),),
        torch.randn(2, t, 6),
        torch.randn(6, 4),
        torch.randn(6),
    )


def test_gated_norm_equals_its_definition() -> None:
    torch.manual_seed(0)

    def in_steps(y: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor]:
        u = norm.gate(y, z)
        return (norm.scale(u, norm.square_sum(u), weight, n_channels=12, eps=1e-5, dtype=torch.float32),)

    inputs = torch.randn(2, 7, 12), torch.randn(2, 7, 12), torch.randn(12)
    assert_same(in_steps, lambda y, z, w: (norm.gated_norm_ref(y, z, w, eps=1e-5),), *inputs)


def test_rms_norm_equals_its_definition() -> None:
    torch.manual_seed(0)
    assert_same(
        lambda x, w: (norm.rms_norm(x, w, eps=1e-5, dtype=torch.float32),),
        lambda x, w: (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w,),
        torch.randn(2, 7, 12),
        torch.randn(12),
    )


@pytest.mark.parametrize(
    ("n_sequences", "t", "heads", "joined", "chunks"),
    [
        # Eight images of 197: 24.6 chunks instead of 32. Sixteen would save one chunk more in a hundred: too little.
        (512, 197, 64, 8, 25),
        (512, 197, 8, 8, 25),  # 64 sequences of 8 heads: 512 programs, of 396 wanted
        (256, 197, 8, 4, 13),  # eight would leave 256 programs
        (32, 197, 8, 1, 4),  # 256 programs already
        (510, 197, 64, 6, 19),  # eight does not divide it: 18.5 chunks instead of 24
        (509, 197, 64, 1, 4),  # a prime
        (512, 192, 64, 1, 3),  # nothing to save
        (512, 190, 64, 1, 3),  # 2.97 chunks instead of 3
        (512, 65, 64, 32, 33),  # 32.5 chunks instead of 64
        (512, 16, 64, 4, 1),  # four fill a chunk
    ],
    ids=str,
)
def test_sequences_are_joined_where_chunks_would_stand_empty(
    n_sequences: int, t: int, heads: int, joined: int, chunks: int
) -> None:
    assert tiles.CHUNK == 64
    assert tiles.WALKS_WANTED == 396
    assert tiles.sequences_joined(n_sequences, t, heads) == joined
    assert tiles.chunks_of(joined * t) == chunks
