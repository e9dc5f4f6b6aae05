"""A faster encoder for GPT-2-style `tokenizer.json` files that gives exactly the ids of the `tokenizers` library.

Byte-level BPE is the same algorithm in tiktoken, some six times faster a core (docs/data.md). Equality needs care:

- `supported` refuses a file with anything that tiktoken does not do: another normaliser than none or NFC, another
  splitting rule, dropout, an unknown token, merges out of the order of their ids.
- The added tokens that are not special (runs of spaces in GPT-NeoX's) are cut out first, leftmost-longest, as the
  `tokenizers` library does. Special tokens are not: their strings are text.
- Text with a code point that Unicode 14 (Python 3.11's tables) does not assign goes to the reference encoder: the two
  libraries' regular expressions may classify it by different versions of Unicode. So does text that overflows
  tiktoken's regular expression stack, such as a megabyte of spaces.
- Every CHECK_EVERY-th document is encoded by the reference as well; a difference stops the run.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GPT2_PATTERN = (
    r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # tokenizers' ByteLevel, use_regex
)
CHECK_EVERY = 512
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
LONG_RUN = 20_000
LONG_SPACE = re.compile(rf"\s{{{LONG_RUN}}}")

Ids = NDArray[np.unsignedinteger]


class EncoderDiffersError(RuntimeError):
    """The fast encoder's ids of a document are not the reference's; the message has its beginning, and the way out."""


class FastByteLevelBpe:
    """tiktoken over the vocabulary of a `tokenizer.json`, with the `tokenizers` object as the reference."""

    def __init__(self, raw: dict[str, Any], reference: Any, dtype: np.dtype[Any]) -> None:
        import tiktoken

        added = {token["content"] for token in raw["added_tokens"]}
        to_byte = {character: byte for byte, character in _byte_characters().items()}
        ranks = {
            bytes(to_byte[c] for c in token): number
            for token, number in raw["model"]["vocab"].items()
            if token not in added
        }
        self._encoding = tiktoken.Encoding(
            "tokenizer.json", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        plain_added = {t["content"]: t["id"] for t in raw["added_tokens"] if not t["special"]}
        self._added = plain_added
        longest_first = sorted(plain_added, key=len, reverse=True)
        self._added_pattern = re.compile("|".join(map(re.escape, longest_first))) if plain_added else None
        self._added_starts = {token[:2] for token in plain_added}
        self._normalizer = reference.normalizer
        self._reference = reference
        self._dtype = dtype
        self._n_documents = 0

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text. Raises EncoderDiffersError where a checked document differs from the reference."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Ids:
        if (not text.isascii() and _unassigned().search(text)) or (len(text) >= LONG_RUN and _has_long_run(text)):
            return self._by_reference(text)
        ids = np.array(self._by_tiktoken(text), self._dtype)
        self._n_documents += 1
        if self._n_documents % CHECK_EVERY == 1 and not np.array_equal(ids, self._by_reference(text)):
            raise EncoderDiffersError(
                f"the fast encoder differs from the tokenizers library on a document that begins {text[:80]!r}: run "
                "with --encoder reference, and report the document"
            )
        return ids

    def _by_tiktoken(self, text: str) -> list[int]:
        if self._normalizer is not None and not text.isascii():
            text = self._normalizer.normalize_str(text)
        if self._added_pattern is None or not any(start in text for start in self._added_starts):
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        end = 0
        for match in self._added_pattern.finditer(text):
            if match.start() > end:
                ids += self._encoding.encode_ordinary(text[end : match.start()])
            ids.append(self._added[match[0]])
            end = match.end()
        if not end:
            return self._encoding.encode_ordinary(text)
        if end < len(text):
            ids += self._encoding.encode_ordinary(text[end:])
        return ids

    def _by_reference(self, text: str) -> Ids:
        (encoding,) = self._reference.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, self._dtype)


def supported(path: Path) -> dict[str, Any] | None:
    """The parsed tokenizer.json where the fast encoder does exactly what it says, and tiktoken is there; else None."""
    if importlib.util.find_spec("tiktoken") is None:
        return None
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    raw["added_tokens"] = raw.get("added_tokens") or []
    model, pre = raw["model"], raw.get("pre_tokenizer") or {}
    plain_model = model.get("type") == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    byte_level = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space", True)
    normalizer = raw.get("normalizer")
    if not plain_model or not byte_level or model.get("ignore_merges") or normalizer not in (None, {"type": "NFC"}):
        return None
    if any(t["single_word"] or t["lstrip"] or t["rstrip"] for t in raw["added_tokens"]):
        return None
    if any(not t["special"] and not t["normalized"] for t in raw["added_tokens"]):
        return None
    added = {token["content"] for token in raw["added_tokens"]}
    characters = {c for byte, c in _byte_characters().items() if byte not in NEVER_IN_UTF8}
    vocab: dict[str, int] = model["vocab"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged_ids = [vocab.get("".join(merge), -1) for merge in merges]
    in_order = all(a < b for a, b in zip([-1, *merged_ids], merged_ids, strict=False))
    mergeable = {token for token in vocab if token not in added}
    made = {"".join(merge) for merge in merges} | characters
    return raw if in_order and made <= mergeable <= made | set(_byte_characters().values()) else None


def _byte_characters() -> dict[int, str]:
    """The printable character by which GPT-2's byte-level vocabulary writes each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _has_long_run(text: str) -> bool:
    """Whether the text has a run of LONG_RUN characters that are all white space, or all not."""
    return LONG_SPACE.search(text) is not None or max(map(len, text.split()), default=0) >= LONG_RUN


@functools.cache
def _unassigned() -> re.Pattern[str]:
    """Matches a code point that Python's Unicode tables do not assign."""
    ranges = [[0x40000, 0xDFFFF]]  # ten planes that Unicode has not opened: not worth 650,000 look-ups
    for code in itertools.chain(range(0x40000), range(0xE0000, sys.maxunicode + 1)):
        if unicodedata.category(chr(code)) == "Cn":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return re.compile("[" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges) + "]")
