"""Schedules do each pass once, in an order that never waits for itself, with the bubbles their papers state."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as some

from dltrain.errors import UserError
from dltrain.parallel.pipeline.schedule import NAMES, Schedule, build, forward_only, micro_batches
from dltrain.parallel.pipeline.simulation import simulate

RANKS = some.integers(1, 8)


def legal(name: str, ranks: int, pieces: int, per_rank: int) -> Schedule | None:
    try:
        return build(name, ranks, pieces, per_rank)
    except UserError:
        return None


@given(some.sampled_from(NAMES), RANKS, some.integers(1, 24), some.integers(0, 3))
def test_every_piece_passes_every_stage_once_and_nobody_waits_for_ever(
    name: str, ranks: int, pieces: int, per_rank: int
) -> None:
    schedule = legal(name, ranks, pieces, per_rank)
    if schedule is None:
        return
    for rank, row in enumerate(schedule.actions):
        assert {action.stage for action in row} == set(schedule.stages_of(rank))
        for stage in schedule.stages_of(rank):
            kinds: dict[int, list[str]] = {}
            for action in row:
                if action.stage == stage:
                    kinds.setdefault(action.piece, []).append(action.kind)
            assert sorted(kinds) == list(range(pieces))
            assert all(sequence in (["F", "B"], ["F", "I", "W"]) for sequence in kinds.values())
    assert simulate(schedule).length >= 3 * pieces  # it raises where ranks wait for each other
    assert simulate(forward_only(schedule.owners, pieces)).length >= pieces


@given(some.sampled_from(NAMES), RANKS, some.integers(1, 24))
def test_gradients_are_added_up_in_the_order_of_the_pieces(name: str, ranks: int, pieces: int) -> None:
    schedule = legal(name, ranks, pieces, 0)
    for row in schedule.actions if schedule else ():
        for stage in {action.stage for action in row}:
            weights = [action.piece for action in row if action.stage == stage and action.kind in "BW"]
            assert weights == list(range(pieces))


@pytest.mark.parametrize(("ranks", "pieces"), [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_bubbles_are_those_of_the_papers(ranks: int, pieces: int) -> None:
    """(p - 1) / (m + p - 1) for GPipe and 1F1B (Narayanan et al., 2021, section 2.2.1), with v stages a rank
    (p - 1) / (v m + p - 1) (section 2.2.2): shares of the whole time. Zero-bubble schedules wait only while the
    pipeline fills: ranks behind the first wait for one forward pass of each stage before them, of 3 v m + p - 1."""
    waiting = ranks - 1
    for name in ("gpipe", "1f1b"):
        assert simulate(build(name, ranks, pieces)).bubble == pytest.approx(waiting / (pieces + waiting))
    for name in ("interleaved_1f1b", "looped_bfs"):
        for per_rank in (2, 3):
            found = simulate(build(name, ranks, pieces, per_rank)).bubble
            assert found == pytest.approx(waiting / (per_rank * pieces + waiting))
    for name in ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v"):
        assert simulate(build(name, ranks, pieces)).bubble == pytest.approx(waiting / (6 * pieces + waiting))


def test_activations_held_are_those_of_the_papers() -> None:
    """1F1B holds p - rank pieces; ZB-V as many as 1F1B's first rank, in halves; DualPipeV one more (its own table)."""
    assert simulate(build("gpipe", 4, 16)).held == (16, 16, 16, 16)
    assert simulate(build("1f1b", 4, 16)).held == (4, 3, 2, 1)
    assert simulate(build("zbv_zero_bubble", 4, 16)).held == (8, 8, 8, 8)
    assert simulate(build("dualpipe_v", 4, 16)).held == (9, 9, 9, 9)


def test_costs_of_kinds_and_stages_are_taken_into_account() -> None:
    even = simulate(build("1f1b", 2, 2))
    assert even.length == 9  # 3 passes of 3 units, one rank waits for 1 + 2
    uneven = simulate(build("1f1b", 2, 2), {"F": 1.0, "B": 1.0, "I": 0.5, "W": 0.5}, stages=(1.0, 3.0))
    assert uneven.length == 1 + 4 * 3 + 1
    assert Counter(action.kind for row in uneven.rows for action, _, _ in row) == {"F": 4, "B": 4}


def test_micro_batches_fill_the_pipeline_unless_their_size_is_given() -> None:
    assert micro_batches(10, 3, stages=2, ranks=2) == (4, 3)
    assert micro_batches(10, 0, stages=2, ranks=2) == (4, 3)
    assert micro_batches(64, 0, stages=8, ranks=4) == (8, 8)
    assert micro_batches(3, 0, stages=4, ranks=2) == (4, 1)


@pytest.mark.parametrize(
    ("name", "pieces", "per_rank", "words"),
    [
        ("1f1b", 8, 2, "1f1b has one stage on each rank, and parallel.stages_per_rank is 2"),
        ("zbv_zero_bubble", 8, 3, "zbv_zero_bubble has two stages on each rank, .* give 2"),
        ("interleaved_1f1b", 9, 2, "in rounds of parallel.pp 4, and there are 9"),
        ("dualpipe_v", 7, 2, "needs at least 8 micro-batches, and there are 7"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(name: str, pieces: int, per_rank: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(name, 4, pieces, per_rank)
