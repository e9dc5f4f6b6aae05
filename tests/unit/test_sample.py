"""`python -m pretrain.sample` on a small run: what a user types, and what a mistake says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.train_tokenizer import train
from modeling.config import LanguageConfig
from modeling.language import LanguageModel
from pretrain.sample import main
from tests.unit import corpus
from tests.unit.one_checkpoint import write_run

CFG = LanguageConfig(n_layers=2, d_model=32, headdim=8, widths=(8, 4), d_state=8, vocab_size=320)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run, of 320 tokens; small.model, a sentencepiece tokenizer of fewer; tokenizer.json, of more."""
    folder = tmp_path_factory.mktemp("sample")
    lines = iter(line for text in corpus.texts(50) for line in text.split("\n") if line)
    (folder / "small.model").write_bytes(train(lines, vocab_size=310, model_type="bpe", n_threads=1))
    corpus.byte_level_tokenizer(folder)  # 602 tokens
    model = LanguageModel(CFG)
    model.init_weights(0)
    with torch.no_grad():
        model.embedding.mul_(20)  # as if trained: the likeliest token is clear
    write_run(folder / "run", model, str(folder / "small.model"))
    return folder


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str, str]:
    code = main([str(folder / "run"), *arguments])
    return code, *capsys.readouterr()


def test_text_at_two_widths(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for width in ("1", "1/2"):
        code, out, err = run(capsys, folder, "--prompt", "the", "--width", width)
        assert code == 0, err
        assert out.startswith("the")
        texts[width] = out
    assert len(set(texts.values())) == 2, "each width is a model of its own"


def test_a_token_that_the_tokenizer_does_not_have_adds_no_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At so high a temperature all of the model's tokens are as likely, and 10 of 320 are not its tokenizer's."""
    code, out, err = run(capsys, folder, "--prompt", "the", "--temperature", "1000", "--max-new-tokens", "300")
    assert code == 0, err
    assert len(out) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--width", "1/3"), "width '1/3'"),
        (("--tokenizer", "absent.json"), "absent.json: no such file"),
        (("--seed", str(2**64)), f"seed={2**64}: must lie in"),
        (("--seed", str(-(2**63) - 1)), "must lie in -9223372036854775808 to 18446744073709551615"),
        (("--prompt", "a\udcffb"), r"--prompt 'a\udcffb' is not UTF-8 text"),
        (("--max-new-tokens", "0"), "must be at least 1"),
    ],
    ids=str,
)
def test_mistakes_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, folder, "--prompt", "the", *arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_another_models_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, folder, "--prompt", "the", "--tokenizer", str(folder / "tokenizer.json"))
    assert code == 2
    assert "the model 320: it was trained with another tokenizer" in err
