"""The regularisers against loops, closed forms, brute force and scipy's distributions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsejepa.model.regularizers import (
    SLICES,
    Draws,
    Regularizers,
    activation_l1,
    covariance_penalty,
    rectified_laplace,
    rectified_match,
    sigreg,
    variance_hinge,
)

ALL = Regularizers(vicreg=(0.5, 0.3), sigreg=0.2, activation_l1=0.7, rectified=0.9)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def unit(dim: int, count: int, seed: int = 1) -> Tensor:
    x = normal(dim, count, seed=seed)
    return x / x.square().sum(0).sqrt()


@given(st.integers(2, 9), st.integers(1, 5), st.floats(0.05, 3), st.integers(0, 100))
def test_vicreg_is_its_formulas_in_loops(n: int, dim: int, scale: float, seed: int) -> None:
    z = normal(n, dim, seed=seed) * scale
    rows = z.tolist()
    mean = [sum(row[j] for row in rows) / n for j in range(dim)]

    def covariance(i: int, j: int) -> float:
        return sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) / (n - 1)

    hinge = sum(max(0.0, 1 - math.sqrt(covariance(j, j) + 1e-4)) for j in range(dim)) / dim
    pairs = itertools.permutations(range(dim), 2)
    off = sum(covariance(i, j) ** 2 for i, j in pairs) / dim
    assert float(variance_hinge(z)) == pytest.approx(hinge, rel=1e-9, abs=1e-12)
    assert float(covariance_penalty(z)) == pytest.approx(off, rel=1e-9, abs=1e-12)


def epps_pulley(x: np.ndarray) -> float:
    """The statistic with weight exp(-t^2/2), its integrals done by hand."""
    n, gaps = len(x), x[:, None] - x
    own = math.sqrt(2 * math.pi) * np.exp(-(gaps**2) / 2).sum() / n**2
    cross = 2 * math.sqrt(math.pi) * np.exp(-(x**2) / 4).sum() / n
    return n * (own - cross + math.sqrt(2 * math.pi / 3))


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0])
def test_sigreg_is_the_closed_form_over_all_directions(scale: float) -> None:
    z, directions = normal(60, 7) * scale + 0.3, unit(7, 20)
    wanted = np.mean([epps_pulley(x) for x in (z @ directions).T.numpy()])
    assert float(sigreg(z, directions)) == pytest.approx(wanted, rel=1e-3)


def test_sigreg_of_gaussian_samples_has_its_known_mean_and_others_have_more() -> None:
    directions = unit(4, 64)
    gaussian = [float(sigreg(normal(200, 4, seed=s), directions)) for s in range(60)]
    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    error = np.std(gaussian) / math.sqrt(len(gaussian))
    assert abs(np.mean(gaussian) - expected) < 4 * error
    axes = torch.eye(4, dtype=torch.float64)
    x = normal(2000, 4)
    uniform = 2 * math.sqrt(3) * (torch.special.ndtr(x) - 0.5)  # variance 1 as well
    bimodal = x.sign() * 0.95 + 0.3 * normal(2000, 4, seed=5)
    collapsed = torch.zeros(2000, 4, dtype=torch.float64)
    values = [float(sigreg(z, axes)) for z in (x, uniform, bimodal, collapsed)]
    assert values == sorted(values)
    assert values[0] < 3 and values[1] > 5


def test_activation_l1_is_the_mean_size_of_standardised_values() -> None:
    z = normal(50, 3) * torch.tensor([0.5, 2.0, 30.0]) + 4
    x = z.numpy()
    wanted = np.abs((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)).mean()
    assert float(activation_l1(z)) == pytest.approx(wanted, rel=1e-9)
    assert float(activation_l1(normal(20_000, 3))) == pytest.approx(math.sqrt(2 / math.pi), 0.01)
    one = torch.zeros(1000, 1, dtype=torch.float64)
    one[7] = 1.0
    assert float(activation_l1(one)) == pytest.approx(2 / math.sqrt(1000), rel=0.05)


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.8])
def test_the_rectified_laplace_has_its_share_and_shape(share: float) -> None:
    draws = Regularizers(rectified=1.0).draw(torch.zeros(20_000, 1), 4, seed=0, step=0).laplace
    assert draws is not None
    x = rectified_laplace(draws, share).numpy().ravel()
    assert (x >= 0).all()
    assert (x > 0).mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(x)))
    scale = 1 / math.sqrt(2)  # variance 1 before it is rectified
    law = scipy.stats.laplace(scipy.stats.laplace(0, scale).ppf(share), scale)
    truncated = (law.cdf(np.sort(x[x > 0])) - law.cdf(0)) / law.sf(0)
    assert scipy.stats.kstest(truncated, "uniform").pvalue > 1e-3


@given(st.integers(1, 6), st.integers(0, 1000))
def test_rectified_match_is_the_cheapest_assignment(n: int, seed: int) -> None:
    z, wanted = normal(n, 3, seed=seed), normal(n, 3, seed=seed + 1).abs()
    directions = unit(3, 4, seed=seed)
    ours, theirs = (z.clamp_min(0) @ directions).T.tolist(), (wanted @ directions).T.tolist()
    costs = [
        min(sum((a - b) ** 2 for a, b in zip(x, order, strict=True)) / n
            for order in itertools.permutations(y))
        for x, y in zip(ours, theirs, strict=True)
    ]  # fmt: skip
    got = float(rectified_match(z, wanted, directions))
    assert got == pytest.approx(np.mean(costs), rel=1e-9, abs=1e-12)


def test_rectified_match_is_near_zero_for_the_distribution_it_asks_for() -> None:
    regularizer = Regularizers(rectified=1.0)
    first, other = (regularizer.draw(torch.zeros(5000, 1), 6, seed=s, step=0) for s in (0, 1))
    assert first.laplace is not None and other.laplace is not None
    assert first.directions is not None
    wanted = rectified_laplace(first.laplace, 0.25)
    like = rectified_laplace(other.laplace, 0.25)
    near = float(rectified_match(like, wanted, first.directions))
    dense = float(rectified_match(like + 0.2, wanted, first.directions))
    assert near < 0.005 and dense > 5 * near


def test_the_sum_is_weighted_and_a_weight_of_zero_leaves_its_term_out() -> None:
    z = normal(16, 5).float()
    draws = ALL.draw(z, 5, seed=3, step=4)
    assert draws.directions is not None and draws.laplace is not None
    wanted = rectified_laplace(draws.laplace, 0.25)
    expected = (
        0.5 * variance_hinge(z)
        + 0.3 * covariance_penalty(z)
        + 0.2 * sigreg(z, draws.directions)
        + 0.7 * activation_l1(z)
        + 0.9 * rectified_match(z, wanted, draws.directions)
    )
    torch.testing.assert_close(ALL(z, draws), expected)
    nothing = Regularizers()
    assert nothing.draw(z, 5, seed=0, step=0) == Draws(None, None)
    assert nothing(z, Draws(None, None)) is None
    assert Regularizers(vicreg=(1.0, 0.0)).draw(z, 5, seed=0, step=0) == Draws(None, None)
    only = Regularizers(sigreg=1.0).draw(z, 5, seed=0, step=0)
    assert only.directions is not None and only.laplace is None


def test_draws_are_unit_directions_keyed_on_seed_and_step() -> None:
    like = torch.zeros(8, 1)

    def drawn(seed: int, step: int) -> Tensor:
        directions, laplace = ALL.draw(like, 6, seed=seed, step=step)
        assert directions is not None and laplace is not None
        assert directions.shape == (6, SLICES) and laplace.shape == (8, 6)
        torch.testing.assert_close(directions.norm(dim=0), torch.ones(SLICES))
        return torch.cat([directions.flatten(), laplace.flatten()])

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert not torch.equal(drawn(1, 2), drawn(1, 3))
    assert not torch.equal(drawn(1, 2), drawn(2, 2))


@pytest.mark.parametrize("kind", ["spread", "collapsed", "far"])
def test_gradients_are_finite_and_autocast_changes_nothing(kind: str) -> None:
    z = normal(12, 5).float() * {"spread": 1.0, "collapsed": 0.0, "far": 1e3}[kind]
    draws = ALL.draw(z, 5, seed=0, step=0)
    values, gradients = [], []
    for autocast in (False, True):
        x = z.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = ALL(x, draws)
        assert value is not None and value.dtype == torch.float32
        value.backward()
        assert x.grad is not None and x.grad.isfinite().all()
        values.append(value)
        gradients.append(x.grad)
    assert torch.equal(*values) and torch.equal(*gradients)
