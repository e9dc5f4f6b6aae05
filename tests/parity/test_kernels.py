"""The mixer's Triton kernels against plain PyTorch in float32: outputs and every gradient, with memory poisoned beforehand.

On a machine without a GPU the kernels run in Triton's interpreter, on small shapes and in float32 and float16 (the
interpreter cannot multiply bfloat16); on a GPU in float32 and bfloat16 at real shapes too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modeling.config import BackboneConfig
from modeling.mixer import Mixer, initial_values
from modeling.ops.dropout import Drop, dropped, split_mix, threshold_of
from modeling.ops.kernels import tiles
from modeling.ops.kernels.conv import conv_backward, conv_forward
from modeling.ops.kernels.gated_norm import gated_norm_backward, gated_norm_forward, row_dots, square_sums
from modeling.ops.kernels.scan_common import time_steps
from modeling.ops.products import times
from modeling.tensor_parallel import Pending, TensorParallel
from tests.parity.kernel_checks import DEVICE, GPU, LOW, assert_close, poison, some_drop

pytestmark = pytest.mark.usefixtures("plain_scan")


@dataclass(frozen=True)
class Case:
    """One mixer and input."""

    heads: int
    headdim: int
    d_state: int
    t: int
    width: int
    documents: bool = False
    ranks: int = 1

    def __str__(self) -> str:
        docs = ", documents" if self.documents else ""
        return (
            f"{self.width} of {self.heads} heads of {self.headdim}, n {self.d_state}, t {self.t}, tp {self.ranks}{docs}"
        )


SMALL = [
    Case(heads=4, headdim=24, d_state=16, t=130, width=2),
    Case(heads=3, headdim=24, d_state=16, t=63, width=3, documents=True),
    Case(heads=3, headdim=64, d_state=32, t=65, width=2),
    Case(heads=3, headdim=48, d_state=16, t=1, width=2),
    Case(heads=3, headdim=16, d_state=16, t=131, width=3, documents=True),
    Case(heads=4, headdim=32, d_state=16, t=70, width=2, ranks=2),
    Case(heads=3, headdim=56, d_state=32, t=130, width=3, documents=True),
    Case(heads=17, headdim=8, d_state=16, t=70, width=17, documents=True),  # so many that programs share them
]
LARGE = [
    Case(heads=64, headdim=headdim, d_state=128, t=t, width=width, documents=documents)
    for headdim, t, width, documents in [
        (24, 1023, 64, False),
        (24, 1024, 8, True),
        (32, 500, 32, True),
        (48, 1023, 16, False),
        (64, 1000, 64, True),
        (64, 2048, 8, False),
        (64, 63, 32, False),
        # So few chunks that programs of the loops over heads have one each, of all widths of tiles.
        (16, 197, 64, False),
        (32, 197, 64, False),
        # States that lie as p x n in tiles of 64.
        (40, 500, 32, True),
        (56, 1023, 64, False),
    ]
]


class TwinRank(TensorParallel):
    """A rank whose partner holds the very same numbers, so that a sum over both is twice its own."""

    def total(self, x: Tensor) -> Tensor:
        return 2 * x

    def share(self, weight: Tensor) -> Tensor:
        return weight

    def times_leave(self, x_mi: Tensor, weight_di: Tensor) -> Tensor:
        return times(x_mi, weight_di)

    def start_times_sum(self, grad_me: Tensor, weight_de: Tensor) -> Pending:
        return Pending(times(grad_me, weight_de), None)


def fused(mixer: Mixer, x_btd: Tensor, n_heads: int, seq_idx_bt: Tensor | None, drop: Drop | None = None) -> Tensor:
    batch = x_btd.shape[0]
    return mixer._fused(x_btd.flatten(0, 1), n_heads, batch, seq_idx_bt, drop).unflatten(0, (batch, -1))


def documents(batch: int, t: int) -> Tensor:
    """Documents that end inside chunks, on a chunk's border, and after one step."""
    ends = torch.tensor([20, 64, 65, 129, 700])
    return (torch.arange(t)[:, None] >= ends).sum(1).int().expand(batch, t).contiguous()


def mixer_of(case: Case, dtype: torch.dtype) -> Mixer:
    heads = case.heads * case.ranks
    cfg = BackboneConfig(
        n_layers=1,
        d_model=64,
        headdim=case.headdim,
        n_heads=heads,
        widths=(heads,),
        d_state=case.d_state,
        chunk_size=32,
    )
    mixer = Mixer(cfg, TensorParallel() if case.ranks == 1 else TwinRank(case.ranks), dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.copy_(initial_values(name, tuple(p.shape), cfg, generator))
            if name in ("D", "gated_norm"):
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return mixer.to(DEVICE)


def results(
    mixer: Mixer, run: str, x_btd: Tensor, n_heads: int, seq_idx_bt: Tensor | None, drop: Drop | None = None
) -> dict[str, Tensor]:
    """Output and gradients of a fixed projection of it, by name."""
    mixer.zero_grad()
    x_btd = x_btd.detach().to(mixer.dtype).requires_grad_()
    poison()
    args = (x_btd, n_heads, seq_idx_bt, drop)
    plain = lambda x, n, seq_idx, drop: mixer._plain(x, n, seq_idx, None, drop)  # noqa: E731
    call = {"fused": partial(fused, mixer), "plain": plain}[run.removeprefix("block ")]
    # "block": the whole mixer recomputed by torch, as with activation_checkpointing=block.
    out_btd = checkpoint(call, *args, use_reentrant=False) if run.startswith("block ") else call(*args)
    weight = torch.randn(out_btd.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    (out_btd.float() * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
    assert x_btd.grad is not None
    return {"output": out_btd.detach(), "x": x_btd.grad, **gradients}


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("case", SMALL + [pytest.param(case, marks=pytest.mark.gpu) for case in LARGE], ids=str)
def test_fused_mixer_equals_the_plain_one(case: Case, dtype: torch.dtype) -> None:
    if case in LARGE and not GPU:
        pytest.skip("a real shape: waits for a CUDA GPU")
    x_btd = torch.randn(2, case.t, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    seq_idx_bt = documents(2, case.t).to(DEVICE) if case.documents else None
    n_heads = case.width * case.ranks
    expected = results(mixer_of(case, torch.float32), "plain", x_btd.to(dtype).float(), n_heads, seq_idx_bt)
    mixer = mixer_of(case, dtype)
    actual = results(mixer, "fused", x_btd, n_heads, seq_idx_bt)
    assert_close(actual, expected, dtype)
    if GPU:
        again = results(mixer, "fused", x_btd, n_heads, seq_idx_bt)
        assert all(torch.equal(actual[name], again[name]) for name in actual), "two runs differ"


@pytest.mark.parametrize(
    "case", [next(c for c in SMALL if c.documents), next(c for c in SMALL if c.ranks > 1)], ids=str
)
def test_recomputing_inside_the_mixer_changes_no_bit(case: Case) -> None:
    x_btd = torch.randn(2, case.t, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    seq_idx_bt = documents(2, case.t).to(DEVICE) if case.documents else None
    mixer = mixer_of(case, LOW)
    for run in ("fused", "plain"):
        mixer.recompute = "none"
        expected = results(mixer, run, x_btd, case.width * case.ranks, seq_idx_bt)
        ways = [("inside", run), ("none", f"block {run}")]
        for recompute, how in [*ways, ("states", run)] if run == "fused" else ways:  # the plain scan keeps no states
            mixer.recompute = recompute
            actual = results(mixer, how, x_btd, case.width * case.ranks, seq_idx_bt)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)


class CountingTwin(TwinRank):
    """Counts how often a mixer's outputs are sent, whichever way."""

    n_sent = 0

    def leave(self, x: Tensor) -> Tensor:
        CountingTwin.n_sent += 1
        return x

    def enter(self, x: Tensor) -> Tensor:
        return x

    def times_leave(self, x_mi: Tensor, weight_di: Tensor) -> Tensor:
        return self.leave(super().times_leave(x_mi, weight_di))


@pytest.mark.parametrize("apart", [True, False])
def test_a_block_done_again_sends_its_output_once(apart: bool) -> None:
    """torch stops at the last tensor that backward needs: what is sent after it is not sent again."""
    case = next(c for c in SMALL if c.ranks > 1)
    mixer = mixer_of(case, LOW)
    mixer.tp, mixer.sends_apart = CountingTwin(case.ranks), apart
    x_btd = torch.randn(2, case.t, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = results(mixer_of(case, LOW), "fused", x_btd, case.width * case.ranks, None)
    CountingTwin.n_sent = 0
    actual = results(mixer, "block fused", x_btd, case.width * case.ranks, None)
    assert CountingTwin.n_sent == (1 if apart else 2)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", [c for c in SMALL if c.headdim == 24], ids=str)
def test_walking_two_heads_at_once_changes_no_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large batches do; of an odd number of heads the last one is walked twice."""
    x_btd = torch.randn(2, case.t, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    seq_idx_bt = documents(2, case.t).to(DEVICE) if case.documents else None
    mixer = mixer_of(case, LOW)
    monkeypatch.setattr(tiles, "sequences_joined", lambda *_: 1)
    found = []
    for wanted, heads in ((10**6, 1), (0, 2)):
        monkeypatch.setattr(tiles, "WALKS_WANTED", wanted)
        assert tiles.walk_of("states", 32, LOW, case.width, 2)["HEADS"] == heads
        found.append(results(mixer, "fused", x_btd, case.width, seq_idx_bt))
    one, two = found
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("case", "recompute"),
    [(case, "none") for case in SMALL if case.ranks > 1 or case.width < case.heads]
    + [(SMALL[0], recompute) for recompute in ("inside", "states", "block")],
    ids=str,
)
def test_gradients_in_place_are_added_to_what_is_there(case: Case, recompute: str) -> None:
    x_btd = torch.randn(2, case.t, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    n_heads = case.width * case.ranks
    mixer = mixer_of(case, LOW)
    expected = results(mixer, "fused", x_btd, n_heads, None)
    mixer.in_place_gradients = True
    mixer.recompute = "none" if recompute == "block" else recompute
    before = {name: torch.randn(p.shape, device=DEVICE) for name, p in mixer.named_parameters()}
    for name, p in mixer.named_parameters():
        p.grad = before[name].clone()
    held = {name: p.grad for name, p in mixer.named_parameters()}
    x_btd = x_btd.to(mixer.dtype).requires_grad_()
    args = (x_btd, n_heads, None)
    call = partial(fused, mixer)
    out_btd = checkpoint(call, *args, use_reentrant=False) if recompute == "block" else call(*args)
    weight = torch.randn(out_btd.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    (out_btd.float() * weight).sum().backward()
    assert torch.equal(out_btd, expected["output"])
    for name, p in mixer.named_parameters():
        assert p.grad is held[name], f"{name}: another tensor took its place"
        # Added within the product instead of after it: float32's rounding of a sum as large as either part.
        torch.testing.assert_close(
            p.grad - before[name], expected[name], rtol=1e-5, atol=2e-5 * expected[name].abs().max().item() + 2e-6
        )
        unused = expected[name] == 0
        assert torch.equal(p.grad[unused], before[name][unused]), f"{name}: written where the width has no rows"


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_kernels_drop_the_very_entries_that_the_definition_drops(rate: float) -> None:
    """Each kernel that reads or writes a part of the projection, in and out, with images joined where the scan sees them."""
    b, t, i, n, h = 3, 7, 48, 16, 3
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    channel_c = torch.randperm(5000, generator=generator)[: i + 2 * n].int().to(DEVICE)
    entries = Drop(
        split_mix(torch.arange(b)).to(DEVICE), torch.tensor([1.5, 1.25, 2.0]).to(DEVICE), threshold_of(rate), t
    )

    def plain(x_btc: Tensor) -> Tensor:
        return dropped(x_btc.flatten(0, 1), entries, channel_c[: x_btc.shape[-1]]).view_as(x_btc)

    def same(ours: Tensor, theirs: Tensor) -> None:
        """But for rounding: a compiler may contract what it is given in two ways. An entry too many or too few is off by 1."""
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    y, z, weight, grad = randn(b, t, i), randn(b, t, i), randn(i), randn(b, t, i)
    drop = (entries, channel_c[:i])
    out, _ = gated_norm_forward(y, z, weight, None, n_channels=i, eps=1e-5, drop=drop)
    expected, expected_sums = gated_norm_forward(y, plain(z), weight, None, n_channels=i, eps=1e-5)
    same(out, expected)
    same(square_sums(y, z, drop), square_sums(y, plain(z)))
    same(row_dots(grad, y, z, weight, drop), row_dots(grad, y, plain(z), weight))
    grads = torch.empty(2, b, t, i, device=DEVICE)
    for into, seen, how in ((grads[0], z, drop), (grads[1], plain(z), None)):
        gated_norm_backward(grad, y, seen, weight, expected_sums, None, into, n_channels=i, eps=1e-5, drop=how)
    same(grads[0], plain(grads[1]))

    c = i + 2 * n
    taps, x, grad = (randn(i, 4), randn(i), randn(2 * n, 4), randn(2 * n)), randn(b, t, c), randn(b, t, c)
    drop = (entries, channel_c)
    same(conv_forward(x, taps, None, drop), conv_forward(plain(x), taps, None))
    grads = torch.empty(2, b, t, c, device=DEVICE)
    sums_of = [
        conv_backward(grad, seen, taps, None, into, how)
        for into, seen, how in ((grads[0], x, drop), (grads[1], plain(x), None))
    ]
    same(grads[0], plain(grads[1]))
    for ours, theirs in zip(*sums_of, strict=True):
        same(ours, theirs)

    dt, bias = randn(b, t, h), randn(h)
    joined = [x_bth.view(1, b * t, h) for x_bth in (dt, plain(dt))]
    found = [time_steps(x, bias, bias, how) for x, how in zip(joined, ((entries, channel_c[:h]), None), strict=True)]
    for ours, theirs in zip(*found, strict=True):
        same(ours, theirs)


def test_the_fused_mixer_drops_what_the_plain_one_drops() -> None:
    case = Case(heads=4, headdim=16, d_state=16, t=19, width=2, ranks=2)
    x_btd = torch.randn(2, case.t, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    n_heads = case.width * case.ranks
    mixer = mixer_of(case, torch.float32)
    drop = some_drop(2, case.t, 0.2)._replace(scale_b=torch.tensor([1.25, 1.25]).to(DEVICE))
    expected = results(mixer, "plain", x_btd, n_heads, None, drop)
    actual = results(mixer, "fused", x_btd, n_heads, None, drop)
    assert_close(actual, expected, torch.float32)
    without = results(mixer, "fused", x_btd, n_heads, None)
    assert float((without["output"] - expected["output"]).norm()) > 0.1 * float(expected["output"].norm())
    # Computed again in backward, by torch or by the mixer itself, the very same entries are dropped.
    by_torch = results(mixer, "block fused", x_btd, n_heads, None, drop)
    mixer.recompute = "inside"
    by_itself = results(mixer, "fused", x_btd, n_heads, None, drop)
    for again in (by_torch, by_itself):
        assert all(torch.equal(again[name], actual[name]) for name in actual)


def test_sequences_joined_for_the_scan_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six sequences of 36 steps in two of 108, two chunks each, against the plain mixer on six; every tensor, with drops."""
    monkeypatch.setattr(tiles, "WALKS_WANTED", 4)
    case = Case(heads=4, headdim=24, d_state=16, t=36, width=2)
    assert tiles.sequences_joined(6, case.t, case.width) == 3
    x_btd = torch.randn(6, case.t, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    drop = Drop(split_mix(torch.arange(6)).to(DEVICE), torch.full((6,), 1.25, device=DEVICE), threshold_of(0.2), case.t)
    mixer = mixer_of(case, torch.float32)
    expected = results(mixer, "plain", x_btd, case.width, None, drop)
    actual = results(mixer, "fused", x_btd, case.width, None, drop)
    assert_close(actual, expected, torch.float32)
    mixer.recompute = "inside"
    again = results(mixer, "fused", x_btd, case.width, None, drop)
    assert all(torch.equal(again[name], actual[name]) for name in actual)
