"""What DeepSpeed leaves alive between passes."""

from __future__ import annotations

import gc
from pathlib import Path

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


def accumulators_after_a_pass(cfg: RunConfig) -> list[str]:
    ranks = init_ranks(1)
    model = LanguageModel(cfg.model, in_place_gradients=cfg.parallel.keeps_gradients)
    model.init_weights(0)
    engine = Engine(model, cfg, ranks)
    ids = torch.randint(0, cfg.model.vocab_size, (2, 17))
    loss = next_token_loss(model, engine(ids[:, :-1], cfg.model.layer_widths(cfg.model.n_heads)), ids[:, 1:])
    engine.backward(loss.total, last=True)
    engine.step(1e-3)
    del loss
    return [name for name, parameter in model.named_parameters() if accumulator_lives_on(parameter)]


def test_no_gradient_accumulator_outlives_its_pass(tmp_path: Path) -> None:
    """One that does is tied to the stream it was made on; capturing a pass as a CUDA graph then fails (seen on an H100)."""
    cfg = run_config(tmp_path / "no dataset is read", tmp_path / "run")
    assert run_ranks(1, accumulators_after_a_pass, cfg) == [[]]
