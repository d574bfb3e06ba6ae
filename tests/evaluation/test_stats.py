"""Intervals: against scipy, in closed form, and by how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from sparsejepa.evaluation.stats import FOLDS, from_draws, jackknife, mean_estimate


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = 0.5 + 0.1 * np.random.default_rng(0).normal(size=400)
    (found,) = jackknife(lambda rows: x[rows].mean(), 400)
    assert found.value == x.mean() and found.low is not None and found.high is not None
    error = (found.high - found.low) / 2 / 1.96
    assert error == pytest.approx(x.std() / 20, rel=0.5)  # of 20 folds
    # As many folds as points: exactly.
    (exact,) = jackknife(lambda rows: x[rows].mean(), 400, folds=400)
    assert exact.high == pytest.approx(x.mean() + 1.959964 * x.std(ddof=1) / 20)
    assert jackknife(lambda rows: x[rows].mean(), 400, folds=0)[0].low is None


def test_the_jackknife_covers_the_truth_of_several_numbers_at_once() -> None:
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(200):
        x = rng.exponential(0.5, size=300)
        found = jackknife(lambda rows, x=x: [x[rows].mean(), x[rows].std()], 300)
        covered += [e.low < 0.5 < e.high for e in found]  # type: ignore[operator]
    assert (covered > 170).all()  # a spread of so skewed numbers is hard


def test_what_is_not_defined_is_none_and_intervals_stay_within_their_bounds() -> None:
    values = np.r_[np.zeros(20), 1.0]
    nan, none_left, bounded = jackknife(
        lambda rows: [np.nan, np.nan if len(rows) < 21 else 1.0, values[rows].mean()],
        21, note="why",
    )  # fmt: skip
    assert nan.value is None and nan.note == "why"
    assert none_left.value == 1 and none_left.low is None
    assert bounded.low == 0 and FOLDS == 20
    assert from_draws(np.nan, [1, 2]).value is None
    some = mean_estimate([1.0, np.nan, 3.0])
    assert some.value == 2 and some.note == "1 of 3 points not defined"
    assert mean_estimate([np.nan]).value is None
