"""The harness's three questions answered at any width, against plain arithmetic; and a local task end to end, offline."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from modeling.config import LanguageConfig
from modeling.decode import generate
from modeling.language import LanguageModel
from modeling.lm_eval import MatMambaLM, main
from modeling.model_folder import save_model
from modeling.nesting import uniform

CFG = LanguageConfig(n_layers=2, d_model=64, headdim=16, widths=(8, 4, 1), d_state=8, vocab_size=260, chunk_size=16)
TEXTS = ["a", "The quick brown fox", "x" * 70, "One more, with  spaces and naïve bytes."]


@dataclass
class Request:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def folder(trained: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a tokenizer of single bytes."""
    folder: Path = tmp_path_factory.mktemp("lm") / "model"
    save_model(folder, {name: p.detach() for name, p in trained.named_parameters()}, CFG, uniform(8, 2))
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<|endoftext|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def log_probabilities(trained: LanguageModel, ids: list[int], widths: tuple[int, ...]) -> torch.Tensor:
    """Of each id after the first, given those before it; and which is the likeliest in its place."""
    with torch.no_grad():
        logits = trained.logits(trained(torch.tensor([ids[:-1]]), widths))[0, :, : CFG.vocab_size]
    return torch.log_softmax(logits.double(), -1)


@pytest.mark.parametrize(("width", "widths"), [("1", (8, 8)), (0.5, (4, 4)), ("1;1/8", (8, 1))])
@pytest.mark.parametrize("tokens_at_once", [2048, 30])
def test_likelihoods_equal_plain_arithmetic(
    trained: LanguageModel,
    folder: Path,
    width: str | float,
    widths: tuple[int, ...],
    tokens_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modeling.lm_eval.TOKENS_AT_ONCE", tokens_at_once)  # 30: documents in pieces of ten
    lm = MatMambaLM(str(folder), width=width, batch_size=3, device="cpu")
    assert lm.widths == widths
    pairs = [("The", " quick"), ("", "fox"), ("A longer context than that, ", "x"), ("one ", "two three four")]
    found = lm.loglikelihood([Request(pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (total, _) in zip(pairs, found, strict=True):
        ids = (lm.text.encode(context) or [256]) + lm.text.encode(continuation)
        n = len(lm.text.encode(continuation)) + (len(context) - len(context.rstrip()) if context else 0)
        log_p = log_probabilities(trained, ids, widths)
        expected = sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1 - n, len(ids) - 1))
        assert total == pytest.approx(expected, rel=1e-4)
    rolling = lm.loglikelihood_rolling([Request((text,)) for text in TEXTS])
    for text, total in zip(TEXTS, rolling, strict=True):
        ids = [256, *lm.text.encode(text)]
        log_p = log_probabilities(trained, ids, widths)
        assert total == pytest.approx(sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1)), rel=1e-4)


def test_greedy_is_what_generating_gives(folder: Path) -> None:
    lm = MatMambaLM(str(folder), width="1/2", batch_size=2, device="cpu")
    contexts = ["The quick", "a", "Something else"]
    rows, wrong = [], []
    for context in contexts:
        ids = lm.text.encode(context)
        new = [int(token) for token in generate(lm.model, [ids], lm.widths, max_new_tokens=4)]
        rows.append((("", ""), ids, new))
        wrong.append((("", ""), ids, [*new[:2], (new[2] + 1) % 260, new[3]]))
    assert [greedy for _, greedy in lm._loglikelihood_tokens(rows)] == [True] * 3
    assert [greedy for _, greedy in lm._loglikelihood_tokens(wrong)] == [False] * 3
    texts = lm.generate_until([Request((context, {"until": [], "max_gen_toks": 4})) for context in contexts])
    assert texts == [lm.text.decode(lm.text.until_end(new)) for _, _, new in rows]


def test_generation_stops_at_the_tasks_words(folder: Path) -> None:
    lm = MatMambaLM(str(folder), device="cpu")
    whole = lm.generate_until([Request(("The", {"until": [], "max_gen_toks": 30}))])[0]
    stop = whole[5]
    cut = lm.generate_until([Request(("The", {"until": [stop], "max_gen_toks": 30}))])[0]
    assert cut == whole[: whole.index(stop)]


def test_the_space_between_a_context_and_its_continuation_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizers like Llama's leave one out at the beginning of a text."""
    lm = MatMambaLM(str(folder), device="cpu")
    real = lm.text
    lm.text = replace(real, decode=lambda ids: real.decode(ids).removeprefix(" "))
    new = [torch.tensor([i, i]) for i in real.encode(" fox")]
    monkeypatch.setattr("modeling.lm_eval.generate", lambda *_args, **_more: iter(new))
    asked = {"until": [], "max_gen_toks": len(new)}
    assert lm.generate_until([Request(("The", asked)), Request(("A brown", asked))]) == [" fox", " fox"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": "1/3"}, "width '1/3'"),
        ({"width": "1;1;1"}, "3 widths for 2 layers"),
        ({"batch_size": "auto"}, "batch"),
        ({"tokenizer": "absent.json"}, "--model_args: tokenizer absent.json: no such file"),
    ],
)
def test_wrong_arguments_are_named(folder: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatMambaLM(str(folder), device="cpu", **arguments)  # type: ignore[arg-type]


def test_a_model_without_a_tokenizer_is_an_error_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    (tmp_path / "task.yaml").write_text(json.dumps({"task": "local", "dataset_path": "json"}))
    arguments = ["--model", "matmamba", "--model_args", f"path={bare}", "--tasks", "local"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *arguments, "--include_path", str(tmp_path)])
    assert main() == 2
    said = capsys.readouterr().err
    assert f"error: --model_args: {bare} names no tokenizer: add tokenizer=FILE or tokenizer=tiktoken:NAME" in said


def test_a_local_task_runs_offline(
    trained: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the command line: a task of multiple choice and one of perplexity, from files."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.jsonl"
    documents = [{"text": text, "choices": [" yes", " no"], "label": i % 2} for i, text in enumerate(TEXTS)]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    perplexity = {
        "task": "local_perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }
    for task in (choice, perplexity):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}))
    results = simple_evaluate(
        model="matmamba",
        model_args=f"path={folder},width=1/2,device=cpu",
        tasks=["local_choice", "local_perplexity"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    lm = MatMambaLM(str(folder), width="1/2", device="cpu")
    total = 0.0
    for text in TEXTS:
        ids = [256, *lm.text.encode(text)]
        log_p = log_probabilities(trained, ids, (4, 4))
        total += sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1))
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    bits = -total / n_bytes / 0.6931471805599453
    assert results["local_perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    right = 0
    for document in documents:
        scores = [lm.loglikelihood([Request((document["text"], c))], disable_tqdm=True)[0][0] for c in (" yes", " no")]
        right += int(scores[1] > scores[0]) == document["label"]
    assert results["local_choice"]["acc,none"] == right / len(documents)
