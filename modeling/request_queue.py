"""One worker that runs requests in the order they came, and a bounded line before it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from modeling.completions import Completion, RequestError
from modeling.decode import generate
from modeling.inference import InferenceModel

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A request in the line. The worker calls `tell` from its own thread."""

    request: Completion
    tell: Callable[[list[int] | Exception | None], None]
    """Given one token id for each sequence at a time, None at the end, an exception where it failed."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by whoever no longer wants the rest."""
    entered_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None


class RequestQueue:
    """Runs one job at a time on the model. Full is full: the caller is told at once, not after a wait."""

    def __init__(self, model: InferenceModel, *, max_waiting: int = 16, max_wait_s: float = 120.0) -> None:
        """At most `max_waiting` jobs wait; one that has waited `max_wait_s` is refused instead of run."""
        if max_waiting < 1:
            raise ValueError(f"max_waiting={max_waiting}: must be at least 1")
        self._model, self._max_waiting, self._max_wait_s = model, max_waiting, max_wait_s
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        """Held by who looks at the line or changes it."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Jobs in the line that somebody waits for, not counting the one that runs."""
        with self._changed:
            return sum(not job.cancelled.is_set() for job in self._jobs)

    def put(self, job: Job) -> None:
        """Enter the line. Raises RequestError where it is full (429) or stopped (503)."""
        with self._changed:
            if self._stopping.is_set():
                raise RequestError("the server is stopping", status=503)
            before, self._jobs = self._jobs, deque()
            for other in before:
                if other.cancelled.is_set():
                    other.tell(None)
                else:
                    self._jobs.append(other)
            if len(self._jobs) >= self._max_waiting:
                raise RequestError(f"{self._max_waiting} requests are waiting: try again later", status=429)
            self._jobs.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Finish the running token, refuse the rest, and end the worker. Asked again, it does nothing."""
        with self._changed:
            self._stopping.set()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._run(job)
                job.tell(None)
            except RequestError as error:
                job.tell(error)
            except Exception as error:
                # The server outlives a request that fails, out of memory for instance.
                log.exception("a request failed")
                if isinstance(error, torch.OutOfMemoryError):
                    self._model.kept_steps.clear()  # room for the next one
                job.tell(error)
        with self._changed:
            while self._jobs:
                self._jobs.popleft().tell(RequestError("the server is stopping", status=503))

    def _next(self) -> Job | None:
        """The job that came first, once there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopping.is_set())
            return None if self._stopping.is_set() else self._jobs.popleft()

    def _run(self, job: Job) -> None:
        job.started_s = time.monotonic()
        if job.started_s - job.entered_s > self._max_wait_s:
            raise RequestError(f"waited longer than {self._max_wait_s:g} s: try again later", status=503)
        if job.cancelled.is_set():  # its client left while it waited: not even the prompt is read
            return
        request = job.request
        generator = torch.Generator(self._model.device)
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed)
        steps = generate(
            self._model,
            request.prompts,
            request.widths,
            max_new_tokens=request.max_tokens,
            sampling=request.sampling,
            generator=generator,
        )
        for tokens_b in steps:
            if self._stopping.is_set():
                raise RequestError("the server is stopping", status=503)
            if job.cancelled.is_set():
                return
            job.tell(tokens_b.tolist())
