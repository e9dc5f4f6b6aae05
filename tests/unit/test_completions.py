"""What a completions request may say, field by field, and what every mistake is told; no web server in here."""

from __future__ import annotations

import queue
import threading
import time

import pytest
import torch

from modeling.completions import Completion, Limits, RequestError, StopWatch, parse
from modeling.config import LanguageConfig
from modeling.decode import GRAPH_FROM, generate
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.request_queue import Job, RequestQueue
from modeling.sampling import LEAST_TEMPERATURE, LEAST_TOP_P, Sampling, probabilities
from modeling.text import Text

CFG = LanguageConfig(n_layers=2, d_model=32, headdim=8, widths=(8, 4, 1), d_state=8, vocab_size=128)


def ascii_ids(text: str) -> list[int]:
    if not text.isascii():
        raise ValueError(f"no id for {text!r}")
    return list(text.encode())


ASCII = Text(encode=ascii_ids, decode=lambda ids: "".join(map(chr, ids)), eos_id=0, vocab_size=128)
LIMITS = Limits(prompt_tokens=20, new_tokens=10, sequences=4)


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    trained = LanguageModel(CFG)
    trained.init_weights(0)
    return InferenceModel(trained)


def parsed(nested: InferenceModel, /, **body: object) -> Completion:
    return parse(body, nested, "tiny", ASCII, LIMITS)


def test_defaults_are_openais(model: InferenceModel) -> None:
    request = parse({"prompt": "ab", "model": "tiny"}, model, "tiny", ASCII, Limits())
    assert request.prompts == [[97, 98]]
    assert (request.max_tokens, request.sampling.temperature, request.sampling.top_p) == (16, 1.0, 1.0)
    assert (request.stream, request.echo, request.stops, request.seed) == (False, False, (), None)


def test_the_default_number_of_tokens_is_within_the_servers(model: InferenceModel) -> None:
    assert parsed(model, prompt="ab").max_tokens == LIMITS.new_tokens < 16
    for name in ("prompt_tokens", "new_tokens"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            Limits(**{name: 0})


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("", [[0]]), (["a", "b"], [[97], [98]]), ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]])],
)
def test_every_form_of_prompt(model: InferenceModel, prompt: object, ids: list[list[int]]) -> None:
    assert parsed(model, prompt=prompt, max_tokens=1).prompts == ids


def test_n_repeats_each_prompt(model: InferenceModel) -> None:
    assert parsed(model, prompt=["a", "b"], n=2, max_tokens=1).prompts == [[97], [97], [98], [98]]


@pytest.mark.parametrize(
    ("body", "widths"),
    [
        ({}, (8, 8)),
        ({"width": "1/2"}, (4, 4)),
        ({"model": "tiny:1/8"}, (1, 1)),
        ({"model": "tiny:1,1/2"}, (8, 4)),
        ({"model": "tiny:1/8", "width": "1/8"}, (1, 1)),
    ],
)
def test_the_width_is_the_field_or_in_the_models_name(
    model: InferenceModel, body: dict[str, object], widths: tuple[int, ...]
) -> None:
    assert parsed(model, prompt="a", max_tokens=1, **body).widths == widths


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt must be"),
        ({"prompt": []}, "prompt", "prompt must be"),
        ({"prompt": 5}, "prompt", "prompt must be"),
        ({"prompt": ["a", 1]}, "prompt", "prompt 1 is neither"),
        ({"prompt": [[]]}, "prompt", "prompt 0 is neither"),
        ({"prompt": [[True]]}, "prompt", "prompt 0 is neither"),
        ({"prompt": [128]}, "prompt", "token id 128"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": "a" * 21}, "prompt", "21 tokens: at most 20"),
        ({"prompt": ["a"] * 5}, "prompt", "at most 4"),
        ({"prompt": ["a"] * 3, "n": 2}, "n", "at most 4"),
        ({"prompt": "a", "n": 0}, "n", "from 1 to 4"),
        ({"prompt": "a", "max_tokens": 11}, "max_tokens", "from 1 to 10"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "whole number"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "temperature"),
        ({"prompt": "a", "temperature": float("inf")}, "temperature", "must be a number"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "must be a number"),
        ({"prompt": "a", "temperature": 10**400}, "temperature", "must be a number"),
        ({"prompt": "a", "temperature": 1e-320}, "temperature", "must be 0, .* or a number of at least 1e-06"),
        ({"prompt": "a", "temperature": "\ud800"}, "temperature", r"temperature=\\ud800: must be a number"),
        ({"prompt": "a", "top_p": 0}, "top_p", "top_p"),
        ({"prompt": "a", "top_p": 1e-320}, "top_p", "must lie in 1e-06 to 1"),
        ({"prompt": ["a", "\x80"]}, "prompt", "prompt 1: no id for"),
        ({"prompt": ["a", "b\ud800"]}, "prompt", "prompt 1 .* character 1 is a lone surrogate"),
        ({"prompt": [10**400]}, "prompt", "token id 10{79}: "),
        ({"prompt": "a", "stream": "yes"}, "stream", "true or false"),
        ({"prompt": "a", "stream_options": True}, "stream_options", "include_usage"),
        ({"prompt": "a", "stream_options": {"usage": True}}, "stream_options", "include_usage"),
        ({"prompt": "a", "stream_options": {"include_usage": 1}}, "include_usage", "true or false"),
        ({"prompt": "a", "stop": ["a", ""]}, "stop", "none empty"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop", "at most 4"),
        ({"prompt": "a", "stop": "x" * 201}, "stop", "200 characters"),
        ({"prompt": "a", "seed": -1}, "seed", "from 0"),
        ({"prompt": "a", "width": "1/3"}, "width", "width '1/3'"),
        ({"prompt": "a", "width": "1,1,1"}, "width", "3 widths for 2 layers"),
        ({"prompt": "a", "width": "@presets.json:x"}, "width", "not a number"),
        ({"prompt": "a", "width": "1e400"}, "width", "not a number"),
        ({"prompt": "a", "width": "1E-999999999"}, "width", "not a number"),
        ({"prompt": "a", "width": "1," + "9" * 4000}, "width", "4000 characters: at most 32"),
        ({"prompt": "a", "width": 4}, "width", "width must be a string"),
        ({"prompt": "a", "model": "tiny:1/2", "width": "1/8"}, "width", "say it once"),
        ({"prompt": "a", "model": 7}, "model", "must be a string"),
        ({"prompt": "a", "logprobs": 5}, "logprobs", "not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of", "not supported"),
        ({"prompt": "a", "promt": "b"}, "promt", "unknown field"),
        ({"prompt": "a", "\ud800": "b"}, r"\ud800", "unknown field"),
    ],
)
def test_mistakes_are_named(model: InferenceModel, body: dict[str, object], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parsed(model, **{"max_tokens": 5, **body})
    assert (caught.value.param, caught.value.status) == (param, 400)


def test_the_least_values_choose_the_likeliest() -> None:
    scores = torch.tensor([[3.0, -1e4, 1e4, 9.9e3]])
    least = (LEAST_TEMPERATURE, 1.0), (1.0, LEAST_TOP_P), (LEAST_TEMPERATURE, LEAST_TOP_P)
    for temperature, top_p in least:
        assert probabilities(scores, Sampling(temperature, top_p)).tolist() == [[0, 0, 1, 0]]


def test_another_model_is_not_here(model: InferenceModel) -> None:
    with pytest.raises(RequestError, match="this server has 'tiny'") as caught:
        parsed(model, prompt="a", model="large")
    assert caught.value.status == 404
    with pytest.raises(RequestError, match="JSON object"):
        parse([1], model, "tiny", ASCII, LIMITS)


def test_text_stops_before_the_stop_even_in_pieces() -> None:
    watch = StopWatch(["END", "\n\n"])
    assert [watch.push(piece) for piece in ("one", " E", "N", "X", "\n", "EN", "D two")] == [
        "one",
        " ",
        "",
        "ENX",
        "",
        "\n",
        "",
    ]
    assert watch.stopped
    assert watch.rest() == ""
    open_end = StopWatch(["END"])
    assert open_end.push("an E") == "an "
    assert open_end.rest() == "E"
    assert StopWatch([]).push("all") == "all"


def request_of(model: InferenceModel, **body: object) -> Completion:
    return parsed(model, **{"prompt": "a", "max_tokens": 3, "temperature": 0, **body})


def collected(line: RequestQueue, request: Completion) -> tuple[Job, queue.Queue[object]]:
    told: queue.Queue[object] = queue.Queue()
    job = Job(request, told.put)
    line.put(job)
    return job, told


def test_the_line_runs_in_order_and_refuses_when_full(model: InferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling import request_queue

    gate, order = threading.Event(), []
    real = request_queue.generate

    def gated(model: InferenceModel, prompts: list[list[int]], *args: object, **kwargs: object) -> object:
        order.append(prompts[0][0])
        assert gate.wait(20)
        return real(model, prompts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(request_queue, "generate", gated)
    line = RequestQueue(model, max_waiting=2)
    jobs = [collected(line, request_of(model, prompt=[1]))]
    while not order:
        time.sleep(0.005)
    jobs += [collected(line, request_of(model, prompt=[i])) for i in (2, 3)]
    assert line.n_waiting == 2
    with pytest.raises(RequestError, match="2 requests are waiting") as caught:
        collected(line, request_of(model, prompt=[4]))
    assert caught.value.status == 429
    gate.set()
    for _, told in jobs:
        items = [told.get(timeout=20) for _ in range(4)]
        assert items[-1] is None
        assert all(isinstance(item, list) and len(item) == 1 for item in items[:-1])
    assert order == [1, 2, 3]
    line.stop()


def test_a_failure_is_told_and_the_next_request_runs(model: InferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    list(generate(model, [[1]], (8, 8), max_new_tokens=GRAPH_FROM))
    assert model.kept_steps.n_kept == 1
    line = RequestQueue(model)
    real = InferenceModel.forward
    monkeypatch.setattr(InferenceModel, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    assert isinstance(collected(line, request_of(model))[1].get(timeout=20), torch.OutOfMemoryError)
    monkeypatch.setattr(InferenceModel, "forward", real)
    assert isinstance(collected(line, request_of(model))[1].get(timeout=20), list)
    assert model.kept_steps.n_kept == 0, "what was kept made room"
    line.stop()


def test_jobs_that_are_late_cancelled_or_left_over_end(model: InferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    late = RequestQueue(model, max_wait_s=-1.0)
    error = collected(late, request_of(model))[1].get(timeout=20)
    assert isinstance(error, RequestError)
    assert error.status == 503
    late.stop()
    line = RequestQueue(model)
    told: queue.Queue[object] = queue.Queue()
    job = Job(request_of(model, max_tokens=10), told.put)
    job.cancelled.set()
    monkeypatch.setattr(InferenceModel, "forward", lambda *_: pytest.fail("the prompt was read"))
    line.put(job)
    assert told.get(timeout=20) is None, "a cancelled job generates nothing"
    line.stop()
    with pytest.raises(RequestError, match="stopping"):
        line.put(job)
