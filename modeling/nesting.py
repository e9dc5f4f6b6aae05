"""All Matryoshka index arithmetic: which heads, channels and rows a width uses, on which rank they live.

Pure integers; no torch, no layers. Two rules generate everything here:

- **A width is a head count.** Width `n` of a mixer with `n_heads` heads is its first `n` heads (MatMamba, arXiv
  2410.06718, section 3). Fractions such as 1/4 are how people write widths; `parse_width` turns them into head counts.
- **Heads go to tensor-parallel ranks strided.** Rank `r` of `tp` owns heads `r, r + tp, r + 2 * tp, ...`, so the first
  `n` heads of the model are the first `n / tp` heads on every rank: what a width is does not depend on `tp`, and
  every rank does the same work at every width. A contiguous split would leave half of the ranks idle at width 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

LayerWidths = tuple[int, ...]
"""One head count for each layer. A uniform width repeats one number; Mix'n'Match mixes them."""
MAX_WIDTH_CHARACTERS = 32
"""Of one width as people write it."""


def parse_width(text: str | int, n_heads: int) -> int:
    """The head count that `text` names: a head count ("16") or a fraction of `n_heads` ("1/4", "1", "0.25").

    "1" is the whole width, as in the paper's tables; a one-head width is written "1h" (any count may carry the "h").

    Raises ValueError where the text is too long or no number (1e1 is none), or does not name between 1 and `n_heads`
    whole heads.
    """
    if isinstance(text, int):
        count = Fraction(text)
    else:
        if len(text) > MAX_WIDTH_CHARACTERS:
            raise ValueError(
                f"width {text[:MAX_WIDTH_CHARACTERS]!r}... has {len(text)} characters: at most {MAX_WIDTH_CHARACTERS}"
            )
        try:
            # Fraction would read 1e999999999 too, and write out its every digit.
            if "e" in text.lower():
                raise ValueError("an exponent")
            number = Fraction(text.removesuffix("h").strip())
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"width {text!r}: not a number. Write a head count (16) or a fraction (1/4)") from None
        count = number * n_heads if number <= 1 and not text.endswith("h") else number
    if count.denominator != 1 or not 1 <= count <= n_heads:
        raise ValueError(
            f"width {text!r} of n_heads={n_heads} is {float(count):g} heads: it must be a whole number from 1 to {n_heads}"
        )
    return int(count)


def parse_layer_widths(text: str, n_heads: int, n_layers: int) -> LayerWidths:
    """Layer widths from "1/4" (every layer) or "1,1/2,1/4,..." (one for each layer).

    Raises ValueError where a width is invalid or their number is neither 1 nor `n_layers`.
    """
    counts = [parse_width(part, n_heads) for part in text.split(",")]
    if len(counts) == 1:
        return uniform(counts[0], n_layers)
    if len(counts) != n_layers:
        raise ValueError(f"{len(counts)} widths for {n_layers} layers: give one width, or one for each layer")
    return tuple(counts)


def uniform(n_heads: int, n_layers: int) -> LayerWidths:
    """The layer widths of a uniform submodel: `n_heads` heads in each of `n_layers` layers."""
    return (n_heads,) * n_layers


def width_name(n_heads: int, full: int) -> str:
    """How people write the width: the fraction of the full width in lowest terms ("1", "1/2", "3/8")."""
    return str(Fraction(n_heads, full))


def check_widths(widths: Sequence[int], n_heads: int) -> None:
    """Raise ValueError unless `widths` is a strictly falling list of head counts that starts with `n_heads`.

    The full width must be among them: parameters that no trained width uses would stay at their initial values.
    """
    if not widths:
        raise ValueError("widths is empty: name at least the full width")
    for width in widths:
        if not 1 <= width <= n_heads:
            raise ValueError(f"width {width} of n_heads={n_heads}: a width is a head count from 1 to {n_heads}")
    if list(widths) != sorted(set(widths), reverse=True):
        raise ValueError(f"widths {list(widths)}: list each head count once, widest first")
    if widths[0] != n_heads:
        raise ValueError(f"widths {list(widths)}: the first must be the full width, n_heads={n_heads}")


def check_layer_widths(
    widths: Sequence[int], n_heads: int, n_layers: int, tp: int, held: LayerWidths | None = None
) -> None:
    """Raise ValueError unless `widths` is one head count for each layer, each a multiple of `tp` in 1..n_heads.

    `held` are the heads that the layers of a model that was cut out still have: no width may be wider.
    """
    if len(widths) != n_layers:
        raise ValueError(f"{len(widths)} widths for {n_layers} layers: give one head count for each layer")
    for layer, width in enumerate(widths):
        if not 1 <= width <= n_heads:
            raise ValueError(
                f"layer {layer}: width {width} of n_heads={n_heads} is not a head count from 1 to {n_heads}"
            )
        local_heads(width, tp)
        if held is not None and width > held[layer]:
            raise ValueError(f"layer {layer}: width {width}, but this model was cut to {held[layer]} heads there")


def allowed_tp(counts: Sequence[int]) -> list[int]:
    """Every tensor-parallel size that divides each of `counts`: of heads, of embedding rows."""
    return [tp for tp in range(1, min(counts) + 1) if all(count % tp == 0 for count in counts)]


def local_heads(n_heads: int, tp: int) -> int:
    """How many of the first `n_heads` heads each tensor-parallel rank holds. Raises ValueError where tp does not divide."""
    if n_heads % tp:
        allowed = ", ".join(map(str, allowed_tp([n_heads])))
        raise ValueError(
            f"width {n_heads}: tp={tp} does not divide {n_heads} heads. Use tp in {{{allowed}}} or drop that width"
        )
    return n_heads // tp


def rank_heads(n_heads: int, tp: int, rank: int) -> range:
    """The model's head numbers that `rank` owns, in its local order: `rank, rank + tp, ...`."""
    local_heads(n_heads, tp)
    return range(rank, n_heads, tp)


def rank_channels(n_heads: int, per_head: int, tp: int, rank: int) -> list[int]:
    """The model's channel numbers that `rank` owns, in its local order, where each head has `per_head` of them."""
    return [head * per_head + i for head in rank_heads(n_heads, tp, rank) for i in range(per_head)]


def projection_channels(n_heads: int, *, headdim: int, bc: int, full: int, tp: int, rank: int) -> list[int]:
    """Numbers in the whole model's input projection [z | x | B C | dt] of the channels that `rank` has at `n_heads` heads.

    `bc` counts the channels of B and C together, `full` the heads of the whole model.
    """
    inner, whole = rank_channels(n_heads, headdim, tp, rank), full * headdim
    z, x = inner, [whole + channel for channel in inner]
    shared = list(range(2 * whole, 2 * whole + bc))
    return z + x + shared + [2 * whole + bc + head for head in rank_heads(n_heads, tp, rank)]


def vocab_rows(vocab_rows_total: int, tp: int, rank: int) -> range:
    """The embedding rows that `rank` owns: contiguous, since no width slices the vocabulary."""
    if vocab_rows_total % tp:
        raise ValueError(f"{vocab_rows_total} embedding rows: tp={tp} does not divide them. Use a tp that does")
    each = vocab_rows_total // tp
    return range(rank * each, (rank + 1) * each)
