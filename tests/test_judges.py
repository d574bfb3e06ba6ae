"""The rules by which claims are judged, apart from any rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rules import FAILS, HOLDS, PART, UNTESTED, Sign, alike, combine, judged, rank_interval
from scipy import stats

from sparsejepa.study.verdict import Interval


@given(st.floats(-1, 1), st.floats(0, 1), st.integers(2, 12), st.sampled_from([1, -1]))
def test_a_verdict_follows_from_the_interval(mean: float, half: float, n: int, sign: int) -> None:
    low, high = sorted((sign * (mean - half), sign * (mean + half)))
    interval = Interval(mean, mean - half, mean + half, (0.0, 0.0), n)
    verdict = judged(interval, sign)
    if low > 0:
        assert verdict == (HOLDS if n >= 5 else PART)
    elif high < 0:
        assert verdict == FAILS
    else:
        assert verdict == (FAILS if n >= 5 else UNTESTED)


def test_no_difference_and_one_seed_are_not_tested() -> None:
    assert judged(None) == UNTESTED
    assert judged(Interval(0.5, None, None, None, 1)) == UNTESTED


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        ([], UNTESTED), ([HOLDS, HOLDS], HOLDS), ([HOLDS, FAILS], FAILS), ([HOLDS, UNTESTED], PART),
        ([PART, PART], PART), ([PART, FAILS], FAILS), ([FAILS, UNTESTED], FAILS),
        ([UNTESTED, UNTESTED], UNTESTED),
    ],
)  # fmt: skip
def test_signs_together(verdicts: list[str], together: str) -> None:
    assert combine([Sign("", verdict) for verdict in verdicts]) == together


def interval(mean: float, half: float, n: int) -> Interval:
    return Interval(mean, mean - half, mean + half, (0.0, 0.0), n)


@pytest.mark.parametrize(
    ("mean", "half", "n", "both", "no_loss"),
    [
        (0.0, 0.005, 5, HOLDS, HOLDS),
        (0.0, 0.005, 4, PART, PART),
        (-0.004, 0.003, 5, HOLDS, HOLDS),  # a clear loss, but of less than a point
        (0.0, 0.02, 3, UNTESTED, UNTESTED),  # no difference shown is not "no loss"
        (0.0, 0.02, 5, FAILS, FAILS),
        (0.03, 0.01, 3, FAILS, PART),
        (-0.03, 0.01, 3, FAILS, FAILS),
    ],
)
def test_equality_needs_an_interval_inside_the_margin(
    mean: float, half: float, n: int, both: str, no_loss: str
) -> None:
    assert alike(interval(mean, half, n)) == both
    assert alike(interval(mean, half, n), high=math.inf) == no_loss


def test_equality_is_not_shown_by_one_seed() -> None:
    assert alike(None) == alike(Interval(0.0, None, None, None, 1)) == UNTESTED


@given(st.floats(-0.99, 0.99), st.integers(4, 50))
def test_a_rank_interval_holds_its_rank_and_narrows(rank: float, n: int) -> None:
    low, high = rank_interval(rank, n)
    assert -1 <= low <= rank <= high <= 1
    assert rank_interval(-rank, n) == pytest.approx((-high, -low))
    more = rank_interval(rank, 4 * n)
    assert more[1] - more[0] < high - low


def test_a_rank_interval_covers_as_often_as_it_says() -> None:
    """Normal pairs with correlation r have the rank correlation 6 / pi asin(r / 2)."""
    rng = np.random.default_rng(0)
    r, n = 0.5, 20
    x = rng.normal(size=(1000, n))
    y = r * x + math.sqrt(1 - r**2) * rng.normal(size=(1000, n))
    true = 6 / math.pi * math.asin(r / 2)
    orders = [(stats.rankdata(a), stats.rankdata(b)) for a, b in zip(x, y, strict=True)]
    found = [rank_interval(float(np.corrcoef(a, b)[0, 1]), n) for a, b in orders]
    assert 0.92 < np.mean([low < true < high for low, high in found]) < 0.98
