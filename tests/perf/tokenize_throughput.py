"""Tokens a second and core: this preparation, bare batch encoders, and an llm.c-style pool, side by side.

    python tests/perf/tokenize_throughput.py --input 'DIR/*.parquet' --tokenizer tokenizer.json --record docs/benchmarks/X.md

CPU seconds (user + system, all processes) are what is compared, so other load on the machine disturbs little. A corpus
of --corpus-gb is made by mixing paragraphs of the input documents. Memory is the largest resident set of any one
process. Writes a record; gates on nothing.
"""

from __future__ import annotations

import argparse
import glob
import json
import multiprocessing
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from data_prep.tokenizers_io import open_tokenizer  # noqa: E402 - after the path

SLICE = 64


@dataclass(frozen=True)
class Result:
    name: str
    n_bytes: int
    n_tokens: int
    cpu_s: float
    wall_s: float
    peak_mib: float

    def row(self, bare: float) -> str:
        rate = self.n_tokens / self.cpu_s
        cells = (
            self.name,
            f"{self.n_bytes / 1e6:,.0f}",
            f"{self.n_tokens / 1e6:.1f}",
            f"{self.cpu_s:.1f}",
            f"{self.wall_s:.1f}",
            f"{rate / 1e6:.2f}",
            f"{self.n_bytes / self.cpu_s / 1e6:.1f}",
            f"{rate / bare:.2f}",
            f"{self.peak_mib:,.0f}",
        )
        return "| " + " | ".join(cells) + " |"


def read(paths: list[str]) -> list[str]:
    texts: list[str] = []
    for path in paths:
        texts += pq.read_table(path, columns=["text"])["text"].to_pylist()
    return texts


def make_corpus(texts: list[str], folder: Path, n_bytes: int) -> list[str]:
    """Parquet files of 256 MB and row groups of 1,000 documents, of paragraphs drawn from `texts`."""
    rng = random.Random(0)
    paragraphs = [p for text in texts for p in text.split("\n") if p.strip()]
    paths: list[str] = []
    left = n_bytes
    while left > 0:
        path = folder / f"{len(paths):03}_00000.parquet"
        paths.append(str(path))
        size = 0
        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            while size < min(left, 256 << 20):
                documents = ["\n".join(rng.choices(paragraphs, k=rng.randint(1, 40))) for _ in range(1000)]
                size += sum(len(document.encode()) for document in documents)
                writer.write_table(pa.table({"text": documents}))
        left -= size
    return paths


def bare(name: str, texts: list[str], encode: Callable[[list[str]], list[int]]) -> Result:
    """Only the encoder's own call; `encode` returns the number of tokens of each text."""
    encode(texts[:SLICE])
    n_tokens, cpu, wall = 0, time.process_time(), time.monotonic()
    for at in range(0, len(texts), SLICE):
        n_tokens += sum(encode(texts[at : at + SLICE]))
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Result(name, sum(len(t.encode()) for t in texts), n_tokens, cpu, wall, peak)


def children(name: str, n_bytes: int, command: list[str], n_tokens: Callable[[], int]) -> Result:
    """A whole program, start-up and files included. Its peak is of its largest process."""
    script = (
        "import resource,subprocess,sys;r=subprocess.run(sys.argv[1:]).returncode;"
        "u=resource.getrusage(resource.RUSAGE_CHILDREN);print('USAGE',r,u.ru_utime+u.ru_stime,u.ru_maxrss)"
    )
    wall = time.monotonic()
    out = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=True)
    wall = time.monotonic() - wall
    status, cpu, peak = out.stdout.split("USAGE")[1].split()
    if status != "0":
        raise RuntimeError(out.stderr)
    return Result(name, n_bytes, n_tokens(), float(cpu), wall, int(peak) / 1024)


def ours(name: str, paths: list[str], n_bytes: int, tokenizer: str, workers: int, *more: str) -> Result:
    """This project's script on these files."""
    with tempfile.TemporaryDirectory(prefix="tokenized-") as out:
        command = [sys.executable, str(REPOSITORY / "data_prep" / "tokenize_fineweb.py"), "--input", *paths]
        command += ["--tokenizer", tokenizer, "--output", out, "--workers", str(workers), *more]

        def n_tokens() -> int:
            return sum(json.loads((Path(out) / "manifest.json").read_text())["n_tokens"].values())

        return children(name, n_bytes, command, n_tokens)


def pool_worker(spec: str) -> None:
    """The llm.c way: a pool over documents, one uint16 buffer a shard, np.save-like files. argv: spec, workers, out."""
    tokenizer, workers, out, *paths = spec.split("\n")
    tokens, filled = np.empty(10**8, np.uint16), 0
    with multiprocessing.get_context("fork").Pool(int(workers), _pool_start, (tokenizer,)) as pool:
        for ids in pool.imap(_pool_encode, _stream(paths), chunksize=16):
            if filled + len(ids) > len(tokens):
                tokens[:filled].tofile(out)
                filled = 0
            tokens[filled : filled + len(ids)] = ids
            filled += len(ids)
    tokens[:filled].tofile(out)


def _stream(paths: list[str]) -> Iterator[str]:
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=["text"]):
            yield from batch.column("text").to_pylist()


def _pool_start(tokenizer: str) -> None:
    global _pool_tokenizer  # noqa: PLW0603
    from tokenizers import Tokenizer

    _pool_tokenizer = Tokenizer.from_file(tokenizer)


def _pool_encode(text: str) -> np.ndarray:
    return np.array([0, *_pool_tokenizer.encode(text, add_special_tokens=False).ids], np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--corpus-gb", type=float, default=1.0)
    parser.add_argument("--sample-mb", type=float, default=60.0, help="how much of it the slow encoders are given")
    parser.add_argument("--record", required=True)
    args = parser.parse_args()
    from tokenizers import Tokenizer

    originals = sorted(glob.glob(args.input))
    texts = read(originals)
    plain = Tokenizer.from_file(args.tokenizer)
    fast = open_tokenizer(args.tokenizer)
    encoders: dict[str, Callable[[list[str]], list[int]]] = {
        "tokenizers encode_batch, bare": lambda t: [len(e) for e in plain.encode_batch(t, add_special_tokens=False)],
        "tokenizers encode_batch_fast, bare": lambda t: [
            len(e) for e in plain.encode_batch_fast(t, add_special_tokens=False)
        ],
        f"{fast.encoder}, bare": lambda t: [len(ids) for ids in fast.encode_batch(t)],
    }
    sections: list[str] = []
    with tempfile.TemporaryDirectory(prefix="throughput-") as name:
        folder = Path(name)
        (folder / "sample").mkdir()
        sample = make_corpus(texts, folder / "sample", int(args.sample_mb * 1e6))
        for title, paths in (("input as given", originals), ("sample of the made corpus", sample)):
            documents = read(paths)
            results = [bare(encoder, documents, encode) for encoder, encode in encoders.items()]
            n_bytes = results[0].n_bytes
            pool = folder / "pool.bin"
            command = [sys.executable, __file__, "--pool", "\n".join([args.tokenizer, "2", str(pool), *paths])]
            results.append(
                children("llm.c-style pool, 2 workers", n_bytes, command, lambda p=pool: p.stat().st_size // 2)  # type: ignore[misc]
            )
            reference = ("--encoder", "reference")
            results.append(ours("this, reference encoder, 1 worker", paths, n_bytes, args.tokenizer, 1, *reference))
            results.append(ours("this, 1 worker", paths, n_bytes, args.tokenizer, 1))
            sections.append(table(title, results, results[0]))
        corpus = make_corpus(texts, folder, int(args.corpus_gb * 1e9))
        n_bytes = sum(len(text.encode()) for text in _stream(corpus))
        half = corpus[: max(1, len(corpus) // 2)]
        n_half = sum(len(text.encode()) for text in _stream(half))
        whole = [
            ours("this, 1 worker, half the files", half, n_half, args.tokenizer, 1),
            ours("this, 1 worker", corpus, n_bytes, args.tokenizer, 1),
            ours("this, 2 workers", corpus, n_bytes, args.tokenizer, 2),
        ]
        sections.append(table("the made corpus, whole", whole, results[0]))
    Path(args.record).write_text(record("\n".join(sections), args))


def table(title: str, results: list[Result], reference: Result) -> str:
    """A section of the record; printed as well, since a run takes minutes."""
    head = "| what | MB text | M tokens | CPU s | wall s | M tokens / CPU s | MB / CPU s | of bare | peak MiB |"
    rows = [result.row(reference.n_tokens / reference.cpu_s) for result in results]
    section = "\n".join([f"## {title}\n", head, "|---" * 9 + "|", *rows]) + "\n"
    print(section, flush=True)
    return section


def record(body: str, args: argparse.Namespace) -> str:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "tiktoken", "pyarrow", "numpy"))
    return (
        f"# Tokenization throughput\n\nCommit {commit.stdout.strip()}, {cpu}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {versions}, tokenizer {Path(args.tokenizer).name}, "
        f"{time.strftime('%Y-%m-%d')}. Other load was on the machine: compare CPU seconds, not wall seconds.\n\n"
        f"Command: `python tests/perf/tokenize_throughput.py --input ... --tokenizer {Path(args.tokenizer).name} "
        f"--corpus-gb {args.corpus_gb:g} --sample-mb {args.sample_mb:g}`. 'of bare' is tokens per CPU second over those "
        f"of bare `encode_batch`. Programs include start-up, reading, hashing, packing, writing.\n\n{body}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pool"]:
        pool_worker(sys.argv[2])
    else:
        main()
