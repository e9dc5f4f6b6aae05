"""Whether a run may go on from a checkpoint, and where in its data: its config against the one that the checkpoint carries.

The position in the data is a number of sequences in an order that the seed and the dataset give (pretrain.stream). Another
seed or dataset makes another place of it, so both are refused. Another data.seq_len cuts the same order of tokens into
other pieces (a row is a whole number of either), so the position is converted, exactly or not at all. What is left may
change, in the open: layout, micro-batch, steps, learning rate, how many widths draw how much.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from modeling.checkpoint_reader import RunState
from pretrain.config import RunConfig
from pretrain.config_io import config_to_plain
from pretrain.config_sections import ConfigError

logger = logging.getLogger(__name__)

DATASET = "dataset_sha256"
"""Key of a checkpoint's manifest: SHA-256 of the index of the split that it trained on (pretrain.dataset_check)."""
_PLACES = ("run_dir", "checkpoint.resume", "checkpoint.init_from")
"""Keys that say where a start reads and writes, not how it trains."""
_WAY_OUT = "or start a new run from its weights, with a run_dir of its own and checkpoint.init_from"


def state_to_go_on_from(
    cfg: RunConfig, manifest: dict[str, Any], state: RunState, dataset_sha256: str = "", *, log: bool = True
) -> RunState:
    """`state`, the state of a checkpoint with this `manifest`, with its position in sequences of `cfg`.

    Logs every other key that differs, a line each. `dataset_sha256` is the run's own; a checkpoint that was written before
    it was noted, or before a key existed, is not compared in it. Raises ConfigError, naming the key and both values,
    where the data would come in another order, or less is asked for than is done.
    """
    ours, theirs = dict(_flat(config_to_plain(cfg))), dict(_flat(manifest["config"]))
    changed = {key: (theirs[key], value) for key, value in ours.items() if key in theirs and theirs[key] != value}
    if "seed" in changed:
        before, now = changed["seed"]
        raise ConfigError(
            f"seed={now}, but the checkpoint of step {state.step} was trained with seed={before}, which orders the data: "
            f"give the same seed, {_WAY_OUT}"
        )
    theirs_sha256 = manifest.get(DATASET, "")
    if theirs_sha256 and dataset_sha256 and theirs_sha256 != dataset_sha256:
        raise ConfigError(
            f"data.path={cfg.data.path} (index {dataset_sha256[:16]}...) is another dataset than the one that the checkpoint of "
            f"step {state.step} was trained on, data.path={theirs['data.path']} (index {theirs_sha256[:16]}...): name that "
            f"one, wherever it lies now, {_WAY_OUT}"
        )
    if state.step > cfg.optim.steps:
        raise ConfigError(
            f"the checkpoint is at step {state.step}, optim.steps={cfg.optim.steps}: nothing is left to do. Give more steps, "
            f"{_WAY_OUT}"
        )
    before, now = seq_lens(cfg, manifest)
    sequence, rest = divmod(state.sequence * before, now)
    if rest:
        raise ConfigError(
            f"data.seq_len={now}, but the checkpoint of step {state.step} was trained with data.seq_len={before} and stands "
            f"after {state.sequence * before} tokens, which is no multiple of {now}: give the same data.seq_len or another "
            f"that divides them, {_WAY_OUT}"
        )
    if log:
        for key, (was, value) in changed.items():
            if key not in _PLACES:
                logger.info("%s=%s from here on; the checkpoint was trained with %s", key, value, was)
        if "data.path" in changed and not theirs_sha256:
            logger.warning(
                "the checkpoint is too old to tell whether data.path names the dataset that it was trained on"
            )
    return replace(state, sequence=sequence)


def seq_lens(cfg: RunConfig, manifest: dict[str, Any]) -> tuple[int, int]:
    """Tokens of a sequence as the checkpoint counts them, and as `cfg` does; 1 and 1 for data that has no such length."""
    now = getattr(cfg.data, "seq_len", 1)
    return manifest["config"]["data"].get("seq_len", now), now


def _flat(values: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{section}{name}.")
        else:
            yield section + name, value
