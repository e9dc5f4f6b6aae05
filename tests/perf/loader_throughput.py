"""How fast the loader hands out batches, by number of worker processes; writes a record, gates on nothing.

python tests/perf/loader_throughput.py --dataset DIR --record docs/benchmarks/X.md
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from data_prep.shard_schema import read_manifest  # noqa: E402 - after the path
from pretrain.config import DataConfig  # noqa: E402
from pretrain.data import TokenLoader  # noqa: E402

SEQ_LEN, MICRO_BATCH, PER_STEP, WARM_UP = 1024, 64, 512, 2


def measure(dataset: str, n_workers: int, n_steps: int) -> str:
    """One row of the table. CPU time is of this process and, once they ended, its workers."""
    manifest = read_manifest(dataset)
    cfg = DataConfig(
        path=dataset,
        seq_len=SEQ_LEN,
        tokens_per_step=SEQ_LEN * PER_STEP,
        micro_batch=MICRO_BATCH,
        n_workers=n_workers,
        reset_at_documents=True,
    )
    loader = TokenLoader(
        cfg, split="train", vocab_size=manifest.vocab_size, seed=0, dp_rank=0, dp_size=1, n_sequences_per_step=PER_STEP
    )
    before = _cpu_s()
    for _ in range(WARM_UP):
        loader.next_step()
    started = time.monotonic()
    for _ in range(n_steps):
        loader.next_step()
    wall = time.monotonic() - started
    loader.close()
    sequences = n_steps * PER_STEP
    tokens_per_cpu_s = (n_steps + WARM_UP) * PER_STEP * SEQ_LEN / (_cpu_s() - before)
    return f"| {n_workers} | {sequences / wall:,.0f} | {sequences * SEQ_LEN / wall / 1e6:.1f} | {tokens_per_cpu_s / 1e6:.1f} |"


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--record", required=True)
    args = parser.parse_args()
    rows = "\n".join(measure(args.dataset, n_workers, args.steps) for n_workers in (0, 1, 2))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    text = (
        f"# Loader throughput\n\nCommit {commit.stdout.strip()}, {cpu.split(':')[1].strip()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, mosaicml-streaming {version('mosaicml-streaming')}, torch "
        f"{version('torch')}, {time.strftime('%Y-%m-%d')}. Other load was on the machine: tokens per CPU second is the "
        f"figure to compare.\n\nSequences of {SEQ_LEN}, micro-batches of {MICRO_BATCH}, {args.steps} steps of {PER_STEP} "
        f"sequences after {WARM_UP}, reset_at_documents on, rows of {read_manifest(args.dataset).row_tokens} tokens.\n\n"
        f"| n_workers | sequences/s | M tokens/s | M tokens / CPU s |\n|---|---|---|---|\n{rows}\n"
    )
    Path(args.record).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
