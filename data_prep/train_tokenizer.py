"""Train a sentencepiece tokenizer on a sample of the text that will be tokenized.

    python data_prep/train_tokenizer.py --input 'fineweb/*.parquet' --vocab-size 32000 --output tokenizer.model

Byte fallback is on and no normalisation is done, so every text survives encoding and decoding byte for byte. Id 0 is
<unk>, never used thanks to byte fallback; id 1 is </s>, which ends every document.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

# Run by its path, a script finds its own folder first on sys.path and not the repository: make both ways work.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import sentencepiece

from data_prep.corpus_io import Filters, InputError, Source, chunks, documents, find_sources

MIN_VOCAB = 256 + 2
"""256 bytes, <unk> and </s>."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for what the user can mend."""
    args = _parser().parse_args(argv)
    try:
        n_documents = train(args)
    except (InputError, ValueError, OSError, RuntimeError) as error:  # sentencepiece raises the last two
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {args.vocab_size} pieces from {n_documents} documents")
    return 0


def train(args: argparse.Namespace) -> int:
    """Train and write the model, whole or not at all; returns how many documents it learnt from."""
    if args.vocab_size <= MIN_VOCAB:
        raise ValueError(
            f"--vocab-size {args.vocab_size}: must be above {MIN_VOCAB}, the 256 bytes and two special tokens"
        )
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    sources = find_sources(args.input)
    budget = _Budget(int(args.sample_mb * 1e6))
    texts = budget.take(_texts(sources, args.text_column))
    first = next(texts, None)
    if first is None:
        raise InputError(f"no text in {', '.join(args.input)}: is --text-column {args.text_column} right?")
    temporary = output.with_name(f".{output.name}.writing")
    with temporary.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], texts),
            model_writer=writer,
            model_type=args.model_type,
            vocab_size=args.vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
        writer.flush()
        os.fsync(writer.fileno())
    temporary.rename(output)
    return budget.n_documents


class _Budget:
    """Passes documents on, line by line, until their UTF-8 bytes are used up."""

    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes
        self.n_documents = 0

    def take(self, texts: Iterator[str]) -> Iterator[str]:
        """Lines of the texts, newlines kept: pieces then learn them, and long documents stay under the line limit."""
        for text in texts:
            if self._left <= 0:
                return
            self.n_documents += 1
            self._left -= len(text.encode())
            yield from text.splitlines(keepends=True)


def _texts(sources: Sequence[Source], text_column: str) -> Iterator[str]:
    """Documents of all sources, a chunk of each in turn, so that a sample is not the first file alone."""
    skipped: Counter[str] = Counter()
    streams = [chunks(i, source, [text_column], Filters()) for i, source in enumerate(sources)]
    while streams:
        for stream in list(streams):
            chunk = next(stream, None)
            if chunk is None:
                streams.remove(stream)
            elif chunk.payload is not None:
                yield from documents(chunk, text_column, Filters(), skipped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a sentencepiece tokenizer with byte fallback.")
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or folders of parquet or JSON lines")
    parser.add_argument("--text-column", default="text", help="column or key that holds the text")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, the 256 bytes included")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--sample-mb", type=float, default=200.0, help="about how much text to learn from")
    parser.add_argument("--output", required=True, help="the .model file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
