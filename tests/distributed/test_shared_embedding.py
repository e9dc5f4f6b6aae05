"""Tokens that are embedded once for all widths give the gradients that each width's own embedding gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.language import LanguageModel
from pretrain.config import RunConfig
from pretrain.data import Batch
from pretrain.distributed import init_ranks
from pretrain.engine import Engine
from pretrain.objective import add_gradients, step_widths
from pretrain.shared_embedding import SharedEmbedding
from tests.distributed.harness import run_ranks
from tests.distributed.toy_run import run_config

MICRO_BATCHES = 2


def gradients(cfg: RunConfig, shared: bool) -> tuple[dict[str, Tensor], int]:
    """This rank's gradients of a step of two micro-batches of other lengths, and how often tokens were embedded."""
    ranks = init_ranks(cfg.parallel.tensor, sequence=cfg.parallel.sequence)
    model = LanguageModel(cfg.model, tp=ranks.tp, in_place_gradients=True)
    model.init_weights(0)
    engine = Engine(model, cfg, ranks)
    assert engine.embedding is not None
    if not shared:
        engine.embedding = None
    embed, calls = model.embed, 0

    def counted(tokens_bt: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return embed(tokens_bt)

    model.embed = counted  # type: ignore[method-assign]
    widths = step_widths(cfg.model, cfg.nesting, cfg.loss_weights, 0, 0)
    for micro in range(MICRO_BATCHES):
        ids = torch.randint(
            0, cfg.model.vocab_size, (4, 33 + 8 * micro), generator=torch.Generator().manual_seed(micro)
        )
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)
        list(add_gradients(engine, [batch], widths, cfg, n_micro=MICRO_BATCHES, last=micro == MICRO_BATCHES - 1))
    return {name: p.grad.clone() for name, p in engine.parameters.items() if p.grad is not None}, calls


@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 1}, {"tensor": 2}, {"tensor": 2, "sequence": True}, {"tensor": 4, "sequence": True}],
    ids=["one rank", "tp 2", "tp 2, sequence", "tp 4, sequence"],
)
def test_gradients_are_those_of_embedding_for_each_width(parallel: dict[str, Any], tmp_path: Path) -> None:
    model = {"widths": [16, 8, 4], "headdim": 4}
    cfg = run_config(tmp_path / "no dataset is read", tmp_path / "run", parallel=parallel, model=model)
    ranks = cfg.parallel.tensor
    n_widths = len(cfg.model.widths)
    for (mine, once), (expected, each) in zip(
        run_ranks(ranks, gradients, cfg, True), run_ranks(ranks, gradients, cfg, False), strict=True
    ):
        assert (once, each) == (MICRO_BATCHES, MICRO_BATCHES * n_widths)
        assert mine.keys() == expected.keys()
        for name, grad in mine.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6 * float(expected[name].abs().max()))
        assert float(mine["embedding"].abs().max()) > 0


def test_the_leaf_of_a_shape_stays_where_it_is() -> None:
    """CUDA graphs know it by its address; a later batch of the same shape starts with no gradient."""
    cfg = run_config(Path("unused"), Path("unused")).model
    model = LanguageModel(cfg)
    model.init_weights(0)
    model.embedding.grad = torch.zeros_like(model.embedding)
    embedding = SharedEmbedding(model)
    tokens = [torch.full((1, 3), token) for token in (1, 2)]
    first = embedding.begin(tokens[0])
    (first * 2).sum().backward()
    embedding.end(tokens[0])
    again = embedding.begin(tokens[1])
    assert again is first
    assert torch.equal(again, model.embedding[2].expand(3, -1))
    assert torch.equal(again.grad, torch.zeros_like(again))
    assert model.embedding.grad.sum(1).nonzero().flatten().tolist() == [1]
    assert torch.equal(model.embedding.grad[1], torch.full((cfg.d_model,), 6.0))
