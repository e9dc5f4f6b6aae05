"""On two GPUs: mixers' copies between GPUs give what collectives give, launched and as CUDA graphs in any order."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modeling import tensor_parallel
from modeling.tensor_parallel import TensorParallel
from pretrain.config_sections import ParallelConfig
from pretrain.distributed import close_ranks, init_ranks
from pretrain.peers import with_peer_copies
from tests.distributed.harness import run_python
from tests.distributed.test_exchange import beside_products, one_after_another

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="waits for two CUDA GPUs"),
]

TOKENS, MODEL = 1024, 256
INNERS = (384, 40)


def test_copies_between_gpus_change_nothing() -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = run_python("-m", *launcher, "tests.distributed.test_gpu_exchange", timeout_s=200, OMP_NUM_THREADS="1")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("all alike") == 2, done.stdout


def draw(inputs: list[Tensor], seed: int, rank: int) -> None:
    """x and the gradient are parts of what all ranks draw alike; the weights are each rank's own."""
    for place, into in enumerate(inputs):
        own = place in (1, 2)
        generator = torch.Generator().manual_seed(10 * seed + place + (1000 * (rank + 1) if own else 0))
        drawn = torch.randn(*(into.shape if own else (TOKENS, MODEL)), generator=generator)
        into.copy_(drawn if own else drawn.chunk(2)[rank])


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def inputs_of(inner: int) -> list[Tensor]:
    shapes = ((TOKENS // 2, MODEL), (inner, MODEL), (MODEL, inner), (TOKENS // 2, MODEL))
    return [torch.empty(*shape, device="cuda") for shape in shapes]


def main() -> None:
    tensor_parallel.LEAST_SPLIT = 2
    ranks = with_peer_copies(init_ranks(2, sequence=True), ParallelConfig(tensor=2, sequence=True))
    assert ranks.tp.peers is not None, "the GPUs of this host do not see each other's memory"
    collectives: TensorParallel = replace(ranks.tp, peers=None)
    inputs = [inputs_of(inner) for inner in INNERS]
    graphs = []
    for given in inputs:
        for seed in range(3):
            draw(given, seed, ranks.tp.rank)
            compare(beside_products(ranks.tp, *given), one_after_another(collectives, *given))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = beside_products(ranks.tp, *given)
        graphs.append((graph, found))
    order = random.Random(0)
    for turn in range(60):
        which = order.randrange(2)
        draw(inputs[which], 100 + turn, ranks.tp.rank)
        graph, found = graphs[which]
        for _ in range(order.randrange(1, 4)):
            graph.replay()
        compare(found, one_after_another(collectives, *inputs[which]))
    torch.cuda.synchronize()
    print("all alike", flush=True)
    graphs.clear()
    close_ranks()


if __name__ == "__main__":
    main()
    sys.exit(0)
