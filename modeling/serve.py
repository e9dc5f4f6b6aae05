"""A page and an API for one model at all its widths: `python -m modeling.serve MODEL --port 8000`.

The API speaks OpenAI's completions format at /v1/completions and /v1/models; docs/inference.md has the rest. Needs the
extra `serve` (FastAPI, uvicorn).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from modeling.checkpoint_reader import CheckpointError
from modeling.completions import Completion, Limits, RequestError, StopWatch, parse
from modeling.flops import language_parameters
from modeling.inference import InferenceModel
from modeling.nesting import LayerWidths, width_name
from modeling.open_model import DTYPES, open_model
from modeling.request_queue import Job, RequestQueue
from modeling.text import Text, TextStream

PAGE = Path(__file__).with_name("serve_page.html")
HEADERS = {"Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "}
HEADERS["Content-Security-Policy"] += "connect-src 'self'; base-uri 'none'; form-action 'none'"
GRACE_S = 5
"""Seconds that a client has, once the server stops, to take what was written to it."""
LOOK_EVERY_S = 1.0
"""Seconds between two looks at whether a client is still there."""


@dataclass
class Served:
    """What the routes share."""

    model: InferenceModel
    name: str
    text: Text
    limits: Limits
    queue: RequestQueue


def memory_of(model: InferenceModel, widths: LayerWidths) -> dict[str, int]:
    """Bytes of the weights that a submodel reads, and of one sequence's state."""
    weights = language_parameters(model.cfg, widths).total * model.dtype.itemsize
    return {"weight_bytes": weights, "state_bytes_per_sequence": model.state_bytes(widths)}


def offered(model: InferenceModel) -> list[tuple[str, LayerWidths]]:
    """What a client may choose without thinking: all that the model holds, then the trained widths below it, widest first.

    A model that was cut out no longer has the wider ones, and may be narrower than all of them.
    """
    cfg, least = model.cfg, min(model.held)
    narrower = [n for n in cfg.widths if n <= least and cfg.layer_widths(n) != model.held]
    return [(model.own_width, model.held), *((width_name(n, cfg.n_heads), cfg.layer_widths(n)) for n in narrower)]


class Answer:
    """The text of a request's sequences as their tokens come."""

    def __init__(self, served: Served, request: Completion) -> None:
        self._served, self.request = served, request
        self._streams = [TextStream(served.text, prompt) for prompt in request.prompts]
        self._stops = [StopWatch(request.stops) for _ in request.prompts]
        self.finished: list[str | None] = [None] * len(request.prompts)
        self.n_new = 0

    def start(self) -> list[str]:
        """What is shown before the first token: the prompts where they are to be echoed."""
        decode = self._served.text.decode
        return [decode(prompt) if self.request.echo else "" for prompt in self.request.prompts]

    def push(self, tokens: list[int]) -> list[str]:
        """Take one token of each sequence; returns the text that each one can show now."""
        new = []
        for i, token in enumerate(tokens):
            if self.finished[i] is not None:
                new.append("")
                continue
            self.n_new += 1
            if token == self._served.text.eos_id:
                self.finished[i] = "stop"
                new.append(self._stops[i].push(self._streams[i].rest()) + self._stops[i].rest())
                continue
            new.append(self._stops[i].push(self._streams[i].push([token])))
            if self._stops[i].stopped:
                self.finished[i] = "stop"
        return new

    def end(self) -> list[str]:
        """What is left when no more tokens come."""
        new = []
        for i, reason in enumerate(self.finished):
            if reason is None:
                self.finished[i] = "length"
                new.append(self._stops[i].push(self._streams[i].rest()) + self._stops[i].rest())
            else:
                new.append("")
        return new


class Server(uvicorn.Server):
    """Told to stop, it ends the requests: uvicorn's own waits for the last token of all that run or wait."""

    def __init__(self, served: Served, *, host: str, port: int, **options: Any) -> None:
        options.setdefault("timeout_graceful_shutdown", GRACE_S)
        super().__init__(uvicorn.Config(build_app(served), host=host, port=port, **options))
        self._queue = served.queue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what runs and what waits, and end."""
        await asyncio.to_thread(self._queue.stop)
        await super().shutdown(sockets)


def build_app(served: Served) -> FastAPI:
    """The application. Its shutdown stops the queue."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.queue.stop)

    app = FastAPI(title="MatMamba", lifespan=lifespan, docs_url=None, redoc_url=None)
    watches = set[asyncio.Task[None]]()

    @app.exception_handler(RequestError)
    async def refuse(_request: Request, error: RequestError) -> Response:
        return JSONResponse(_error(error), status_code=error.status)

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(), headers=HEADERS)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": served.queue.n_waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cfg = served.model.cfg
        entries = []
        for width, widths in offered(served.model):
            about = {"width": width, "parameters": language_parameters(cfg, widths).total}
            about["label"] = width if len(set(widths)) == 1 else "the mix that was cut out"
            entry = {"id": f"{served.name}:{width}", "object": "model", "created": 0, "owned_by": "local"}
            entries.append({**entry, "matmamba": {**about, **memory_of(served.model, widths)}})
        return {"object": "list", "data": entries}

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        body = await _body(http, served.limits)
        # In a thread: ids of a text as large as a body may be take a second, and others wait for their next token.
        request = await asyncio.to_thread(parse, body, served.model, served.name, served.text, served.limits)
        told: asyncio.Queue[list[int] | Exception | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = Job(request, lambda item: _tell(loop, told, item))
        served.queue.put(job)
        watch = asyncio.create_task(_cancel_when_gone(http, job))
        watches.add(watch)  # the loop itself holds tasks weakly
        watch.add_done_callback(watches.discard)
        about = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": f"{served.name}:{request.width}",
        }
        answer = Answer(served, request)
        if request.stream:
            # The first item is awaited here, so that a refusal in the line still has its status.
            events = _events(served, about, answer, job, told, await _next(told))
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        texts = answer.start()
        try:
            while not all(answer.finished) and (tokens := await _next(told)) is not None:
                texts = [text + new for text, new in zip(texts, answer.push(tokens), strict=True)]
        finally:
            job.cancelled.set()
        texts = [text + new for text, new in zip(texts, answer.end(), strict=True)]
        choices = [_choice(i, text, answer.finished[i]) for i, text in enumerate(texts)]
        return JSONResponse({**about, "choices": choices, **_usage(served, answer, job)})

    return app


def _tell(loop: asyncio.AbstractEventLoop, told: asyncio.Queue[Any], item: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
        loop.call_soon_threadsafe(told.put_nowait, item)


async def _cancel_when_gone(http: Request, job: Job) -> None:
    """Cancel the job once its client has gone, however fast its tokens come; ends with the request."""
    while not job.cancelled.is_set():
        if await http.is_disconnected():
            job.cancelled.set()
        await asyncio.sleep(LOOK_EVERY_S)


async def _next(told: asyncio.Queue[Any]) -> list[int] | None:
    """The worker's next word. Raises RequestError where it failed."""
    item = await told.get()
    if isinstance(item, RequestError):
        raise item
    if isinstance(item, Exception):
        raise RequestError("the request failed on the server, whose log says why", status=500)
    tokens: list[int] | None = item
    return tokens


async def _events(
    served: Served,
    about: dict[str, Any],
    answer: Answer,
    job: Job,
    told: asyncio.Queue[Any],
    tokens: list[int] | None,
) -> AsyncIterator[str]:
    """The answer as server-sent events. A client that goes away cancels the job."""
    try:
        reported: list[str | None] = [None] * len(answer.finished)
        for i, text in enumerate(answer.start()):
            if text:
                yield _event({**about, "choices": [_choice(i, text, None)]})
        while tokens is not None:
            for i, text in enumerate(answer.push(tokens)):
                if text or answer.finished[i] != reported[i]:
                    reported[i] = answer.finished[i]
                    yield _event({**about, "choices": [_choice(i, text, reported[i])]})
            if all(answer.finished):
                break
            tokens = await _next(told)
        for i, text in enumerate(answer.end()):
            if reported[i] is None:
                yield _event({**about, "choices": [_choice(i, text, answer.finished[i])]})
        if answer.request.include_usage:
            yield _event({**about, "choices": [], **_usage(served, answer, job)})
    except RequestError as error:
        yield _event(_error(error))
    finally:
        job.cancelled.set()
    yield "data: [DONE]\n\n"


async def _body(http: Request, limits: Limits) -> Any:
    raw = bytearray()
    async for chunk in http.stream():
        raw += chunk
        if len(raw) > limits.body_bytes:
            raise RequestError(f"the body is larger than {limits.body_bytes} bytes", status=413)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON") from None


def _event(about: dict[str, Any]) -> str:
    return f"data: {json.dumps(about)}\n\n"


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _usage(served: Served, answer: Answer, job: Job) -> dict[str, Any]:
    n_prompt = sum(len(prompt) for prompt in answer.request.prompts)
    started_s = job.started_s or time.monotonic()
    elapsed_s = max(time.monotonic() - started_s, 1e-9)
    speed = {"tokens_per_s": round(answer.n_new / elapsed_s, 2), "waited_s": round(started_s - job.entered_s, 4)}
    memory = memory_of(served.model, answer.request.widths)
    total = n_prompt + answer.n_new
    return {
        "usage": {"prompt_tokens": n_prompt, "completion_tokens": answer.n_new, "total_tokens": total},
        "matmamba": {"width": answer.request.width, **speed, **memory},
    }


def _error(error: RequestError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": None}}


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m modeling.serve", description="Serve a model at all its widths.")
    parser.add_argument("model", type=Path, help="a run, a checkpoint, or a model folder")
    parser.add_argument("--name", help="what clients call it; default: the folder's name")
    parser.add_argument("--host", default="127.0.0.1", help="there is no authentication: think before you widen this")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tokenizer", default="", help="FILE.json, FILE.model or tiktoken:NAME; default: the model's")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-waiting", type=int, default=16, help="requests in the line; more are refused (429)")
    parser.add_argument("--max-prompt-tokens", type=int, default=Limits.prompt_tokens)
    parser.add_argument("--max-new-tokens", type=int, default=Limits.new_tokens)
    args = parser.parse_args(argv)
    try:
        name = args.name or args.model.resolve().name
        if not 0 < args.port < 65536:
            raise ValueError(f"--port {args.port}: must be 1 to 65535")
        if ":" in name:
            raise ValueError(f"name {name!r}: a colon separates the name from the width, pass another --name")
        opened = open_model(args.model, dtype=args.dtype, device=args.device)
        text = opened.text(args.tokenizer)
        limits = Limits(prompt_tokens=args.max_prompt_tokens, new_tokens=args.max_new_tokens)
        line = RequestQueue(opened.model, max_waiting=args.max_waiting)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    server = Server(Served(opened.model, name, text, limits, line), host=args.host, port=args.port)
    with contextlib.suppress(KeyboardInterrupt):  # which it heard, and raises again at its end
        server.run()
    return 0 if server.started else 3


if __name__ == "__main__":
    sys.exit(main())
