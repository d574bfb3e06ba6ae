"""The rules by which claims are judged, apart from any rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judges import FAILS, HOLDS, PART, UNTESTED, Sign, combine, judged

from sparsejepa.report.summary import Interval


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
        ([], UNTESTED), ([HOLDS, HOLDS], HOLDS), ([HOLDS, FAILS], PART), ([HOLDS, UNTESTED], PART),
        ([PART, PART], PART), ([FAILS, UNTESTED], FAILS), ([UNTESTED, UNTESTED], UNTESTED),
    ],
)  # fmt: skip
def test_signs_together(verdicts: list[str], together: str) -> None:
    assert combine([Sign("", verdict) for verdict in verdicts]) == together
