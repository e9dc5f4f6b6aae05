"""Every layout computes the same step: losses, gradients, gradient norm and updated parameters of one rank, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from torch.nn.functional import cross_entropy

from modeling.language import LanguageModel
from modeling.loss import next_token_loss
from modeling.models import logical_shapes
from modeling.tensor_parallel import TensorParallel, is_partial, layout_of, local_index, local_part
from pretrain.config import RunConfig
from pretrain.config_io import config_from_dict
from pretrain.distributed import Ranks, init_ranks
from pretrain.engine import Engine
from pretrain.optim import learning_rate, parameter_groups
from tests.distributed.harness import RankFailedError, run_ranks

# One float32 rounding is 6e-8 relative; sums over 32 channels and 16 steps in another order cost a few of them.
TOLERANCE = 1e-5
N_STEPS = 3
WIDTHS = (8, 4)
MIXED = (8, 4)
"""Mix'n'Match: full width in layer 0, half in layer 1."""


def small_run(**overrides: Any) -> RunConfig:
    """A run of two layers and widths 8 and 4, with AdamW's eps large enough that updates are smooth in the gradient.

    Adam's first update is the sign of the gradient where eps is tiny: rounding would flip it where the gradient is ~0.
    """
    raw: dict[str, Any] = {
        "run_dir": "unused",
        "model": {
            "n_layers": 2,
            "d_model": 32,
            "headdim": 8,
            "d_state": 8,
            "widths": list(WIDTHS),
            "chunk_size": 8,
            "vocab_size": 100,
        },
        "data": {"path": "unused", "micro_batch": 1, "seq_len": 16, "tokens_per_step": 64},
        "optim": {"lr": 1e-2, "steps": 10, "warmup_steps": 2, "clip_norm": 0.5, "eps": 1e-3},
    }
    for section, values in overrides.items():
        raw[section] = {**raw.get(section, {}), **values}
    return config_from_dict(raw)


def tokens_of_step(step: int) -> Tensor:
    """Four sequences of 17 ids, of which the last is only a target."""
    return torch.randint(0, 100, (4, 17), generator=torch.Generator().manual_seed(step))


def one_rank_in_plain_torch(cfg: RunConfig) -> dict[str, Any]:
    """The steps without DeepSpeed, tensor parallelism or our loss: one backward of the summed cross-entropies, AdamW."""
    model = LanguageModel(cfg.model)
    model.init_weights(cfg.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), cfg.optim), lr=cfg.optim.lr, betas=cfg.optim.betas, eps=cfg.optim.eps
    )
    losses, norms = [], []
    for step in range(N_STEPS):
        ids = tokens_of_step(step)
        step_losses = []
        for widths in [cfg.model.layer_widths(n) for n in WIDTHS] + [MIXED]:
            logits = model.logits(model(ids[:, :-1], widths))
            step_losses.append(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        torch.stack(step_losses).mean().backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg.optim)
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in step_losses])
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
    }


def steps_on_ranks(cfg: RunConfig) -> dict[str, Any]:
    """The same steps as one rank of a layout: its losses, and its local gradients and parameters."""
    ranks = init_ranks(cfg.parallel.tensor, sequence=cfg.parallel.sequence)
    model = LanguageModel(
        cfg.model,
        tp=ranks.tp,
        recompute=cfg.parallel.activation_checkpointing,
        in_place_gradients=cfg.parallel.keeps_gradients,
    )
    model.init_weights(cfg.seed)
    engine = Engine(model, cfg, ranks)
    n_mine, micro_batch = 4 // ranks.dp_size, cfg.data.micro_batch
    all_widths = [cfg.model.layer_widths(n) for n in WIDTHS] + [MIXED]
    losses, norms = [], []
    gradients: dict[str, Tensor] = {}
    for step in range(N_STEPS):
        mine = tokens_of_step(step)[ranks.dp_rank * n_mine : (ranks.dp_rank + 1) * n_mine]
        step_losses = torch.zeros(len(all_widths))
        n_micro = n_mine // micro_batch
        for micro, ids in enumerate(mine.split(micro_batch)):
            for i, widths in enumerate(all_widths):
                loss = next_token_loss(model, engine(ids[:, :-1], widths), ids[:, 1:])
                last = micro == n_micro - 1 and i == len(all_widths) - 1
                engine.backward(loss.total / (n_micro * len(all_widths)), last=last)
                step_losses[i] += loss.cross_entropy.detach() / n_micro
        if step == 0:
            if engine.gathered is not None:
                engine.gathered.start_return()  # as `step` does, which finds none left then
            gradients = {name: reduced_gradient(name, p, engine, ranks) for name, p in model.named_parameters()}
        norms.append(engine.step(learning_rate(step, cfg.optim)))
        torch.distributed.all_reduce(step_losses, group=ranks.dp_group)
        losses.append((step_losses / ranks.dp_size).tolist())
    return {
        "tp_rank": ranks.tp.rank,
        "dp_rank": ranks.dp_rank,
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


def reduced_gradient(name: str, parameter: torch.nn.Parameter, engine: Engine, ranks: Ranks) -> Tensor:
    """The step's gradient over all ranks. Under ZeRO 1 `step` itself sums over tp what is partial and DeepSpeed takes the
    mean over dp; both are done here to what they are given, and `step`'s norm and update are compared too."""
    if engine.gradients is None:
        return safe_get_full_grad(parameter).clone()
    assert parameter.grad is not None
    gradient = parameter.grad.clone()
    if ranks.tp.size > 1 and is_partial(name, sequence=ranks.tp.sequence):
        torch.distributed.all_reduce(gradient, group=ranks.tp.group)
    torch.distributed.all_reduce(gradient, group=ranks.dp_group)
    return gradient / ranks.dp_size


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Relative error in the Frobenius norm, which one bad entry among zeros cannot hide from."""
    assert torch.isfinite(actual).all(), what
    error = (actual - expected).norm() / expected.norm()
    assert error < TOLERANCE, f"{what}: relative error {error:.2e}"


def logical(parts: dict[int, dict[str, Tensor]], name: str, cfg: RunConfig) -> Tensor:
    """The parameter in the model's own head order, from the local parts by tp rank; replicated ones must agree."""
    shape, layout, tp = logical_shapes(cfg.model)[name], layout_of(name), len(parts)
    full = torch.full(shape, torch.nan)
    for rank, tensors in parts.items():
        full[local_index(shape, layout, cfg.model.n_heads, tp, rank)] = tensors[name]
        if not layout.is_sharded:
            assert_close(tensors[name], parts[0][name], f"{name} on tp rank {rank} against rank 0")
    return full


def compare(cfg: RunConfig, world_size: int) -> None:
    """Run the steps on `world_size` ranks and compare everything with one rank of plain torch."""
    expected = one_rank_in_plain_torch(cfg)
    results = run_ranks(world_size, steps_on_ranks, cfg)
    for result in results:
        assert_close(torch.tensor(result["losses"]), torch.tensor(expected["losses"]), "losses")
        assert_close(torch.tensor(result["norms"]), torch.tensor(expected["norms"]), "gradient norms")
    for dp_rank in range(max(r["dp_rank"] for r in results) + 1):
        replica = {r["tp_rank"]: r for r in results if r["dp_rank"] == dp_rank}
        for what in ("gradients", "parameters"):
            parts = {rank: result[what] for rank, result in sorted(replica.items())}
            for name, value in expected[what].items():
                assert_close(logical(parts, name, cfg), value, f"{what} of {name} on dp rank {dp_rank}")


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4)])
def test_layout_equals_one_rank_of_plain_torch(tp: int, dp: int) -> None:
    compare(small_run(parallel={"tensor": tp}), tp * dp)


@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (2, 2)])
def test_zero_stage_2_equals_one_rank_of_plain_torch(tp: int, dp: int) -> None:
    compare(small_run(parallel={"tensor": tp, "zero_stage": 2}), tp * dp)


@pytest.mark.parametrize(("tp", "dp", "stage"), [(2, 1, 1), (2, 2, 1), (4, 1, 1), (2, 2, 2)])
def test_sequence_parallelism_equals_one_rank_of_plain_torch(tp: int, dp: int, stage: int) -> None:
    compare(small_run(parallel={"tensor": tp, "sequence": True, "zero_stage": stage}), tp * dp)


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (2, 2), (4, 1)])
def test_widths_that_ranks_gather_equal_one_rank_of_plain_torch(tp: int, dp: int, recompute: str) -> None:
    """Half of the width on sequences of each rank's own, in one micro-batch a step or two."""
    cfg = small_run(
        parallel={"tensor": tp, "sequence": True, "activation_checkpointing": recompute}, data={"micro_batch": tp}
    )
    assert cfg.gathered_heads == WIDTHS[1]
    compare(cfg, tp * dp)


@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
def test_recomputation_equals_one_rank_of_plain_torch(recompute: str, sequence: bool) -> None:
    compare(small_run(parallel={"tensor": 2, "sequence": sequence, "activation_checkpointing": recompute}), 2)


def _not_reduced(self: TensorParallel, x: Tensor) -> Tensor:
    return x


def _reduced_twice(self: TensorParallel, weight: Tensor) -> Tensor:
    return self.enter(self.enter(weight))


def _reduced_at_once(self: TensorParallel, weight: Tensor) -> Tensor:
    return self.enter(weight)


@pytest.mark.parametrize(
    ("stage", "method", "mutation"),
    [
        (2, "share", _not_reduced),
        (2, "share", _reduced_twice),
        (1, "share", _reduced_at_once),
        (1, "total", _not_reduced),
        (1, "leave", _not_reduced),
    ],
    ids=[
        "B/C gradient not reduced",
        "B/C gradient reduced twice",
        "B/C gradient reduced at once and later",
        "norm not reduced",
        "output not reduced",
    ],
)
def test_a_wrong_collective_is_noticed(stage: int, method: str, mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorParallel, method, mutation)
    with pytest.raises((AssertionError, RankFailedError), match="relative error"):
        compare(small_run(parallel={"tensor": 2, "zero_stage": stage}), 2)


def test_a_norm_whose_gradient_is_not_reduced_under_sequence_parallelism_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TensorParallel, "replicate", _not_reduced)
    with pytest.raises((AssertionError, RankFailedError), match="relative error"):
        compare(small_run(parallel={"tensor": 2, "sequence": True, "zero_stage": 2}), 2)


@pytest.mark.parametrize("sequence", [False, True], ids=["B/C", "norms"])
def test_a_partial_gradient_that_no_step_sums_is_noticed(sequence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = (lambda name, sequence: is_partial(name, sequence=False)) if sequence else (lambda name, sequence: False)
    monkeypatch.setattr("pretrain.engine.is_partial", left_out)
    with pytest.raises((AssertionError, RankFailedError), match="relative error"):
        compare(small_run(parallel={"tensor": 2, "sequence": sequence}), 2)


def test_initial_weights_do_not_depend_on_the_layout() -> None:
    cfg = small_run().model
    whole = LanguageModel(cfg)
    whole.init_weights(3)
    for rank in range(4):
        part = LanguageModel(cfg, tp=TensorParallel(size=4, rank=rank))
        part.init_weights(3)
        for name, parameter in part.named_parameters():
            expected = local_part(dict(whole.named_parameters())[name], layout_of(name), cfg.n_heads, 4, rank)
            assert torch.equal(parameter, expected), name
