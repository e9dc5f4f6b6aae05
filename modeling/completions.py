"""Requests in the format of OpenAI's completions endpoint: what they may say, and what is wrong with the others.

The field `width` is our own (1/4, 16h, or one for each layer). The model's name may carry a width after a colon
("lm_130m:1/4"), so that clients that know nothing of widths can choose one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modeling.inference import InferenceModel
from modeling.nesting import LayerWidths, parse_layer_widths
from modeling.sampling import Sampling
from modeling.text import Text

IGNORED = ("user",)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
"""Fields of OpenAI's that we do not offer, and the values at which they ask for nothing."""
MAX_STOPS = 4


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    prompt_tokens: int = 4096
    """Tokens of one prompt."""
    new_tokens: int = 1024
    """Tokens generated for one sequence."""
    sequences: int = 8
    """Prompts times n."""
    body_bytes: int = 1 << 20
    """Bytes of a request."""
    stop_characters: int = 200
    """Characters of one stop text."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: a request may ask for at least 1")


class RequestError(ValueError):
    """A request that is refused: what is wrong, which field, and the HTTP status.

    Both texts may quote the request; its lone surrogates, which no answer can carry, are escaped.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(_sendable(message))
        self.param, self.status = param and _sendable(param), status


@dataclass(frozen=True)
class Completion:
    """A checked request."""

    prompts: list[list[int]]
    """Token ids, one list a sequence: each prompt n times in a row."""
    widths: LayerWidths
    width: str
    """As it was asked for."""
    max_tokens: int
    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    """Whether a stream ends with an event of no choices, which has the counts."""
    echo: bool


def parse(body: Any, model: InferenceModel, name: str, text: Text, limits: Limits) -> Completion:
    """The request that `body` (decoded JSON) makes of the model called `name`. Raises RequestError."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    known = {"model", "prompt", "width", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "echo"}
    known |= {"stream", "stream_options"}
    for key, value in body.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            raise RequestError(f"{key} is not supported: leave it out", key)
        if key not in known and key not in NEUTRAL and key not in IGNORED:
            raise RequestError(f"unknown field {str(key)[:80]!r}", str(key)[:80])
    width = _width(body, name, model.own_width)
    try:
        widths = parse_layer_widths(width, model.cfg.n_heads, model.cfg.n_layers)
        model.check_widths(widths)
    except ValueError as error:
        raise RequestError(str(error), "width") from None
    n = _integer(body, "n", 1, 1, limits.sequences)
    prompts = _prompts(body.get("prompt"), model.cfg.vocab_size, text, limits)
    if len(prompts) * n > limits.sequences:
        raise RequestError(f"{len(prompts)} prompts x n={n}: at most {limits.sequences} sequences a request", "n")
    try:
        sampling = Sampling(temperature=_number(body, "temperature", 1.0), top_p=_number(body, "top_p", 1.0))
    except ValueError as error:
        raise RequestError(str(error), "temperature" if "temperature" in str(error) else "top_p") from None
    return Completion(
        prompts=[prompt for prompt in prompts for _ in range(n)],
        widths=widths,
        width=width,
        max_tokens=_integer(body, "max_tokens", min(16, limits.new_tokens), 1, limits.new_tokens),
        sampling=sampling,
        seed=None if body.get("seed") is None else _integer(body, "seed", 0, 0, 2**63 - 1),
        stops=_stops(body.get("stop"), limits),
        stream=_flag(body, "stream"),
        include_usage=_include_usage(body.get("stream_options")),
        echo=_flag(body, "echo"),
    )


class StopWatch:
    """Cuts a stream of text before the first stop text, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.stopped = tuple(stops), "", False

    def push(self, text: str) -> str:
        """Add text; returns what can be shown. Nothing after a stop."""
        if self.stopped:
            return ""
        self._held += text
        places = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def rest(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _overlap(self, stop: str) -> int:
        """Characters at the end of what is held that `stop` begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def _width(body: dict[str, Any], name: str, default: str) -> str:
    asked = body.get("model", name)
    if not isinstance(asked, str):
        raise RequestError("model must be a string", "model")
    base, colon, suffix = asked.partition(":")
    if base != name:
        raise RequestError(f"model {asked[:80]!r} is not here: this server has {name!r}", "model", 404)
    width = body.get("width", suffix if colon else default)
    if not isinstance(width, str):
        raise RequestError('width must be a string: "1/4", "16h", or one for each layer', "width")
    if colon and "width" in body and width != suffix:
        raise RequestError(f"model says width {suffix[:80]!r}, width says {width[:80]!r}: say it once", "width")
    if len(width) > 4096:
        raise RequestError(f"width has {len(width)} characters: at most 4096", "width")
    return width


def _prompts(raw: Any, vocab_size: int, text: Text, limits: Limits) -> list[list[int]]:
    if isinstance(raw, str) or (isinstance(raw, list) and raw and all(_is_integer(i) for i in raw)):
        raw = [raw]
    if not isinstance(raw, list) or not raw:
        raise RequestError(
            "prompt must be a string, a list of strings, or token ids: [1, 2] or [[1, 2], [3]]", "prompt"
        )
    if len(raw) > limits.sequences:
        raise RequestError(f"{len(raw)} prompts: at most {limits.sequences} sequences a request", "prompt")
    prompts = []
    for i, one in enumerate(raw):
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"prompt {i} is not Unicode text: character {error.start} is a lone surrogate", "prompt"
                ) from None
            try:
                ids = text.prompt_ids(one)
            except ValueError as error:
                raise RequestError(f"prompt {i}: {error}", "prompt") from None
        elif isinstance(one, list) and one and all(_is_integer(token) for token in one):
            ids = one
        else:
            raise RequestError(f"prompt {i} is neither a string nor a non-empty list of token ids", "prompt")
        if len(ids) > limits.prompt_tokens:
            raise RequestError(f"prompt {i} has {len(ids)} tokens: at most {limits.prompt_tokens}", "prompt")
        bad = next((token for token in ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"prompt {i} has token id {str(bad)[:80]}: the vocabulary is 0 to {vocab_size - 1}", "prompt"
            )
        prompts.append(ids)
    return prompts


def _stops(raw: Any, limits: Limits) -> tuple[str, ...]:
    stops = [] if raw is None else [raw] if isinstance(raw, str) else raw
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError("stop must be a text or a list of texts, none empty", "stop")
    if len(stops) > MAX_STOPS or any(len(stop) > limits.stop_characters for stop in stops):
        raise RequestError(f"stop: at most {MAX_STOPS} texts of at most {limits.stop_characters} characters", "stop")
    return tuple(stops)


def _include_usage(options: Any) -> bool:
    if options is not None and not (isinstance(options, dict) and options.keys() <= {"include_usage"}):
        raise RequestError('stream_options must be {"include_usage": true}, or false', "stream_options")
    return _flag(options or {}, "include_usage")


def _sendable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(body: dict[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = default if body.get(key) is None else body[key]
    if not _is_integer(value) or not low <= value <= high:
        raise RequestError(f"{key}={str(value)[:80]}: must be a whole number from {low} to {high}", key)
    return int(value)


def _number(body: dict[str, Any], key: str, default: float) -> float:
    value = default if body.get(key) is None else body[key]
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise RequestError(f"{key}={str(value)[:80]}: must be a number", key)
    return number


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{key}={str(value)[:80]}: must be true or false", key)
    return bool(value)
