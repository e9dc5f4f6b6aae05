"""The planner: only layouts that fit, in an order that makes sense, near what one and two GPUs were measured to take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modeling.config import LanguageConfig
from modeling.flops import training_flops_per_token
from pretrain.__main__ import main
from pretrain.collectives import collectives
from pretrain.config import RunConfig
from pretrain.config_io import load_config
from pretrain.config_sections import ConfigError
from pretrain.memory import estimate
from pretrain.plan import GIB, GPUS, NVLINK_GB_S, RESERVED_GIB, Cluster, plan, predict

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "docs/benchmarks"
ALONE = [
    row
    for name in ("compare_reference.json", "compare_reference_h100_202611.json")
    for row in json.loads((BENCHMARKS / name).read_text())
    if row["width"] == "joint" and row["sequence"] == 1024
]
LAYOUTS = [
    pytest.param(
        run,
        row,
        id=f"{Path(run['config']).stem}, {row['world_size']} GPUs, tp {row['tensor']}, {row['scaling']} {run['commit'][:7]}",
    )
    for run in json.loads((BENCHMARKS / "scaling_h200_x4_202611.json").read_text())
    for row in run["rows"]
]


def config(size: str, *overrides: str) -> RunConfig:
    return load_config(REPOSITORY / f"configs/lm_{size}.yaml", ["run_dir=unused", "data.path=unused", *overrides])


def cluster(nodes: int, gpus: int, gpu: str = "H200", network_gb_s: float = 45.0) -> Cluster:
    return Cluster(nodes=nodes, gpus_per_node=gpus, gpu=gpu, nvlink_gb_s=400.0, network_gb_s=network_gb_s)


@pytest.mark.parametrize(
    "row", ALONE, ids=lambda row: f"{row['model']} {row['activation_checkpointing']} {row.get('precision', 'bf16')}"
)
def test_one_gpu_is_predicted_as_measured(row: dict[str, Any]) -> None:
    """The passes of a micro-batch; the record has no optimizer in it, and each of its widths embeds for itself."""
    cfg = config(row["model"])
    mode, micro_batch = row["activation_checkpointing"], cfg.data.micro_batch
    cfg = replace(
        cfg,
        precision=row.get("precision", "bf16"),
        data=replace(cfg.data, tokens_per_step=micro_batch * 1024),
        parallel=replace(cfg.parallel, activation_checkpointing=mode),
    )
    (gpu,) = (name for name in ("H100", "H200") if name in row["device"])
    found = predict(cfg, cluster(1, 1, gpu))
    assert found.compute_s == pytest.approx(micro_batch * 1024 / row["ours_tok_s"], rel=0.10)
    memory = found.memory
    passes = memory.parameters + memory.gradients + memory.activations + memory.transient
    assert passes / GIB == pytest.approx(row["ours_peak_gib"], rel=0.05)


@pytest.mark.parametrize(("run", "row"), LAYOUTS)
def test_a_layout_is_predicted_as_measured(run: dict[str, Any], row: dict[str, Any]) -> None:
    """Whole steps, update and collectives included, on one, two and four H200s of one host."""
    size = Path(run["config"]).stem.removeprefix("lm_")
    cfg = config(size, *run["overrides"], f"parallel.tensor={row['tensor']}")
    micro_batch = row.get("micro_batch", cfg.data.micro_batch)
    cfg = replace(cfg, data=replace(cfg.data, tokens_per_step=row["tokens_per_step"], micro_batch=micro_batch))
    hosts = Cluster(
        nodes=1, gpus_per_node=row["world_size"], gpu="H200", nvlink_gb_s=NVLINK_GB_S, network_gb_s=NVLINK_GB_S
    )
    found = predict(cfg, hosts)
    assert found.step_s == pytest.approx(row["step_s"], rel=0.10)
    # Trays lie outside what torch counts.
    assert (found.memory.total - found.memory.trays) / GIB == pytest.approx(row["peak_gib"], rel=0.06)


def test_zero_2_keeps_a_master_copy() -> None:
    one, two = (estimate(config("1b4", f"parallel.zero_stage={stage}"), 4) for stage in (1, 2))
    assert 3 * one.optimizer == 2 * two.optimizer == 6 * two.parameters / 4


def test_trays_of_peers_are_counted_where_there_are_any() -> None:
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    with_peers, without = (
        estimate(config("1b4", *layout, f"parallel.peer_copies={how}"), 2) for how in ("auto", "never")
    )
    assert with_peers.total - without.total == with_peers.trays == 3 * 16384 * 2048 * 2
    assert estimate(config("1b4", *layout, "parallel.activation_checkpointing=block"), 2).trays == without.trays == 0


def test_gathered_weights_are_counted_where_there_are_any() -> None:
    layout = ["parallel.tensor=4", "parallel.sequence=true"]
    with_them, without = (estimate(config("1b4", *layout, f"parallel.gathered_width={w}"), 4) for w in (0.5, 0.1))
    # 32 heads of 64 channels in 48 layers: z, x and out; dt; four taps and a bias; A, D, dt's bias; the gated norm.
    numbers = 48 * (3 * 2048 * 2048 + 32 * 2048 + 2048 * 5 + 3 * 32 + 2048)
    # And z of all layers as it arrives, with this rank's quarter of it.
    arriving = 48 * 2048 * 2048 * 4 * 5 // 4
    assert with_them.total - without.total == with_them.gathered == 8 * numbers + arriving
    assert without.gathered == 0


@pytest.mark.parametrize(
    "elsewhere",
    [
        ["parallel.tensor=1"],
        ["parallel.sequence=false"],
        ["parallel.zero_stage=2"],
        ["data.micro_batch=2"],
        ["parallel.gathered_width=0"],
    ],
    ids=str,
)
def test_nothing_is_gathered_where_the_layout_cannot(elsewhere: list[str]) -> None:
    cfg = config("1b4", "parallel.tensor=4", "parallel.sequence=true", *elsewhere)
    assert estimate(cfg, 4).gathered == 0
    assert not [row for row in collectives(cfg, 4) if row.what.startswith("gathered weights")]


@pytest.mark.parametrize(("nodes", "gpus", "gpu"), [(1, 1, "H200"), (1, 8, "A100"), (4, 8, "H100")])
def test_every_planned_layout_fits_and_divides_the_step(nodes: int, gpus: int, gpu: str) -> None:
    plans = plan(config("1b4"), cluster(nodes, gpus, gpu))
    assert [p.step_s for p in plans] == sorted(p.step_s for p in plans)
    for found in plans:
        cfg, world_size = found.cfg, nodes * gpus
        assert found.memory == estimate(cfg, world_size)
        assert found.memory.total <= (GPUS[gpu][0] - RESERVED_GIB) * GIB
        used = cfg.data_parallel(world_size) * cfg.data.micro_batch * cfg.grad_accum_steps(world_size)
        assert used == cfg.data.sequences_per_step
        assert found.step_s >= found.compute_s > 0


def test_more_gpus_or_faster_links_are_not_slower() -> None:
    best = [plan(config("1b4"), cluster(nodes, 8))[0].step_s for nodes in (1, 2, 4, 8)]
    assert best == sorted(best, reverse=True)
    slow, fast = (plan(config("1b4"), cluster(4, 8, network_gb_s=speed))[0] for speed in (5.0, 400.0))
    assert fast.step_s < slow.step_s
    # Where the network is slow, tensor parallelism leaves less to send between nodes.
    assert slow.cfg.parallel.tensor >= fast.cfg.parallel.tensor


def test_tensor_parallelism_costs_links_and_one_rank_none() -> None:
    for found in plan(config("130m"), cluster(1, 4)):
        assert (found.tp_s > 0) == (found.cfg.parallel.tensor > 1)
        assert (found.dp_s > 0) == (found.cfg.data_parallel(4) > 1)


def test_gathered_widths_send_less_and_are_planned_with() -> None:
    layout = ["parallel.tensor=4", "parallel.sequence=true", "data.tokens_per_step=16384"]
    gathered, split = (
        predict(config("1b4", *layout, f"parallel.gathered_width={width}"), cluster(1, 4)) for width in (0.5, 0)
    )
    # One pass of four sends, and 48 layers' weights of half of the heads come and go: 4.5 GiB of 24 fewer.
    assert 0.3 * split.tp_s < gathered.tp_s < 0.6 * split.tp_s
    assert (gathered.compute_s, gathered.update_s, gathered.dp_s) == (split.compute_s, split.update_s, split.dp_s)
    assert gathered.memory.total > split.memory.total


def test_only_layouts_that_split_the_embedding_are_planned() -> None:
    """24, 12 and 6 heads divide by 3 and by 6 too; 50,176 rows do not, 50,304 do."""
    heads = ["model.n_heads=24", "model.widths=[24,12,6]", "data.tokens_per_step=393216"]
    for vocab_size, sizes in ((50176, {1, 2}), (50304, {1, 2, 3, 6})):
        found = plan(config("130m", *heads, f"model.vocab_size={vocab_size}"), cluster(1, 6))
        assert {layout.cfg.parallel.tensor for layout in found} == sizes


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(ConfigError, match="no layout fits A100"):
        plan(config("1b4", "model.n_layers=4000"), cluster(1, 8, "A100"))
    with pytest.raises(ConfigError, match="7 GPUs: no tensor-parallel size"):
        plan(config("1b4"), cluster(1, 7))
    with pytest.raises(ConfigError, match="known are"):
        cluster(1, 1, "RTX 3060")
    with pytest.raises(ConfigError, match="at least 1"):
        cluster(0, 8)


@pytest.mark.parametrize("gb_s", [0.0, -1.0, float("nan")])
def test_a_link_of_no_speed_is_refused(gb_s: float) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        cluster(1, 8, network_gb_s=gb_s)


def test_the_command_prints_a_ranking_and_what_it_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--plan", str(REPOSITORY / "configs/lm_1b4.yaml"), "--nodes", "4", "--gpus-per-node", "8"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for expected in (
        "layouts fit",
        "fastest: parallel.tensor=",
        "assumed: rates of one H100",
        "between nodes have not been checked",
    ):
        assert expected in printed
    assert "kernels do not run" not in printed
    assert main([*arguments, "--gpu", "A100"]) == 0
    assert "On an A100 the mixer's kernels do not run" in capsys.readouterr().out
    assert main([*arguments, "--gpu", "abacus"]) == 2
    assert "known are" in capsys.readouterr().err


def test_the_dry_run_prints_memory_and_collectives(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(REPOSITORY / "configs/lm_1b4.yaml")
    assert main(["--dry-run", path, "--world-size", "32", "parallel.tensor=2"]) == 0
    printed = capsys.readouterr().out
    cfg = config("1b4", "parallel.tensor=2")
    assert f"{estimate(cfg, 32).total / GIB:.2f}" in printed
    for expected in ("outputs of mixers", "gradients of shared matrices", "updated parameters"):
        assert expected in printed
    gathering = ["parallel.tensor=2", "parallel.sequence=true"]
    assert main(["--dry-run", path, "--world-size", "2", *gathering]) == 0
    printed = capsys.readouterr().out
    assert f"{estimate(config('1b4', *gathering), 2).gathered / GIB:.2f}" in printed
    for expected in (
        "mixers of the narrowest 3",
        "gathered weights: z, x, out",
        "their gradients, heads 0 to 7: z, x, out",
    ):
        assert expected in printed
    assert main(["--dry-run", path, "--world-size", "0"]) == 2
    assert "0 ranks: there must be at least one" in capsys.readouterr().err
    assert main(["--dry-run", path]) == 0
    assert "collectives: none" in capsys.readouterr().out


@pytest.mark.parametrize("draw", ["shared", "separate"])
def test_the_dry_run_of_a_sandwich_counts_what_trains(draw: str, capsys: pytest.CaptureFixture[str]) -> None:
    """64, 8 and one of 32 and 16 heads on 0.5M tokens each, in each of 1,000 steps."""
    sandwich = ["nesting.rule=sandwich", f"nesting.draw={draw}", "optim.steps=1000"]
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    path = str(REPOSITORY / "configs/lm_1b4.yaml")
    assert main(["--dry-run", path, "--world-size", "2", *sandwich, *layout]) == 0
    printed = capsys.readouterr().out
    model = config("1b4").model
    assert isinstance(model, LanguageConfig)
    a_token = sum(training_flops_per_token(model, (heads,) * model.n_layers) for heads in (64, 32, 8))
    assert f"{a_token * 1000 * 524_288:.3g} FLOPs over the widths that train" in printed
    assert f"{a_token / (3 if draw == 'separate' else 1) / 1e9:.2f} GFLOP a token" in printed
    assert ", 3 widths each" in printed
    assert "one of 3 widths" in printed
    assert "mixers of the narrowest 2" in printed
    assert " ".join(printed.split()).count("a drawn width counts as the widest that it can be") == 2


def test_layouts_that_float8_cannot_have_are_left_out() -> None:
    """Of 8 heads of 24 channels each of 8 ranks has 24, unless it gathers them all."""
    found = plan(config("130m", "precision=fp8"), cluster(1, 8))
    of_tp_8 = [layout for layout in found if layout.cfg.parallel.tensor == 8]
    assert {layout.cfg.parallel.tensor for layout in found} == {1, 2, 4, 8}
    assert all(layout.cfg.gathered_heads for layout in of_tp_8)
    assert len(of_tp_8) < len(
        [layout for layout in plan(config("130m"), cluster(1, 8)) if layout.cfg.parallel.tensor == 8]
    )


def test_what_is_estimated_for_float8_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(REPOSITORY / "configs/lm_1b4.yaml")
    assert main(["--plan", path, "--nodes", "1", "--gpus-per-node", "8", "precision=fp8"]) == 0
    assert "products at 730 TFLOP/s (projections in float8 1.8 times that)" in capsys.readouterr().out
    for precision, said in (("fp8", "GiB (fp8, recompute"), ("auto", "GiB (bf16, recompute")):
        assert main(["--dry-run", path, f"precision={precision}"]) == 0
        assert said in " ".join(capsys.readouterr().out.split())


def test_float8_is_not_planned_for_gpus_without_it() -> None:
    with pytest.raises(ConfigError, match=r"precision=fp8: an A100 does not multiply in float8"):
        plan(config("1b4", "precision=fp8"), cluster(1, 8, "A100"))
    wide, narrow = (predict(config("1b4", f"precision={p}"), cluster(1, 8)) for p in ("bf16", "fp8"))
    assert 1.1 < wide.compute_s / narrow.compute_s < 1.2
    assert wide.memory.activations - narrow.memory.activations == 48 * (3 * 4096 + 256 + 64) * 2048
