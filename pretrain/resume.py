"""Resuming a run, or taking it back: from a checkpoint into the engine's memory. Every rank calls each function."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from modeling.checkpoint_reader import EMA, CheckpointError, Reader, RunState
from modeling.tensor_parallel import layout_of, local_part
from pretrain import checkpoint
from pretrain.config import RunConfig
from pretrain.config_sections import ConfigError
from pretrain.distributed import RankError, Ranks
from pretrain.engine import Engine
from pretrain.manifest_check import has_begun
from pretrain.same_run import seq_lens, state_to_go_on_from

logger = logging.getLogger(__name__)
T = TypeVar("T")


def resume(engine: Engine, cfg: RunConfig, ranks: Ranks, dataset_sha256: str = "") -> RunState | None:
    """Load what `cfg.checkpoint.resume` asks for into the engine; returns where the run stands, None for a fresh start.

    `dataset_sha256` is that of the run's dataset (pretrain.dataset_check); without it, datasets are not compared.

    A named checkpoint is where the run begins: once it has checkpoints of its own from there on, this is "auto".

    With "auto", checkpoints that are damaged or incomplete are skipped with a warning that says what is wrong with them,
    and set aside once a whole one was found. Raises CheckpointError where a named checkpoint is damaged, or where every
    one is, or was set aside: starting anew over them is for people to decide. Raises ConfigError where run_dir holds later
    checkpoints than the one to start from: pruning and the next "auto" would take those for this run's; and where that one is no
    checkpoint of this run (pretrain.same_run).
    """
    root = checkpoint.checkpoint_dir(cfg.run_dir)
    found: list[Path] = ranks.gather_objects(checkpoint.candidates(root) if ranks.is_main else [])[0]
    choice = cfg.checkpoint.resume
    if choice == "never":
        _refuse_later(found, -1, root)
        return None
    if ranks.gather_objects(has_begun(cfg) if ranks.is_main else False)[0]:
        choice = "auto"
    damaged: list[Path] = []
    for folder in found if choice == "auto" else [Path(choice)]:
        try:
            reader = _attempt(ranks, partial(_open_verified, folder, ranks))
        except CheckpointError as error:
            if choice != "auto":
                raise
            if ranks.is_main:
                logger.warning("skipping checkpoint %s: %s", folder.name, error)
            damaged.append(folder)
            continue
        try:
            reader.check_model(cfg.model)
        except CheckpointError as error:  # nothing is wrong with the checkpoint
            raise ConfigError(str(error)) from None
        state = state_to_go_on_from(cfg, reader.manifest, reader.state, dataset_sha256, log=ranks.is_main)
        _refuse_later([path for path in found if path not in damaged], state.step, root)
        _attempt(ranks, partial(checkpoint.set_aside, damaged if ranks.is_main else [], "damaged"))
        _load(engine, reader, cfg.model.n_heads, ranks)
        if ranks.is_main:
            logger.info("resumed from %s: step %d, %d tokens", folder, state.step, state.tokens)
        return state
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {root} is damaged (see the warnings above): mend or remove them to start anew"
        )
    aside: list[Path] = ranks.gather_objects(checkpoint.those_set_aside(root) if ranks.is_main else [])[0]
    if aside:
        raise CheckpointError(
            f"{root} has no checkpoint to go on from, only what was set aside: {', '.join(path.name for path in aside)}. Rename "
            "one to step_N to go on from it, or remove them to start anew"
        )
    return None


def go_back(engine: Engine, cfg: RunConfig, ranks: Ranks, step: int) -> RunState | None:
    """Load the newest whole checkpoint of at most `step` steps; returns what it holds, None where there is none.

    Later checkpoints, and damaged ones on the way, are then renamed: the run is about to write those steps again. Where there is
    none to go back to, all stay as they are: a rank that cannot read now may be able to at the next start.
    """
    root = checkpoint.checkpoint_dir(cfg.run_dir)
    found: list[Path] = ranks.gather_objects(checkpoint.candidates(root) if ranks.is_main else [])[0]
    passed = [folder for folder in found if folder.name > checkpoint.step_name(step)]
    for folder in found[len(passed) :]:
        try:
            reader = _attempt(ranks, partial(_open_verified, folder, ranks))
        except CheckpointError as error:
            if ranks.is_main:
                logger.warning("skipping checkpoint %s: %s", folder.name, error)
            passed.append(folder)
            continue
        _attempt(ranks, partial(checkpoint.set_aside, passed if ranks.is_main else [], "rolled-back"))
        _load(engine, reader, cfg.model.n_heads, ranks)
        before, now = seq_lens(cfg, reader.manifest)
        return replace(reader.state, sequence=reader.state.sequence * before // now)
    return None


def _refuse_later(found: list[Path], step: int, root: Path) -> None:
    later = [path.name for path in found if path.name > checkpoint.step_name(step)] if step >= 0 else found
    if later:
        raise ConfigError(
            f"{root} holds {len(later)} checkpoints after step {max(step, 0)}, where this run is to start: give it a "
            "run_dir of its own, or remove them"
        )


def _attempt(ranks: Ranks, work: Callable[[], T]) -> T:
    try:
        return ranks.attempt(work, (OSError, CheckpointError))
    except RankError as error:
        raise CheckpointError(str(error)) from None


def _open_verified(folder: Path, ranks: Ranks) -> Reader:
    reader = Reader(folder)
    reader.verify(ranks.rank, ranks.world_size)
    return reader


def _load(engine: Engine, reader: Reader, n_heads: int, ranks: Ranks) -> None:
    """Fill parameters and optimizer fragments in place, one logical parameter at a time.

    A moving average that the checkpoint does not have starts at its weights.
    """
    if EMA in engine.kinds and EMA not in reader.kinds and ranks.is_main:
        logger.info("%s has no moving average of weights: it starts at the weights", reader.folder.name)
    for name, parameter in engine.parameters.items():
        fragment = engine.fragment(name)
        for kind in engine.kinds:
            if kind != "master" and fragment is None:
                continue  # only the owner of a fragment needs its moments
            full = reader.full(name, kind if kind in reader.kinds else "master", n_heads)
            part = local_part(full, layout_of(name), n_heads, ranks.tp.size, ranks.tp.rank)
            if kind == "master":
                parameter.data.copy_(part)
            if fragment is not None:
                target = getattr(fragment, kind)
                target.data.copy_(part.flatten()[fragment.start : fragment.start + target.numel()])
    engine.restore(reader.state.n_updates)
