"""A nested model for EleutherAI's lm-evaluation-harness, at any width.

    python -m modeling.lm_eval --model matmamba --model_args path=runs/lm_130m,width=1/2 --tasks hellaswag

This is the harness's own command line with the model `matmamba` known to it; `import modeling.lm_eval` does the same in a
script. Needs the extra `eval`. In --model_args a comma separates arguments, so a width for each layer is written with
semicolons: width=1;1/2;1/4, and presets as width=@presets.json:NAME.

Letters: b batch, t time, d model, v vocabulary.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from modeling.checkpoint_reader import CheckpointError
from modeling.completions import StopWatch
from modeling.decode import generate
from modeling.open_model import open_model
from modeling.sampling import Sampling
from modeling.search import read_widths
from modeling.text import TextStream

log = logging.getLogger(__name__)

TOKENS_AT_ONCE = 2048
"""Tokens of the batch whose scores over the vocabulary are in memory at a time."""
DEFAULT_NEW_TOKENS = 256


class ModelArgumentsError(ValueError):
    """What --model_args asks for cannot be had; the message says which argument and the way out."""


@register_model("matmamba")
class MatMambaLM(TemplateLM):
    """One width, or one mix, of a run, a checkpoint, or a model folder.

    The state has a constant size, so a context is never cut: rolling log-likelihoods read a document of any length with
    the state carried along, where other models are given windows.
    """

    def __init__(
        self,
        path: str,
        width: str | float = "",
        tokenizer: str = "",
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
    ) -> None:
        """Raises ModelArgumentsError where the model, the width or the tokenizer is wrong."""
        super().__init__()
        try:
            self._open(path, width, tokenizer, dtype, device)
        except (CheckpointError, OSError, ValueError) as error:
            raise ModelArgumentsError(f"--model_args: {error}") from None
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ModelArgumentsError(f"batch_size={batch_size!r}: must be a whole number from 1 on")
        self.batch_size = min(int(batch_size), max_batch_size or int(batch_size))

    def _open(self, path: str, width: str | float, tokenizer: str, dtype: str | None, device: str | None) -> None:
        """The model, its text, and the heads of each layer."""
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            # The harness's command line asks for a GPU by default, whether there is one or not.
            log.warning("there is no GPU here: device %s becomes cpu", device)
            device = "cpu"
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        opened = open_model(Path(path), dtype=dtype, device=chosen)
        self.model = opened.model
        if not (tokenizer or opened.tokenizer):
            raise ValueError(f"{path} names no tokenizer: add tokenizer=FILE or tokenizer=tiktoken:NAME")
        self.text = opened.text(tokenizer)
        # The harness turns width=1 into a number.
        written = str(width).replace(";", ",")
        asked = written or self.model.own_width
        self.widths = read_widths(asked, self.model.cfg.n_heads, self.model.cfg.n_layers)
        self.model.check_widths(self.widths)

    @property
    def eot_token_id(self) -> int:
        """Id that ends a document; it also stands before one."""
        return self.text.eos_id

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches of requests: ids depend on nothing else."""
        return f"matmamba-{self.text.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text. Nothing is ever added, as in training."""
        return self.text.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would give it."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Longest first: batches of like lengths, and memory runs out at once or never.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for chosen in _batches(order, self.batch_size):
            rows = [requests[i][1] + requests[i][2] for i in chosen]
            scored = self._score(rows, [len(requests[i][2]) for i in chosen])
            for i, answer in zip(chosen, scored, strict=True):
                answers[i] = answer
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text as a document of its own: every token after the end-of-text id."""
        rows = [self.text.encode(request.args[0]) for request in requests]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        answers = [0.0] * len(rows)
        for chosen in _batches(order, self.batch_size):
            scored = self._score([[self.eot_token_id, *rows[i]] for i in chosen], [len(rows[i]) for i in chosen])
            for i, (total, _) in zip(chosen, scored, strict=True):
                answers[i] = total
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts up to a stop text; greedy unless the task says do_sample."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for group in groups.values():
            for chosen in _batches(sorted(group, key=lambda i: -len(requests[i].args[0])), self.batch_size):
                texts = self._continue([requests[i].args[0] for i in chosen], requests[chosen[0]].args[1])
                for i, text in zip(chosen, texts, strict=True):
                    answers[i] = text
        return answers

    def _continue(self, contexts: list[str], asked: dict[str, Any]) -> list[str]:
        stops = asked.get("until") or []
        stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
        sampling = Sampling()
        if asked.get("do_sample"):
            sampling = Sampling(temperature=float(asked.get("temperature", 1.0)), top_p=float(asked.get("top_p", 1.0)))
        prompts = [self.text.encode(context) or [self.eot_token_id] for context in contexts]
        streams, watches = [TextStream(self.text, prompt) for prompt in prompts], [StopWatch(stops) for _ in prompts]
        texts, done = [""] * len(prompts), [False] * len(prompts)
        n = int(asked.get("max_gen_toks", asked.get("max_new_tokens", DEFAULT_NEW_TOKENS)))
        for tokens_b in generate(self.model, prompts, self.widths, max_new_tokens=n, sampling=sampling):
            for i, token in enumerate(tokens_b.tolist()):
                if not done[i]:
                    new = streams[i].rest() if token == self.eot_token_id else streams[i].push([token])
                    texts[i] += watches[i].push(new)
                    done[i] = token == self.eot_token_id or watches[i].stopped
            if all(done):
                break
        return [
            text + watch.push(stream.rest()) + watch.rest()
            for text, watch, stream in zip(texts, watches, streams, strict=True)
        ]

    def _score(self, rows: list[list[int]], n_scored: list[int]) -> list[tuple[float, bool]]:
        """Of each row, the log-probability of its last `n_scored` ids, and whether each of them is the likeliest."""
        state = self.model.empty_state(len(rows), self.widths)
        totals, greedy = [0.0] * len(rows), [True] * len(rows)
        longest = max(len(row) for row in rows) - 1
        piece = max(1, TOKENS_AT_ONCE // len(rows))
        for start in range(0, longest, piece):
            end = min(start + piece, longest)
            inputs = [row[start : min(end, len(row) - 1)] for row in rows]
            targets = [row[start + 1 : end + 1] for row in rows]
            t = max(len(ids) for ids in inputs)
            tokens_bt, targets_bt = (
                torch.tensor([[*ids, *[0] * (t - len(ids))] for ids in side], device=self.model.device)
                for side in (inputs, targets)
            )
            count_b = torch.tensor([len(ids) for ids in inputs], dtype=torch.int32, device=self.model.device)
            log_p_btv = torch.log_softmax(self.model.logits(self.model.forward(tokens_bt, state, count_b)), dim=-1)
            log_p_bt = log_p_btv.gather(-1, targets_bt[..., None])[..., 0].double().cpu()
            likeliest_bt = (log_p_btv.argmax(-1) == targets_bt).cpu()
            for b, (row, n) in enumerate(zip(rows, n_scored, strict=True)):
                first = max(0, len(row) - 1 - n - start)
                last = len(inputs[b])
                if first < last:
                    totals[b] += float(log_p_bt[b, first:last].sum())
                    greedy[b] &= bool(likeliest_bt[b, first:last].all())
        return list(zip(totals, greedy, strict=True))


def _batches(order: Sequence[int], size: int) -> Iterator[list[int]]:
    for i in range(0, len(order), size):
        yield list(order[i : i + size])


def main() -> int:
    """The harness's command line; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ModelArgumentsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
