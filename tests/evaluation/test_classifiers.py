"""The probes: scikit-learn's minima, its own checks of estimators, and input that is not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sparsejepa.errors import UserError
from sparsejepa.evaluation.classifiers import (
    KNNProbe,
    LogisticProbe,
    Standardized,
    minimise_logistic,
    validation_part,
)
from sparsejepa.training.monitor import knn_accuracy

ALL = [lambda: LogisticProbe(), lambda: LogisticProbe(1.0), lambda: KNNProbe()]


def blobs(
    n: int, width: int, classes: int, seed: int = 0, spread: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes in correlated features of very different scales and means."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width)) * spread / width**0.5
    y = rng.integers(0, classes, n)
    y[:classes] = np.arange(classes)
    x = rng.normal(size=(n, width)) + 2 * centres[y]
    mix = (
        np.random.default_rng(99).normal(size=(width, width)) * np.logspace(0, -1.5, width)[:, None]
    )
    return x @ mix * np.logspace(-2, 2, width) + 5, y


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0)


def objective(z: np.ndarray, y: np.ndarray, C: float, coef: np.ndarray, bias: np.ndarray) -> float:
    scores = z @ coef.T + bias
    top = scores.max(1)
    logsumexp = top + np.log(np.exp(scores - top[:, None]).sum(1))
    return 0.5 * (coef**2).sum() + C * (logsumexp - scores[np.arange(len(y)), y]).sum()


@pytest.mark.parametrize(("n", "width"), [(300, 12), (60, 150)])
@pytest.mark.parametrize("C", [1e-3, 0.1, 10.0])
def test_logistic_is_scikit_learns_at_the_same_c(n: int, width: int, C: float) -> None:
    x, y = blobs(n, width, classes=5)
    z = standardised(x)
    theirs = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(z, y)
    ours = LogisticProbe(C, tol=1e-9).fit(x, y)
    least = objective(z, y, C, theirs.coef_, theirs.intercept_)
    found = objective(z, y, C, ours.coef_.numpy(), ours.intercept_.numpy())
    assert found == pytest.approx(least, rel=1e-9)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4)
    new, _ = blobs(200, width, classes=5, seed=1)
    new_z = (new - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(ours.predict_proba(new), theirs.predict_proba(new_z), atol=1e-4)
    np.testing.assert_array_equal(ours.predict(new), theirs.predict(new_z))


def test_two_classes_are_scikit_learns_at_twice_the_c() -> None:
    x, y = blobs(200, 6, classes=2)
    ours = LogisticProbe(0.05, tol=1e-9).fit(x, y)
    theirs = LogisticRegression(C=0.1, tol=1e-10).fit(standardised(x), y)
    np.testing.assert_allclose(
        ours.predict_proba(x), theirs.predict_proba(standardised(x)), atol=1e-6
    )


@pytest.mark.parametrize("order", [1, -1])
def test_every_minimum_of_a_path_is_found_from_the_one_before(order: int) -> None:
    x, y = blobs(400, 12, classes=5)
    z, space, labels = standardised(x), Standardized(x), torch.from_numpy(y)
    theta = torch.zeros(13, 5, dtype=torch.float64)
    fit: dict[str, Any] = {"tol": 1e-9, "max_iter": 500}
    for C in np.logspace(-3, 1, 9)[::order]:
        theta, _ = minimise_logistic(space.rotated, labels, space.variance, theta, C, **fit)
        cold = LogisticProbe(C, tol=1e-9).fit(x, y)
        coef = (space.basis @ theta[:-1]).T.numpy()
        found = objective(z, y, C, coef, theta[-1].numpy())
        least = objective(z, y, C, cold.coef_.numpy(), cold.intercept_.numpy())
        assert found == pytest.approx(least, rel=1e-12)
        again = minimise_logistic(space.rotated, labels, space.variance, theta, C, **fit)
        assert again[1] <= 3  # it is there already
    # Other rows, the variance of all: the minimum is that of the other rows.
    rows = space.rotated[:300]
    theta, _ = minimise_logistic(rows, labels[:300], space.variance, theta, 0.1, **fit)
    theirs = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(z[:300], y[:300])
    np.testing.assert_allclose((space.basis @ theta[:-1]).T, theirs.coef_, atol=1e-4)


@pytest.mark.parametrize("spread", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("C", [1e-2, 1.0, 100.0])
def test_single_precision_is_no_worse_than_scikit_learns(spread: float, C: float) -> None:
    x, y = blobs(2000, 30, classes=8, spread=spread)
    z = standardised(x).astype(np.float32)
    theirs = LogisticRegression(C=C, max_iter=10_000).fit(z, y)
    ours = LogisticProbe(C).fit(x.astype(np.float32), y)
    least, found = (
        objective(
            standardised(x), y, C, np.asarray(p.coef_, float), np.asarray(p.intercept_, float)
        )
        for p in (theirs, ours)
    )
    assert found <= least * (1 + 1e-6)


def test_c_is_chosen_on_a_part_of_train() -> None:
    x, y = blobs(400, 30, classes=4, spread=1.0)
    grid = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    held = validation_part(y, seed=7)
    z = standardised(x)
    scores = [
        LogisticRegression(C=C, tol=1e-9, max_iter=5000)
        .fit(z[~held], y[~held])
        .score(z[held], y[held])
        for C in grid
    ]
    probe = LogisticProbe(grid, random_state=7, tol=1e-8).fit(x, y)
    assert probe.validation_score_ == pytest.approx(max(scores))
    assert grid[int(np.argmax(scores))] == probe.C_
    alone = LogisticProbe(probe.C_, tol=1e-8).fit(x, y)
    np.testing.assert_allclose(probe.coef_, alone.coef_, atol=1e-5)
    default = LogisticProbe(random_state=7).fit(x, y)
    assert round(default.C_ * len(x), 6) in [10**k for k in range(8)]


@settings(max_examples=60)
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_the_validation_part_is_a_stratified_fifth(counts: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    wanted = min(round(0.2 * len(labels)), len(labels) - len(counts))
    if wanted == 0:
        with pytest.raises(UserError, match="more images per class"):
            validation_part(labels, seed)
        return
    held = validation_part(labels, seed)
    assert held.sum() == wanted
    taken = np.bincount(labels[held], minlength=len(counts))
    assert (taken < counts).all()
    share = wanted * (np.array(counts) - 1) / (len(labels) - len(counts))
    assert (abs(taken - share) < 1).all()
    np.testing.assert_array_equal(held, validation_part(labels, seed))
    assert validation_part(labels, -1 - seed).sum() == held.sum()


def test_knn_is_scikit_learns_with_the_same_weights() -> None:
    x, y = blobs(300, 10, classes=5, spread=1.0)
    new, new_y = blobs(150, 10, classes=5, seed=1, spread=1.0)
    votes: Any = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    theirs = KNeighborsClassifier(20, metric="cosine", weights=votes).fit(standardised(x), y)
    wanted = theirs.predict((new - x.mean(0)) / x.std(0))
    probe = KNNProbe().fit(x, y)
    np.testing.assert_array_equal(probe.predict(new), wanted)
    bank_x, bank_y, query_x, query_y = (torch.from_numpy(a) for a in (x, y, new, new_y))
    found = knn_accuracy(bank_x, bank_y, query_x, query_y)
    assert found == pytest.approx((wanted == new_y).mean())


@pytest.mark.parametrize("make", ALL)
def test_labels_of_any_kind_and_test_labels_that_train_did_not_have(make) -> None:
    x, y = blobs(120, 6, classes=3, spread=6.0)
    names = np.array(["cat", "dog", "eel"])[y]
    probe = make()
    assert probe.fit(x.astype(np.float32), names) is probe
    assert list(probe.classes_) == ["cat", "dog", "eel"]
    assert probe.score(x, names) > 0.8
    unseen = np.where(y == 0, "fox", names)
    assert probe.score(x, unseen) == pytest.approx(np.mean((probe.predict(x) == names) & (y != 0)))
    # Two of a hundred classes, far fewer rows than classes.
    few = make().fit(x[:40], np.where(y[:40] == 0, 17, 93))
    assert set(few.predict(x)) <= {17, 93}


@pytest.mark.parametrize("make", ALL)
def test_features_that_do_not_vary(make) -> None:
    x, y = blobs(90, 4, classes=3, spread=6.0)
    wide = np.hstack([x, np.full((90, 3), 0.1), np.zeros((90, 1))]).astype(np.float32)
    # A constant feature changes nothing, not even when it is another constant later.
    plain, padded = make().fit(x.astype(np.float32), y), make().fit(wide, y)
    assert (plain.predict(x) == padded.predict(wide)).mean() > 0.97
    constant = np.full((90, 5), 0.3, np.float32)
    labels = np.r_[np.zeros(60, int), np.ones(30, int)]
    found = make().fit(constant, labels).predict(constant)
    # Neighbours that are all equally near are no majority; the linear probes know the frequencies.
    assert set(found) <= ({0, 1} if isinstance(make(), KNNProbe) else {0})


@pytest.mark.parametrize("make", ALL)
def test_bad_input_is_one_clear_line(make) -> None:
    x, y = blobs(50, 4, classes=2)
    for bad, labels, words in (
        (np.where(x == x[0, 0], np.nan, x), y, "NaN"),
        (np.where(x == x[0, 0], np.inf, x), y, "NaN or infinity"),
        (x[:, 0], y, "matrix"),
        (x[:0], y[:0], "0 sample"),
        (torch.empty(0, 4), y[:0], "matrix"),
        (x, y[:-1], "one per row"),
        (x, y * 0, "one class only"),
    ):
        with pytest.raises(UserError, match=words):
            make().fit(bad, labels)
    with pytest.raises(UserError, match=r"3 features, but .*Probe is expecting 4"):
        make().fit(x, y).predict(x[:, :3])
    with pytest.raises(UserError, match=r"3 features, but .*Probe is expecting 4"):
        make().fit(x, y).predict(torch.as_tensor(x[:, :3]))


def test_one_image_per_class_leaves_nothing_to_choose_on() -> None:
    x, _ = blobs(8, 3, classes=2)
    with pytest.raises(UserError, match="more images per class"):
        LogisticProbe().fit(x, np.arange(8))
    assert LogisticProbe(1.0).fit(x, np.arange(8)).score(x, np.arange(8)) > 0.5


@pytest.mark.parametrize(("n", "width"), [(50, 8), (20, 60)])
def test_principal_axes_keep_all_inner_products(n: int, width: int) -> None:
    x, _ = blobs(n, width, classes=2)
    z = standardised(x)
    space = Standardized(x)
    np.testing.assert_allclose(space.rotated @ space.rotated.T, z @ z.T, atol=1e-9 * width)
    np.testing.assert_allclose(z @ space.basis.numpy(), space.rotated, atol=1e-7)
    covariance = space.rotated.T @ space.rotated / n
    np.testing.assert_allclose(covariance, torch.diag(space.variance), atol=1e-9 * width)


@parametrize_with_checks([LogisticProbe(), LogisticProbe(C=1.0), KNNProbe()])
def test_probes_pass_scikit_learns_checks(estimator, check) -> None:
    check(estimator)


def test_searches_choose_what_is_told_and_leave_a_probe_that_predicts() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 6)).astype(np.float32), np.arange(120) % 3
    x[np.arange(120), y] += 4
    for probe, grid in (
        (LogisticProbe(), {"probe__C": [1e-3, 1.0]}),
        (KNNProbe(), {"probe__k": [1, 5]}),
    ):
        model = Pipeline([("scale", StandardScaler()), ("probe", probe)])
        search = GridSearchCV(model, grid, cv=3).fit(x, np.array(["a", "b", "c"])[y])
        assert search.best_score_ > 0.8 and set(search.predict(x[:9])) <= {"a", "b", "c"}
        twin: Any = clone(probe.set_params(device="cpu"))
        assert type(twin) is type(probe) and twin.get_params() == probe.get_params()
        assert not hasattr(twin, "classes_")
