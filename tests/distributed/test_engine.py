"""What CUDA graphs of passes rest on: what DeepSpeed leaves alive between them, and where it leaves it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling.language import LanguageModel
from modeling.loss import next_token_loss
from pretrain.config import RunConfig
from pretrain.distributed import init_ranks
from pretrain.engine import Engine
from tests.distributed.harness import run_ranks
from tests.distributed.toy_run import run_config


def accumulator_lives_on(parameter: nn.Parameter) -> bool:
    """Whether something holds the node that adds to the parameter's gradient, which autograd else makes anew."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    node.metadata["seen"] = True
    del node
    gc.collect()
    return "seen" in torch.autograd.graph.get_gradient_edge(parameter).node.metadata


def engine_after_a_step(cfg: RunConfig) -> Engine:
    ranks = init_ranks(1)
    model = LanguageModel(cfg.model, in_place_gradients=cfg.parallel.keeps_gradients)
    model.init_weights(0)
    engine = Engine(model, cfg, ranks)
    a_step(engine, cfg)
    return engine


def a_step(engine: Engine, cfg: RunConfig) -> None:
    model, ids = engine.model, torch.randint(0, cfg.model.vocab_size, (2, 17))
    loss = next_token_loss(model, engine(ids[:, :-1], cfg.model.layer_widths(cfg.model.n_heads)), ids[:, 1:])
    engine.backward(loss.total, last=True)
    engine.step(1e-3)


def accumulators_after_a_step(cfg: RunConfig) -> list[str]:
    engine = engine_after_a_step(cfg)
    return [name for name, parameter in engine.parameters.items() if accumulator_lives_on(parameter)]


def what_moved_in_a_step(cfg: RunConfig) -> list[str]:
    engine = engine_after_a_step(cfg)
    before = {name: (p.data_ptr(), p.grad.data_ptr(), p.detach().clone()) for name, p in engine.parameters.items()}
    a_step(engine, cfg)
    assert all(not torch.equal(p, before[name][2]) for name, p in engine.parameters.items()), "updated"
    return [name for name, p in engine.parameters.items() if (p.data_ptr(), p.grad.data_ptr()) != before[name][:2]]


def moved_parameters_are_noticed(cfg: RunConfig) -> str:
    engine = engine_after_a_step(cfg)
    engine.graphs = object()  # type: ignore[assignment]
    a_step(engine, cfg)
    assert engine._update is not None
    moved, step = engine.parameters["embedding"], engine._update.step

    def a_step_that_moves() -> float:
        norm = step()
        moved.data = moved.data.clone()
        return norm

    engine._update.step = a_step_that_moves  # type: ignore[method-assign]
    try:
        a_step(engine, cfg)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    parts = {name: engine.fragment(name) for name in engine.parameters}
    kept = {f"{name} {kind}": getattr(part, kind) for name, part in parts.items() if part for kind in engine.kinds}
    return {name: tensor.detach().clone() for name, tensor in (engine.parameters | kept).items()}


def what_a_bad_step_changed(cfg: RunConfig, rank: int) -> tuple[float, list[str]]:
    """A NaN in one gradient of one rank."""
    engine = engine_after_a_step(cfg)
    before = state_of(engine)
    if torch.distributed.get_rank() == rank:
        assert engine.parameters["embedding"].grad is not None
        engine.parameters["embedding"].grad[3, 2] = torch.nan
    norm = engine.step(1e-3)
    assert engine.parameters["embedding"].grad is not None
    assert not engine.parameters["embedding"].grad.any(), "cleared for the next step"
    return norm, [name for name, tensor in state_of(engine).items() if not torch.equal(tensor, before[name])]


def masters_that_are_no_parameters(cfg: RunConfig) -> list[str]:
    engine = engine_after_a_step(cfg)
    wrong = []
    for name, parameter in engine.parameters.items():
        part = engine.fragment(name)
        if part is not None and part.master.data_ptr() != parameter.data_ptr() + 4 * part.start:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_with_a_norm_that_is_not_finite_changes_nothing_on_any_rank(world_size: int, tmp_path: Path) -> None:
    cfg = run_config(tmp_path / "no dataset is read", tmp_path / "run")
    for norm, changed in run_ranks(world_size, what_a_bad_step_changed, cfg, world_size - 1):
        assert norm == torch.inf
        assert changed == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_float32_parameters_have_no_second_copy(world_size: int, tmp_path: Path) -> None:
    cfg = run_config(tmp_path / "no dataset is read", tmp_path / "run")
    assert run_ranks(world_size, masters_that_are_no_parameters, cfg) == [[]] * world_size


def test_no_gradient_accumulator_outlives_its_pass(tmp_path: Path) -> None:
    """One that does is tied to the stream it was made on; capturing a pass as a CUDA graph then fails (seen on an H100)."""
    cfg = run_config(tmp_path / "no dataset is read", tmp_path / "run")
    assert run_ranks(1, accumulators_after_a_step, cfg) == [[]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_updates_parameters_where_they_are(world_size: int, tmp_path: Path) -> None:
    cfg = run_config(tmp_path / "no dataset is read", tmp_path / "run")
    assert run_ranks(world_size, what_moved_in_a_step, cfg) == [[]] * world_size


def test_a_step_that_moves_parameters_is_noticed(tmp_path: Path) -> None:
    cfg = run_config(tmp_path / "no dataset is read", tmp_path / "run")
    assert "moved parameters" in run_ranks(1, moved_parameters_are_noticed, cfg)[0]
