"""Shares: every prefix of the choices is within one sample of all shares, and every rank sees every source."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.shares import PERIOD, earliest_deadline_first, make_table, reduced, weights_by_size
from dltrain.errors import UserError

weight_lists = st.lists(st.integers(1, 60), min_size=1, max_size=7).map(reduced)


def deviations(choice: np.ndarray, weights: tuple[int, ...]) -> np.ndarray:
    """W times (samples of each source minus its share) after every prefix, [prefixes, sources], in whole numbers."""
    counts = np.cumsum(choice[:, None] == np.arange(len(weights)), axis=0)
    return counts * sum(weights) - np.arange(1, len(choice) + 1)[:, None] * np.array(weights)


def test_golden_vectors_never_change() -> None:
    assert earliest_deadline_first((3, 2, 1)).tolist() == [0, 1, 0, 1, 0, 2]
    assert make_table((2, 1), 4, 7).source[:12].tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1]


@given(weights=weight_lists, lanes=st.sampled_from([1, 2, 5, 16]), key=st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_prefix_is_within_one_sample_of_all_shares(weights: tuple[int, ...], lanes: int, key: int) -> None:
    """|count - p w / W| < 1, that is |count W - p w| < W, in every prefix of three periods, and 0 at their ends."""
    period = sum(weights)
    for choice in (earliest_deadline_first(weights), make_table(weights, lanes, key).source):
        ahead = deviations(np.tile(choice, 3), weights)
        assert abs(ahead).max() < period
        assert not ahead[len(choice) - 1 :: len(choice)].any()


def test_shares_hold_for_long_periods_and_many_sources() -> None:
    many = tuple(np.random.default_rng(0).integers(1, 100, 60).tolist())
    for weights in ((32_769, 32_767), (65_535, 1), (40_000, 20_000, 5_535, 1), reduced(many)):
        assert abs(deviations(make_table(weights, 16, 3).source, weights)).max() < sum(weights)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (32_769, 32_767), (7, 2, 1)])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_rank_sees_every_source_in_its_share(weights: tuple[int, ...], ranks: int) -> None:
    """Weights 1:1 in strict turns would give even ranks the one source and odd ranks the other."""
    choice = make_table(weights, 16, 0).source[:4096]
    for rank in range(ranks):
        seen = np.bincount(choice[rank::ranks], minlength=len(weights)) / (4096 / ranks)
        assert abs(seen - np.array(weights) / sum(weights)).max() < 0.12


def test_shares_by_size_are_rounded_where_they_would_repeat_too_late() -> None:
    weights = weights_by_size([(1_281_167,), (30_007,)], (1, 1))
    assert sum(weights) <= PERIOD
    assert weights[0] / weights[1] == pytest.approx(1_281_167 / 30_007, rel=1e-3)
    with pytest.raises(UserError, match=r"smallest of data\.sources has 10 of 1000000010 samples"):
        weights_by_size([(10**9,), (10,)], (1, 1))
