"""Whole runs on real ranks: resuming, being told to stop, and what ends a run before it does harm."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.checkpoint_reader import KINDS, CheckpointError, Reader
from modeling.language import LanguageModel
from pretrain import checkpoint, same_start, train
from pretrain.config import RunConfig
from pretrain.config_sections import ConfigError
from pretrain.distributed import init_ranks
from pretrain.metrics import Record, read_metrics
from pretrain.stability import NonFiniteError
from tests.datasets import write_token_dataset
from tests.distributed.harness import RankFailedError, run_ranks
from tests.distributed.toy_run import damage, losses, run_config, train_until


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"nesting": {"rule": "sandwich", "draw": "separate"}},
        {"nesting": {"mix_rate": 0.5}},
        {"nesting": {"distill_weight": 0.5}, "data": {"reset_at_documents": True}},
        {"parallel": {"tensor": 2}},
        {
            "parallel": {"tensor": 2, "sequence": True},
            "nesting": {"mix_rate": 0.5},
            "data": {"reset_at_documents": True},
        },
        {"parallel": {"zero_stage": 2}},
    ],
    ids=[
        "all widths",
        "sandwich, separate draws",
        "mixes",
        "distillation, documents reset",
        "tp 2",
        "tp 2 with gathered widths, mixes, documents reset",
        "ZeRO 2",
    ],
)
def test_stopped_and_resumed_is_bitwise_the_run_that_never_stopped(
    overrides: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    whole = run_config(dataset, tmp_path / "whole", **overrides)
    assert run_ranks(2, train.main, whole) == [0, 0]
    parts = run_config(dataset, tmp_path / "parts", **overrides)
    assert run_ranks(2, train_until, parts, 6) == [train.EXIT_REQUEUE] * 2
    assert losses(parts)[-1][1] == 7, "the step in progress is finished and saved"
    assert run_ranks(2, train.main, parts) == [0, 0]
    assert losses(parts) == losses(whole)
    first, last = losses(whole)[0][2], losses(whole)[-1][2]
    assert all(last[name] < first[name] for name in last), "every width learns"
    expected, resumed = (Reader(checkpoint.candidates(checkpoint.checkpoint_dir(c.run_dir))[0]) for c in (whole, parts))
    assert expected.state == resumed.state
    for name in expected.shapes:
        for kind in KINDS:
            assert torch.equal(expected.full(name, kind, 8), resumed.full(name, kind, 8)), (name, kind)


def state_after_loading(cfg: RunConfig) -> dict[str, torch.Tensor]:
    """What a checkpoint that was loaded at this layout and saved again at once holds, on rank 0."""
    from pretrain import resume
    from pretrain.distributed import init_ranks
    from pretrain.engine import Engine
    from pretrain.saver import Saver

    ranks = init_ranks(cfg.parallel.tensor)
    model = LanguageModel(cfg.model, tp=ranks.tp)
    model.init_weights(99)
    engine = Engine(model, cfg, ranks)
    state = resume.resume(engine, cfg, ranks)
    assert state is not None
    whole = {} if ranks.tp.size > 1 else {name: p.detach().clone() for name, p in model.named_parameters()}
    reader = Reader(Saver(engine, cfg, ranks).save(state).folder)
    for name in reader.shapes:
        for kind in KINDS:
            whole[f"{name}|{kind}"] = reader.full(name, kind, cfg.model.n_heads)
    return whole


@pytest.mark.parametrize(
    ("world_size", "tensor", "stage"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (4, 4, 1), (4, 1, 2)], ids=str
)
def test_a_checkpoint_loads_bitwise_at_every_layout(
    world_size: int, tensor: int, stage: int, dataset: Path, tmp_path: Path
) -> None:
    widths = {"widths": [8, 4]}
    saved = run_config(dataset, tmp_path / "saved", model=widths, optim={"steps": 3}, parallel={"tensor": 2})
    run_ranks(4, train.main, saved)
    source = checkpoint.candidates(checkpoint.checkpoint_dir(saved.run_dir))[0]
    other = run_config(
        dataset,
        tmp_path / "other",
        model=widths,
        parallel={"tensor": tensor, "zero_stage": stage},
        checkpoint={"resume": str(source)},
    )
    result = run_ranks(world_size, state_after_loading, other)[0]
    reader = Reader(source)
    for name in reader.shapes:
        for kind in KINDS:
            assert torch.equal(result[f"{name}|{kind}"], reader.full(name, kind, 8)), (name, kind)
        if tensor == 1:
            assert torch.equal(result[name], reader.full(name, "master", 8)), name


def train_with_nan(cfg: RunConfig) -> str:
    """Poison one weight of rank 1 alone before step 2; returns the error and whether rank 0's weights moved after it."""
    accumulate = train.accumulate_gradients
    kept: dict[str, Any] = {}

    def poisoned(run: train.Run, micro_batches: Any) -> float:
        if run.state.step == 2:
            kept["model"] = run.model
            kept["before"] = run.model.final_norm.detach().clone()
            if run.ranks.rank == 1:
                run.model.embedding.data[5] = torch.nan
        return accumulate(run, micro_batches)

    train.accumulate_gradients = poisoned
    with pytest.raises(NonFiniteError) as caught:
        train.main(cfg)
    assert torch.equal(kept["model"].final_norm, kept["before"])
    return str(caught.value)


def test_nan_on_one_rank_stops_all_ranks_before_the_update(dataset: Path, tmp_path: Path) -> None:
    messages = run_ranks(2, train_with_nan, run_config(dataset, tmp_path, stability={"max_skips": 0}))
    assert all("step 2: a loss is not finite; nothing was updated" in message for message in messages)


def train_on_a_full_disk(cfg: RunConfig) -> str:
    """The disk of rank 1 is full from the second checkpoint on."""
    write = checkpoint.write_rank_file

    def fail_later(folder: Path, rank: int, tensors: Any) -> Any:
        if rank == 1 and "00000004" in folder.name:
            raise OSError(28, "No space left on device")
        return write(folder, rank, tensors)

    checkpoint.write_rank_file = fail_later
    with pytest.raises(CheckpointError) as caught:
        train.main(cfg)
    return str(caught.value)


def test_a_full_disk_is_reported_on_all_ranks_and_spares_the_last_checkpoint(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path, checkpoint={"every_steps": 2})
    for message in run_ranks(2, train_on_a_full_disk, cfg):
        assert "step 4 was not written: rank 1: [Errno 28] No space left on device" in message
    root = checkpoint.checkpoint_dir(cfg.run_dir)
    assert [path.name for path in checkpoint.candidates(root)] == ["step_00000002"]
    assert not list(root.glob(".writing-*"))
    Reader(root / "step_00000002").verify()
    assert (root / "latest").read_text().strip() == "step_00000002"


def test_auto_resume_skips_a_damaged_checkpoint_and_never_starts_over_all_of_them(
    dataset: Path, tmp_path: Path
) -> None:
    cfg = run_config(dataset, tmp_path, checkpoint={"every_steps": 4})
    run_ranks(2, train.main, cfg)
    expected = losses(cfg)
    root = checkpoint.checkpoint_dir(cfg.run_dir)
    assert [path.name for path in checkpoint.candidates(root)] == ["step_00000010", "step_00000008", "step_00000004"]
    damage(root / "step_00000010" / "rank_00001.safetensors")
    (root / "step_00000008" / "manifest.json").write_text("{")
    run_ranks(2, train.main, cfg)
    assert losses(cfg) == expected, "it went on from step 4, and the curve has one value a step"
    for folder in checkpoint.candidates(root):
        damage(folder / "rank_00000.safetensors")
    with pytest.raises(RankFailedError, match=r"every checkpoint in .* is damaged"):
        run_ranks(2, train.main, cfg)


def test_pruning_never_takes_what_was_just_written_for_old(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path, checkpoint={"every_steps": 2, "keep_last": 2})
    run_ranks(1, train.main, cfg)
    root = checkpoint.checkpoint_dir(cfg.run_dir)
    for folder in checkpoint.candidates(root):
        if folder.name != "step_00000008":
            damage(folder / "rank_00000.safetensors")
    run_ranks(1, train.main, cfg)
    assert [path.name for path in checkpoint.candidates(root)] == ["step_00000010", "step_00000008"]
    assert (root / "damaged-step_00000010").is_dir()
    earlier = run_config(dataset, tmp_path, checkpoint={"resume": str(root / "step_00000008")})
    with pytest.raises(RankFailedError, match=r"holds 1 checkpoints after step 8"):
        run_ranks(1, train.main, earlier)
    with pytest.raises(RankFailedError, match=r"holds 2 checkpoints after step 0"):
        run_ranks(1, train.main, run_config(dataset, tmp_path, checkpoint={"resume": "never"}))


def test_a_checkpoint_of_another_model_is_refused_by_name(dataset: Path, tmp_path: Path) -> None:
    cfg = run_config(dataset, tmp_path, optim={"steps": 3})
    run_ranks(1, train.main, cfg)
    other = run_config(dataset, tmp_path, optim={"steps": 3}, model={"d_state": 16})
    with pytest.raises(
        RankFailedError, match=r"another model: blocks\.0\.mixer\.conv_bc is \(16, 4\) there and \(32, 4\)"
    ):
        run_ranks(1, train.main, other)


def missing_shard(dataset: Path) -> None:
    next((dataset / "train").glob("*.mds")).unlink()


def truncated_shard(dataset: Path) -> None:
    path = next((dataset / "train").glob("*.mds"))
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "overrides", "message"),
    [
        (missing_shard, {}, "shard .* is missing"),
        (truncated_shard, {}, "it is truncated or damaged"),
        (None, {"model": {"vocab_size": 63}}, "whose ids reach 63"),
        (None, {"data": {"seq_len": 48, "tokens_per_step": 192}}, "does not divide the dataset's rows of 32"),
        (None, {"data": {"tokens_per_step": 32 * 64}}, "holds 48 sequences of 32 tokens, a step needs 64"),
        (None, {"data": {"micro_batch": 3}}, "not a multiple of data-parallel size 2 x data.micro_batch=3"),
    ],
    ids=["missing shard", "truncated shard", "id beyond the vocabulary", "seq_len", "too little data", "micro_batch"],
)
def test_bad_data_ends_every_rank_before_a_step(
    harm: Any, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dataset = write_token_dataset(tmp_path / "shards", vocab_size=64, row_tokens=32, n_rows=48)
    if harm is not None:
        harm(dataset)
    cfg = run_config(dataset, tmp_path / "run", **overrides)
    with pytest.raises(RankFailedError, match=message) as caught:
        run_ranks(2, train.main, cfg)
    assert "rank 0:" in str(caught.value)
    assert "rank 1:" in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def train_with_a_rate_of_its_own(cfg: RunConfig) -> int:
    rank = int(os.environ["RANK"])
    return train.main(replace(cfg, optim=replace(cfg.optim, lr=1e-2 * (1 + rank))))


def test_ranks_that_disagree_on_the_config_all_end(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RankFailedError, match=r"rank 1 has another config than rank 0: lr: 0\.01 / lr: 0\.02"
    ) as caught:
        run_ranks(2, train_with_a_rate_of_its_own, run_config(dataset, tmp_path))
    assert str(caught.value).count("ConfigError: rank 1 has another") == 2


def train_on_a_disk_of_its_own(cfg: RunConfig, nodes: Path) -> int:
    """`data.path` is relative, and each rank is elsewhere: one path, a folder for each node."""
    os.chdir(nodes / os.environ["RANK"])
    return train.main(cfg)


def test_ranks_whose_datasets_differ_all_end_before_a_step(tmp_path: Path) -> None:
    for node, n_rows in (("0", 48), ("1", 40)):
        write_token_dataset(tmp_path / node / "shards", vocab_size=64, row_tokens=32, n_rows=n_rows)
    indices = [tmp_path / node / "shards" / "train" / "index.json" for node in "01"]
    sha256, stale = (hashlib.sha256(index.read_bytes()).hexdigest() for index in indices)
    says = f"ConfigError: rank 1 has another dataset than rank 0: dataset_sha256: {sha256} / dataset_sha256: {stale}."
    with pytest.raises(RankFailedError) as caught:
        run_ranks(2, train_on_a_disk_of_its_own, run_config(Path("shards"), tmp_path / "run"), tmp_path)
    assert str(caught.value).count(says) == 2
    assert not (tmp_path / "run").exists()


def told_of_other_code(cfg: RunConfig, commits: list[str], mixers: list[str]) -> str:
    """What a start says where this rank runs its own of these; nothing where it would go on."""
    ranks = init_ranks(1)
    same_start.git_commit = lambda: commits[ranks.rank]
    try:
        same_start.check_same_start(cfg, ranks, mixers[ranks.rank])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("commits", "mixers", "says"),
    [
        (["unknown", "a1", "a1"], ["mixer: fused"] * 3, ""),
        (
            ["unknown", "a1", "a1-dirty"],
            ["mixer: fused"] * 3,
            "commit than rank 1: git_commit: a1 / git_commit: a1-dirty.",
        ),
        (
            ["a1"] * 3,
            ["mixer: fused", "mixer: fused", "mixer: plain"],
            "mixer than rank 0: mixer: fused / mixer: plain.",
        ),
    ],
    ids=["one does not know", "commit", "mixer"],
)
def test_ranks_that_run_other_code_all_end(
    commits: list[str], mixers: list[str], says: str, dataset: Path, tmp_path: Path
) -> None:
    told = run_ranks(3, told_of_other_code, run_config(dataset, tmp_path), commits, mixers)
    assert len(set(told)) == 1
    assert told[0].startswith(f"rank 2 has another {says}") if says else not told[0]


def test_a_run_folder_that_cannot_be_written_ends_every_rank(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cfg = run_config(dataset, tmp_path / "file" / "run")
    with pytest.raises(RankFailedError, match=r"run_dir=.* cannot be written") as caught:
        run_ranks(2, train.main, cfg)
    assert str(caught.value).count("RankError: rank 0: run_dir=") == 2, "both ranks say which one it was"


def deterministic_losses(cfg: RunConfig) -> list[Any]:
    train.main(cfg)
    assert torch.are_deterministic_algorithms_enabled()
    return losses(cfg)


def test_two_deterministic_runs_are_bitwise_equal(dataset: Path, tmp_path: Path) -> None:
    first, second = (
        run_ranks(2, deterministic_losses, run_config(dataset, tmp_path / name, deterministic=True)) for name in "ab"
    )
    assert first == second


def evaluation(cfg: RunConfig) -> list[Record]:
    train.main(cfg)
    return [record for record in read_metrics(Path(cfg.run_dir) / "metrics.jsonl") if record["kind"] == "eval"]


def test_validation_does_not_depend_on_the_number_of_ranks(dataset: Path, tmp_path: Path) -> None:
    results = []
    for world_size in (1, 2):
        cfg = run_config(dataset, tmp_path / str(world_size), optim={"steps": 3})
        results.append(run_ranks(world_size, evaluation, cfg)[0][-1]["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_validation_fits_where_its_last_batch_does_not_divide_by_tp(dataset: Path, tmp_path: Path) -> None:
    """Sequences of 32 tokens over 3 ranks: micro-batches of 3 divide, the last 2 of 8 do not."""
    results = []
    for tp in (1, 3):
        cfg = run_config(
            dataset,
            tmp_path / str(tp),
            model={"n_heads": 12, "widths": [12, 6], "vocab_size": 384},
            data={"micro_batch": 3, "tokens_per_step": 192, "reset_at_documents": True},
            optim={"steps": 3},
            parallel={"tensor": tp, "sequence": tp > 1},
        )
        results.append(run_ranks(tp, evaluation, cfg)[0][-1]["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
