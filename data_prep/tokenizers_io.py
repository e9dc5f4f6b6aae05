"""One interface over Hugging Face `tokenizer.json`, sentencepiece `.model` and tiktoken encodings.

Rules that hold for all three:

- Text is text: a special token's string inside a document ("<|endoftext|>") is encoded as the characters it is made of.
  A tokenizer whose model takes the string of its end-of-text token for that token, as Unigram's do, is refused.
- Nothing is added: no bos, no post-processor template, no truncation, no padding. The caller appends `eos_id`.
- The end-of-text id is the tokenizer's own where it names one (sentencepiece, tiktoken); for `tokenizer.json` it is the
  first of EOS_NAMES in the vocabulary. `--eos-token` overrides it.
- `decode(encode(text)) == text`, byte for byte, where `lossless` is True. A tokenizer that normalises (NFC, dummy
  prefix, whitespace) gives back the normalised text; one without byte fallback loses what it does not know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep import fast_bpe
from data_prep.shard_schema import file_sha256, token_dtype

EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]")

Ids = NDArray[np.unsignedinteger]


class TextTokenizer(Protocol):
    """What the preparation needs of a tokenizer."""

    name: str
    """File or encoding name."""
    sha256: str
    """Hash of the tokenizer file's bytes (tiktoken: of its ranks, pattern and special tokens)."""
    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """Id that ends a document."""
    lossless: bool
    """Whether decoding an encoded text gives back exactly its bytes."""
    encoder: str
    """Which library makes the ids, for people."""

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Ids | None]:
        """Ids of each text, in the narrowest dtype for the vocabulary; None of one that the library cannot take."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""


def open_tokenizer(spec: str, eos_token: str = "", *, reference: bool = False) -> TextTokenizer:
    """The tokenizer that `spec` names: FILE.json, FILE.model, or `tiktoken:ENCODING`.

    `reference` keeps a tokenizer.json on the `tokenizers` library where data_prep.fast_bpe would give the same ids.

    Raises FileNotFoundError where there is no such file, ValueError where it is no tokenizer, names no end of text, or
    tiktoken cannot fetch it.
    """
    if spec.startswith("tiktoken:"):
        return TiktokenTokenizer.named(spec.removeprefix("tiktoken:"), eos_token)
    path = Path(spec)
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer {spec}: no such file. Name a tokenizer.json, a sentencepiece .model, or tiktoken:ENCODING"
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eos_token, reference=reference)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, eos_token)
    raise ValueError(f"tokenizer {spec}: unknown kind {path.suffix!r}. Use .json, .model, or tiktoken:ENCODING")


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, path: Path, eos_token: str = "", *, reference: bool = False) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer {path}: not a tokenizer.json ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # their strings inside text are text
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = path.name
        self.sha256 = file_sha256(path)
        self.vocab_size = max(vocab.values()) + 1
        self.eos_id = _find_eos(vocab, eos_token, str(path))
        self._check_eos_is_no_text(path)
        self.lossless = self._tokenizer.normalizer is None and _is_byte_level(self._tokenizer.pre_tokenizer)
        self._dtype = np.dtype(token_dtype(self.vocab_size))
        self._fast = None
        raw = None if reference else fast_bpe.supported(path)
        if raw is not None:
            self._fast = fast_bpe.FastByteLevelBpe(raw, self._tokenizer, self._dtype)
        self.encoder = "tokenizers" if self._fast is None else "tiktoken, equal to tokenizers"

    def _check_eos_is_no_text(self, path: Path) -> None:
        """`encode_special_tokens` stops the search for the string, but a model may hold it among its own pieces."""
        eos = self._tokenizer.id_to_token(self.eos_id)
        if self.eos_id in self._tokenizer.encode(f"a{eos}a {eos} a", add_special_tokens=False).ids:
            raise ValueError(
                f"tokenizer {path}: {eos!r} in a document would be its end-of-text token, and one document two. Use a "
                "tokenizer of another kind (byte-level BPE, a sentencepiece .model), or name another --eos-token"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        if self._fast is not None:
            return self._fast.encode_batch(texts)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


class SentencePieceTokenizer:
    """A sentencepiece `.model`. Control symbols such as </s> are never parsed out of text."""

    encoder = "sentencepiece"

    def __init__(self, path: Path, eos_token: str = "") -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer {path}: not a sentencepiece model ({error})") from None
        self.name = path.name
        self.sha256 = file_sha256(path)
        self.vocab_size = self._processor.vocab_size()
        if eos_token:
            pieces = {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}
            self.eos_id = _find_eos(pieces, eos_token, str(path))
        else:
            self.eos_id = self._processor.eos_id()
            if self.eos_id < 0:
                raise ValueError(f"tokenizer {path}: it has no end-of-sentence piece: name one with --eos-token")
        self.lossless = self._round_trips()
        self._dtype = np.dtype(token_dtype(self.vocab_size))

    def _round_trips(self) -> bool:
        """Normalisation and byte fallback are not readable from the processor: a probe shows them."""
        probe = " two  spaces\ttab\nline \r e\u0301 \u00e9 \ufb01 \U0001f600 \u4e00 \u0901 end "
        return bool(self._processor.decode(self._processor.encode(probe)) == probe)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        ids = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return [np.array(one, self._dtype) for one in ids]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids])
        return text


class TiktokenTokenizer:
    """A tiktoken encoding; `tiktoken` is an optional extra, and `named` may fetch the ranks over the network."""

    lossless = True
    encoder = "tiktoken"

    def __init__(self, encoding: Any, eos_token: str = "") -> None:
        self._encoding = encoding
        self.name = f"tiktoken:{encoding.name}"
        state = (encoding._pat_str, sorted(encoding._mergeable_ranks.items()), sorted(encoding._special_tokens.items()))
        self.sha256 = hashlib.sha256(repr(state).encode()).hexdigest()
        self.vocab_size = encoding.max_token_value + 1
        self.eos_id = _find_eos(encoding._special_tokens, eos_token, self.name)
        self._dtype = np.dtype(token_dtype(self.vocab_size))

    @classmethod
    def named(cls, name: str, eos_token: str = "") -> TiktokenTokenizer:
        """The encoding that tiktoken knows as `name`, such as gpt2."""
        try:
            import tiktoken
        except ImportError:
            raise ValueError(
                f"tokenizer tiktoken:{name}: install tiktoken (pip install 'matmamba-pretrain[data]')"
            ) from None
        try:
            return cls(tiktoken.get_encoding(name), eos_token)
        except OSError as error:
            raise ValueError(
                f"tokenizer tiktoken:{name}: tiktoken could not fetch it ({error}). Without a network, point "
                "TIKTOKEN_CACHE_DIR at a folder that tiktoken filled on a machine with one, or name a tokenizer file"
            ) from None
        except ValueError as error:
            raise ValueError(f"tokenizer tiktoken:{name}: {error}") from None

    def encode_batch(self, texts: Sequence[str]) -> list[Ids | None]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Ids | None:
        try:
            return np.array(self._encoding.encode_ordinary(text), self._dtype)
        except BaseException as error:  # its regular expression overflows: a megabyte of spaces before a word
            if type(error).__name__ != "PanicException":
                raise
            return None

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._encoding.decode([int(i) for i in ids])
        return text


def _find_eos(ids: dict[str, int], eos_token: str, where: str) -> int:
    if eos_token:
        if eos_token not in ids:
            raise ValueError(f"tokenizer {where}: --eos-token {eos_token!r} is not in its vocabulary")
        return ids[eos_token]
    for name in EOS_NAMES:
        if name in ids:
            return ids[name]
    raise ValueError(f"tokenizer {where}: none of {', '.join(EOS_NAMES)} in its vocabulary: name one with --eos-token")


def _is_byte_level(pre_tokenizer: Any) -> bool:
    return (
        pre_tokenizer is not None
        and "ByteLevel" in str(pre_tokenizer)
        and "add_prefix_space=True" not in str(pre_tokenizer)
    )
