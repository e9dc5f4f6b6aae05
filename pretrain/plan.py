"""`--plan`: which layout of a run on so many GPUs is fastest, estimated from measured kernel rates and stated link speeds.

A step's time on a rank is its arithmetic, its memory-bound kernels and the collectives that wait for each other, never less
than what the host needs to launch what is no CUDA graph. The rates are an H100's (docs/benchmarks; the scan's lies between its
record and an H200's of newer kernels), the update's an H200's; another GPU's are scaled by its datasheet. The link terms were
checked on four GPUs of one host, none between nodes: the plan says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from modeling.flops import local_parameters, training_flops_per_token
from pretrain.collectives import collectives, passes_per_step, widths_of_a_step
from pretrain.config import LanguageRunConfig
from pretrain.config_sections import ConfigError, require
from pretrain.dry_run import plain_console
from pretrain.hardware import GPU_PEAK_TFLOPS
from pretrain.memory import Memory, estimate
from pretrain.passes import why_launched

GIB = 2**30
GPUS = {  # memory in GiB as torch sees it, bandwidth in TB/s: datasheets; peaks are hardware.GPU_PEAK_TFLOPS
    "H200": (139.8, 4.8),
    "H100": (79.1, 3.35),
    "A100": (79.1, 2.04),
    "B200": (178.4, 8.0),
}
MEASURED_ON = "H100"
BEFORE_HOPPER = frozenset({"A100"})
"""Where mamba-ssm's scan runs instead of our kernels (modeling.ops.kernels.OLDEST_GPU)."""
PRODUCT_FLOP_S = 730e12
"""bf16 matrix products at the models' shapes: 719 at 130M, 758 at 1.4B."""
FLOAT8_TIMES, ROUND_S = 1.8, 1e-12
"""With precision=fp8, on an H200 (docs/benchmarks/speed_h200_graphs_202611.md): what its products are faster than bf16's, 1.55
times at 130M and 1.95 at 1.4B, and what rounding a number that goes into one takes."""
CHANNEL_S, HEAD_S = 17e-12, 500e-12
"""Scan, convolution and gated norm, forward and backward: seconds a channel and token are the first plus the second over
headdim. 130M (24): 38e-12; 1.4B (64): 25e-12."""
STATES_SHARE, FORWARD_SHARE = 0.08, 0.3
"""Of that, what computing the scan's states takes, and all of forward (of the norms too), which recomputation does again."""
RESIDUAL_S = 10e-12
"""Residual addition and norm, a d_model channel and token and layer."""
VOCABULARY_S = 2.1e-12
"""Softmax statistics and gradient, a token and vocabulary row."""
PARAMETER_S, OUTSIDE_S = 4e-12, 20e-12
"""Casts and gradient sums a parameter and pass; embedding and loss a d_model channel and token and width (the embedding, a small
part of it, is a micro-batch's now)."""
WIDTH_USED = 0.4
"""What these kernels gain of a wider memory: on an H200, 1.43 times as wide, they took 0.85 of the H100's time. What else they
do, exponentials and sums over a tile, is as fast on both."""
UPDATE_S, UPDATE_HOST_S = 12e-12, 0.004
"""The update, on an H200: AdamW and the norm, a parameter of the shard, and in any case (pretrain.flat_update)."""
CLEAR_S = 1e-12
"""Zeroing gradients, a parameter of the rank."""
SMALL_S = 0.18e-3
"""What a layer of a pass takes that does not shrink with a rank's share of it: kernels shorter than their launch, parts that are
summed, copies that are waited for. One rank's is in the rates above."""
HOST_S = {"none": 3.4e-3, "states": 3.4e-3, "selective": 3.8e-3, "block": 4.6e-3}
"""What the host needs to launch one layer of one pass where passes are no CUDA graphs: more than the GPU takes for 370M and
790M. Measured while DeepSpeed's hooks were still on every pass: an upper bound."""
RESERVED_GIB = 4.0
"""CUDA context, NCCL's buffers, fragmentation."""
LATENCY_S = 20e-6
"""Of one collective."""
PEER_COPY_GB_S = 369.0
"""One way, of copies from GPU to GPU, in which mixers send under sequence parallelism (parallel.peer_copies)."""
NVLINK_GB_S = 230.0
"""One way, of a ring on two H200s: 287 where nothing else ran, 167 to 248 beside matrix products
(docs/benchmarks/scaling_h200_202611.md)."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the plan is for."""

    nodes: int
    gpus_per_node: int
    gpu: str
    nvlink_gb_s: float
    """One way, a GPU, inside a node."""
    network_gb_s: float
    """One way, a GPU, between nodes."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 1:
            raise ConfigError(f"--nodes {self.nodes} --gpus-per-node {self.gpus_per_node}: both must be at least 1")
        if self.gpu not in GPUS:
            raise ConfigError(f"--gpu {self.gpu}: known are {', '.join(GPUS)}")
        if not (self.nvlink_gb_s > 0 and self.network_gb_s > 0):  # NaN is not above 0 either
            raise ConfigError("--nvlink-gb-s and --network-gb-s must be positive")

    @property
    def world_size(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Plan:
    """One layout that fits."""

    cfg: LanguageRunConfig
    memory: Memory
    compute_s: float
    """Matrix products and memory-bound kernels of a step's passes."""
    update_s: float
    """The optimizer's."""
    tp_s: float
    dp_s: float
    host_s: float

    @property
    def step_s(self) -> float:
        """A step. What is sent beside arithmetic slows it as much: no collective counts as hidden."""
        return max(self.compute_s, self.host_s) + self.update_s + self.tp_s + self.dp_s


def plan(cfg: LanguageRunConfig, cluster: Cluster) -> list[Plan]:
    """Every layout of `cfg`'s step that fits the cluster, fastest first. Raises ConfigError where none does."""
    room = (GPUS[cluster.gpu][0] - RESERVED_GIB) * GIB
    memories = [(candidate, estimate(candidate, cluster.world_size)) for candidate in _layouts(cfg, cluster)]
    if not memories:
        raise ConfigError(
            f"{cluster.world_size} GPUs: no tensor-parallel size in {cfg.allowed_tensor} with any "
            f"micro-batch divides a step of {cfg.data.sequences_per_step} sequences: change data.tokens_per_step"
        )
    fitting = [predict(candidate, cluster, memory) for candidate, memory in memories if memory.total <= room]
    if not fitting:
        least = min(memory.total for _, memory in memories) / GIB
        raise ConfigError(
            f"no layout fits {cluster.gpu}'s {GPUS[cluster.gpu][0]:.0f} GiB less {RESERVED_GIB:.0f} reserved: the "
            f"smallest needs {least:.0f} GiB. Use more GPUs a node, or a smaller model"
        )
    return sorted(fitting, key=lambda found: (found.step_s, found.memory.total))


def _layouts(cfg: LanguageRunConfig, cluster: Cluster) -> Iterator[LanguageRunConfig]:
    for tp in cfg.allowed_tensor:
        dp, rest = divmod(cluster.world_size, tp)
        per_rank, uneven = divmod(cfg.data.sequences_per_step, max(dp, 1))
        if rest or uneven or tp > cluster.world_size:
            continue
        micro_batches = [2**i for i in range(per_rank.bit_length()) if per_rank % 2**i == 0]
        for micro_batch in micro_batches:
            for recompute in ("none", "states", "selective", "block"):
                for sequence in (False, True) if tp > 1 and cfg.data.seq_len % tp == 0 else (False,):
                    for stage in (1, 2) if dp > 1 else (1,):
                        parallel = replace(
                            cfg.parallel,
                            tensor=tp,
                            sequence=sequence,
                            zero_stage=stage,
                            activation_checkpointing=recompute,
                        )
                        try:
                            layout = replace(cfg, parallel=parallel, data=replace(cfg.data, micro_batch=micro_batch))
                        except ConfigError:  # precision=fp8, and a rank's channels do not suit it
                            continue
                        yield layout


def predict(cfg: LanguageRunConfig, cluster: Cluster, memory: Memory | None = None) -> Plan:
    """The run's own layout, whether it fits or not. Raises ConfigError where it does not divide the step."""
    tp_s, dp_s = _link_seconds(cfg, cluster)
    launches = cfg.model.n_layers * passes_per_step(cfg, cluster.world_size)
    captured = why_launched(cfg, torch.device("cuda")) is None
    require(
        not cfg.float8 or cluster.gpu not in BEFORE_HOPPER,
        f"precision=fp8: an {cluster.gpu} does not multiply in float8: use precision=bf16",
    )
    return Plan(
        cfg=cfg,
        memory=memory or estimate(cfg, cluster.world_size),
        compute_s=_compute_seconds(cfg, cluster),
        update_s=_update_seconds(cfg, cluster),
        tp_s=tp_s,
        dp_s=dp_s,
        host_s=0.0 if captured else launches * HOST_S[cfg.parallel.activation_checkpointing],
    )


def _compute_seconds(cfg: LanguageRunConfig, cluster: Cluster) -> float:
    model, tp = cfg.model, cfg.parallel.tensor
    tokens = cfg.data.micro_batch * cfg.data.seq_len * cfg.grad_accum_steps(cluster.world_size)
    between = tokens / tp if cfg.parallel.sequence else tokens
    again = cfg.parallel.activation_checkpointing
    products = bound = 0.0
    for n_heads in widths_of_a_step(cfg):
        whole = training_flops_per_token(model, model.layer_widths(n_heads))
        head = 6 * model.n_vocab_rows * model.d_model
        # Forward, which may be done again, and the gradient of what it read; then weights' gradients.
        each = (whole - head) / 3
        either, of_weights = each * (3 if again == "block" else 2), each
        products += tokens / tp * (head + either / (FLOAT8_TIMES if cfg.float8 else 1) + of_weights)
        if cfg.float8:
            inner = n_heads * model.headdim
            # Of a gathered width a rank rounds its own tokens alone.
            between_mixers = tokens / tp if n_heads <= cfg.gathered_heads else tokens
            rounded = between_mixers * 2 * model.d_model + tokens / tp * (3 * inner + 2 * model.d_state + n_heads)
            bound += rounded * model.n_layers * ROUND_S
        channels = tokens / tp * n_heads * model.headdim * model.n_layers
        scan = channels * (CHANNEL_S + HEAD_S / model.headdim)
        bound += scan * {"none": 1.0, "states": 1 + STATES_SHARE}.get(again, 1 + FORWARD_SHARE)
        residual = between * model.d_model * model.n_layers * RESIDUAL_S
        bound += residual * (1 + FORWARD_SHARE if again == "block" else 1)
        bound += tokens / tp * model.n_vocab_rows * VOCABULARY_S + tokens * model.d_model * OUTSIDE_S
    passes = passes_per_step(cfg, cluster.world_size)
    bound += passes * local_parameters(model, tp) * PARAMETER_S
    faster = GPU_PEAK_TFLOPS[cluster.gpu] / GPU_PEAK_TFLOPS[MEASURED_ON]
    wider = _wider(cluster, MEASURED_ON)
    # A narrower memory binds them all the more.
    seconds = products / (PRODUCT_FLOP_S * faster) + bound / (1 + WIDTH_USED * (wider - 1) if wider > 1 else wider)
    return seconds + passes * model.n_layers * SMALL_S * (1 - 1 / tp)


def _update_seconds(cfg: LanguageRunConfig, cluster: Cluster) -> float:
    parameters = local_parameters(cfg.model, cfg.parallel.tensor)
    bound = parameters * (UPDATE_S / cfg.data_parallel(cluster.world_size) + CLEAR_S)
    return bound / _wider(cluster, "H200") + UPDATE_HOST_S


def _wider(cluster: Cluster, measured_on: str) -> float:
    """The cluster's memory bandwidth over that of the GPU on which something bound by it was measured."""
    return GPUS[cluster.gpu][1] / GPUS[measured_on][1]


def _link_seconds(cfg: LanguageRunConfig, cluster: Cluster) -> tuple[float, float]:
    """Seconds of a step's collectives over tp and over dp: rings, over the slowest link that they cross."""
    tp, world_size = cfg.parallel.tensor, cluster.world_size
    sizes = {"tp": tp, "dp": cfg.data_parallel(world_size)}
    spans = {"tp": tp > cluster.gpus_per_node, "dp": world_size > cluster.gpus_per_node}
    seconds = {"tp": 0.0, "dp": 0.0}
    copies = cfg.parallel.copies_between_peers and not spans["tp"]
    for row in collectives(cfg, world_size):
        n = sizes[row.over]
        gb_s = cluster.network_gb_s if spans[row.over] else cluster.nvlink_gb_s
        if copies and row.of_mixers:  # faster than collectives by as much as was measured
            gb_s *= PEER_COPY_GB_S / NVLINK_GB_S
        rounds = 2 if row.operation == "all-reduce" else 1
        seconds[row.over] += row.per_step * LATENCY_S + rounds * (n - 1) / n * row.bytes_per_step / (gb_s * 1e9)
    return seconds["tp"], seconds["dp"]


def print_plan(cfg: LanguageRunConfig, cluster: Cluster, *, shown: int = 12) -> None:
    """Print the fastest layouts and what they rest on. Raises ConfigError where none fits."""
    plans = plan(cfg, cluster)
    table = Table(
        title=f"{cfg.run_dir} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}: {len(plans)} layouts fit"
    )
    for column in (
        "tp",
        "dp",
        "micro-batch",
        "accumulate",
        "recompute",
        "ZeRO",
        "sequence",
        "GiB",
        "step s",
        "tokens/s",
    ):
        table.add_column(column, justify="right")
    for column in ("compute", "tp links", "dp links"):
        table.add_column(f"{column} %", justify="right")
    for found in plans[:shown]:
        parallel, step = found.cfg.parallel, found.step_s
        table.add_row(
            str(parallel.tensor),
            str(found.cfg.data_parallel(cluster.world_size)),
            str(found.cfg.data.micro_batch),
            str(found.cfg.grad_accum_steps(cluster.world_size)),
            parallel.activation_checkpointing,
            str(parallel.zero_stage),
            "yes" if parallel.sequence else "no",
            f"{found.memory.total / GIB:.0f}",
            f"{step:.3f}",
            f"{found.cfg.data.tokens_per_step / step:,.0f}",
            f"{max(found.compute_s, found.host_s) / step:.0%}" + (" host" if found.host_s > found.compute_s else ""),
            f"{found.tp_s / step:.0%}",
            f"{found.dp_s / step:.0%}",
        )
    console = plain_console()
    console.print(table)
    best = plans[0].cfg
    days = cfg.optim.steps * plans[0].step_s / 86400
    console.print(
        f"fastest: parallel.tensor={best.parallel.tensor} data.micro_batch={best.data.micro_batch} "
        f"parallel.activation_checkpointing={best.parallel.activation_checkpointing} "
        f"parallel.zero_stage={best.parallel.zero_stage} parallel.sequence={str(best.parallel.sequence).lower()}; "
        f"{cfg.optim.steps:,} steps take {days:.1f} days of {cluster.world_size} GPUs"
    )
    float8 = f" (projections in float8 {FLOAT8_TIMES:g} times that)" if cfg.float8 else ""
    scaled = "" if cluster.gpu == MEASURED_ON else f", scaled to {cluster.gpu} by datasheets"
    console.print(
        f"assumed: rates of one {MEASURED_ON}, the scan's fitted to newer kernels{scaled}: products at {PRODUCT_FLOP_S / 1e12:.0f} TFLOP/s{float8}, "
        f"at most {HOST_S['none'] * 1e3:.1f} to {HOST_S['block'] * 1e3:.1f} ms of host a layer and pass that is no CUDA graph; links {cluster.nvlink_gb_s:g} GB/s inside a node, "
        f"{cluster.network_gb_s:g} GB/s a GPU between nodes, one way, as stated (--nvlink-gb-s, --network-gb-s), "
        f"{LATENCY_S * 1e6:.0f} us a collective, none counted as hidden; {RESERVED_GIB:.0f} GiB reserved. "
        "Rates are fitted to steps on one to four H200s; links between nodes have not been checked"
        + (
            f". On an {cluster.gpu} the mixer's kernels do not run: expect less" if cluster.gpu in BEFORE_HOPPER else ""
        ),
        soft_wrap=True,
    )
