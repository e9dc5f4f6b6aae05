"""What ended the documents that a model was trained on ends its texts, whatever the tokenizer calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modeling.config import LanguageConfig
from modeling.export import main as export
from modeling.language import LanguageModel
from modeling.open_model import open_model
from tests.parity.test_generate_cli import write_tokenizer
from tests.unit.one_checkpoint import write_run

CFG = LanguageConfig(n_layers=2, d_model=64, headdim=16, widths=(8, 4), d_state=8, vocab_size=310)


@pytest.fixture
def model() -> LanguageModel:
    model = LanguageModel(CFG)
    model.init_weights(0)
    return model


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """One whose end of a document no tool would guess, and is not its first id."""
    path = tmp_path / "own.json"
    made = write_tokenizer(path, eos="<|begin|>")
    made.add_special_tokens(["<|stop|>"])
    made.save(str(path))
    assert made.token_to_id("<|stop|>") == 300
    return str(path)


def test_an_end_that_no_tool_would_guess_goes_with_the_model(
    model: LanguageModel, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", model, tokenizer, eos_id=300)
    assert open_model(run).text().eos_id == 300
    assert open_model(run).text(tokenizer).prompt_ids("") == [300]
    for source, target in ((run, "matmamba"), (tmp_path / "matmamba", "hf"), (tmp_path / "matmamba", "remote_code")):
        assert export([str(source), "--format", target, "-o", str(tmp_path / target), "--width", "1/2"]) == 0
    assert open_model(tmp_path / "matmamba").text().eos_id == 300
    for target in ("hf", "remote_code"):
        about = json.loads((tmp_path / target / "config.json").read_text())
        assert about["eos_token_id"] == about["pad_token_id"] == 300
        assert AutoTokenizer.from_pretrained(tmp_path / target).eos_token == "<|stop|>"


def test_it_is_told_where_no_tokenizer_stands_beside_the_model(model: LanguageModel, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", model, "tiktoken:gpt2", eos_id=7)
    assert export([str(run), "--format", "hf", "-o", str(tmp_path / "hf"), "--width", "1/2"]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 7


def test_a_run_of_earlier_code_ends_with_what_is_called_so(model: LanguageModel, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "usual.json")
    opened = open_model(write_run(tmp_path / "run", model, str(tmp_path / "usual.json")))
    assert opened.eos_id is None
    assert opened.text().eos_id == 0


def test_a_tokenizer_without_that_id_is_another_models(
    model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path / "other.json")
    run = write_run(tmp_path / "run", model, str(tmp_path / "other.json"), eos_id=300)
    with pytest.raises(ValueError, match="300 tokens, the model's documents ended with the id 300"):
        open_model(run).text()
    assert export([str(run), "--format", "matmamba", "-o", str(tmp_path / "ours")]) == 2
    assert "it was trained with another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("damaged", ["0", -1, 1.5, True, [1]])
def test_what_is_no_id_is_refused(damaged: object, model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json: eos_id=.* is no token id"):
        open_model(write_run(tmp_path / "run", model, eos_id=damaged))
