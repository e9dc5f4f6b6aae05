"""Whether all ranks start the same run. What each reads on its own node, no later step would notice to be another."""

from __future__ import annotations

from pretrain.config import RunConfig
from pretrain.config_io import config_to_yaml
from pretrain.config_sections import ConfigError
from pretrain.distributed import Ranks
from pretrain.provenance import git_commit

_WAYS_OUT = {
    "config": "Start all ranks with the same file and overrides",
    "commit": "Check out one commit on all nodes, and change no file on some of them alone",
    "mixer": "Give all ranks GPUs of one kind, the same libraries and the same launch settings",
    "dataset": "Copy the dataset anew to the node that has another one, or name a folder that all nodes share",
}
"""What may differ, and what to do then."""


def check_same_start(cfg: RunConfig, ranks: Ranks, mixer: str) -> None:
    """Raise ConfigError on all ranks, naming one and the lines, where configs, the code's commits or `mixer` differ.

    `mixer` says what computes this rank's mixers. Ranks that do not know their commit are not compared in it. Every rank
    must call.
    """
    commit = git_commit()
    known = None if commit == "unknown" else f"git_commit: {commit}"
    _compare(ranks, {"config": config_to_yaml(cfg), "commit": known, "mixer": mixer})


def check_same_dataset(sha256: str, ranks: Ranks) -> None:
    """Raise ConfigError on all ranks, naming one, where the datasets' `sha256` (pretrain.dataset_check) differ. Every rank
    must call."""
    _compare(ranks, {"dataset": f"dataset_sha256: {sha256}"})


def _compare(ranks: Ranks, texts: dict[str, str | None]) -> None:
    """One collective for all of `texts`; None is not compared."""
    starts: list[dict[str, str | None]] = ranks.gather_objects(texts)
    for what in texts:
        lines_of = {rank: text.splitlines() for rank, start in enumerate(starts) if (text := start[what]) is not None}
        first_rank = min(lines_of, default=0)
        for rank, lines in lines_of.items():
            first = lines_of[first_rank]
            if lines != first:
                differing = [f"{a.strip()} / {b.strip()}" for a, b in zip(first, lines, strict=False) if a != b]
                raise ConfigError(
                    f"rank {rank} has another {what} than rank {first_rank}: "
                    f"{'; '.join(differing[:3]) or 'one has more keys'}. {_WAYS_OUT[what]}"
                )
