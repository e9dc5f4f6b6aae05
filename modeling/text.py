"""Text to token ids and back, for the tools that run a model: tokenizer.json, sentencepiece .model, or tiktoken:NAME.

The data preparation has its own reader of the same files, with what it needs and this does not: speed, hashes, proofs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TIKTOKEN = "tiktoken:"
"""What the name of an encoding begins with, where other tokenizers are files."""
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]")
IDS_BEFORE = 8
"""Ids that the text after them is decoded with, at the least."""
IDS_KEPT = 64
"""More of them are let go."""


@dataclass(frozen=True)
class Text:
    """A tokenizer, as far as generating needs one."""

    encode: Callable[[str], list[int]]
    """Ids of a text, nothing added; special tokens' names are plain text. Raises ValueError where the library cannot take it."""
    decode: Callable[[Sequence[int]], str]
    """Text of ids. Those that the tokenizer does not have, which a model of a larger vocabulary may draw, add none."""
    eos_id: int
    """Id that ends a document."""
    vocab_size: int
    """One more than the largest id."""

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids that a text goes on from: the prompt's, or the end of a document for an empty one.

        Raises ValueError where the prompt is not UTF-8, as what Python makes of other bytes of a command line.
        """
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(f"--prompt {prompt[:80]!a} is not UTF-8 text")
        return self.encode(prompt) or [self.eos_id]

    def until_end(self, ids: Sequence[int]) -> list[int]:
        """The ids before the first end of text."""
        ids = list(ids)
        return ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids


class TextStream:
    """Text of ids as they come: a character that needs several tokens appears when its last one does."""

    def __init__(self, text: Text, before: Sequence[int] = ()) -> None:
        """`before` are the ids that the text goes on from, which are not shown: some tokenizers leave out the space at the
        beginning of a text."""
        self._text, self._ids = text, list(before)
        self._shown, self._n_shown = text.decode(self._ids), len(self._ids)
        self._forget()

    def push(self, ids: Sequence[int]) -> str:
        """Add ids; returns the text that is complete now and was not before."""
        self._ids += ids
        return self._advance(final=False)

    def rest(self) -> str:
        """What is left at the end, incomplete characters included."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        whole = self._text.decode(self._ids)
        # A replacement character at the end may be the first bytes of a longer character.
        if not final and whole.endswith("�"):
            return ""
        new = whole[len(self._shown) :]
        if not whole.startswith(self._shown):
            # One byte of no character makes the library's ByteFallback give up those before it that were whole too.
            new = self._text.decode(self._ids[self._n_shown :])
        self._shown, self._n_shown = whole, len(self._ids)
        if len(self._ids) > IDS_KEPT:
            self._forget()
        return new

    def _forget(self) -> None:
        """Let go of the first ids: all that are here are decoded at every push."""
        for n in range(IDS_BEFORE, min(len(self._ids), 4 * IDS_BEFORE)):
            kept = self._text.decode(self._ids[-n:])
            # In the middle of a character they would have another text.
            if kept and self._shown.endswith(kept):
                self._ids, self._shown, self._n_shown = self._ids[-n:], kept, n
                return


def open_text(spec: str, vocab_size: int, eos_id: int | None = None) -> Text:
    """The tokenizer that `spec` names, for a model of `vocab_size` tokens.

    `eos_id` ended documents in what the model was trained on, where that is known; else one of EOS_NAMES does.

    Raises FileNotFoundError where there is no such file, ValueError where it is no tokenizer, names no end of text, has more
    ids than the model, or tiktoken cannot fetch it.
    """
    if not spec:
        raise ValueError("the model names no tokenizer: pass --tokenizer FILE or tiktoken:NAME")
    if spec.startswith(TIKTOKEN):
        text = _tiktoken(spec, eos_id)
    elif not Path(spec).is_file():
        raise FileNotFoundError(f"tokenizer {spec}: no such file")
    else:
        text = (_sentencepiece if spec.endswith(".model") else _tokenizer_json)(spec, eos_id)
    if text.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {spec} has {text.vocab_size} tokens, the model {vocab_size}: it was trained with another tokenizer"
        )
    if text.eos_id >= text.vocab_size:
        raise ValueError(
            f"tokenizer {spec} has {text.vocab_size} tokens, the model's documents ended with the id {text.eos_id}: it was "
            "trained with another tokenizer"
        )
    return text


def _tokenizer_json(spec: str, eos_id: int | None) -> Text:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(spec)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer {spec}: not a tokenizer.json ({error})") from None
    # Text is text: "<|endoftext|>" in a prompt is the characters it is made of, as in the training data.
    tokenizer.encode_special_tokens = True
    vocab = tokenizer.get_vocab(with_added_tokens=True)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    return Text(encode, decode, _eos(vocab, spec) if eos_id is None else eos_id, max(vocab.values()) + 1)


def _sentencepiece(spec: str, eos_id: int | None) -> Text:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=spec)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"tokenizer {spec}: not a sentencepiece model ({error})") from None
    eos_id = processor.eos_id() if eos_id is None else eos_id
    if eos_id < 0:
        raise ValueError(f"tokenizer {spec}: it has no end-of-sentence piece")

    def encode(text: str) -> list[int]:
        return list(processor.encode(text, out_type=int))

    size = processor.vocab_size()

    def decode(ids: Sequence[int]) -> str:
        return str(processor.decode([int(i) for i in ids if i < size]))

    return Text(encode, decode, eos_id, size)


def _tiktoken(spec: str, eos_id: int | None) -> Text:
    try:
        import tiktoken
    except ImportError:
        raise ValueError(f"tokenizer {spec}: install tiktoken (pip install 'matmamba-pretrain[data]')") from None
    try:
        encoding = tiktoken.get_encoding(spec.removeprefix(TIKTOKEN))
    except OSError as error:
        raise ValueError(
            f"tokenizer {spec}: tiktoken could not fetch it ({error}). Without a network, point TIKTOKEN_CACHE_DIR at a "
            "folder that tiktoken filled on a machine with one, or name a tokenizer file"
        ) from None

    special = encoding._special_tokens
    known = frozenset([*encoding._mergeable_ranks.values(), *special.values()])  # some encodings have gaps

    def decode(ids: Sequence[int]) -> str:
        return str(encoding.decode([i for i in ids if i in known]))

    def encode(text: str) -> list[int]:
        try:
            return list(encoding.encode_ordinary(text))
        except BaseException as error:  # its regular expression overflows: a megabyte of spaces before a word
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"tokenizer {spec} cannot take a run of so many spaces as this text has") from None

    return Text(encode, decode, _eos(special, spec) if eos_id is None else eos_id, encoding.max_token_value + 1)


def _eos(ids: dict[str, int], where: str) -> int:
    for name in EOS_NAMES:
        if name in ids:
            return ids[name]
    raise ValueError(f"tokenizer {where}: none of {', '.join(EOS_NAMES)} in its vocabulary")
