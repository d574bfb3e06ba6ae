"""A measured number with its 95 % interval, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


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
