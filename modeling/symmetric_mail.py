"""Trays in symmetric memory: each GPU of a host sees those of the others, and its copy engines write into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from modeling.peer_exchange import TRAYS

ALIGN = 1024
"""Trays start at multiples of this many bytes."""


class SymmetricMail:
    """`peer_exchange.Mail` between the GPUs of one host. All ranks of `group` must make it, and send letters of the same length.

    Its methods can be captured in CUDA graphs once a letter as long as theirs has been sent: longer letters get longer
    trays, which the ranks have to agree on. Raises RuntimeError where the GPUs do not see each other's memory.
    """

    def __init__(self, group: Any) -> None:
        self.size, self.rank, self._group = group.size(), group.rank(), group
        # Signals of their own: between two copies of one stream a signal would leave the copy engine idle.
        self._sending, self._telling, self._watching, self._copying = (torch.cuda.Stream(priority=-1) for _ in range(4))
        self._told: dict[tuple[int, int], torch.cuda.Event] = {}
        self._room = 0
        self._trays: Any = None
        self._kept: list[tuple[Tensor, Any]] = []
        self._make_room(ALIGN, torch.device("cuda", torch.cuda.current_device()))

    def send(self, tray: int, to: int, x: Tensor) -> None:
        """As Mail.send."""
        self._make_room(x.numel() * x.element_size(), x.device)
        self._sending.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._sending):
            self._place(to, tray, self.rank, x).copy_(x)
        self._telling.wait_stream(self._sending)
        with torch.cuda.stream(self._telling):
            self._trays.put_signal(to, tray)
        self._told[tray, (to - self.rank) % self.size] = self._telling.record_event()

    def receive(self, tray: int, sender: int, like: Tensor) -> Tensor:
        """As Mail.receive.

        It is waited for beside what this stream does, but not before this rank's own letter has gone to the one who is as many
        ranks ahead as the sender is behind: so wherever the GPU puts the waiting, no letter that is waited for can be behind it.
        """
        self._watching.wait_event(self._told[tray, (self.rank - sender) % self.size])
        with torch.cuda.stream(self._watching):
            self._trays.wait_signal(sender, tray)
        torch.cuda.current_stream().wait_stream(self._watching)
        return self._place(self.rank, tray, sender, like)

    def aside(self, work: Callable[[], object]) -> None:
        """As Mail.aside."""
        self._copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copying):
            work()

    def finish(self) -> None:
        """As Mail.finish."""
        for stream in (self._telling, self._copying):
            torch.cuda.current_stream().wait_stream(stream)

    def _place(self, owner: int, tray: int, sender: int, like: Tensor) -> Tensor:
        offset = (tray * self.size + sender) * self._room // like.element_size()
        place: Tensor = self._trays.get_buffer(owner, like.shape, like.dtype, offset)
        return place

    def _make_room(self, n_bytes: int, device: torch.device) -> None:
        if n_bytes <= self._room:
            return
        self._room = -(-n_bytes // ALIGN) * ALIGN
        memory = symmetric_memory.empty(len(TRAYS) * self.size * self._room, dtype=torch.uint8, device=device)
        self._trays = symmetric_memory.rendezvous(memory, self._group)
        self._kept.append((memory, self._trays))  # for good: graphs know trays by their address
