"""`--dry-run`: what a run would be, from its config alone, on any machine: sizes, FLOPs, bytes, tokens, steps."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from modeling.flops import local_parameters, submodel_parameters
from modeling.models import build_model
from modeling.nesting import width_name
from modeling.tensor_parallel import TensorParallel
from pretrain.collectives import collectives, widths_of_a_step
from pretrain.config import RunConfig
from pretrain.memory import estimate

GIB = 2**30
LOG_WIDTH = 150


def print_dry_run(cfg: RunConfig, world_size: int) -> None:
    """Print what the run is on `world_size` ranks. Raises ConfigError where the layout does not fit the run.

    One rank's model is built on the meta device, so that a shape that cannot be is found here and not on the cluster.
    """
    dp, tp = cfg.data_parallel(world_size), cfg.parallel.tensor
    accumulation = cfg.grad_accum_steps(world_size)
    with torch.device("meta"):
        local = build_model(cfg.model, tp=TensorParallel(size=tp))
    built = sum(parameter.numel() for parameter in local.parameters())
    assert built == local_parameters(cfg.model, tp), (
        f"flops.py counts {local_parameters(cfg.model, tp)}, model has {built}"
    )

    console = plain_console()
    console.print(_width_table(cfg))
    unit = "images" if cfg.task == "vision" else "sequences"
    draws, samples, each = cfg.draws_per_micro_batch, cfg.samples_per_step, cfg.tokens_per_sequence
    total = cfg.optim.steps * samples
    widths = widths_of_a_step(cfg)
    # Where each width draws its own samples, one of them sees a sample; else all do.
    flops = sum(cfg.training_flops(cfg.model.layer_widths(n)) for n in widths) / draws
    whole = submodel_parameters(cfg.model, cfg.model.layer_widths(cfg.model.n_heads)).total
    checkpoint = cfg.checkpoint_bytes(whole)
    rows = {
        "layout": f"{world_size} ranks = tp {tp} x dp {dp}, ZeRO stage {cfg.parallel.zero_stage}",
        "parameters a rank": f"{built:,}",
        "steps": f"{cfg.optim.steps:,} of {samples:,} {unit} of {each:,} tokens = {total:,} {unit}, "
        f"{total * each / 1e9:,.2f}B tokens",
        "a step on a rank": f"{accumulation} micro-batches of {cfg.data.micro_batch} x {each} tokens "
        f"({cfg.tokens_per_pass:,}), {len(widths)} widths each"
        + (", every width on its own" if draws > 1 else "")
        + ", gradients reduced once",
        "training compute": f"{flops * total:.3g} FLOPs over the widths that train, {flops / each / 1e9:,.2f} GFLOP a token"
        + _drawn(cfg),
        "checkpoint": f"{checkpoint / GIB:.2f} GiB "
        f"each, {cfg.checkpoint.keep_last} kept, every {cfg.checkpoint.every_steps:,} steps",
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(f"[bold]{name}[/]", value)
    console.print(grid)
    console.print(_memory_table(cfg, world_size))
    console.print(_collectives_table(cfg, world_size))


def _drawn(cfg: RunConfig) -> str:
    """What the numbers take a sandwich's drawn width for."""
    return "; a drawn width counts as the widest that it can be" if cfg.nesting.rule == "sandwich" else ""


def plain_console() -> Console:
    """A terminal as wide as it is; a log or a pipe wide enough for whole tables."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def _width_table(cfg: RunConfig) -> Table:
    table = Table(title=f"{cfg.run_dir}: {len(cfg.model.widths)} models in one")
    for column in (
        "width",
        "heads",
        "parameters",
        "of full",
        "without embedding",
        "forward MFLOP/token",
        "bf16 weights MiB",
    ):
        table.add_column(column, justify="right")
    full = submodel_parameters(cfg.model, cfg.model.layer_widths(cfg.model.n_heads)).total
    for n_heads in cfg.model.widths:
        widths = cfg.model.layer_widths(n_heads)
        parameters = submodel_parameters(cfg.model, widths)
        table.add_row(
            width_name(n_heads, cfg.model.n_heads),
            str(n_heads),
            f"{parameters.total:,}",
            f"{parameters.total / full:.0%}",
            f"{parameters.blocks:,}",
            f"{cfg.training_flops(widths) / 3 / cfg.tokens_per_sequence / 1e6:,.0f}",
            f"{parameters.total * 2 / 2**20:,.0f}",
        )
    return table


def _memory_table(cfg: RunConfig, world_size: int) -> Table:
    memory = estimate(cfg, world_size)
    parallel, precision = cfg.parallel, "fp8" if cfg.float8 else "bf16"
    table = Table(
        title=f"GPU memory of a rank at its peak, GiB ({precision}, recompute {parallel.activation_checkpointing}, ZeRO "
        f"{parallel.zero_stage}; CUDA, NCCL and fragmentation take 1 to 3 more)"
    )
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "gathered widths": memory.gathered,
        "optimizer state": memory.optimizer,
        "activations": memory.activations,
        "transient": memory.transient,
        "peers' trays": memory.trays,
        "total": memory.total,
    }
    for name in parts:
        table.add_column(name, justify="right")
    table.add_row(*(f"{n_bytes / GIB:.2f}" for n_bytes in parts.values()))
    return table


def _collectives_table(cfg: RunConfig, world_size: int) -> Table | str:
    listed = collectives(cfg, world_size)
    if not listed:
        return "collectives: none, one rank"
    widths = widths_of_a_step(cfg)
    n_gathered = sum(n_heads <= cfg.gathered_heads for n_heads in widths)
    cost = f"; mixers of the narrowest {n_gathered}, whose weights are gathered, send nothing" if n_gathered else ""
    table = Table(
        title=f"Collectives of a rank (a pass: one of {len(widths)} widths over a micro-batch{cost}{_drawn(cfg)})"
    )
    for column in ("over", "what", "operation"):
        table.add_column(column)
    for column in ("calls a pass", "passes a step", "calls a step", "MiB each", "GiB a step"):
        table.add_column(column, justify="right")
    for row in listed:
        table.add_row(
            row.over,
            row.what,
            row.operation,
            str(row.per_pass or "-"),
            f"{row.passes:,}" if row.passes else "-",
            f"{row.per_step:,}",
            f"{row.n_bytes / 2**20:,.3f}",
            f"{row.bytes_per_step / GIB:,.2f}",
        )
    return table
