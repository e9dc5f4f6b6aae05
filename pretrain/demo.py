"""`make demo`: the whole road on a CPU in a few minutes, by the commands that people use.

Text from Python's own documentation, a sentencepiece tokenizer, token shards, a nested LM of four widths trained by two
ranks under DeepSpeed ZeRO-1, stopped half-way by SIGTERM, resumed from its sharded checkpoint; then a table, a picture,
and text from two widths. Everything lands in demo/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain.metrics import Record, read_metrics
from pretrain.plot import plot_losses
from pretrain.train import EXIT_REQUEUE

FOLDER = Path("demo")
RUN = FOLDER / "run"
MADE = ("text", "tokenizer.model", "shards", "run", "losses.png")
"""All that the demo puts into its folder."""
CONFIG = "configs/lm_tiny.yaml"
STOP_AFTER_STEP = 50
ROWS = ("--row-tokens", "256", "--val-fraction", "0.05")
PROMPT = "Return the"

console = Console()


def main(argv: list[str] | None = None) -> int:
    """Run every stage; returns 0 where all of them did what they should."""
    # It takes no options; --help and what is mistyped must not remove the last demo and train for minutes.
    argparse.ArgumentParser(
        prog="python -m pretrain.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    start = time.monotonic()
    clear()
    text = str(FOLDER / "text" / "*.parquet")
    tokenizer = str(FOLDER / "tokenizer.model")
    shards = str(FOLDER / "shards")
    step("Text", ["data_prep/make_demo_text.py", str(FOLDER / "text")])
    step("Tokenizer", ["data_prep/train_tokenizer.py", "--input", text, "--vocab-size", "2048", "--output", tokenizer])
    step(
        "Token shards",
        ["data_prep/tokenize_fineweb.py", "--input", text, "--tokenizer", tokenizer, "--output", shards, *ROWS],
    )
    heading(f"Training, two ranks; SIGTERM after step {STOP_AFTER_STEP}")
    code = train(stop_after=STOP_AFTER_STEP)
    if code != EXIT_REQUEUE:
        return fail(f"training ended with {code} where it was to save and end with {EXIT_REQUEUE}")
    heading("Training goes on from the sharded checkpoint")
    code = train()
    if code != 0:
        return fail(f"training ended with {code}")
    records = read_metrics(RUN / "metrics.jsonl")
    losses = [record for record in records if record["kind"] == "eval"]
    show_table(losses)
    plot_losses(RUN / "metrics.jsonl", FOLDER / "losses.png", title="configs/lm_tiny.yaml on two CPU ranks")
    for width in ("1", "1/4"):
        step(f"Sample at width {width}", ["-m", "pretrain.sample", str(RUN), "--width", width, "--prompt", PROMPT])
    if any(losses[-1]["loss"][name] >= losses[0]["loss"][name] for name in losses[0]["loss"]):
        return fail("a width's validation loss did not fall")
    console.print(f"\nDone in {time.monotonic() - start:.0f} s. Loss curves: {FOLDER / 'losses.png'}; the run: {RUN}")
    return 0


def clear() -> None:
    """Remove what an earlier demo made, and nothing else of the folder: docs put data sets of their own there."""
    FOLDER.mkdir(exist_ok=True)
    for name in MADE:
        if (FOLDER / name).is_dir():
            shutil.rmtree(FOLDER / name)
        else:
            (FOLDER / name).unlink(missing_ok=True)


def step(title: str, command: list[str]) -> None:
    """Run one script of the project, showing its command; ends the demo where it fails."""
    heading(title)
    console.print(f"$ python {' '.join(command)}", style="dim", highlight=False)
    result = subprocess.run([sys.executable, *command], check=False)
    if result.returncode:
        sys.exit(fail(f"{command[0]} ended with {result.returncode}"))


def train(stop_after: int | None = None) -> int:
    """Train on two ranks; sends SIGTERM to both once metrics.jsonl shows `stop_after`. Returns rank 0's exit code."""
    world_size = 2
    command = [sys.executable, "-m", "pretrain", CONFIG]
    console.print(f"$ torchrun --nproc-per-node 2 -m pretrain {CONFIG}", style="dim", highlight=False)
    # One process a rank and no torchrun, whose agent would turn exit code 75 into 1.
    base = os.environ | {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000)}
    ranks = [
        subprocess.Popen(command, env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world_size)
    ]
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.2)
        if stop_after is not None and last_step() >= stop_after:
            stop_after = None
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
        if any(rank.poll() not in (None, 0, EXIT_REQUEUE) for rank in ranks):
            for rank in ranks:
                rank.kill()
    return max(rank.wait() for rank in ranks)


def last_step() -> int:
    """The last step that metrics.jsonl tells of; 0 before there is one."""
    path = RUN / "metrics.jsonl"
    return max((record["step"] for record in read_metrics(path)), default=0) if path.exists() else 0


def show_table(losses: list[Record]) -> None:
    """Validation loss per width over the run."""
    table = Table(title="Validation loss (nats a token) of each width, from one run")
    table.add_column("step", justify="right")
    for name in losses[0]["loss"]:
        table.add_column(f"width {name}", justify="right")
    for record in losses:
        table.add_row(str(record["step"]), *(f"{loss:.3f}" for loss in record["loss"].values()))
    console.print(table)


def heading(text: str) -> None:
    """A title between stages."""
    console.rule(text, align="left")


def fail(message: str) -> int:
    """Say what went wrong; returns the exit code."""
    console.print(f"demo failed: {message}", style="bold red")
    return 1


if __name__ == "__main__":
    sys.exit(main())
