"""Steps that are not fit to train on: which they are, and how a run gets past them.

Every decision is a function of RunState and of losses that all ranks agree on, so that a resumed run, or one at the same
layout that is run again, decides the same. Each is an event in metrics.jsonl.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

from modeling.checkpoint_reader import RunState
from pretrain.config_sections import StabilityConfig


class NonFiniteError(RuntimeError):
    """A run that could not get past its bad steps; raised on all ranks before any of them updates a parameter."""


def why_bad(state: RunState, cfg: StabilityConfig, loss: float) -> str | None:
    """Why the step with this loss (mean over ranks, weighted over widths) must update nothing; None where it may."""
    if not math.isfinite(loss):
        return "a loss is not finite"
    if cfg.spike_factor and len(state.recent_losses) >= cfg.spike_window:
        usual = statistics.median(state.recent_losses)
        if loss > cfg.spike_factor * usual:
            return f"loss {loss:.4f} is over {cfg.spike_factor:g} times the usual {usual:.4f}"
    return None


def count(state: RunState, cfg: StabilityConfig, loss: float, *, bad: bool) -> RunState:
    """`state` with this step counted as good or bad."""
    if bad:
        return replace(state, bad_in_a_row=state.bad_in_a_row + 1, bad_steps=state.bad_steps + 1)
    recent = (*state.recent_losses, loss)[-cfg.spike_window :] if cfg.spike_factor else ()
    return replace(state, bad_in_a_row=0, recent_losses=recent)


def gone_back(saved: RunState, now: RunState) -> RunState:
    """Where a run stands that took its weights from `saved` and goes on with the data after `now`."""
    return replace(saved, sequence=now.sequence, bad_in_a_row=0, bad_steps=now.bad_steps, rollbacks=now.rollbacks + 1)


def check_last_steps(state: RunState) -> None:
    """Raise NonFiniteError where the run that ends here is in the middle of a streak of bad steps, or has no good one.

    A single bad step at the end is one of those that any run may have.
    """
    if state.bad_in_a_row > 1 or (state.step and not state.n_updates):
        raise NonFiniteError(
            f"the last {state.bad_in_a_row} of {state.step} steps updated nothing: the run has not finished in order. Its last "
            "checkpoint has the weights from before them; look at the data of these steps, and go on with a larger optim.steps"
        )
