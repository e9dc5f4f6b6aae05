"""Properties of the index arithmetic that widths and tensor parallelism share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling import nesting

tp_sizes = st.integers(1, 16)
multiples = st.integers(1, 16)


@given(tp=tp_sizes, each=multiples)
def test_ranks_cover_each_head_once(tp: int, each: int) -> None:
    heads = [head for rank in range(tp) for head in nesting.rank_heads(tp * each, tp, rank)]
    assert sorted(heads) == list(range(tp * each))


@given(tp=tp_sizes, each=multiples, data=st.data())
def test_first_heads_of_the_model_are_the_first_local_ones(tp: int, each: int, data: st.DataObject) -> None:
    narrow = tp * data.draw(st.integers(1, each))
    for rank in range(tp):
        local = list(nesting.rank_heads(tp * each, tp, rank))
        n = nesting.local_heads(narrow, tp)
        assert [head for head in local if head < narrow] == local[:n]


@given(tp=tp_sizes, each=st.integers(1, 1000))
def test_vocabulary_rows_are_contiguous_and_cover(tp: int, each: int) -> None:
    rows = [row for rank in range(tp) for row in nesting.vocab_rows(tp * each, tp, rank)]
    assert rows == list(range(tp * each))


@given(full=st.integers(1, 256), data=st.data())
def test_parse_width_undoes_width_name(full: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, full))
    assert nesting.parse_width(nesting.width_name(n, full), full) == n
    assert nesting.parse_width(f"{n}h", full) == nesting.parse_width(n, full) == n


@pytest.mark.parametrize(("text", "heads"), [("1", 64), ("1/4", 16), ("0.25", 16), ("16", 16), ("1h", 1), ("64", 64)])
def test_parse_width(text: str, heads: int) -> None:
    assert nesting.parse_width(text, 64) == heads


@pytest.mark.parametrize("text", ["", "wide", "0", "-1", "65", "1/3", "1/0", "2.5", "1e400", "9" * 4000])
def test_parse_width_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="width"):
        nesting.parse_width(text, 64)


def test_layer_widths() -> None:
    assert nesting.parse_layer_widths("1/2", 16, 3) == (8, 8, 8)
    assert nesting.parse_layer_widths("1,1/2,2", 16, 3) == (16, 8, 2)
    with pytest.raises(ValueError, match="2 widths for 3 layers"):
        nesting.parse_layer_widths("1,1/2", 16, 3)
    with pytest.raises(ValueError, match="tp=4 does not divide 2 heads"):
        nesting.check_layer_widths((16, 8, 2), 16, 3, tp=4)
    with pytest.raises(ValueError, match="layer 1: width 17"):
        nesting.check_layer_widths((16, 17, 2), 16, 3, tp=1)


@pytest.mark.parametrize("widths", [(), (8, 4), (16, 4, 8), (16, 16), (16, 0), (32, 16)])
def test_check_widths_refuses(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="width"):
        nesting.check_widths(widths, 16)


@given(widths=st.lists(st.integers(1, 64), min_size=1, max_size=4), tp=st.integers(1, 64))
def test_allowed_tp_is_exact(widths: list[int], tp: int) -> None:
    assert (tp in nesting.allowed_tp(widths)) == all(width % tp == 0 for width in widths)
