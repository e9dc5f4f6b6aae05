"""Self-made text, tokenizers and input files for the tests of data_prep."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ["the", "of", "and", "a", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at", "by", "i", "this", "had", "not", "are", "but", "from", "or", "have", "an", "they", "which", "one", "you", "were", "her", "all", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "more", "no", "if", "out", "so", "said", "what", "naïve", "café", "Ünïcode", "東京", "emoji", "😀", "don't", "we'll", "I'M", "1984", "3.14", "x²", "\xa0", "ﬁne", "é"]  # fmt: skip


def texts(n: int, seed: int = 0) -> list[str]:
    """`n` documents of 5 to 120 words with punctuation, digits, runs of spaces and other scripts."""
    rng = random.Random(seed)
    return [
        "".join(
            rng.choice(WORDS) + rng.choice((" ", " ", " ", ", ", ".\n", "  ", "\n\n"))
            for _ in range(rng.randint(5, 120))
        )
        for _ in range(n)
    ]


@cache
def _byte_level_json() -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(200), trainer)
    tokenizer.add_tokens(["    ", "  "])  # as GPT-NeoX's: plain added tokens that text is searched for
    text: str = tokenizer.to_str()
    return text


def byte_level_tokenizer(folder: Path) -> Path:
    """A GPT-2-style tokenizer.json with an end-of-text token and two added runs of spaces."""
    path = folder / "tokenizer.json"
    path.write_text(_byte_level_json(), encoding="utf-8")
    return path


def write_parquet(path: Path, documents: list[Any], group: int = 20, **columns: list[Any]) -> Path:
    """A parquet file with a text column and others, in row groups of `group` documents."""
    pq.write_table(pa.table({"text": documents, **columns}), path, row_group_size=group)
    return path


def write_jsonl(path: Path, documents: list[Any]) -> Path:
    """JSON lines; what is bytes goes in as it is."""
    lines = [d if isinstance(d, bytes) else json.dumps({"text": d}).encode() for d in documents]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
