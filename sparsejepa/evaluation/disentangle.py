"""Measures of disentanglement: does each code unit stand for one factor, and each factor for one?

Definitions as in Locatello et al. 2019 and its `disentanglement_lib` ("the reference"); where one
differs, its docstring says how. Letters: n points, L code columns, F factors, U code units, R
resamples. Codes are real [n, L], factors whole numbers [n, F]: classes, not measured quantities.

Code units. By default each column is a unit. `units` [L] names the unit 0..U-1 of each column, for
instance the group of each of the P outputs of a group map: redundant codes score near 0 column by
column by construction, and the question about groups is whether *groups* are disentangled. A unit
counts as its best column where the measure looks at single columns (MIG, SAP, modularity), as the
sum of its importances in DCI, and as a vector, whatever its rotation, in IRS and FactorVAE.

Intervals resample points and refit nothing. A resample holds points twice, which by itself changes
what histograms, quantiles and forests say, so draws of those measures are shifted to the value.

A factor with a single value says nothing and is left out, with a note. Codes that are all constant
score 0, but for explicitness 0.5 (chance) and for informativeness the share of the largest class.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from sparsejepa.evaluation.estimate import Estimate, from_draws, undefined
from sparsejepa.evaluation.resampled import (
    Points,
    best_per_unit,
    binned,
    check_factors,
    checked_points,
    checked_split,
    finite_mean,
    mutual_informations,
    roc_area,
    shifted,
    standardised,
    sum_per_unit,
    upper_quantile,
    weights_with_value,
)

__all__ = [
    "check_factors",
    "dci",
    "disentanglement",
    "explicitness",
    "factor_vae_score",
    "irs",
    "mig",
    "modularity",
    "sap",
]

BINS = 20
"""Bins of equal width per code column, from its least to its largest value."""


def mig(
    codes: Any,
    factors: Any,
    *,
    units: Any = None,
    bins: int = BINS,
    resamples: int = 200,
    random_state: int = 0,
) -> Estimate:
    """Return the mutual information gap (Chen et al. 2018), 0 to 1: 1 is best.

    Per factor, mutual information with the best unit minus that with the second best, over the
    factor's entropy; averaged over factors. Not defined for a single unit.
    """
    points = checked_points(codes, factors, units)
    return _mig(points, *mutual_informations(points, bins, resamples, random_state))


def modularity(
    codes: Any,
    factors: Any,
    *,
    units: Any = None,
    bins: int = BINS,
    resamples: int = 200,
    random_state: int = 0,
) -> Estimate:
    """Return the modularity (Ridgeway and Mozer 2018), 0 to 1: 1 is best.

    Per unit with mutual informations m_f: 1 - (sum of m_f^2 but the largest) / (largest * (F - 1));
    0 for a unit that knows nothing; averaged over units. Not defined for a single factor.
    """
    points = checked_points(codes, factors, units)
    return _modularity(points, mutual_informations(points, bins, resamples, random_state)[0])


def sap(
    train_codes: Any,
    train_factors: Any,
    test_codes: Any,
    test_factors: Any,
    *,
    units: Any = None,
    resamples: int = 200,
    random_state: int = 0,
) -> Estimate:
    """Return the separated attribute predictability (Kumar et al. 2018), 0 to 1: 1 is best.

    Per factor, test accuracy of the best unit minus that of the second best, each predicting from
    one column; averaged over factors. Not defined for a single unit.

    The classifier gives the class of the nearest class mean (linear discriminant analysis with
    equal priors, in closed form; a constant column gives the most frequent class). The reference
    fits one-vs-rest linear support vector machines (balanced, C = 0.01): also linear in the column
    and blind to class sizes, but such machines cannot tell a class in the middle of a line, so for
    ordered factors with many levels our accuracies, and gaps, are larger.
    """
    train, test = checked_split(train_codes, train_factors, test_codes, test_factors, units)
    if lack := _lack(train, units=2):
        return undefined(lack)
    weights = weights_with_value(len(test.codes), resamples, random_state)
    gaps = 0
    for f in range(train.factors.shape[1]):
        hits = _nearest_mean_hits(train, test, f)
        accuracy = weights @ hits / len(hits)
        gaps = gaps + _gap(best_per_unit(accuracy, train.units))
    scores = gaps / train.factors.shape[1]
    return shifted(scores, train.note)


def explicitness(
    train_codes: Any,
    train_factors: Any,
    test_codes: Any,
    test_factors: Any,
    *,
    resamples: int = 200,
    random_state: int = 0,
) -> Estimate:
    """Return the explicitness (Ridgeway and Mozer 2018): area under the ROC curve, 0.5 is chance.

    Per factor one multinomial logistic regression (C = 1 on standardised codes, as the reference);
    per class the area of its probability against the rest on test points; averaged over classes,
    then factors. Classes that train or test points lack are left out. Units play no part.
    """
    from sparsejepa.evaluation.classifiers import LogisticProbe
    from sparsejepa.evaluation.linear import Standardized

    train, test = checked_split(train_codes, train_factors, test_codes, test_factors, None)
    if lack := _lack(train):
        return undefined(lack)
    weights = weights_with_value(len(test.codes), resamples, random_state)
    fitted_on, tested_on = standardised(train, test)
    space = Standardized(fitted_on)
    per_factor = []
    for fitted, true in zip(train.factors.T, test.factors.T, strict=True):
        # scikit-learn's C = 1: with two classes it keeps one row of weights, which is half of C.
        C = 1.0 if len(np.unique(fitted)) > 2 else 0.5
        # Ten times the default tolerance moves areas by less than 1e-4, in half the time.
        probe = LogisticProbe(C=C, tol=1e-3).fit(space, fitted)
        scores = probe.predict_log_proba(tested_on)
        areas = [
            roc_area(scores[:, k], true == label, weights)
            for k, label in enumerate(probe.classes_)
            if 0 < (true == label).sum() < len(true)
        ]
        if areas:
            per_factor.append(finite_mean(np.array(areas)))
    if not per_factor:
        return undefined("no factor has two classes among the test points")
    scores = np.mean(per_factor, axis=0)
    return from_draws(scores[0], scores[1:], train.note)


def irs(
    codes: Any,
    factors: Any,
    *,
    units: Any = None,
    bins: int = BINS,
    quantile: float = 0.99,
    resamples: int = 200,
    random_state: int = 0,
) -> Estimate:
    """Return the interventional robustness score (Suter et al. 2019), 0 to 1: 1 is best.

    Per unit and factor 1 - (mean over the factor's levels of the 0.99 quantile of the distance of
    the code from its mean at that level) / (largest distance from its mean over all); the best
    factor per unit; averaged over units with the largest distance as weight. Distances of a unit
    are Euclidean. Factors with more than `bins` levels are cut into bins, as in the reference.

    The largest distance grows with n, and the score with it: compare at equal n. Resamples keep
    the means as measured, and no resample can tell how far a largest value might have been: with
    1,000 points in a simulation the interval was a third too narrow.
    """
    points = checked_points(codes, factors, units)
    if lack := _lack(points):
        return undefined(lack)
    weights = weights_with_value(len(points.codes), resamples, random_state)
    largest = upper_quantile(_distances(points.codes, points.units), weights, 1)
    spread = np.where(largest > 0, largest, 1)
    best = np.full(spread.shape, -np.inf)
    for column in points.factors.T:
        levels = binned(column[:, None].astype(float), bins)[:, 0]
        total, present = 0, 0
        for level in np.unique(levels):
            rows = np.flatnonzero(levels == level)
            drawn = weights[:, rows]
            distances = _distances(points.codes[rows], points.units)
            total = total + upper_quantile(distances, drawn, quantile)
            present = present + (drawn.sum(1, keepdims=True) > 0)
        best = np.maximum(best, 1 - total / present / spread)
    everything = largest.sum(1)
    scores = (best * largest).sum(1) / np.where(everything > 0, everything, 1)
    return shifted(scores, points.note)


def factor_vae_score(
    codes: Any,
    factors: Any,
    *,
    units: Any = None,
    batch_size: int = 64,
    votes: tuple[int, int, int] = (10_000, 5_000, 1_000),
    resamples: int = 200,
    random_state: int = 0,
) -> Estimate:
    """Return the FactorVAE score (Kim and Mnih 2018): an accuracy, 1 / F is chance.

    A vote: a random factor is fixed at the value of a random point, `batch_size` points with that
    value are drawn, and the unit whose variance there is least, relative to its variance over all,
    votes for the factor. A majority table of units against factors from `votes[0]` votes is scored
    on `votes[1]` others. Points come from the data with replacement, where the reference renders
    new ones; constant units do not vote, where the reference divides by zero. The variance of a
    unit is that of its columns added up. For the interval each resample of the points casts
    `votes[2]` votes of its own (the table stays): rather too wide than too narrow.
    """
    points = checked_points(codes, factors, units)
    if lack := _lack(points, factors=2):
        return undefined(lack)
    centred = (points.codes - points.codes.mean(0)).astype(np.float32)
    overall = sum_per_unit(np.square(centred).mean(0), points.units)
    if not overall.any():
        return Estimate(0.0, note=points.note)
    rng = np.random.default_rng(random_state)
    number = points.factors.shape[1]

    def vote(pool: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the factor fixed and the unit that votes, [count] each, on points of the pool."""
        fixed = rng.integers(number, size=count)
        batches = np.empty((count, batch_size), np.int64)
        for f in range(number):
            asked = fixed == f
            batches[asked] = pool[_batches(points.factors[pool, f], asked.sum(), batch_size, rng)]
        variance = sum_per_unit(_batch_variance(centred, batches), points.units)
        relative = np.full_like(variance, np.inf)
        np.divide(variance, overall, out=relative, where=overall > 0)
        return fixed, relative.argmin(1)

    everybody = np.arange(len(centred))
    table = np.zeros((len(overall), number))
    fixed, unit = vote(everybody, votes[0])
    np.add.at(table, (unit, fixed), 1)
    majority = table.argmax(1)
    scores = []
    for row in weights_with_value(len(centred), resamples, random_state):
        fixed, unit = vote(np.repeat(everybody, row.astype(int)), votes[2] if scores else votes[1])
        scores.append(np.mean(majority[unit] == fixed))
    return shifted(np.array(scores), points.note)


def dci(
    train_codes: Any,
    train_factors: Any,
    test_codes: Any,
    test_factors: Any,
    *,
    units: Any = None,
    model: Literal["forest", "boosted"] = "forest",
    trees: int = 30,
    jobs: int = 2,
    resamples: int = 200,
    random_state: int = 0,
) -> dict[str, Any]:
    """Return disentanglement, completeness, informativeness (Eastwood and Williams 2018).

    Trees that predict a factor from all columns say how important each is for it; importances add
    up per unit to R [U, F], columns summing to 1. Disentanglement: 1 minus the entropy of each
    row's shares of the factors (base F), rows weighted by their share of R. Completeness: the same
    for the columns (base U). Informativeness: mean test accuracy. All 0 to 1: 1 is best.

    The forest is one of extremely randomised trees (Geurts et al. 2006) that weigh every column at
    every split and stop at leaves of 5 points: a random forest that sees sqrt(L) columns, or trees
    that go on to fit noise, spread importance over columns that say nothing. "boosted" is the
    reference's choice, gradient boosting with `trees` rounds (there 100), which takes minutes per
    factor for many columns and classes. Its scores are somewhat higher: compare like with like.

    Returns a dict of three `Estimate` and ``importance`` [U, F], zero for factors left out. The
    intervals of the first two resample the trees of the forest (none for boosted trees, which are
    not exchangeable), since these measures depend on the fit alone; that of the third resamples
    test points.
    """
    train, test = checked_split(train_codes, train_factors, test_codes, test_factors, units)
    number = int(train.units.max()) + 1
    importance = np.zeros((number, np.shape(train_factors)[1]))
    if lack := _lack(train):
        names = ("disentanglement", "completeness", "informativeness")
        return {name: undefined(lack) for name in names} | {"importance": importance}
    fitted_on, tested_on = standardised(train, test)
    per_tree, hits = [], []
    for fitted, true in zip(train.factors.T, test.factors.T, strict=True):
        classifier = _trees(model, trees, jobs, random_state).fit(fitted_on, fitted)
        hits.append(classifier.predict(tested_on) == true)
        # Boosted trees have one importance for all of them together.
        parts = classifier.estimators_ if model == "forest" else [classifier]
        per_tree.append([sum_per_unit(part.feature_importances_, train.units) for part in parts])
    resampled = resamples if model == "forest" else 0
    votes = weights_with_value(len(per_tree[0]), resampled, random_state)
    # A tree without a split has importances of zero, and so no say in the mean.
    drawn = np.einsum("rt,ftu->ruf", votes, np.array(per_tree))
    drawn /= np.maximum(drawn.sum(1, keepdims=True), 1e-300)
    importance[:, train.kept] = drawn[0]
    accuracy = weights_with_value(len(test.codes), resamples, random_state) @ np.mean(hits, axis=0)
    accuracy = accuracy / len(test.codes)
    return {
        "disentanglement": _concentration(drawn, train, "a single factor"),
        "completeness": _concentration(drawn.swapaxes(1, 2), train, "a single code unit"),
        "informativeness": from_draws(accuracy[0], accuracy[1:], train.note),
        "importance": importance,
    }


def disentanglement(
    train_codes: Any,
    train_factors: Any,
    test_codes: Any,
    test_factors: Any,
    *,
    units: Any = None,
    quick: bool = False,
    resamples: int = 200,
    random_state: int = 0,
) -> dict[str, Estimate]:
    """Return all measures by name; `quick` leaves out the three of DCI.

    SAP, explicitness and DCI fit on the training points and score the test points. The others fit
    nothing and use the training points, of which the reference has more (10,000 against 5,000).
    """
    options: dict[str, Any] = {"resamples": resamples, "random_state": random_state}
    both = (train_codes, train_factors, test_codes, test_factors)
    points = checked_points(train_codes, train_factors, units)
    information, entropy = mutual_informations(points, BINS, resamples, random_state)
    scores = {
        "mig": _mig(points, information, entropy),
        "sap": sap(*both, units=units, **options),
        "modularity": _modularity(points, information),
        "explicitness": explicitness(*both, **options),
        "irs": irs(train_codes, train_factors, units=units, **options),
        "factor_vae": factor_vae_score(train_codes, train_factors, units=units, **options),
    }
    if not quick:
        found = dci(*both, units=units, **options)
        for name in ("disentanglement", "completeness", "informativeness"):
            scores[f"dci_{name}"] = found[name]
    return scores


def _lack(points: Points, *, factors: int = 1, units: int = 1) -> str:
    """Return why a measure that needs so many factors and code units is not defined, or ''."""
    if not len(points.kept):
        return "every factor has one value only"
    if len(points.kept) < factors:
        return "needs two factors with several values"
    return "needs two code units" if points.units.max() + 1 < units else ""


def _mig(points: Points, information: np.ndarray, entropy: np.ndarray) -> Estimate:
    """Return the MIG of mutual information [1 + R, U, F] and entropy [1 + R, F]."""
    if lack := _lack(points, units=2):
        return undefined(lack)
    gap = _gap(information.swapaxes(1, 2))
    # A resample may hold one level only, and then has no gap.
    share = np.divide(gap, entropy, out=np.full_like(gap, np.nan), where=entropy > 1e-12)
    return shifted(share.mean(1), points.note)


def _modularity(points: Points, information: np.ndarray) -> Estimate:
    """Return the modularity of mutual information [1 + R, U, F]."""
    if lack := _lack(points, factors=2):
        return undefined(lack)
    squares = np.square(information)
    top = squares.max(2)
    excess = (squares.sum(2) - top) / np.where(top > 0, top, 1) / (information.shape[2] - 1)
    return shifted(np.where(top > 0, 1 - excess, 0).mean(1), points.note)


def _gap(values: np.ndarray) -> np.ndarray:
    """Return the largest minus the second largest along the last axis."""
    ordered = np.partition(values, -2, axis=-1)
    return ordered[..., -1] - ordered[..., -2]


def _nearest_mean_hits(train: Points, test: Points, f: int) -> np.ndarray:
    """Return whether the class mean nearest to each test code is that of its class, [n, L]."""
    labels, index, counts = np.unique(train.factors[:, f], return_inverse=True, return_counts=True)
    member = (index == np.arange(len(labels))[:, None]).astype(float)
    means = member @ train.codes / counts[:, None]
    order = np.argsort(means, 0)
    means = np.take_along_axis(means, order, 0)
    borders = (means[1:] + means[:-1]) / 2
    predicted = np.empty(test.codes.shape, np.int64)
    for column in range(len(train.dead)):
        nearest = np.searchsorted(borders[:, column], test.codes[:, column])
        predicted[:, column] = order[nearest, column]
    predicted[:, train.dead] = counts.argmax()
    return labels[predicted] == test.factors[:, f : f + 1]


def _distances(codes: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return the distance [n, U] of each point's units from their means over these points."""
    return np.sqrt(sum_per_unit(np.square(codes - codes.mean(0)), units))


def _batches(levels: np.ndarray, number: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return `number` batches [number, size] of points that share the level of a random point."""
    order = np.argsort(levels, kind="stable")
    _, index, counts = np.unique(levels, return_inverse=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    level = index[rng.integers(len(levels), size=number)][:, None]
    return order[starts[level] + rng.integers(counts[level], size=(number, size))]


def _batch_variance(codes: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Return the variance [V, L] of codes [n, L] (centred) within each of batches [V, size]."""
    from scipy.sparse import csr_matrix

    number, size = batches.shape
    entries = (np.full(batches.size, 1 / size), batches.ravel(), np.arange(number + 1) * size)
    mean = csr_matrix(entries, shape=(number, len(codes)))
    return np.maximum(mean @ np.square(codes) - np.square(mean @ codes), 0)


def _trees(model: str, trees: int, jobs: int, random_state: int) -> Any:
    """Return the classifier of `dci`, not fitted."""
    from sklearn.ensemble import ExtraTreesClassifier, GradientBoostingClassifier

    if model == "forest":
        return ExtraTreesClassifier(
            trees,
            max_features=1.0,  # type: ignore[arg-type]  # a share: all columns
            min_samples_leaf=5,
            n_jobs=jobs,
            random_state=random_state,
        )
    if model == "boosted":
        return GradientBoostingClassifier(n_estimators=trees, random_state=random_state)
    raise ValueError(f"model must be 'forest' or 'boosted', got {model!r}")


def _concentration(shares: np.ndarray, train: Points, single: str) -> Estimate:
    """Return 1 minus the entropy of the rows of `shares` [1 + R, a, b], weighted by their sums."""
    if shares.shape[2] < 2:
        return undefined(f"not defined for {single}")
    rows = shares.sum(2)
    p = shares / np.where(rows > 0, rows, 1)[..., None]
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(2) / np.log(shares.shape[2])
    total = rows.sum(1)
    scores = ((1 - entropy) * rows).sum(1) / np.where(total > 0, total, 1)
    return shifted(scores, train.note)
