from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from sparsejepa.evaluation.information import (
    gaussian_mutual_information,
    mutual_information,
    overlap_information,
    total_correlation,
    wishart_bias,
)
from sparsejepa.evaluation.stats import Estimate

PLAIN: dict[str, Any] = dict(copula=False, resamples=0)


def valid(estimate: Estimate) -> float:
    assert estimate.value is not None, estimate.note
    return estimate.value


def interval(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None and estimate.high is not None, estimate.note
    return estimate.low, estimate.high


def width(estimate: Estimate) -> float:
    low, high = interval(estimate)
    return high - low


def covers(estimate: Estimate, truth: float) -> bool:
    low, high = interval(estimate)
    return low < truth < high


def equicorrelated(n: int, d: int, r: float, rng: np.random.Generator) -> np.ndarray:
    return math.sqrt(1 - r) * rng.normal(size=(n, d)) + math.sqrt(r) * rng.normal(size=(n, 1))


def true_total_correlation(d: int, r: float) -> float:
    """The eigenvalues of the correlation matrix are 1 - r, d - 1 times, and 1 + (d - 1) r."""
    return -((d - 1) * math.log(1 - r) + math.log(1 + (d - 1) * r)) / 2


def mixed(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


# --- the bias -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "bias"), [(10_000, 0.92), (2_000, 4.74), (512, 20.78)])
def test_bias_at_192_dimensions(n: int, bias: float) -> None:
    assert wishart_bias(n, 192) == pytest.approx(bias, abs=0.005)


@pytest.mark.parametrize("r", [0, 0.5])
@pytest.mark.parametrize(("n", "d"), [(500, 24), pytest.param(10_000, 192, marks=pytest.mark.slow)])
def test_mean_error_over_20_draws_is_within_three_standard_errors(n: int, d: int, r: float) -> None:
    rng = np.random.default_rng(7)
    draws = [equicorrelated(n, d, r, rng) for _ in range(20)]
    ranked = np.array([valid(total_correlation(x, resamples=0)) for x in draws])
    exact = np.array([valid(total_correlation(x, copula=False, resamples=0)) for x in draws])
    errors = ranked - true_total_correlation(d, r)
    assert abs(errors.mean()) < 3 * errors.std(ddof=1) / math.sqrt(20)
    # What ranking alone does on the same points is a small part of the bias that is corrected.
    assert abs((ranked - exact).mean()) < 0.2 * wishart_bias(n, d)


# --- total correlation ----------------------------------------------------------------------------


@given(n=st.integers(8, 40), d=st.integers(2, 6), seed=st.integers(0, 999))
def test_total_correlation_is_the_log_determinant_of_numpys_correlations(
    n: int, d: int, seed: int
) -> None:
    x = mixed(n, d, seed)
    expected = -np.linalg.slogdet(np.corrcoef(x.T))[1] / 2 - wishart_bias(n, d)
    found = valid(total_correlation(torch.from_numpy(x), **PLAIN))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_between_blocks_is_the_whole_less_what_is_inside() -> None:
    x, blocks = mixed(60, 7, 1), np.array([2, 0, 0, 1, 2, 2, 1])
    inside = sum(valid(total_correlation(x[:, blocks == b], resamples=0)) for b in range(3))
    between = valid(total_correlation(x, blocks=blocks, resamples=0))
    assert between + inside == pytest.approx(valid(total_correlation(x, resamples=0)), rel=1e-9)


def test_a_block_counts_with_the_dimensions_that_it_spans() -> None:
    x = mixed(80, 5, 2)
    redundant = np.concatenate([x[:, :3] @ np.random.default_rng(0).normal(size=(3, 8)), x], 1)
    blocks = [0] * 11 + [1] * 2
    assert valid(total_correlation(redundant, blocks=blocks, copula=False)) == pytest.approx(
        valid(total_correlation(x, blocks=[0, 0, 0, 1, 1], copula=False)), rel=1e-6
    )


def test_a_monotone_change_of_a_dimension_changes_nothing() -> None:
    x = mixed(50, 4, 3)
    changed = np.stack([np.exp(x[:, 0]), x[:, 1] ** 3, -x[:, 2], 1e6 + x[:, 3]], 1)
    a, b = total_correlation(x), total_correlation(changed)
    assert (a.value, a.low) == pytest.approx((b.value, b.low))
    assert valid(total_correlation(changed, copula=False)) != pytest.approx(a.value, rel=0.05)


def test_interval_is_the_jackknifes() -> None:
    x, blocks = mixed(60, 5, 4), np.array([0, 0, 1, 1, 2])
    kind: dict[str, Any] = dict(blocks=blocks, copula=False)
    value = valid(total_correlation(x, **kind, resamples=0))
    without = [valid(total_correlation(np.delete(x, i, 0), **kind, resamples=0)) for i in range(60)]
    spread = math.sqrt(59 / 60 * ((np.array(without) - np.mean(without)) ** 2).sum())
    estimate = total_correlation(x, **kind, resamples=20_000)
    assert width(estimate) == pytest.approx(2 * 1.96 * spread, rel=0.04)
    assert covers(estimate, value)


def test_what_has_no_total_correlation_says_why() -> None:
    x = mixed(30, 3, 5)
    constant = np.concatenate([x, np.full((30, 1), 0.7)], 1).astype(np.float32)
    estimate = total_correlation(constant)
    assert estimate.note == "1 of 4 dimensions are constant and left out"
    assert valid(estimate) == valid(total_correlation(x.astype(np.float32)))
    for x_, note in [
        (np.ones((30, 3)), "0 of 3 dimensions or blocks vary"),
        (x[:, :1], "1 of 1 dimensions or blocks vary"),
        (x[:3], "3 points are too few for 3 dimensions"),
        (np.concatenate([x, x[:, :1]], 1), "infinite: a dimension is a linear function"),
    ]:
        estimate = total_correlation(x_)
        assert estimate.value is None and estimate.note.startswith(note)
    assert total_correlation(x, blocks=[1, 1, 1]).value is None


def test_no_interval_where_one_point_carries_a_dimension() -> None:
    x = mixed(30, 3, 5)
    x[:, 0] = np.arange(30) == 4
    estimate = total_correlation(x)
    assert math.isfinite(valid(estimate))
    assert estimate.low is None and "no interval" in estimate.note


def test_wrong_shapes_and_values_are_said() -> None:
    x = mixed(10, 3, 0)
    with pytest.raises(ValueError, match=r"must label 3 dimensions, got shape \(2,\)"):
        total_correlation(x, blocks=[0, 1])
    with pytest.raises(ValueError, match=r"points in rows \[n, D\], got shape \(1, 10, 3\)"):
        total_correlation(x[None])
    with pytest.raises(ValueError, match="NaN or infinity"):
        total_correlation([[1.0, math.nan], [0.0, 1.0]])
    with pytest.raises(ValueError, match="x has 10 points and y has 9"):
        gaussian_mutual_information(x, x[1:])


# --- mutual information of vectors ----------------------------------------------------------------


def test_gaussian_information_is_that_of_scikit_learns_canonical_correlations() -> None:
    x = mixed(200, 5, 7)
    u, v = CCA(2, max_iter=10_000, tol=1e-14).fit_transform(x[:, :3], x[:, 3:])
    r = [np.corrcoef(u[:, k], v[:, k])[0, 1] for k in range(2)]
    estimate = gaussian_mutual_information(x[:, :3], x[:, 3:], **PLAIN)
    bias = wishart_bias(200, 5) - wishart_bias(200, 3) - wishart_bias(200, 2)
    assert valid(estimate) == pytest.approx(-np.log1p(-np.square(r)).sum() / 2 - bias, rel=1e-5)


# --- overlap --------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), groups=st.integers(2, 4), P=st.integers(1, 3))
def test_overlap_is_the_blockwise_log_determinant(seed: int, groups: int, P: int) -> None:
    rng = np.random.default_rng(seed)
    W, mix = rng.normal(size=(groups, P, 5)), rng.normal(size=(5, 5))
    S = np.concatenate(W) @ mix @ mix.T @ np.concatenate(W).T + 0.25 * np.eye(groups * P)
    own = sum(
        np.linalg.slogdet(S[g * P : (g + 1) * P, g * P : (g + 1) * P])[1] for g in range(groups)
    )
    value = overlap_information(torch.from_numpy(W), mix @ mix.T, noise=0.5)
    assert value == pytest.approx((own - np.linalg.slogdet(S)[1]) / 2, rel=1e-9)
    assert value >= 0


# --- information about labels ---------------------------------------------------------------------


@given(seed=st.integers(0, 999), K=st.integers(2, 6))
def test_information_of_categories_is_scikit_learns_plus_millers_term(seed: int, K: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, 50)
    a = np.where(rng.random(50) < 0.5, y, rng.integers(0, K, 50))
    table = np.asarray(contingency_matrix(a, y))
    miller = (sum(table.shape) - (table > 0).sum() - 1) / 100
    expected = mutual_info_score(a, y) + miller
    assert valid(mutual_information(a, y)) == pytest.approx(expected, abs=1e-9)
    # Floats with few values are categories too, and values need not be 0, 1, 2.
    assert valid(mutual_information(a / 7 - 1, 10 * y)) == pytest.approx(expected, abs=1e-9)


def test_continuous_values_are_cut_into_equal_counts_with_ties_together() -> None:
    a, y = np.random.default_rng(0).normal(size=100), np.arange(100) % 3
    rank = np.argsort(np.argsort(a))
    assert mutual_information(a, y, 5) == mutual_information(rank // 20, y)
    assert mutual_information(np.exp(a), y, 5) == mutual_information(a, y, 5)
    # More than half are exactly 0, as activations after a threshold: one bin for them.
    sparse = np.maximum(a - np.quantile(a, 0.6), 0)
    by_hand = np.where(sparse == 0, 0, 1 + (rank - 60) // 20)
    assert mutual_information(sparse, y, 5) == mutual_information(by_hand, y)


def test_information_interval_covers_the_truth() -> None:
    # y is a with probability 0.8, else another of 4: H(y) - H(y | a) in closed form.
    truth = math.log(4) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2 / 3)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        a = rng.integers(0, 4, 300)
        y = np.where(rng.random(300) < 0.8, a, (a + rng.integers(1, 4, 300)) % 4)
        covered += covers(mutual_information(a, y), truth)
    assert covered >= 88


def test_information_about_what_cannot_be_is_said() -> None:
    y = np.arange(10) % 2
    for a, labels in [(np.ones(10), y), (y, np.zeros(10, int))]:
        assert mutual_information(a, labels) == Estimate(None, note="one value only")
    with pytest.raises(ValueError, match="integer labels"):
        mutual_information(y, y + 0.5)
    with pytest.raises(ValueError, match="equal length"):
        mutual_information(y, y[1:])
    with pytest.raises(ValueError, match="finite"):
        mutual_information(np.where(y == 0, math.nan, 1.0), y)
