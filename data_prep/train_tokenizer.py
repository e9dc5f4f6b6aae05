"""A sentencepiece tokenizer from a sample of the same inputs that tokenize_fineweb.py reads.

    python data_prep/train_tokenizer.py --input 'fineweb/*.parquet' --vocab-size 32000 --output tokenizer.model

Set up to give every text back: no normalisation, no dummy prefix, white space kept, bytes for what has no piece.
One character is the exception that sentencepiece makes: U+2581, its own sign for a space, comes back as a space.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

# Run by its path, a script finds its own folder first on sys.path and not the repository: make both ways work.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.corpus_files import InputError, Source, find_sources
from data_prep.corpus_io import Filters, chunks, documents
from data_prep.shard_writer import write_atomic

MAX_LINE_BYTES = 16384


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for what the user can mend."""
    args = _parser().parse_args(argv)
    try:
        output = Path(args.output)
        _check(args, output)
        sources = find_sources(args.input, args.hub_config)
        model = train(
            sample_lines(sources, args.text_column, int(args.sample_mb * 1e6)),
            vocab_size=args.vocab_size,
            model_type=args.model_type,
            n_threads=args.threads,
        )
        write_atomic(output, model)
    except (InputError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {args.model_type}, {args.vocab_size} pieces, {len(model):,} bytes")
    return 0


def _check(args: argparse.Namespace, output: Path) -> None:
    """Raise ValueError or OSError where the options cannot be had or the model could not be written; makes its folder."""
    if output.suffix != ".model":
        raise ValueError(f"--output {output}: must end in .model, by which tokenize_fineweb.py knows its kind")
    if output.exists():
        raise ValueError(
            f"--output {output}: it is there, and data may have been made with it: name another, or remove it"
        )
    if args.sample_mb <= 0:
        raise ValueError(f"--sample-mb {args.sample_mb:g}: must be positive")
    if args.threads < 1:
        raise ValueError(f"--threads {args.threads}: must be at least 1")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--output {output}: nothing can be written into {output.parent}")


def sample_lines(sources: list[Source], text_column: str, n_bytes: int) -> Iterator[str]:
    """Lines of the first documents of every source, an equal share of `n_bytes` from each."""
    skipped: Counter[str] = Counter()
    for number, source in enumerate(sources):
        left = -(-n_bytes // len(sources))
        for chunk in chunks(number, source, [text_column], Filters()):
            if left <= 0 or chunk.payload is None:
                break
            for text in documents(chunk, text_column, Filters(), skipped):
                left -= len(text.encode())
                yield from (line for line in text.split("\n") if line and len(line.encode()) <= MAX_LINE_BYTES)
                if left <= 0:
                    break


def train(lines: Iterator[str], *, vocab_size: int, model_type: str, n_threads: int) -> bytes:
    """The serialised model. Raises ValueError where the sample cannot give so many pieces."""
    import sentencepiece

    first = next(lines, None)
    if first is None:
        raise ValueError("no text to train on: is --text-column right?")

    def all_lines() -> Iterator[str]:
        yield first
        yield from lines

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=all_lines(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_LINE_BYTES,
            user_defined_symbols=["\n"],  # lines are trained on one by one, so no piece would hold it
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=-1,
            num_threads=n_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"sentencepiece cannot make {vocab_size} pieces of this sample: {error}") from None
    return model.getvalue()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="files, globs, folders, or OWNER/NAME on the hub")
    parser.add_argument("--hub-config", default="", help="hub configuration, as for tokenize_fineweb.py")
    parser.add_argument("--text-column", default="text", help="column or key that holds the text")
    parser.add_argument("--output", required=True, metavar="FILE.model", help="where the model goes")
    parser.add_argument("--vocab-size", type=int, default=32000, help="pieces, the 256 bytes included")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="kind of model")
    parser.add_argument("--sample-mb", type=float, default=200.0, help="text to train on")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="training threads")
    return parser


if __name__ == "__main__":
    sys.exit(main())
