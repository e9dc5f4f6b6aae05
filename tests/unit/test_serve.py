"""The server over HTTP, and its page in a headless browser where there is one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("httpx", reason="FastAPI's test client needs httpx")

import httpx
from fastapi.testclient import TestClient

from modeling.completions import Limits, RequestError, parse
from modeling.config import LanguageConfig
from modeling.convert import cut_mix
from modeling.decode import generate
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from modeling.request_queue import Job, RequestQueue
from modeling.serve import Answer, Served, Server, build_app
from modeling.text import Text

CFG = LanguageConfig(n_layers=2, d_model=64, headdim=16, widths=(8, 4, 1), d_state=8, vocab_size=128)
BYTES = Text(
    encode=lambda s: [b for b in s.encode() if b < 128],
    decode=lambda ids: bytes(ids).decode(),
    eos_id=0,
    vocab_size=128,
)


def served(max_waiting: int = 4, held: tuple[int, ...] | None = None) -> Served:
    """The server of a whole model, or of the mix `held` cut out of it."""
    trained = LanguageModel(CFG)
    trained.init_weights(5)
    with torch.no_grad():
        trained.embedding.mul_(20)
    if held is not None:
        mix = LanguageModel(CFG, held=held)
        mix.load_state_dict(cut_mix({name: p.detach() for name, p in trained.named_parameters()}, CFG, held))
        trained = mix
    model = InferenceModel(trained)
    limits = Limits(prompt_tokens=50, new_tokens=40, sequences=4, body_bytes=10_000)
    return Served(model, "tiny", BYTES, limits, RequestQueue(model, max_waiting=max_waiting))


@pytest.fixture(scope="module")
def shared() -> Served:
    return served()


@pytest.fixture(scope="module")
def client(shared: Served) -> Iterator[TestClient]:
    with TestClient(build_app(shared)) as client:
        yield client


def ask(client: TestClient, **body: object) -> Any:
    answer = client.post("/v1/completions", json={"prompt": "The", "temperature": 0, "max_tokens": 12, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: TestClient, **body: object) -> list[Any]:
    asked = {"prompt": "The", "temperature": 0, "max_tokens": 12, "stream": True, **body}
    with client.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def expected(shared: Served, prompt: str, n_heads: int, n: int = 12) -> str:
    steps = generate(shared.model, [BYTES.encode(prompt)], CFG.layer_widths(n_heads), max_new_tokens=n)
    return BYTES.decode(BYTES.until_end([int(token) for token in steps]))


@pytest.mark.parametrize(("width", "n_heads"), [("1", 8), ("1/2", 4), ("1h", 1)])
def test_a_completion_is_the_text_of_its_width(client: TestClient, shared: Served, width: str, n_heads: int) -> None:
    answer = ask(client, width=width)
    assert answer["object"] == "text_completion"
    assert answer["model"] == f"tiny:{width}"
    (choice,) = answer["choices"]
    assert choice["text"] == expected(shared, "The", n_heads)
    assert choice["finish_reason"] in ("length", "stop")
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["matmamba"]["tokens_per_s"] > 0
    assert answer["matmamba"]["state_bytes_per_sequence"] == shared.model.state_bytes(CFG.layer_widths(n_heads))


def test_a_stream_is_the_same_text(client: TestClient) -> None:
    for body in ({}, {"width": "1/2", "echo": True}, {"prompt": ["The", "A longer prompt"], "max_tokens": 9}):
        whole = ask(client, **body)
        pieces = events(client, **body, stream_options={"include_usage": True})
        texts = dict.fromkeys(range(len(whole["choices"])), "")
        reasons = {}
        for piece in pieces:
            for choice in piece["choices"]:
                texts[choice["index"]] += choice["text"]
                if choice["finish_reason"]:
                    reasons[choice["index"]] = choice["finish_reason"]
        assert list(texts.values()) == [choice["text"] for choice in whole["choices"]]
        assert list(reasons.values()) == [choice["finish_reason"] for choice in whole["choices"]]
        assert pieces[-1]["usage"] == whole["usage"]
        assert len(pieces) > 3
        assert [piece["choices"] for piece in pieces].count([]) == 1


def test_every_event_has_a_choice_unless_the_counts_are_asked_for(client: TestClient) -> None:
    """OpenAI's own example takes choices[0] of each."""
    assert all(len(piece["choices"]) == 1 for piece in events(client, stream_options=None))


def test_a_batch_of_unequal_prompts_equals_single_requests(client: TestClient) -> None:
    prompts = ["a", "A much longer prompt than that", "The"]
    together = ask(client, prompt=prompts)["choices"]
    assert [choice["index"] for choice in together] == [0, 1, 2]
    for prompt, choice in zip(prompts, together, strict=True):
        assert choice["text"] == ask(client, prompt=prompt)["choices"][0]["text"]


def test_the_space_between_a_prompt_and_its_answer_is_kept() -> None:
    """Tokenizers like Llama's leave one out at the beginning of a text."""
    own = served()
    own.text = replace(BYTES, decode=lambda ids: bytes(ids).decode().removeprefix(" "))
    answer = Answer(own, parse({"prompt": "The", "echo": True}, own.model, "tiny", own.text, own.limits))
    assert answer.start() == ["The"]
    assert "".join(answer.push([i])[0] for i in b" fox") == " fox"
    own.queue.stop()


def test_stop_texts_and_seeds(client: TestClient, shared: Served) -> None:
    text = expected(shared, "The", 8)
    stop = text[3:5]
    answer = ask(client, stop=stop)["choices"][0]
    assert answer == {"index": 0, "text": text[: text.index(stop)], "logprobs": None, "finish_reason": "stop"}
    sampled = [ask(client, temperature=1.5, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 5000, 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b'{"prompt": "a", "width": "2/3"}', 400, "width '2/3'"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "must be a number"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", 400, "temperature=1000"),
        (b'{"prompt": "a", "temperature": 1e-320}', 400, "at least 1e-06"),
        (b'{"prompt": "a", "top_p": 1e-320}', 400, "must lie in 1e-06 to 1"),
        (b'{"prompt": "\\ud800"}', 400, "lone surrogate"),
        (b'{"prompt": "a", "\\ud800": 1}', 400, "unknown field"),
        (b'{"prompt": "a", "stream": "\\ud800"}', 400, "stream=\\ud800: must be true or false"),
        (b'{"prompt": "a", "width": "1e400"}', 400, "width '1e400': not a number"),
        (b'{"prompt": "a", "width": "' + b"9" * 4000 + b'"}', 400, "4000 characters: at most 32"),
        (b'{"prompt": "a", "model": "gpt"}', 404, "this server has"),
        (b'"' + b"a" * 20_000 + b'"', 413, "larger than 10000"),
    ],
)
def test_bad_input_is_refused_in_openais_words(client: TestClient, body: bytes, status: int, message: str) -> None:
    answer = client.post("/v1/completions", content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_models_lists_every_width_with_its_memory(client: TestClient, shared: Served) -> None:
    entries = client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in entries] == ["tiny:1", "tiny:1/2", "tiny:1/8"]
    memory = [entry["matmamba"]["weight_bytes"] for entry in entries]
    assert memory == sorted(memory, reverse=True)
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}


@pytest.mark.parametrize(
    ("held", "widths"),
    [((8, 4), ["8h,4h", "1/2", "1/8"]), ((3, 8), ["3h,8h", "1/8"]), ((4, 4), ["1/2", "1/8"])],
    ids=str,
)
def test_a_cut_out_model_offers_what_it_holds_and_runs_it_unasked(
    shared: Served, held: tuple[int, ...], widths: list[str]
) -> None:
    with TestClient(build_app(served(held=held))) as client:
        entries = client.get("/v1/models").json()["data"]
        assert [entry["matmamba"]["width"] for entry in entries] == widths
        assert [ask(client, model=entry["id"])["matmamba"]["width"] for entry in entries] == widths
        answer = ask(client)
        steps = generate(shared.model, [BYTES.encode("The")], held, max_new_tokens=12)
        expected_text = BYTES.decode(BYTES.until_end([int(token) for token in steps]))
        assert answer["model"] == f"tiny:{widths[0]}"
        assert answer["choices"][0]["text"] == expected_text
        refused = client.post("/v1/completions", json={"prompt": "a", "width": "1"})
        assert refused.status_code == 400
        assert "but this model was cut to" in refused.json()["error"]["message"]


def test_a_prompt_that_takes_long_to_encode_keeps_nobody_waiting() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(prompt: str) -> list[int]:
        begun.set()
        assert go_on.wait(60)
        return BYTES.encode(prompt)

    slow = replace(served(), text=replace(BYTES, encode=slowly))
    with TestClient(build_app(slow)) as client:
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(ask(client)))
        asking.start()
        assert begun.wait(60)
        assert client.get("/health", timeout=30).json() == {"status": "ok", "waiting": 0}
        go_on.set()
        asking.join(60)
    assert answers[0]["usage"]["prompt_tokens"] == 3


def test_a_full_line_is_429(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request holds the model, one waits, and the third is told at once."""
    from modeling import request_queue

    gate, entered = threading.Event(), threading.Event()
    real = request_queue.generate

    def gated(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert gate.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(request_queue, "generate", gated)
    with TestClient(build_app(served(max_waiting=1))) as client:
        answers: list[int] = []

        def post() -> None:
            answers.append(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code)

        threads = [threading.Thread(target=post) for _ in range(2)]
        threads[0].start()
        assert entered.wait(20)
        threads[1].start()
        deadline = time.monotonic() + 20
        while client.get("/health").json()["waiting"] < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = client.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        gate.set()
        for thread in threads:
            thread.join(timeout=20)
        assert answers == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its tokens never stop coming."""
    from modeling import request_queue, serve

    entered, ended = threading.Event(), threading.Event()

    def endless(*_args: object, **_more: object) -> Iterator[torch.Tensor]:
        try:
            for _ in range(10_000):
                entered.set()
                time.sleep(0.001)
                yield torch.tensor([65])
        finally:
            ended.set()

    monkeypatch.setattr(request_queue, "generate", endless)
    monkeypatch.setattr(serve, "LOOK_EVERY_S", 0.05)
    own = served()
    body = json.dumps({"prompt": "a", "max_tokens": 40, "stream": stream}).encode()
    given: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        while not entered.is_set():
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(_message: object) -> None:
        pass

    async def request() -> bool:
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        answer = asyncio.ensure_future(build_app(own)({**scope, "query_string": b""}, receive, send))
        is_over = await asyncio.to_thread(ended.wait, 2)
        answer.cancel()
        return is_over

    assert asyncio.run(request())
    own.queue.stop()


def started(own: Served) -> tuple[Server, threading.Thread, int]:
    """The server on a free port, in a thread of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(own, host="127.0.0.1", port=port, log_level="warning")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    return server, thread, port


def test_a_server_that_is_told_to_stop_refuses_what_runs_and_what_waits() -> None:
    """Ctrl-C does not wait for the last token of every request."""
    own = replace(served(), limits=Limits(new_tokens=10**6), text=replace(BYTES, eos_id=-1))
    server, thread, port = started(own)
    asked = {"prompt": "The", "temperature": 0, "max_tokens": 10**6}
    waiting: list[httpx.Response] = []

    def wait() -> None:
        waiting.append(httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=60))

    other = threading.Thread(target=wait, daemon=True)
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json={**asked, "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert "choices" in next(lines)
        other.start()
        while own.queue.n_waiting == 0:
            time.sleep(0.01)
        server.should_exit = True
        *_, error, done = lines
    assert "the server is stopping" in error
    assert done == "data: [DONE]"
    other.join(timeout=20)
    assert waiting[0].status_code == 503
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_clients_that_left_hold_no_place_in_the_line() -> None:
    """Ones that ask again and again with a short patience would keep all others out until the running request ends."""
    own = served(max_waiting=2)
    request = parse({"prompt": "The"}, own.model, "tiny", BYTES, own.limits)
    began, go = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        began.set()
        go.wait(20)

    told: list[list[object]] = [[], [], [], []]
    jobs = [Job(request, hold), *(Job(request, answers.append) for answers in told)]
    own.queue.put(jobs[0])
    assert began.wait(20)
    own.queue.put(jobs[1])
    own.queue.put(jobs[2])
    with pytest.raises(RequestError, match="2 requests are waiting"):
        own.queue.put(jobs[3])
    jobs[1].cancelled.set()
    assert own.queue.n_waiting == 1
    own.queue.put(jobs[3])
    assert told == [[None], [], [], []], "and whoever answers for it is told that it is over"
    with pytest.raises(RequestError, match="2 requests are waiting"):
        own.queue.put(jobs[4])
    go.set()
    own.queue.stop()


@contextlib.contextmanager
def opened_page(own: Served) -> Iterator[tuple[Any, Any, list[str]]]:
    """A real server and its page in a real browser: the page, playwright's `expect`, and what the page complained of."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no chromium on PATH")
    server, thread, port = started(own)
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            page = browser.new_page()
            complaints: list[str] = []
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
            page.goto(f"http://127.0.0.1:{port}/")
            yield page, playwright.expect, complaints
            browser.close()
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def test_the_page_generates_side_by_side() -> None:
    """The slider names widths, three panels fill with their widths' texts."""
    own = served()
    with opened_page(own) as (page, expect, complaints):
        expect(page.locator("#width-name")).to_have_text("1")
        page.locator("#width").fill("0")
        expect(page.locator("#width-name")).to_have_text("1/8")
        page.fill("#prompt", "<b>The")
        page.fill("#tokens", "12")
        page.fill("#temperature", "0")
        page.check("#side")
        page.click("#go")
        notes = page.locator("article p")
        expect(notes).to_have_count(3, timeout=20_000)
        for i in range(3):
            expect(notes.nth(i)).to_contain_text("tokens/s", timeout=20_000)
        for width, n_heads in (("1", 8), ("1/2", 4), ("1/8", 1)):
            shown = page.locator(f'article[data-width="{width}"] pre').text_content()
            assert shown == "<b>The" + expected(own, "<b>The", n_heads)
        assert complaints == []
        page.fill("#mix", "1/3")
        page.uncheck("#side")
        page.click("#go")
        expect(page.locator("#problem")).to_contain_text("width '1/3'", timeout=20_000)


def test_the_page_of_a_cut_out_mix_starts_with_the_mix(shared: Served) -> None:
    with opened_page(served(held=(3, 8))) as (page, expect, complaints):
        expect(page.locator("#width-name")).to_have_text("the mix that was cut out")
        page.fill("#prompt", "The")
        page.fill("#tokens", "12")
        page.fill("#temperature", "0")
        page.click("#go")
        expect(page.locator("article p")).to_contain_text("tokens/s", timeout=20_000)
        expect(page.locator("article h2")).to_have_text("width the mix that was cut out")
        steps = generate(shared.model, [BYTES.encode("The")], (3, 8), max_new_tokens=12)
        text = BYTES.decode(BYTES.until_end([int(token) for token in steps]))
        assert page.locator("article pre").text_content() == "The" + text
        page.locator("#width").fill("0")
        expect(page.locator("#width-name")).to_have_text("1/8")
        assert complaints == []
