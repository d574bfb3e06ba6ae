"""A measured number with its 95 % interval, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

NORMAL = 1.959963984540054
"""Standard deviations that 95 % of a normal distribution lie within."""
FOLDS = 20
"""Parts of the points that the jackknife leaves out in turn."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval. What is not defined is None, never NaN; `note` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


def undefined(note: str) -> Estimate:
    """Return an estimate without a value."""
    return Estimate(None, note=note)


def from_draws(value: float, draws: Any, note: str = "") -> Estimate:
    """Return `value` with the percentile interval of bootstrap `draws` [R].

    Draws that are not finite (a resample on which the measure is not defined) are left out; with
    fewer than two there is no interval. A value that is not finite becomes None.
    """
    if not np.isfinite(value):
        return undefined(note or "not finite")
    draws = np.asarray(draws, float)
    draws = draws[np.isfinite(draws)]
    if len(draws) < 2:
        return Estimate(float(value), note=note)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high), note)


def bootstrap_weights(n: int, resamples: int, random_state: int = 0) -> np.ndarray:
    """Return how often each of n points is drawn in each resample, int64 [R, n]; rows sum to n."""
    rng = np.random.default_rng(random_state)
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) if n else np.zeros((resamples, 0))


def mean_estimate(
    values: Any, *, resamples: int = 1000, random_state: int = 0, note: str = ""
) -> Estimate:
    """Return the mean over the finite ones of `values` [n] with a percentile bootstrap interval."""
    values = np.asarray(values, float).ravel()
    finite = values[np.isfinite(values)]
    left_out = len(values) - len(finite)
    if left_out:
        note = "; ".join(filter(None, [note, f"{left_out} of {len(values)} points not defined"]))
    if not len(finite):
        return undefined(note or "no points")
    rng = np.random.default_rng(random_state)
    draws = [finite[rng.integers(0, len(finite), len(finite))].mean() for _ in range(resamples)]
    return from_draws(float(finite.mean()), draws, note)


def jackknife(
    score: Callable[[np.ndarray], Any],
    n: int,
    *,
    folds: int = FOLDS,
    random_state: int = 0,
    note: str = "",
) -> list[Estimate]:
    """Return the values in 0..1 that `score` gives for all of n points, with jackknife intervals.

    `score` takes the indices of some points and returns m numbers, NaN where one is not defined.
    Each of the folds of a random partition is left out in turn (delete-a-group jackknife, Shao and
    Wu 1989); the interval, cut to 0..1, is the value and 1.96 standard errors on both sides. No
    point is looked at twice, as in a bootstrap: points that are there twice change by themselves
    what histograms and quantiles say. `folds` of 0 gives values alone.
    """
    values = np.atleast_1d(np.asarray(score(np.arange(n)), float))
    folds = min(folds, n)
    error = np.full(len(values), np.nan)
    if folds > 1:
        fold = np.random.default_rng(random_state).permutation(n) % folds
        left = np.array([score(np.flatnonzero(fold != f)) for f in range(folds)], float)
        left = left.reshape(folds, -1)
        error = np.sqrt((folds - 1) / folds * np.square(left - left.mean(0)).sum(0))
    found = []
    for value, spread in zip(values.tolist(), (NORMAL * error).tolist(), strict=True):
        if not np.isfinite(value):
            found.append(undefined(note or "not finite"))
        elif not np.isfinite(spread):
            found.append(Estimate(value, note=note))
        else:
            low, high = max(0.0, value - spread), min(1.0, value + spread)
            found.append(Estimate(value, min(low, value), max(high, value), note))
    return found


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share that was measured on n points."""
    from scipy.stats import binomtest

    found = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
