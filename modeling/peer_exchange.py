"""What a mixer sends beside its matrix products, written straight into the other ranks' memory (sequence parallelism).

Collectives run on the multiprocessors that the product beside them needs, so that hiding one slows the other down. Between
the GPUs of one host the copy engines can do it instead: a rank writes into a tray of the other rank's memory, and a signal
says that it has. What is sent goes off first, and this rank's own share of the products is done while it is under way.

Letters: m tokens of all ranks, n those of one, r ranks, d model, e channels of the projection, i inner, k either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor

from modeling.ops.additions import add_all
from modeling.ops.products import Weight, add_product, times
from modeling.tensor_parallel import halves, tokens_each

GATHERED, SUMMED, SUMMED_LATER = range(3)
"""The trays: for what is gathered, and for the two halves of what is summed.

Mixers fill them in turns, forward and backward: something to gather, then something to sum. So a tray is free again when its
turn comes: what arrived in the other one since was sent by a rank that was done with this one, and nobody has to say so.
"""
TRAYS = (GATHERED, SUMMED, SUMMED_LATER)


class Mail(Protocol):
    """A tray for each kind of letter and each sender. All is in order with what runs on this stream."""

    size: int
    rank: int

    def send(self, tray: int, to: int, x: Tensor) -> None:
        """Start to write contiguous `x` into the tray of rank `to`; x must stay as it is until `finish`.

        A sum's letters are no longer than the gather's before it: trays never have to grow in the middle of one.
        """

    def receive(self, tray: int, sender: int, like: Tensor) -> Tensor:
        """What `sender` wrote: of the shape and dtype of `like`. Valid until the tray's next turn.

        After this rank's own letters of that tray have been sent.
        """

    def aside(self, work: Callable[[], object]) -> None:
        """Do `work` after what is on this stream by now, beside what follows."""

    def finish(self) -> None:
        """What follows on this stream is after all that was sent or done aside."""


class Arriving(NamedTuple):
    """A sum under way."""

    add_others: Callable[[], Tensor]

    def wait(self) -> Tensor:
        """This rank's tokens of the sum."""
        return self.add_others()


class PeerExchange:
    """The exchanges of a fused mixer, of which every rank holds n of the m tokens. All ranks must call alike."""

    def __init__(self, mail: Mail) -> None:
        self._mail = mail
        self._others = [(mail.rank + step) % mail.size for step in range(1, mail.size)]

    def gather_times(self, x_nd: Tensor, weight_ed: Weight) -> tuple[Tensor, Tensor]:
        """All ranks' tokens (m d), and their product with `weight_ed` transposed (m e). Outside autograd."""
        mail, x_nd = self._mail, x_nd.contiguous()
        for other in self._others:
            mail.send(GATHERED, other, x_nd)
        whole = x_nd.new_empty(mail.size, *x_nd.shape)
        product = x_nd.new_empty(mail.size, x_nd.shape[0], weight_ed.shape[0])
        mail.aside(partial(whole[mail.rank].copy_, x_nd))
        times(x_nd, weight_ed, product[mail.rank])
        for sender in reversed(self._others):  # who sent to this rank first
            arrived = mail.receive(GATHERED, sender, x_nd)
            mail.aside(partial(whole[sender].copy_, arrived))
            times(arrived, weight_ed, product[sender])
        mail.finish()
        return whole.flatten(0, 1), product.flatten(0, 1)

    def gather_times_adding(self, grad_nd: Tensor, weight_ed: Weight, total_dk: Tensor, x_mk: Tensor) -> Tensor:
        """All ranks' `grad_nd` times `weight_ed` transposed (m e); adds its transposed times `x_mk` to `total_dk` (float32)."""
        mail, grad_nd, x_rnk = self._mail, grad_nd.contiguous(), x_mk.unflatten(0, (self._mail.size, -1))
        for other in self._others:
            mail.send(GATHERED, other, grad_nd)
        product = grad_nd.new_empty(mail.size, grad_nd.shape[0], weight_ed.shape[0])

        def multiply(grad_nd: Tensor, rank: int) -> None:
            times(grad_nd, weight_ed, product[rank])
            add_product(total_dk, grad_nd.T, x_rnk[rank])

        multiply(grad_nd, mail.rank)
        for sender in reversed(self._others):
            multiply(mail.receive(GATHERED, sender, grad_nd), sender)
        mail.finish()
        return product.flatten(0, 1)

    def times_leave(self, x_mi: Tensor, weight_di: Weight) -> Tensor:
        """This rank's tokens of the ranks' sum of x times `weight_di` transposed (n d). Outside autograd."""
        return self._sum_products(x_mi, weight_di, halves(tokens_each(x_mi, self._mail.size))).wait()

    def start_times_sum(self, grad_me: Tensor, weight_de: Weight) -> Arriving:
        """Start to sum the gradient by `gather_times`' tokens, `grad_me` times `weight_de` transposed; ends with this rank's
        (n d).

        Nothing else may be exchanged before it is waited for.
        """
        return self._sum_products(grad_me, weight_de, [slice(0, tokens_each(grad_me, self._mail.size))])

    def _sum_products(self, x_mk: Tensor, weight_dk: Weight, parts: Sequence[slice]) -> Arriving:
        """Send the other ranks' tokens times weight transposed, and multiply this rank's own; what is returned adds up what
        arrives."""
        mail, x_rnk = self._mail, x_mk.unflatten(0, (self._mail.size, -1))
        sent = []
        for tray, rows in zip((SUMMED, SUMMED_LATER), parts, strict=False):
            for other in self._others:
                sent.append(times(x_rnk[other][rows], weight_dk))
                mail.send(tray, other, sent[-1])
        total_nd = times(x_rnk[mail.rank], weight_dk)

        def add_others() -> Tensor:
            for tray, rows in zip((SUMMED, SUMMED_LATER), parts, strict=False):
                mine = total_nd[rows]
                add_all(mine, [mail.receive(tray, sender, mine) for sender in reversed(self._others)])
            mail.finish()
            sent.clear()
            return total_nd

        return Arriving(add_others)
