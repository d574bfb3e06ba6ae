from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from sparsejepa.data.store import ImageSet, Target
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.errors import UserError
from sparsejepa.evaluation import probe as module
from sparsejepa.evaluation.linear import LogisticDescent, Standardized, validation_part
from sparsejepa.evaluation.probe import (
    KNNProbe,
    LogisticProbe,
    RidgeProbe,
    evaluate,
    wilson_interval,
)
from sparsejepa.model.encoder import ViT
from sparsejepa.training.quality import knn_accuracy

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)


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


# Logistic regression


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


def test_single_precision_and_the_usual_tolerance_are_enough() -> None:
    x, y = blobs(1000, 40, classes=10)
    z = standardised(x)
    new, new_y = blobs(1000, 40, classes=10, seed=1)
    for C in (1e-3, 1e-1):
        rough = LogisticProbe(C).fit(x.astype(np.float32), y)
        exact = LogisticProbe(C, tol=1e-9).fit(x, y)
        found, least = (
            objective(z, y, C, p.coef_.double().numpy(), p.intercept_.double().numpy())
            for p in (rough, exact)
        )
        assert found == pytest.approx(least, rel=1e-4)
        assert abs(rough.score(new, new_y) - exact.score(new, new_y)) <= 0.003


@pytest.mark.parametrize("order", [1, -1])
def test_one_descent_finds_every_minimum_of_a_path(order: int) -> None:
    x, y = blobs(400, 12, classes=5)
    z, space, labels = standardised(x), Standardized(x), torch.from_numpy(y)
    descent = LogisticDescent(space.variance)
    descent.place(space.rotated, labels, torch.zeros(13, 5, dtype=torch.float64))
    for C in np.logspace(-3, 1, 9)[::order]:
        descent.minimise(C, tol=1e-9, max_iter=500)
        cold = LogisticProbe(C, tol=1e-9).fit(x, y)
        coef = (space.basis @ descent.theta[:-1]).T.numpy()
        found = objective(z, y, C, coef, descent.theta[-1].numpy())
        least = objective(z, y, C, cold.coef_.numpy(), cold.intercept_.numpy())
        assert found == pytest.approx(least, rel=1e-12)
        again = descent.minimise(C, tol=1e-9, max_iter=500)
        assert again <= 3  # it is there already
    # Other rows, the curvature of the first: the minimum is that of the other rows.
    descent.place(space.rotated[:300], labels[:300], descent.theta)
    descent.minimise(0.1, tol=1e-9, max_iter=500)
    theirs = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(z[:300], y[:300])
    coef = (space.basis @ descent.theta[:-1]).T
    np.testing.assert_allclose(coef, theirs.coef_, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_single_precision_path_over_many_decades(seed: int) -> None:
    """More features than rows, so that at weak penalties next to nothing curves the loss."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(40, 100)).astype(np.float32), rng.integers(3, size=40)
    space, labels = Standardized(x), torch.from_numpy(y)
    descent = LogisticDescent(space.variance)
    descent.place(space.rotated, labels, torch.zeros(len(space.variance) + 1, 3))
    z = standardised(x)
    for C in 10.0 ** np.arange(-3, 6, 2):
        assert descent.minimise(C, tol=1e-5, max_iter=500) < 500
        coef = (space.basis @ descent.theta[:-1].double()).T.numpy()
        found = objective(z, y, C, coef, descent.theta[-1].double().numpy())
        exact = LogisticProbe(C, tol=1e-10, max_iter=5000).fit(x.astype(np.float64), y)
        least = objective(z, y, C, exact.coef_.numpy(), exact.intercept_.numpy())
        assert found < 1.01 * least


def test_a_step_into_nan_ends() -> None:
    """Remembered curvature that is nonsense is dropped, and nothing loops for ever."""
    x, y = blobs(60, 4, classes=3)
    space, labels = Standardized(x.astype(np.float32)), torch.from_numpy(y)
    descent = LogisticDescent(space.variance)
    descent.place(space.rotated, labels, torch.zeros(5, 3))
    descent.pairs = [(torch.full((5, 3), np.nan), torch.ones(5, 3))]
    assert descent.minimise(1.0, tol=1e-4, max_iter=50) < 50
    assert descent.theta.isfinite().all()


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


# Ridge


@pytest.mark.parametrize(("n", "width"), [(200, 8), (40, 90)])
def test_ridge_is_scikit_learns_on_one_hot_labels(n: int, width: int) -> None:
    x, y = blobs(n, width, classes=4)
    ours = RidgeProbe(3.0).fit(x, y)
    theirs = Ridge(alpha=3.0).fit(standardised(x), np.eye(4)[y])
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-7)
    np.testing.assert_allclose(
        ours.decision_function(x), theirs.predict(standardised(x)), atol=1e-6
    )


@pytest.mark.parametrize(("n", "width"), [(60, 6), (24, 40)])
def test_ridge_leaves_every_row_out_exactly(n: int, width: int) -> None:
    x, y = blobs(n, width, classes=3, spread=1.0)
    z, onehot = standardised(x), np.eye(3)[y]
    for alpha in (0.5, 20.0):
        hits = 0
        for i in range(n):
            rest = np.arange(n) != i
            fitted = Ridge(alpha=alpha).fit(z[rest], onehot[rest])
            hits += fitted.predict(z[i : i + 1]).argmax() == y[i]
        assert RidgeProbe(alpha).fit(x, y).validation_score_ == pytest.approx(hits / n)


def test_ridge_takes_the_best_alpha_and_the_stronger_of_equals() -> None:
    x, y = blobs(150, 20, classes=3, spread=1.0)
    grid = [1.0, 10.0, 100.0, 1e8, 1e9]
    scores = {a: RidgeProbe(a).fit(x, y).validation_score_ for a in grid}
    probe = RidgeProbe(grid).fit(x, y)
    assert probe.validation_score_ == max(scores.values())
    assert probe.alpha_ == max(a for a in grid if scores[a] == probe.validation_score_)


# Nearest neighbours


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


def test_knn_with_fewer_images_than_neighbours_and_with_nan() -> None:
    x, y = blobs(10, 4, classes=2)
    assert KNNProbe(k=20).fit(x, y).predict(x).shape == (10,)
    bad = torch.full((6, 3), torch.nan)
    accuracy = knn_accuracy(bad, torch.tensor([0, 1, 2] * 2), bad, torch.tensor([0] * 6))
    assert 0 <= accuracy <= 1


# What all of them share

ALL = [
    lambda: LogisticProbe(),
    lambda: LogisticProbe(1.0),
    lambda: RidgeProbe(),
    lambda: KNNProbe(),
]


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


@settings(max_examples=50)
@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_is_scipys(n: int, share: float) -> None:
    hits = round(share * n)
    wanted = binomtest(hits, n).proportion_ci(method="wilson")
    low, high = wilson_interval(hits / n, n)
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert low <= hits / n <= high


# Encoders on data sets


def colour_set(split: str, count: int, seed: int, name: str = "colours") -> ImageSet:
    """Noise with a colour cast (easy), a target of pure chance, and one that is constant."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 128, (count, 8, 8, 3))
    hue = rng.permutation(np.r_[np.arange(count // 2) * 0, np.arange(count - count // 2) % 2 + 1])
    images[np.arange(count), :, :, hue] += 100
    targets = {
        "hue": Target(hue, ("red", "green", "blue")),
        "noise": Target(rng.integers(0, 2, count), ("x", "y")),
        "same": Target(np.zeros(count, np.int64), ("only",)),
    }
    about = f"{name}{split}{count}"
    return ImageSet(name, split, images.astype(np.uint8), targets, MEAN, STD, fingerprint=about)


def make_encoder(seed: int = 0, name: str = "a", width: int = 12) -> Encoder:
    torch.manual_seed(seed)
    vit = ViT(8, 4, embed_dim=width, depth=2, num_heads=3)
    return Encoder(vit, name=name, mean=MEAN, std=STD)


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """Built-in test data; the list collects what was embedded."""
    calls: list[str] = []

    def load_dataset(name: str, split: str, **settings: Any) -> ImageSet:
        if name == "bare":
            bare = colour_set(split, 10, 0, name)
            return ImageSet(name, split, bare.images, {}, bare.mean, bare.std)
        return colour_set(split, 240 if split == "train" else 100, split == "test", name)

    def counted(encoder: Encoder, images: ImageSet, **settings):
        calls.append(f"{encoder.name}/{images.split}")
        return real(encoder, images, **settings)

    def pixels(images: ImageSet):
        calls.append(f"pixels/{images.split}")
        return real_pixels(images)

    real, real_pixels = module.embed, module.pixel_features
    monkeypatch.setattr(module, "load_dataset", load_dataset)
    monkeypatch.setattr(module, "embed", counted)
    monkeypatch.setattr(module, "pixel_features", pixels)
    return calls


def test_evaluate_puts_both_floors_beside_every_number(embedded: list[str]) -> None:
    encoders = [make_encoder(0, "a"), make_encoder(1, "b"), make_encoder(0, "wide", width=24)]
    rows = evaluate(encoders, ["colours"], protocols=("logistic", "ridge", "knn"))
    assert [(r.encoder, r.target, r.protocol) for r in rows] == [
        (e, t, p)
        for e in ("a", "b", "wide")
        for t in ("hue", "noise")  # the constant target is no task
        for p in ("logistic", "ridge", "knn")
    ]
    # One untrained floor per architecture, one pixel floor in all.
    assert embedded == [
        f"{name}/{split}"
        for name in ("pixels", "a", "a (untrained)", "b", "wide", "wide (untrained)")
        for split in ("train", "test")
    ]
    by = {(r.encoder, r.target, r.protocol): r for r in rows}
    test = colour_set("test", 100, 1)
    for row in rows:
        assert row.data == "colours" and (row.n_train, row.n_test) == (240, 100)
        counts = np.bincount(test.targets[row.target].values)
        assert row.chance == counts.max() / 100
        assert row.interval == wilson_interval(row.accuracy, 100)
        assert row.pixels_interval == wilson_interval(row.pixels, 100)  # type: ignore[arg-type]
        assert row.untrained_interval == wilson_interval(row.untrained, 100)  # type: ignore[arg-type]
        other = by["b", row.target, row.protocol]
        assert row.pixels == other.pixels
        if row.encoder != "wide":
            assert row.untrained == other.untrained
        json.dumps(row.to_dict(), allow_nan=False)
    hue = by["a", "hue", "logistic"]
    assert hue.accuracy > 0.95 and hue.pixels is not None and hue.pixels > 0.9
    assert hue.settings["C"] > 0 and hue.settings["pool"] == "mean"
    noise = by["a", "noise", "logistic"]
    assert abs(noise.accuracy - 0.5) < 0.2


def test_an_untrained_row_equals_probing_the_untrained_encoder(embedded: list[str]) -> None:
    encoder = make_encoder(5)
    (row,) = evaluate(encoder, "colours", targets=["hue"], seed=3)
    (fresh,) = evaluate(encoder.untrained(3), "colours", targets=["hue"], seed=3, floors=False)
    assert fresh.accuracy == row.untrained
    assert fresh.untrained is None and fresh.pixels_interval is None


def test_kept_floors_are_used_again_for_equal_settings_only(
    embedded: list[str], tmp_path: Path
) -> None:
    def again(**settings) -> list[str]:
        embedded.clear()
        rows = evaluate(make_encoder(), "colours", targets=["hue"], cache_dir=tmp_path, **settings)
        found.append((rows[0].untrained, rows[0].pixels))
        return [call for call in embedded if call.endswith("train")]

    found: list[tuple] = []
    everything = ["pixels/train", "a/train", "a (untrained)/train"]
    assert again() == everything
    assert again() == ["a/train"]
    assert found[0] == found[1]
    assert again(seed=1) == everything
    assert again(limit=100) == everything
    for file in tmp_path.iterdir():
        file.write_text("[[")
    assert again() == everything
    assert found[-1] == found[0]


def test_limit_draws_training_images_only(embedded: list[str]) -> None:
    (row,) = evaluate(make_encoder(), "colours", targets=["hue"], floors=False, limit=60)
    assert (row.n_train, row.n_test) == (60, 100)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"data": "bare"}, r"bare: has no labels; add class folders or a factors\.csv"),
        ({"protocols": ["logistics"]}, "--protocol logistics.*did you mean 'logistic'"),
        ({"targets": ["hues"]}, "no target 'hues'.*did you mean 'hue'"),
        ({"targets": ["same"]}, "colours, target 'same': the labels name one class only"),
        ({"refs": "nowhere"}, "nowhere: no such run directory"),
    ],
)
def test_bad_requests(embedded: list[str], settings_: dict, words: str) -> None:
    request = {"refs": make_encoder(), "data": "colours", **settings_}
    with pytest.raises(UserError, match=words):
        evaluate(**request)
