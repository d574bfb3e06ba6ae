"""Disentanglement: does each code unit stand for one factor, and each factor for one unit?

Definitions as in Locatello et al. 2019 and its `disentanglement_lib` ("the reference"); where one
differs, its docstring says how. Letters: n points, L code columns, F factors, U code units. Codes
are real [n, L], factors whole numbers [n, F]: classes, not measured quantities.

Code units. By default each column is a unit. `units` [L] names the unit 0..U-1 of each column, for
instance the group of each of the P outputs of a group map: redundant codes score near 0 column by
column by construction, and the question about groups is whether *groups* are disentangled. A unit
counts as its best column in MIG and as the sum of its importances in DCI.

Intervals are those of a jackknife over points (`folds` parts, 0 for none); nothing is refitted. In
a simulation they were 0.6 to 1.8 times as wide as the values scatter. A factor with a single value
is left out, with a note. Codes that are all constant score 0, but for informativeness the share of
the largest class.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsejepa.errors import UserError
from sparsejepa.evaluation.stats import FOLDS, Estimate, jackknife, undefined

BINS = 20
"""Bins of equal width per code column, from its least to its largest value."""
DCI = ("disentanglement", "completeness", "informativeness")


def check_factors(factors: Any, n: int) -> np.ndarray:
    """Return `factors` as int64 [n, F]; UserError with the remedy unless they are classes.

    Whole numbers >= 0 of any dtype are classes. NaN, fractions, and (from 100 points on) columns
    with more values than half the points are not.
    """
    values = np.asarray(factors, float)
    if values.ndim != 2 or not values.shape[1] or len(values) != n:
        raise UserError(f"factors must be [{n} points, factors], got shape {values.shape}")
    for j, column in enumerate(values.T):
        if not np.isfinite(column).all() or (column < 0).any():
            raise UserError(f"factor {j} holds NaN or negative values; number its levels from 0")
        if (column % 1).any() or (n >= 100 and len(np.unique(column)) > n / 2):
            raise UserError(f"factor {j} is continuous; cut it into bins first")
    return values.astype(np.int64)


class Points:
    """Codes [n, L] and factors [n, F] of points, and the code unit of each column (see above).

    Constant columns are set to exactly 0, and factors with one value are left out; `note` says so.

    Raises UserError for factors that are no classes (`check_factors`), ValueError for codes that
    are no finite matrix and for units that are not 0..U-1, each with a column.
    """

    def __init__(self, codes: Any, factors: Any, units: Any = None) -> None:
        self.codes = _matrix(codes)
        factors = check_factors(factors, len(self.codes))
        width = self.codes.shape[1]
        self.units = np.arange(width) if units is None else np.asarray(units)
        counted = self.units.shape == (width,) and self.units.dtype.kind in "iu"
        if not counted or not np.array_equal(np.unique(self.units), np.arange(max(self.units) + 1)):
            raise ValueError("units must be whole numbers 0..U-1, one per code column")
        # What rounding leaves of a constant is not a signal.
        codes = np.asarray(codes)
        precision = np.finfo(codes.dtype if codes.dtype.kind == "f" else float).eps
        self.dead = np.ptp(self.codes, 0) <= 100 * precision * np.abs(self.codes).max(0)
        self.codes[:, self.dead] = 0
        self.given, single = factors.shape[1], np.ptp(factors, 0) == 0
        self.kept = np.flatnonzero(~single)
        self.factors = factors[:, self.kept]
        names = ", ".join(map(str, np.flatnonzero(single)))
        left_out = f"left out, one value only: factor {names}" if names else ""
        constant = "all codes are constant" if self.dead.all() else ""
        self.note = "; ".join(filter(None, [left_out, constant]))

    def test(self, codes: Any, factors: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return test codes [m, L] and factors [m, F'] without what the training points leave out.

        Raises as the constructor, and ValueError for another number of columns or factors.
        """
        codes = _matrix(codes)
        factors = check_factors(factors, len(codes))
        if codes.shape[1] != len(self.dead) or factors.shape[1] != self.given:
            raise ValueError("training and test points differ in the number of columns or factors")
        codes[:, self.dead] = 0
        return codes, factors[:, self.kept]

    def standardised(self, codes: np.ndarray) -> np.ndarray:
        """Return codes as float32, with the mean and deviation of these points 0 and 1."""
        scale = np.where(self.dead, 1, self.codes.std(0))
        return ((codes - self.codes.mean(0)) / scale).astype(np.float32)

    def lack(self, *, units: int = 1) -> str:
        """Return why a measure that needs so many units is not defined, or ''."""
        if not len(self.kept):
            return "every factor has one value only"
        return "needs two code units" if self.units.max() + 1 < units else ""


def _matrix(codes: Any) -> np.ndarray:
    """Return codes as float64 [n, L], a copy."""
    codes = np.array(codes, float)
    if codes.ndim != 2 or not codes.size:
        raise ValueError(f"codes must be a matrix [points, columns], got shape {codes.shape}")
    if not np.isfinite(codes).all():
        raise ValueError("codes hold NaN or infinity")
    return codes


def mig(points: Points, *, folds: int = FOLDS, random_state: int = 0) -> Estimate:
    """Return the mutual information gap (Chen et al. 2018), 0 to 1: 1 is best.

    Per factor, mutual information with the best unit minus that with the second best, over the
    factor's entropy; averaged over factors. Not defined for a single unit.
    """
    if lack := points.lack(units=2):
        return undefined(lack)
    cells = _binned(points.codes)

    def score(rows: np.ndarray) -> float:
        information, entropy = _mutual_informations(cells[rows], points.factors[rows], points.units)
        best, known = np.sort(information, 0), np.full_like(entropy, np.nan)
        np.divide(best[-1] - best[-2], entropy, out=known, where=entropy > 1e-12)
        return float(known.mean())

    about: Any = {"folds": folds, "random_state": random_state, "note": points.note}
    return jackknife(score, len(cells), **about)[0]


def dci(
    train: Points,
    codes: Any,
    factors: Any,
    *,
    trees: int = 30,
    jobs: int = 2,
    folds: int = FOLDS,
    random_state: int = 0,
) -> dict[str, Estimate]:
    """Return disentanglement, completeness, informativeness (Eastwood and Williams 2018).

    Trees that predict a factor from all columns say how important each is for it; importances add
    up per unit to R [U, F], columns summing to 1. Disentanglement: 1 minus the entropy of each
    row's shares of the factors (base F), rows weighted by their share of R. Completeness: the same
    for the columns (base U). Informativeness: mean test accuracy. All 0 to 1: 1 is best.

    The forest is one of extremely randomised trees (Geurts et al. 2006) that weigh every column at
    every split and stop at leaves of 5 points: others spread importance over columns that say
    nothing. The reference's gradient boosting gives somewhat higher scores.

    The intervals of the first two leave out trees of the forest, since these measures depend on the
    fit alone; that of the third leaves out test points.
    """
    from sklearn.ensemble import ExtraTreesClassifier

    codes, factors = train.test(codes, factors)
    if lack := train.lack():
        return dict.fromkeys(DCI, undefined(lack))
    fitted_on, tested_on = (train.standardised(part) for part in (train.codes, codes))
    per_tree, hits = [], []
    for fitted, true in zip(train.factors.T, factors.T, strict=True):
        forest = ExtraTreesClassifier(
            trees,
            max_features=1.0,  # type: ignore[arg-type]  # a share: all columns
            min_samples_leaf=5,
            n_jobs=jobs,
            random_state=random_state,
        ).fit(fitted_on, fitted)
        hits.append(forest.predict(tested_on) == true)
        importances = [tree.feature_importances_ for tree in forest.estimators_]
        per_tree.append([np.bincount(train.units, importance) for importance in importances])
    shares, right = np.array(per_tree), np.mean(hits, axis=0)  # [F, trees, U] and [n]

    def concentrations(some: np.ndarray) -> list[float]:
        # A tree without a split has importances of zero, and so no say in the mean.
        total = shares[:, some].sum(1).T
        importance = total / np.maximum(total.sum(0), 1e-300)
        return [_concentration(importance), _concentration(importance.T)]

    about: Any = {"folds": folds, "random_state": random_state, "note": train.note}
    values = jackknife(concentrations, trees, **about)
    values += jackknife(lambda rows: right[rows].mean(), len(right), **about)
    if len(train.kept) < 2:
        values[0] = undefined("not defined for a single factor")
    if train.units.max() == 0:
        values[1] = undefined("not defined for a single code unit")
    return dict(zip(DCI, values, strict=True))


def disentanglement(
    train_codes: Any,
    train_factors: Any,
    test_codes: Any,
    test_factors: Any,
    *,
    units: Any = None,
    quick: bool = False,
    folds: int = FOLDS,
    random_state: int = 0,
) -> dict[str, Estimate]:
    """Return all measures by name; `quick` leaves out the three of DCI.

    DCI fits on the training points and scores the test points, MIG uses the training points alone.
    """
    options: dict[str, Any] = {"folds": folds, "random_state": random_state}
    train = Points(train_codes, train_factors, units)
    found = {} if quick else dci(train, test_codes, test_factors, **options)
    return {"mig": mig(train, **options), **{f"dci_{name}": found[name] for name in found}}


# --- what they are made of ------------------------------------------------------------------------


def _binned(values: np.ndarray) -> np.ndarray:
    """Return the histogram bin of each entry of values [n, L], by column."""
    edges = np.linspace(values.min(0), values.max(0), BINS + 1)[1:-1]
    columns = [np.searchsorted(e, v, "right") for e, v in zip(edges.T, values.T, strict=True)]
    return np.stack(columns, 1)


def _mutual_informations(
    cells: np.ndarray, factors: np.ndarray, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return mutual information [U, F] and factor entropy [F] in nats, plug-in.

    cells: [n, L], the bin of each entry of the codes; factors: [n, F].
    """
    n, width = cells.shape
    information, entropy = [], []
    for factor in factors.T:
        level = np.unique(factor, return_inverse=True)[1]
        levels = level.max() + 1
        place = (cells + BINS * np.arange(width)) * levels + level[:, None]
        counts = np.bincount(place.ravel(), minlength=width * BINS * levels)
        joint = counts.reshape(width, BINS, levels)
        of_codes, of_factor = _c_log_c(joint.sum(2)).sum(1), _c_log_c(joint[0].sum(0)).sum()
        found = (_c_log_c(joint).sum((1, 2)) - of_codes - of_factor) / n + np.log(n)
        found[found < 1e-12] = 0  # rounding; none is negative
        best = np.full(units.max() + 1, -np.inf)
        np.maximum.at(best, units, found)
        information.append(best)
        entropy.append(np.log(n) - of_factor / n)
    return np.stack(information, 1), np.array(entropy)


def _c_log_c(counts: np.ndarray) -> np.ndarray:
    return counts * np.log(np.maximum(counts, 1))


def _concentration(shares: np.ndarray) -> float:
    """Return 1 minus the entropy of the rows of `shares` [a, b], weighted by their sums."""
    rows = shares.sum(1)
    p = shares / np.where(rows > 0, rows, 1)[:, None]
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1) / np.log(max(2, shares.shape[1]))
    return float(((1 - entropy) * rows).sum() / (rows.sum() or 1))
