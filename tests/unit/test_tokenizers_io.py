"""Tokenizers: one interface, exact ids, special tokens in text, round trips."""

from __future__ import annotations

import contextlib
import json
import sys
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import fast_bpe, train_tokenizer
from data_prep.corpus_io import Chunk
from data_prep.encode_worker import Encoder, EncodeSettings
from data_prep.tokenizers_io import TextTokenizer, TiktokenTokenizer, open_tokenizer
from modeling.text import open_text
from tests.unit import corpus

NEOX = Path(__file__).resolve().parents[3] / "shared" / "tokenizers" / "gpt_neox_20b.json"
HARD = [
    "",
    " ",
    "\x00\x00 a\x00b",
    "<|endoftext|> and </s> <unk> <s>",
    "  two   three    four     five\n\n\n  \t x",
    "e\u0301 \u0958 \ufb01 \u2581 \u00a0 \u3000",
    "\r\n\r\n it's I'LL we'Re 'S",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0e01\u0e33 العربية हिन्दी",
    "\U000323af\U0001fae9",  # assigned after Unicode 14
    "1234567890 x²½ Ⅷ",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus.write_jsonl(folder / "text.jsonl", list(corpus.texts(300)))
    output = folder / "t.model"
    arguments = ["--input", str(folder / "text.jsonl"), "--vocab-size", "420", "--output", str(output)]
    assert train_tokenizer.main([*arguments, "--threads", "1"]) == 0
    return output


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--output", "{tmp}/t.json", "must end in .model"),
        ("--output", "{tmp}/t.model", "t.model: it is there"),
        ("--output", "{tmp}/file/new.model", "file"),  # its folder is a file
        ("--output", "/proc/self/new.model", "nothing can be written into /proc/self"),
        ("--sample-mb", "0", "--sample-mb 0: must be positive"),
        ("--threads", "0", "--threads 0: must be at least 1"),
    ],
)
def test_training_checks_before_it_reads(
    option: str,
    value: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read(*arguments: object) -> None:
        raise AssertionError("an input was looked for")

    monkeypatch.setattr(train_tokenizer, "find_sources", read)
    monkeypatch.setattr(train_tokenizer.os, "access", lambda path, mode: str(path) != "/proc/self")  # root may all
    (tmp_path / "t.model").write_text("another's")
    (tmp_path / "file").touch()
    arguments = {
        "--input": "texts.jsonl",
        "--output": str(tmp_path / "other.model"),
        option: value.format(tmp=tmp_path),
    }
    assert train_tokenizer.main([word for pair in arguments.items() for word in pair]) == 2
    assert says in capsys.readouterr().err
    assert (tmp_path / "t.model").read_text() == "another's"


def same_as_reference(fast: TextTokenizer, reference: TextTokenizer, texts: list[str]) -> None:
    for text, a, b in zip(texts, fast.encode_batch(texts), reference.encode_batch(texts), strict=True):
        assert np.array_equal(a, b), text
        assert a.dtype == b.dtype


def test_the_fast_encoder_gives_the_reference_ids(byte_level: Path) -> None:
    pytest.importorskip("tiktoken", reason="needs the optional extra [data]: tiktoken")
    fast, reference = open_tokenizer(str(byte_level)), open_tokenizer(str(byte_level), reference=True)
    assert "tiktoken" in fast.encoder
    assert reference.encoder == "tokenizers"
    same_as_reference(fast, reference, HARD + corpus.texts(100, seed=5))
    runs = [" " * n + tail for n in range(1, 40) for tail in ("", "x", "\n")]
    same_as_reference(fast, reference, [*runs, " " * 30000, "x" * 30000, "a" + "\n" * 25000 + "b"])


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from(" \n\t'se"), max_size=60))
def test_the_fast_encoder_on_any_text(byte_level: Path, text: str) -> None:
    pytest.importorskip("tiktoken", reason="needs the optional extra [data]: tiktoken")
    fast, reference = _both(byte_level)
    same_as_reference(fast, reference, [text])
    assert reference.decode(reference.encode_batch([text])[0].tolist()) == unicodedata.normalize("NFC", text)


_cached: dict[Path, tuple[TextTokenizer, TextTokenizer]] = {}


def _both(path: Path) -> tuple[TextTokenizer, TextTokenizer]:
    if path not in _cached:
        _cached[path] = open_tokenizer(str(path)), open_tokenizer(str(path), reference=True)
    return _cached[path]


@pytest.mark.slow
def test_the_fast_encoder_on_every_code_point() -> None:
    pytest.importorskip("tiktoken", reason="needs the optional extra [data]: tiktoken")
    if not NEOX.is_file():
        pytest.skip(f"needs {NEOX.name} among the shared tokenizers")
    fast, reference = open_tokenizer(str(NEOX)), open_tokenizer(str(NEOX), reference=True)
    points = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cs", "Co")]
    for at in range(0, len(points), 4096):
        same_as_reference(fast, reference, [f"a{c} {c}1{c}{c}.\n {c}" for c in points[at : at + 4096]])


def test_the_fast_encoder_refuses_what_it_cannot_equal(byte_level: Path, tmp_path: Path) -> None:
    text = byte_level.read_text(encoding="utf-8")
    changed = {
        "normalizer": text.replace('"NFC"', '"NFKC"'),
        "dropout": text.replace('"dropout":null', '"dropout":0.5').replace('"dropout": null', '"dropout": 0.5'),
        "prefix": text.replace('"add_prefix_space":false', '"add_prefix_space":true').replace(
            '"add_prefix_space": false', '"add_prefix_space": true'
        ),
    }
    for name, content in changed.items():
        assert content != text, name
        path = tmp_path / f"{name}.json"
        path.write_text(content, encoding="utf-8")
        assert fast_bpe.supported(path) is None, name


def test_unassigned_code_points_are_those_of_this_python() -> None:
    pattern = fast_bpe._unassigned()
    for code in [*range(0, 0x30000, 7), 0x3FFFF, 0x40000, 0x9ABCD, 0xDFFFF, 0xE0001, 0xF0000, 0x10FFFD, 0x10FFFF]:
        if not 0xD800 <= code < 0xE000:
            assert bool(pattern.match(chr(code))) == (unicodedata.category(chr(code)) == "Cn"), hex(code)


def test_a_difference_from_the_reference_stops_the_run(byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tiktoken", reason="needs the optional extra [data]: tiktoken")
    monkeypatch.setattr(fast_bpe, "GPT2_PATTERN", r"\S+|\s+")
    fast = open_tokenizer(str(byte_level))
    with pytest.raises(fast_bpe.EncoderDiffersError, match="differs from the tokenizers library"):
        fast.encode_batch(["one two, three don't"])


def test_special_tokens_in_text_are_text(byte_level: Path, sentencepiece: Path) -> None:
    for path in (byte_level, sentencepiece):
        for reference in (False, True):
            tokenizer = open_tokenizer(str(path), reference=reference)
            (ids,) = tokenizer.encode_batch(["a <|endoftext|> b </s> c"])
            assert tokenizer.eos_id not in ids
            assert tokenizer.decode(ids.tolist()) == "a <|endoftext|> b </s> c"


def test_an_end_of_text_that_text_can_forge_is_refused(tmp_path: Path) -> None:
    """T5's and XLM-R's files are such: HTML's </s> would end a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "ab</s>\u2581")]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>", "<end>"])
    path = tmp_path / "unigram.json"
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match=r"unigram.json: '</s>' in a document would be its end-of-text token"):
        open_tokenizer(str(path))
    other = open_tokenizer(str(path), "<end>")
    assert other.eos_id not in other.encode_batch(["a<end>b <end> a"])[0]


def test_a_file_without_added_tokens_is_a_tokenizer(byte_level: Path, tmp_path: Path) -> None:
    raw = json.loads(byte_level.read_text(encoding="utf-8"))
    del raw["added_tokens"]  # the library does not ask for them
    (tmp_path / "plain.json").write_text(json.dumps(raw), encoding="utf-8")
    plain, reference = (open_tokenizer(str(tmp_path / "plain.json"), reference=chosen) for chosen in (False, True))
    same_as_reference(plain, reference, [text for text in HARD if text])


def test_sentencepiece_gives_every_text_back(sentencepiece: Path) -> None:
    tokenizer = open_tokenizer(str(sentencepiece))
    assert tokenizer.lossless
    assert tokenizer.vocab_size == 420
    texts = [text.replace("\u2581", "") for text in HARD] + corpus.texts(50, seed=2)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids.tolist()) == text
    (ids,) = tokenizer.encode_batch(["\u2581"])
    assert tokenizer.decode(ids.tolist()) == " "  # the one loss, stated in train_tokenizer.py


def test_tiktoken_encodings_are_tokenizers() -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="needs the optional extra [data]: tiktoken")
    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r"\S+|\s+",
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    tokenizer = TiktokenTokenizer(encoding)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.name) == (257, 256, "tiktoken:bytes")
    for text, ids in zip(HARD, tokenizer.encode_batch(HARD), strict=True):
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids.tolist()) == text


def test_a_text_that_tiktoken_cannot_take_costs_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its regular expression overflows, which it says with an exception that is no Exception."""
    tiktoken = pytest.importorskip("tiktoken", reason="needs the optional extra [data]: tiktoken")
    ranks, special = {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256}
    pattern = r"\p{L}+|\s+(?!\S)|\s"
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: encoding)
    spaces = " " * 1_500_000 + "a"
    lines = "".join(f"{json.dumps({'text': text})}\n" for text in ("ab", spaces, "c")).encode()
    encoded = Encoder(EncodeSettings(tokenizer="tiktoken:bytes")).encode(Chunk(0, "a.jsonl", 0, lines, 1.0))
    assert encoded.ids.tolist() == [*b"ab", 256, *b"c", 256]
    assert encoded.skipped == {"not_encodable": 1}
    with pytest.raises(ValueError, match="tokenizer tiktoken:bytes cannot take a run of so many spaces"):
        open_text("tiktoken:bytes", 300).encode(spaces)


@pytest.mark.parametrize(
    "opener", [open_tokenizer, partial(open_text, vocab_size=50304)], ids=["data_prep", "modeling"]
)
def test_tiktoken_without_a_network_says_the_way_out(
    opener: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="needs the optional extra [data]: tiktoken")
    monkeypatch.setattr(tiktoken, "get_encoding", _no_network)
    with pytest.raises(
        ValueError, match=r"tiktoken:gpt2: .*could not fetch.*no route.*TIKTOKEN_CACHE_DIR.*tokenizer file"
    ):
        opener("tiktoken:gpt2")


def test_ids_that_no_tokenizer_has_are_no_text(
    byte_level: Path, sentencepiece: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may have more tokens than its tokenizer, and draws them now and then."""
    specs = [str(byte_level), str(sentencepiece)]
    with contextlib.suppress(ImportError):
        import tiktoken

        ranks = {bytes([b]): b for b in range(256)}
        gap = tiktoken.Encoding("gap", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})
        monkeypatch.setattr(tiktoken, "get_encoding", lambda _: gap)
        specs.append("tiktoken:gap")
        assert open_text("tiktoken:gap", 50304).decode([104, 270, 105]) == "hi"
    for spec in specs:
        text = open_text(spec, 50304)
        ids = text.encode("some text")
        assert text.decode([*ids[:1], text.vocab_size, 50303, *ids[1:]]) == "some text"


def _no_network(name: str) -> None:
    raise ConnectionError("no route to host")  # an OSError, as requests' own is


def test_what_is_no_tokenizer_is_refused(byte_level: Path, tmp_path: Path) -> None:
    for name in ("bad.json", "bad.model", "bad.txt"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=f"tokenizer .*{name}"):
            open_tokenizer(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_tokenizer(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="not in its vocabulary"):
        open_tokenizer(str(byte_level), "<nope>")
    with pytest.raises(ValueError, match="'a' in a document would be its end-of-text token"):
        open_tokenizer(str(byte_level), "a")
    never_in_text = "\u00c0"  # how byte-level vocabularies write the byte C0, which UTF-8 has not
    assert open_tokenizer(str(byte_level), never_in_text).eos_id != open_tokenizer(str(byte_level)).eos_id


def test_the_shared_tokenizer_is_exact_on_shared_text() -> None:
    pytest.importorskip("tiktoken", reason="needs the optional extra [data]: tiktoken")
    files = sorted((NEOX.parents[1] / "data" / "fineweb_schema").glob("*.parquet"))
    if not NEOX.is_file() or not files:
        pytest.skip("needs the shared tokenizer and text; the twin on self-made data ran")
    import pyarrow.parquet as pq

    texts = pq.read_table(files[0], columns=["text"])["text"].to_pylist()[:150]
    same_as_reference(open_tokenizer(str(NEOX)), open_tokenizer(str(NEOX), reference=True), texts)
