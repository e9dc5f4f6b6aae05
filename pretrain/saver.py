"""Writing checkpoints while training goes on.

A save has three parts. *Copy*: each rank copies its optimizer fragments into one host buffer, which is all that training
waits for. *Write*: a thread writes and syncs the rank's file from that buffer. *Commit*: at the next step border at which
all ranks have written, rank 0 writes the manifest and renames the folder. One save is in flight at a time; a second one
waits for it. A rank that dies between the parts leaves a `.writing-` folder that no reader takes for a checkpoint, and the
next start removes.

Extra host memory: 12 bytes for each parameter of this rank's ZeRO shard (16 with a moving average), once, whatever the model's size: nothing is
gathered, on a GPU or off it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from modeling.checkpoint_reader import FORMAT_VERSION, CheckpointError, Piece, RunState
from modeling.models import logical_shapes
from modeling.tensor_parallel import layout_of
from pretrain import checkpoint, retention
from pretrain.config import RunConfig
from pretrain.config_io import config_to_plain
from pretrain.distributed import RankError, Ranks
from pretrain.engine import Engine, Fragment
from pretrain.provenance import git_commit, versions

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole, and what it cost."""

    folder: Path
    stall_s: float
    """Seconds that training stood still for it on this rank."""
    total_s: float
    """Seconds from its start until it was whole."""


class Saver:
    """The checkpoints of one run. Every rank makes one, and every rank calls each method at the same step border.

    `about_data` is what each says of the run's data, for whoever goes on from it or uses the model.
    """

    def __init__(
        self, engine: Engine, cfg: RunConfig, ranks: Ranks, about_data: Mapping[str, Any] | None = None
    ) -> None:
        self._engine, self._cfg, self._ranks, self._about_data = engine, cfg, ranks, dict(about_data or {})
        self._root = checkpoint.checkpoint_dir(cfg.run_dir)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._buffer: Tensor | None = None
        self._write: Future[dict[str, Any]] | None = None
        self._prune: Future[None] | None = None
        self._state = RunState()
        self._began = self._stall_s = 0.0
        self.slowest_s = 0.0
        """Seconds that the slowest save so far took in all."""
        if cfg.checkpoint.asynchronous and cfg.checkpoint.every_steps:
            self._buffer = self._new_buffer()  # now, so that the first save does not wait for it

    def save(self, state: RunState) -> Saved:
        """Write the checkpoint of `state`, and of the one in flight before it, and wait until it is whole.

        Raises CheckpointError on every rank where any rank could not write; earlier checkpoints are then untouched.
        """
        self.start(state)
        saved = self.finish()
        assert saved is not None
        return saved

    def start(self, state: RunState) -> Saved | None:
        """Begin the checkpoint of `state`; returns the one that was in flight, which is whole now. Raises as `save`."""
        before = self.finish()
        self._began, self._state = time.perf_counter(), state
        folder = checkpoint.temporary_dir(self._root, state.step)
        main = self._ranks.is_main
        self._attempt(lambda: checkpoint.begin(self._root, state.step) if main else None)
        pieces = self._copy()
        self._write = self._thread.submit(checkpoint.write_rank_file, folder, self._ranks.rank, pieces)
        self._stall_s = time.perf_counter() - self._began
        return before

    def poll(self) -> Saved | None:
        """The checkpoint in flight, if all ranks have written it by now, made whole. Raises as `save`."""
        if self._write is None or self._ranks.agree_any(not self._write.done()):
            return None
        return self.finish()

    def finish(self) -> Saved | None:
        """Wait for the checkpoint in flight and make it whole; None where there is none. Raises as `save`."""
        if self._write is None:
            return None
        waiting, write, self._write = time.perf_counter(), self._write, None
        entry = self._attempt(write.result)
        manifest = _manifest(self._cfg, self._ranks, self._state, self._engine.kinds, self._ranks.gather_objects(entry))
        manifest |= self._about_data
        step, main = self._state.step, self._ranks.is_main
        self._attempt(lambda: checkpoint.commit(self._root, step, manifest) if main else None)
        # In a streak of bad steps a roll-back may want the checkpoints from before it; the last one has yet to be validated.
        if not self._state.bad_in_a_row and step < self._cfg.optim.steps:
            self.prune()
        if not self._cfg.checkpoint.asynchronous:
            self._buffer = None
        now = time.perf_counter()
        self.slowest_s = max(self.slowest_s, now - self._began)
        return Saved(self._root / checkpoint.step_name(step), self._stall_s + now - waiting, total_s=now - self._began)

    def prune(self) -> None:
        """Start to remove what the newest checkpoint made old, beside what follows."""
        self._report_prune()
        if self._ranks.is_main:
            self._prune = self._thread.submit(retention.prune, self._root, self._cfg.checkpoint)

    def settle(self) -> Saved | None:
        """As `finish`, and wait until what the new checkpoint made old is removed."""
        saved = self.finish()
        self._report_prune()
        return saved

    def close(self) -> None:
        """Wait for the thread. What is in flight is not made whole: call `finish` for that."""
        self._thread.shutdown()
        self._report_prune()

    def _report_prune(self) -> None:
        """Old checkpoints that cannot be removed are no reason to stop, but the disk will fill."""
        if self._prune is not None and (error := self._prune.exception()) is not None:
            logger.warning("an old checkpoint was not removed: %s", error)
        self._prune = None

    def _attempt(self, work: Callable[[], T]) -> T:
        try:
            return self._ranks.attempt(work, (OSError,))
        except RankError as error:
            if self._ranks.is_main:
                checkpoint.abandon(self._root, self._state.step)
            raise CheckpointError(
                f"checkpoint of step {self._state.step} was not written: {error}. Earlier checkpoints in {self._root} "
                "are whole"
            ) from None

    def _fragments(self) -> list[tuple[str, Fragment]]:
        """What this rank writes: its optimizer fragments; of what all tp ranks hold alike, tp rank 0's."""
        found = []
        for name in self._engine.parameters:
            fragment = self._engine.fragment(name)
            if fragment is not None and (self._ranks.tp.rank == 0 or layout_of(name).is_sharded):
                found.append((name, fragment))
        return found

    def _new_buffer(self) -> Tensor:
        buffer = torch.empty(
            len(self._engine.kinds) * sum(fragment.master.numel() for _, fragment in self._fragments())
        )
        if self._ranks.device.type == "cuda" and buffer.numel():
            # Page-locked by hand: torch's pinned allocator rounds each block up to a power of two.
            code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel() * 4, 0)
            torch.cuda.check_error(int(code))
        return buffer

    def _copy(self) -> dict[Piece, dict[str, Tensor]]:
        """This rank's fragments as they are now, in host memory that training does not touch."""
        if self._buffer is None:
            self._buffer = torch.empty(len(self._engine.kinds) * sum(f.master.numel() for _, f in self._fragments()))
        pieces: dict[Piece, dict[str, Tensor]] = {}
        used = 0
        for name, fragment in self._fragments():
            numel = fragment.master.numel()
            piece = Piece(name=name, tp_rank=self._ranks.tp.rank, start=fragment.start, numel=numel)
            pieces[piece] = {}
            for kind in self._engine.kinds:
                target = self._buffer[used : used + numel]
                target.copy_(getattr(fragment, kind).detach(), non_blocking=True)
                pieces[piece][kind] = target
                used += numel
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return pieces


def _manifest(
    cfg: RunConfig, ranks: Ranks, state: RunState, kinds: tuple[str, ...], entries: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "state": asdict(state),
        "config": config_to_plain(cfg),
        "layout": {"tensor": ranks.tp.size, "data": ranks.dp_size, "zero_stage": cfg.parallel.zero_stage},
        "kinds": kinds,
        "shapes": logical_shapes(cfg.model),
        "files": entries,
        "git_commit": git_commit(),
        "versions": versions(),
    }
