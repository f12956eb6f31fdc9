"""Where the time of a trace went is arithmetic on intervals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dltrain.profiling.exposure import Kind, Span, exposure, length, union, without
from dltrain.profiling.trace import windows

moments = st.integers(0, 40)
intervals = st.lists(st.tuples(moments, moments).map(lambda pair: (float(min(pair)), float(max(pair)))), max_size=8)


def marked(found: list[tuple[float, float]]) -> set[int]:
    """The units of time that intervals cover."""
    return {unit for start, end in found for unit in range(int(start), int(end))}


@given(intervals, intervals)
def test_unions_and_differences_are_those_of_sets(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> None:
    assert marked(union(one)) == marked(one)
    assert length(union(one)) == len(marked(one))
    assert marked(without(union(one), union(other))) == marked(one) - marked(other)
    assert length(without(union(one), union(other))) == len(marked(one) - marked(other))


def test_what_is_hidden_behind_computing_does_not_show() -> None:
    spans: list[tuple[Kind, float, float]] = [
        ("compute", 1.0, 4.0),
        ("compute", 3.0, 5.0),
        ("communication", 4.0, 7.0),  # 2 of 3 seconds show
        ("copy", 6.5, 8.0),  # 1 of 1.5
    ]
    found = exposure([Span(*span) for span in spans], 0.0, 10.0)
    assert (found.total, found.compute, found.communication, found.exposed) == (10.0, 4.0, 3.0, 2.0)
    assert (found.copy, found.copying) == (1.5, 1.0)
    assert found.idle == pytest.approx(10 - 4 - 2 - 1)


def test_steps_that_follow_each_other_are_one_window() -> None:
    assert windows([12, 10, 11, 20]) == [(10, 12), (20, 20)]
    assert windows([]) == []
