"""Codes and factors, checked, and statistics of them under many resamples at once.

The ground that the measures of disentanglement stand on. Letters: n points, L code columns, F
factors, U code units, R resamples. A resample is a row of weights: how often each point is drawn
(the first row, all ones, gives the value itself), so that counting is a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsejepa.errors import UserError
from sparsejepa.evaluation.estimate import Estimate, bootstrap_weights, from_draws


def check_factors(factors: Any, n: int) -> np.ndarray:
    """Return `factors` as int64 [n, F]; UserError with the remedy unless they are classes.

    Whole numbers >= 0 of any dtype are classes. NaN, fractions, and (from 100 points on) columns
    with more values than half the points are not.
    """
    try:
        values = np.asarray(factors, float)
    except (TypeError, ValueError):
        raise UserError("factors must be numbers; give each level of a factor a number") from None
    if values.ndim != 2 or not values.shape[1]:
        raise UserError(f"factors must be [points, factors], got shape {values.shape}")
    if len(values) != n:
        raise UserError(f"factors have {len(values)} rows for {n} codes; give one row per point")
    for j, column in enumerate(values.T):
        if not np.isfinite(column).all():
            raise UserError(f"factor {j} holds NaN or infinity; leave those points out")
        if (column < 0).any():
            raise UserError(f"factor {j} has negative values; number its levels from 0")
        if (column % 1).any() or (n >= 100 and len(np.unique(column)) > n / 2):
            raise UserError(f"factor {j} is continuous; cut it into bins first")
    return values.astype(np.int64)


@dataclass(frozen=True)
class Points:
    """Checked input: constant columns are exactly 0, factors with one value are left out."""

    codes: np.ndarray  # float64 [n, L]
    factors: np.ndarray  # int64 [n, len(kept)]
    units: np.ndarray  # int64 [L]
    kept: np.ndarray  # which factors these are
    dead: np.ndarray  # bool [L], the constant columns
    note: str


def checked_points(codes: Any, factors: Any, units: Any) -> Points:
    """Check the input of a measure; ValueError for wrong shapes or codes that are not finite."""
    codes, precision = _matrix(codes)
    factors = check_factors(factors, len(codes))
    units = np.arange(codes.shape[1]) if units is None else np.asarray(units)
    if units.shape != (codes.shape[1],) or units.dtype.kind not in "iu":
        raise ValueError("units must be one whole number per code column")
    if not np.array_equal(np.unique(units), np.arange(units.max() + 1)):
        raise ValueError("units must be 0..U-1, each with a column")
    # What rounding leaves of a constant is not a signal.
    dead = np.ptp(codes, 0) <= 100 * precision * np.abs(codes).max(0)
    codes[:, dead] = 0
    single = np.ptp(factors, 0) == 0
    notes = []
    if single.any():
        names = ", ".join(map(str, np.flatnonzero(single)))
        notes.append(f"left out, one value only: factor {names}")
    if dead.all():
        notes.append("all codes are constant")
    kept = np.flatnonzero(~single)
    return Points(codes, factors[:, kept], units, kept, dead, "; ".join(notes))


def checked_split(
    train_codes: Any, train_factors: Any, test_codes: Any, test_factors: Any, units: Any
) -> tuple[Points, Points]:
    """Check both parts; what the training part leaves out, the test part does too."""
    train = checked_points(train_codes, train_factors, units)
    codes, _ = _matrix(test_codes)
    factors = check_factors(test_factors, len(codes))
    if codes.shape[1] != train.codes.shape[1] or factors.shape[1] != np.shape(train_factors)[1]:
        raise ValueError("training and test points differ in the number of columns or factors")
    codes[:, train.dead] = 0
    return train, replace(train, codes=codes, factors=factors[:, train.kept])


def standardised(train: Points, test: Points) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of both parts as float32, columns of the first with mean 0 and deviation 1.

    Before they are rounded: what a column says may be small beside its mean.
    """
    mean, scale = train.codes.mean(0), train.codes.std(0)
    scale[train.dead] = 1
    first, second = ((part.codes - mean) / scale for part in (train, test))
    return first.astype(np.float32), second.astype(np.float32)


def _matrix(codes: Any) -> tuple[np.ndarray, float]:
    """Return codes as float64 [n, L], a copy, and the precision that they came in."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or not codes.size:
        raise ValueError(f"codes must be a matrix [points, columns], got shape {codes.shape}")
    precision = np.finfo(codes.dtype if codes.dtype.kind == "f" else float).eps
    codes = codes.astype(float)
    if not np.isfinite(codes).all():
        raise ValueError("codes hold NaN or infinity")
    return codes, float(precision)


def weights_with_value(n: int, resamples: int, random_state: int) -> np.ndarray:
    """Return float64 [1 + R, n]: ones, for the value itself, then the resamples."""
    draws = bootstrap_weights(n, resamples, random_state)
    return np.concatenate([np.ones((1, n)), draws])


def shifted(scores: np.ndarray, note: str) -> Estimate:
    """Return the estimate from scores [1 + R] in 0..1, the draws shifted to centre on the value.

    Points drawn twice bias these draws, as drawing the points once biased the value.
    """
    value, draws = scores[0], scores[1:]
    draws = draws[np.isfinite(draws)]
    shift = value - draws.mean() if len(draws) else 0.0
    return from_draws(value, np.clip(draws + shift, 0, 1), note)


def binned(values: np.ndarray, bins: int) -> np.ndarray:
    """Return the histogram bin 0..bins-1 of each entry of values [n, L], by column."""
    edges = np.linspace(values.min(0), values.max(0), bins + 1)[1:-1]
    columns = [np.searchsorted(e, v, "right") for e, v in zip(edges.T, values.T, strict=True)]
    return np.stack(columns, 1)


def mutual_informations(
    points: Points, bins: int, resamples: int, random_state: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mutual information [1 + R, U, F] and factor entropy [1 + R, F] in nats, plug-in.

    One sparse product per factor level counts all columns and all resamples: the 0/1 matrix of the
    bins of each point [L * bins, n] times the weights of the points [n, 1 + R].
    """
    from scipy.sparse import csr_matrix

    n, width = points.codes.shape
    drawn = np.ascontiguousarray(weights_with_value(n, resamples, random_state).T)
    cells = binned(points.codes, bins) + bins * np.arange(width)

    def surprise(rows: np.ndarray) -> np.ndarray:
        """Return sum over bins of c log c [L, 1 + R], c the weight of `rows` in each bin."""
        pointer = np.arange(0, len(rows) * width + 1, width)
        entries = (np.ones(len(rows) * width), cells[rows].ravel(), pointer)
        membership = csr_matrix(entries, shape=(len(rows), width * bins)).T.tocsr()
        return _c_log_c(membership @ drawn[rows]).reshape(width, bins, -1).sum(1)

    of_codes = surprise(np.arange(n))
    information = np.empty((1 + resamples, points.units.max() + 1, len(points.kept)))
    entropy = np.empty((1 + resamples, len(points.kept)))
    for f, column in enumerate(points.factors.T):
        levels = [np.flatnonzero(column == level) for level in np.unique(column)]
        of_factor = sum(_c_log_c(drawn[rows].sum(0)) for rows in levels)
        joint = sum(surprise(rows) for rows in levels)
        found = (joint - of_codes - of_factor) / n + np.log(n)
        found[found < 1e-12] = 0  # rounding; none is negative
        information[..., f] = best_per_unit(found.T, points.units)
        entropy[:, f] = np.log(n) - of_factor / n
    return information, entropy


def _c_log_c(counts: np.ndarray) -> np.ndarray:
    return counts * np.log(np.maximum(counts, 1))


def best_per_unit(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return the largest value of each unit [..., U] from values of columns [..., L]."""
    order = np.argsort(units, kind="stable")
    starts = np.searchsorted(units[order], np.arange(units.max() + 1))
    return np.maximum.reduceat(values[..., order], starts, axis=-1)


def sum_per_unit(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return the sum over each unit's columns [..., U] of values [..., L]."""
    order = np.argsort(units, kind="stable")
    starts = np.searchsorted(units[order], np.arange(units.max() + 1))
    return np.add.reduceat(values[..., order], starts, axis=-1)


def roc_area(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of scores [n] with each row of weights [R, n]; ties half.

    NaN where a row has no positive or no negative point.
    """
    order = np.argsort(scores)
    scores, positive, weights = scores[order], positive[order], weights[:, order]
    below = np.zeros((len(weights), len(scores) + 1))
    np.cumsum(weights * ~positive, axis=1, out=below[:, 1:])
    first = np.searchsorted(scores, scores[positive])
    last = np.searchsorted(scores, scores[positive], "right")
    won = (weights[:, positive] * (below[:, first] + below[:, last])).sum(1) / 2
    pairs = weights[:, positive].sum(1) * below[:, -1]
    return np.divide(won, pairs, out=np.full_like(won, np.nan), where=pairs > 0)


def finite_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis of what is not NaN, NaN if nothing is."""
    finite = np.isfinite(values)
    total, count = np.where(finite, values, 0).sum(0), finite.sum(0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def upper_quantile(values: np.ndarray, weights: np.ndarray, q: float) -> np.ndarray:
    """Return the q-quantile (linear) of values [n, U] repeated by each of weights [R, n], [R, U].

    A high quantile is found in the largest values: enough of them are looked at that their weight
    falls short in less than one of 1e10 resamples (the smallest of them is taken then). 0 for a
    row without weight.
    """
    total = weights.sum(1)
    rank = np.maximum(total - 1, 0) * (1 - q)  # counted from the largest value, 0
    kept = min(len(values), int(2 * rank.max()) + 30)
    order = np.argsort(-values, axis=0)[:kept]
    ordered = np.take_along_axis(values, order, 0)
    reached = np.cumsum(np.ascontiguousarray(weights.T.astype(np.int32))[order], axis=0)
    units = np.arange(values.shape[1])[:, None]
    low = np.floor(rank)
    at = [
        ordered[np.minimum((reached <= r).sum(0), kept - 1), units]
        for r in (low, np.minimum(low + 1, np.maximum(total - 1, 0)))
    ]
    return np.where(total > 0, at[0] + (rank - low) * (at[1] - at[0]), 0).T
