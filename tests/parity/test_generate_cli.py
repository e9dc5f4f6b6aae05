"""`python -m modeling.generate` on a small model folder: what a user types, and what a mistake says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from modeling import generate as generate_module
from modeling.config import LanguageConfig
from modeling.export import main as export_main
from modeling.generate import main
from modeling.language import LanguageModel
from modeling.model_folder import save_model
from modeling.nesting import uniform
from modeling.speculative import speculate
from modeling.text import TextStream, open_text

SENTENCE = "The quick brown fox — naïve, 日本語 — jumps over the lazy dog. "


def write_tokenizer(path: Path, eos: str = "<|endoftext|>") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 5, trainer)
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model") / "whole"
    cfg = LanguageConfig(n_layers=2, d_model=64, headdim=16, widths=(8, 4, 1), d_state=8, vocab_size=310)
    model = LanguageModel(cfg)
    model.init_weights(0)
    save_model(folder, {name: p.detach() for name, p in model.named_parameters()}, cfg, uniform(8, 2))
    write_tokenizer(folder / "tokenizer.json")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["--device", "cpu", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_text_in_text_out_at_any_width(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for width in ("1", "1/8", "1,1/2"):
        code, out, err = run(capsys, folder, "--width", width, "--prompt", "The quick", "--max-new-tokens", 12)
        assert code == 0, err
        assert out.startswith("The quick")
        assert "tokens/s" in err
        texts[width] = out
    assert len(set(texts.values())) == 3, "each width is a model of its own"


def test_speculation_and_batches_print_the_same_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (folder, "--prompt", "The", "--max-new-tokens", 20)
    _, plain, _ = run(capsys, *common)
    code, drafted, err = run(capsys, *common, "--speculate", "1/2")
    assert code == 0
    assert drafted == plain
    assert "accepted" in err
    code, batch, _ = run(capsys, *common, "--prompt", SENTENCE)
    assert code == 0
    assert batch.startswith(plain)
    assert SENTENCE in batch


def test_speculation_shows_its_text_as_it_comes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt and the first token are shown before the first round begins, and every round adds to them."""
    shown = [""]

    def watched(*arguments: object, **named: object) -> Iterator[object]:
        for result in speculate(*arguments, **named):  # type: ignore[arg-type]
            yield result
            shown.append(shown[-1] + capsys.readouterr().out)

    monkeypatch.setattr(generate_module, "speculate", watched)
    code, last, _ = run(capsys, folder, "--prompt", "The", "--max-new-tokens", 20, "--speculate", "1/8")
    assert code == 0
    lengths = [len(text) for text in shown[1:]]
    assert lengths[0] >= len("The")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > len(lengths) // 2, "a token may be half a character, but most are not"
    monkeypatch.undo()
    assert shown[-1] + last == run(capsys, folder, "--prompt", "The", "--max-new-tokens", 20)[1]


def test_a_cut_out_mix_runs_as_it_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main([str(folder), "--width", "1,1/2", "--format", "matmamba", "-o", str(tmp_path / "mix")]) == 0
    capsys.readouterr()
    tokenizer = ("--tokenizer", folder / "tokenizer.json", "--prompt", "The quick")
    _, expected, _ = run(capsys, folder, "--width", "1,1/2", *tokenizer)
    code, found, _ = run(capsys, tmp_path / "mix", *tokenizer)
    assert (code, found) == (0, expected)
    code, _, err = run(capsys, tmp_path / "mix", "--width", "1", *tokenizer)
    assert code == 2
    assert "layer 1: width 8, but this model was cut to 4 heads" in err


def test_sampling_follows_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (folder, "--prompt", "The", "--temperature", "1.5", "--max-new-tokens", 20, "--seed")
    first, again, other = (run(capsys, *common, seed)[1] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--width", "1/3"), "width '1/3'"),
        (("--width", "1e400"), "width '1e400': not a number"),
        (("--width", "1,1/2,1"), "3 widths for 2 layers"),
        (("--temperature", "-1"), "temperature=-1.0"),
        (("--seed", str(2**64)), f"seed={2**64}: must lie in"),
        (("--temperature", "1e-320"), "at least 1e-06"),
        (("--speculate", "1", "--width", "1/2"), "wider than target"),
        (("--tokenizer", "absent.json"), "absent.json: no such file"),
        (("--max-new-tokens", "0"), "must be at least 1"),
        (("--device", "abacus"), "device 'abacus': must be cpu, cuda or cuda:N"),
        (("--device", "meta"), "device 'meta': must be cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "device 'cuda:99': this machine has"),
        (("--speculate", ""), "width ''"),
        (("--draft-tokens", "4"), "--draft-tokens 4: nothing drafts without --speculate WIDTH"),
        (("--draft-tokens", "0", "--speculate", "1/2"), "draft_tokens=0"),
        (("--prompt", "a\udcffb"), r"--prompt 'a\udcffb' is not UTF-8 text"),
        (("--width", "1", "--width", "1/2", "--prompt", "x"), "several turns need one prompt"),
    ],
)
def test_mistakes_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, folder, "--prompt", "The", *arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_another_vocabulary_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer of more ids than the model has: ids would be wrong long before one is out of range."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"word{i}" for i in range(50)])
    tokenizer.save(str(tmp_path / "large.json"))
    code, _, err = run(capsys, folder, "--prompt", "x", "--tokenizer", tmp_path / "large.json")
    assert code == 2
    assert "it was trained with another tokenizer" in err


def damaged(folder: Path, target: Path, name: str, damage: object) -> Path:
    shutil.copytree(folder, target)
    path = target / name
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    return target


def test_damaged_and_hostile_folders_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def altered(raw: bytes, **changes: object) -> bytes:
        about = json.loads(raw)
        about["model"] |= changes
        return json.dumps(about).encode()

    cases = {
        "cut": ("model.safetensors", lambda raw: raw[: len(raw) // 2], "cannot be read"),
        "field": ("config.json", lambda raw: altered(raw, run="rm"), "unknown fields: ['run']"),
        "vocab": ("config.json", lambda raw: altered(raw, vocab_size=1000), "embedding"),
        "layers": ("config.json", lambda raw: altered(raw, n_layers=-1), "model.n_layers=-1"),
        "huge": ("config.json", lambda raw: altered(raw, n_layers=10**9), "2 widths for 1000000000 layers"),
        "text": ("config.json", lambda raw: b"{", "does not describe a model"),
        "list": ("config.json", lambda raw: b"[]", "does not describe a model"),
    }
    for case, (name, damage, message) in cases.items():
        code, _, err = run(capsys, damaged(folder, tmp_path / case, name, damage), "--prompt", "x")
        assert code == 2, case
        assert message in err, case


def test_streamed_text_is_the_whole_text_and_never_half_a_character(folder: Path) -> None:
    text = open_text(str(folder / "tokenizer.json"), 310)
    stream = TextStream(text)
    pieces = [stream.push([i]) for i in text.encode("日本語 naïve")]
    assert "".join(pieces) + stream.rest() == "日本語 naïve"
    assert not any("�" in piece for piece in pieces)
    assert pieces.count("") > 0, "some characters take several tokens"
    cut = TextStream(text)
    assert cut.push(text.encode("日")[:1]) == ""
    assert cut.rest() == "�"


def write_byte_fallback_tokenizer(path: Path) -> None:
    """As Llama's: a character without a piece is its bytes, and a space stands before a text."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    vocab |= {character: 258 + i for i, character in enumerate("▁abx")}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))


def test_text_goes_on_behind_a_prompt_of_many_bytes(tmp_path: Path) -> None:
    """What is decoded with it begins with a character: the library writes a run of bytes with half a one in it as none."""
    write_byte_fallback_tokenizer(tmp_path / "tokenizer.json")
    text = open_text(str(tmp_path / "tokenizer.json"), 310)
    for prompt, new in (("ab 你好世界", "世 a"), ("a", " b世"), ("ab", "a")):
        before = text.encode(prompt)
        stream = TextStream(text, before)
        ids = text.encode(prompt + new)[len(before) :]
        assert "".join(stream.push([i]) for i in ids) + stream.rest() == new
        half = text.encode("世")[-3:-1]
        assert stream.push(half) + stream.rest() == "��", "and nothing of what was shown again"


def test_a_long_stream_decodes_a_few_ids_at_a_time(folder: Path) -> None:
    text, most = open_text(str(folder / "tokenizer.json"), 310), 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal most
        most = max(most, len(ids))
        return text.decode(ids)

    long = SENTENCE * 20
    stream = TextStream(replace(text, decode=decode))
    ids = text.encode(long)
    assert "".join(stream.push([i]) for i in ids) + stream.rest() == long
    assert len(ids) > 400
    assert most < 100


def test_a_special_tokens_name_in_a_prompt_is_text(folder: Path) -> None:
    text = open_text(str(folder / "tokenizer.json"), 310)
    assert text.eos_id not in text.encode("<|endoftext|>")
    assert torch.tensor(text.encode("<|endoftext|>")).numel() > 1
