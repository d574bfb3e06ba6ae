"""Disentanglement on codes with known answers, and against scikit-learn and plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import mutual_info_score

from sparsejepa.errors import UserError
from sparsejepa.evaluation import disentangle as d
from sparsejepa.evaluation.disentangle import Points

LEVELS = (2, 3, 4)
GRID = np.array(list(itertools.product(*map(range, LEVELS))) * 10)
"""Every combination of three factors, ten times: balanced and independent to the last digit."""
FEW: dict[str, Any] = {"folds": 0}
ALL = {"mig", "dci_disentanglement", "dci_completeness", "dci_informativeness"}


def scores(codes: np.ndarray, factors: np.ndarray = GRID, **options) -> dict[str, float | None]:
    found = d.disentanglement(codes, factors, codes, factors, folds=0, **options)
    assert set(found) == ALL
    return {name: estimate.value for name, estimate in found.items()}


def noisy(n: int = 300, columns: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes that mix two factors of 3 and 4 unbalanced levels with noise."""
    rng = np.random.default_rng(seed)
    factors = np.stack([rng.integers(0, 3, n), rng.binomial(3, 0.3, n)], 1)
    mix = np.random.default_rng(99).normal(size=(2, columns))
    return factors @ mix + 0.7 * rng.normal(size=(n, columns)), factors


# --- codes with known answers ---------------------------------------------------------------------


def test_one_column_per_factor_is_perfect():
    found = scores(GRID.astype(float))
    for name, value in found.items():
        assert value == pytest.approx(1, abs=1e-9), name


def test_order_sign_and_scale_of_the_columns_do_not_matter():
    changed = GRID[:, [2, 0, 1]] * np.array([-3.0, 1e-6, 1e6]) + 5
    before, after = scores(GRID.astype(float)), scores(changed)
    for name in ALL:
        assert after[name] == pytest.approx(before[name], abs=1e-9), name


def test_two_factors_rotated_by_45_degrees():
    factors = np.array(list(itertools.product((0, 1), (0, 1))) * 25)
    a, b = factors.T
    found: Any = scores(np.stack([a + b, a - b], 1).astype(float), factors)
    # Both columns know as much of both factors, so no gap; only a joint reading gets all of it.
    assert found["mig"] == pytest.approx(0, abs=1e-12)
    assert found["dci_informativeness"] == 1
    assert found["dci_disentanglement"] < 0.05
    assert found["dci_completeness"] < 0.05


def test_information_of_a_half_known_factor():
    # One column says which half of four levels, one says nothing: (log 2 - 0) / log 4.
    factor = np.arange(80)[:, None] % 4
    codes = np.stack([factor[:, 0] // 2, np.arange(80) // 4 % 2], 1).astype(float)
    assert d.mig(Points(codes, factor)).value == pytest.approx(0.5)


def test_duplicated_columns_and_how_units_mend_them():
    twice = np.repeat(GRID, 2, axis=1).astype(float)
    found = scores(twice)
    assert found["mig"] == 0
    assert found["dci_disentanglement"] == pytest.approx(1)
    # Each factor's importance lies in 2 of 6 columns.
    assert found["dci_completeness"] == pytest.approx(1 - math.log(2) / math.log(6), abs=0.05)
    assert scores(twice, units=[0, 0, 1, 1, 2, 2]) == pytest.approx(scores(GRID.astype(float)))


@pytest.mark.parametrize("jitter", [0.0, 1e-7])
def test_constant_codes_have_their_stated_values(jitter: float):
    rng = np.random.default_rng(0)
    codes = np.float32(0.3) * (1 + jitter * rng.normal(size=(240, 4))).astype(np.float32)
    found = d.disentanglement(codes, GRID, codes, GRID, **FEW)
    stated = dict.fromkeys(ALL, 0.0) | {"dci_informativeness": np.mean([1 / k for k in LEVELS])}
    assert {name: e.value for name, e in found.items()} == pytest.approx(stated)
    assert all("constant" in estimate.note for estimate in found.values())


def test_noise_is_at_chance():
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 4, (4000, 3))
    codes = rng.normal(size=(4000, 6))
    found = d.disentanglement(codes[:2000], factors[:2000], codes[2000:], factors[2000:], **FEW)
    values = {name: estimate.value or 0 for name, estimate in found.items()}
    assert values["mig"] < 0.01
    assert values["dci_informativeness"] == pytest.approx(1 / 4, abs=0.03)
    assert values["dci_disentanglement"] < 0.02 and values["dci_completeness"] < 0.02


def test_a_perfect_code_is_found_among_many_columns_of_noise():
    rng = np.random.default_rng(0)
    codes = np.concatenate([GRID, rng.normal(size=(240, 60))], 1)
    found: Any = d.dci(Points(codes, GRID), codes, GRID, **FEW)
    assert found["disentanglement"].value > 0.97 and found["completeness"].value > 0.97


# --- against scikit-learn and plain loops ---------------------------------------------------------


def reference_information(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The reference's matrix [L, F]: its discretiser and scikit-learn, pair by pair."""
    cells = [np.digitize(c, np.histogram(c, 20)[1][:-1]) for c in codes.T]
    return np.array([[mutual_info_score(f, c) for f in factors.T] for c in cells])


@given(seed=st.integers(0, 1000), columns=st.integers(2, 6))
@settings(max_examples=10, deadline=None)
def test_mig_is_the_reference(seed: int, columns: int):
    codes, factors = noisy(120, columns, seed)
    m = reference_information(codes, factors)
    top = np.sort(m, 0)[::-1]
    h = [mutual_info_score(f, f) for f in factors.T]
    assert d.mig(Points(codes, factors), **FEW).value == pytest.approx(
        np.mean((top[0] - top[1]) / h)
    )


def test_dci_is_that_of_the_importances():
    (codes, factors), (test_codes, test_factors) = noisy(200), noisy(150, seed=1)
    found: Any = d.dci(Points(codes, factors), test_codes, test_factors, trees=8)
    importance, accuracy = [], []
    for f, g in zip(factors.T, test_factors.T, strict=True):
        every: Any = 1.0
        fitted = ExtraTreesClassifier(8, max_features=every, min_samples_leaf=5, random_state=0)
        importance.append(fitted.fit(codes, f).feature_importances_)
        accuracy.append(fitted.score(test_codes, g))
    r = np.array(importance).T
    rows = 1 - entropy(r, axis=1, base=2)
    assert found["disentanglement"].value == pytest.approx(np.average(rows, weights=r.sum(1)))
    assert found["completeness"].value == pytest.approx(np.mean(1 - entropy(r, base=5)))
    assert found["informativeness"].value == pytest.approx(np.mean(accuracy))
    assert all(found[name].low < found[name].value for name in found)
    units = [0, 0, 1, 2, 2]
    found = d.dci(Points(codes, factors, units), test_codes, test_factors, trees=8)
    r = np.array([r[:2].sum(0), r[2], r[3:].sum(0)])
    assert found["completeness"].value == pytest.approx(np.mean(1 - entropy(r, base=3)))


# --- intervals ------------------------------------------------------------------------------------


def test_intervals_hold_the_value_and_are_about_as_wide_as_it_scatters():
    found = [d.mig(Points(*noisy(300, seed=s))) for s in range(40)]
    bounds: Any = [(e.low, e.value, e.high) for e in found]
    low, value, high = np.array(bounds).T
    assert (low <= value).all() and (value <= high).all()
    assert 0.6 < np.mean(high - low) / (2 * 1.96) / np.std(value) < 1.8
    parts = (*noisy(200), *noisy(200, seed=1))
    assert set(d.disentanglement(*parts, quick=True)) == {"mig"}
    assert d.mig(Points(*parts[:2])) == d.mig(Points(*parts[:2]))


# --- input that is not as it should be ------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (np.zeros((9, 2)), r"\[10 points, factors\], got shape \(9, 2\)"),
        (np.zeros(10), "shape"),
        (np.zeros((10, 0)), "shape"),
        (np.full((10, 1), np.nan), "factor 0 holds NaN"),
        (np.full((10, 2), -1), "negative"),
        (np.linspace(0, 1, 20).reshape(10, 2), "cut it into bins"),
    ],
)
def test_factors_that_are_no_classes(factors, said: str):
    with pytest.raises(UserError, match=said) as caught:
        d.check_factors(factors, 10)
    assert "\n" not in str(caught.value)


def test_factors_with_one_value_are_left_out():
    codes, factors = noisy(200)
    more = np.insert(factors, 1, 7, axis=1)
    plain = d.disentanglement(codes, factors, codes, factors, **FEW)
    found = d.disentanglement(codes, more, codes, more, **FEW)
    for name, estimate in found.items():
        assert estimate.value == plain[name].value, name
        assert "one value only: factor 1" in estimate.note
    none = d.disentanglement(codes, more[:, [1]], codes, more[:, [1]], **FEW)
    assert all(e.value is None and "one value" in e.note for e in none.values())


def test_too_few_units_or_factors_is_not_defined():
    codes, factors = noisy(200)
    one_unit = d.disentanglement(codes, factors, codes, factors, units=[0] * 5, **FEW)
    undefined = {name for name, e in one_unit.items() if e.value is None}
    assert undefined == {"mig", "dci_completeness"}
    one = factors[:, :1]
    one_factor = d.disentanglement(codes, one, codes, one, **FEW)
    undefined = {name for name, e in one_factor.items() if e.value is None}
    assert undefined == {"dci_disentanglement"}
    assert all(one_factor[name].note for name in undefined)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codes": np.full((240, 3), np.nan)}, "NaN"),
        ({"codes": np.zeros(240)}, "matrix"),
        ({"codes": np.zeros((0, 3))}, "matrix"),
        ({"units": [0, 1]}, "one per"),
        ({"units": [0.0, 1.0, 2.0]}, "one per"),
        ({"units": [0, 2, 2]}, "one per"),
    ],
)
def test_wrong_codes_or_units(change: dict, said: str):
    with pytest.raises(ValueError, match=said):
        Points(change.get("codes", GRID), GRID, change.get("units"))


def test_parts_of_different_width():
    with pytest.raises(ValueError, match="differ"):
        d.dci(Points(GRID, GRID), GRID, GRID[:, :2])
    with pytest.raises(ValueError, match="differ"):
        d.dci(Points(GRID, GRID), GRID[:, :2], GRID)
