"""Loss terms against torch.distributions, closed forms and finite differences."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions

from sparsejepa.model.losses import (
    KLParts,
    RunningMoments,
    aggregate_kl,
    posterior_kl,
    prediction_loss,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a mean and a well-conditioned covariance with correlations, float64."""
    mix = normal(dim, dim, seed=seed) / math.sqrt(dim)
    scale = torch.exp(0.5 * normal(dim, seed=seed + 1))
    cov = (mix @ mix.T + 0.1 * torch.eye(dim)) * scale[:, None] * scale
    return normal(dim, seed=seed + 2), cov


def exact(mu: torch.Tensor, cov: torch.Tensor) -> KLParts:
    return aggregate_kl(mu, cov, jitter=0, variance_floor=0)


def total(parts: KLParts) -> torch.Tensor:
    return parts.marginal + parts.total_correlation


# ---------------------------------------------------------------- aggregate KL


@settings(max_examples=40)
@given(dim=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_marginals_and_total_correlation_add_up_to_the_divergence(dim: int, seed: int):
    mu, cov = gaussian(dim, seed)
    parts = exact(mu, cov)
    standard = distributions.MultivariateNormal(torch.zeros_like(mu), torch.eye(dim).double())
    whole = distributions.kl_divergence(distributions.MultivariateNormal(mu, cov), standard)
    assert (total(parts) * dim).item() == pytest.approx(whole.item(), rel=1e-9, abs=1e-9)
    one = distributions.Normal(torch.zeros(1).double(), 1.0)
    each = distributions.kl_divergence(distributions.Normal(mu, cov.diagonal().sqrt()), one)
    assert (parts.marginal * dim).item() == pytest.approx(each.sum().item(), rel=1e-9, abs=1e-9)
    tc = 0.5 * (cov.diagonal().log().sum() - torch.linalg.slogdet(cov)[1])
    assert (parts.total_correlation * dim).item() == pytest.approx(tc.item(), rel=1e-9, abs=1e-9)
    assert parts.total_correlation > -1e-12 and parts.marginal > -1e-12


@pytest.mark.parametrize("jitter", [0.0, 1e-4])
@pytest.mark.parametrize("part", [0, 1])
def test_aggregate_kl_gradients(jitter: float, part: int):
    x = (normal(20, 5) @ normal(5, 5, seed=1) + 0.5).requires_grad_()

    def value(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(0)
        return aggregate_kl(x.mean(0), centred.T @ centred / len(x), jitter=jitter)[part]

    assert torch.autograd.gradcheck(value, (x,))


@pytest.mark.parametrize("dim,samples", [(96, 16), (192, 128), (192, 768), (384, 64)])
@pytest.mark.parametrize("shape", ["white", "rank 3", "decaying", "constant", "huge", "dead"])
def test_aggregate_kl_is_finite_for_singular_input_and_near_its_float64_value(
    dim: int, samples: int, shape: str
):
    x = normal(samples, dim, seed=dim)
    x = {
        "white": x,
        "rank 3": x[:, :3] @ normal(3, dim, seed=1) * 3,
        "decaying": x * torch.logspace(0, -4, dim) @ torch.linalg.qr(normal(dim, dim, seed=2)).Q,
        "constant": torch.ones_like(x) * 2,
        "huge": x * 1e3 + 1e4 * normal(samples, 1, seed=3),
        "dead": x * (torch.arange(dim) % 2),
    }[shape]
    x32 = x.float().requires_grad_()
    parts = aggregate_kl(*RunningMoments(dim)(x32))
    gradient = torch.autograd.grad(total(parts), x32)[0]
    assert gradient.isfinite().all()
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts)
    for part, want in zip(parts, aggregate_kl(*RunningMoments(dim)(x)), strict=True):
        assert part.item() == pytest.approx(want.item(), rel=1e-3, abs=2e-3)


# ---------------------------------------------------------------- running moments


def test_a_large_batch_is_used_alone():
    x = normal(40, 10)
    moments = RunningMoments(10)
    moments(normal(8, 10, seed=1))
    before = copy.deepcopy(moments.state_dict())
    mean, cov = moments(x)
    np.testing.assert_allclose(mean, x.numpy().mean(0), atol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.numpy().T, bias=True), atol=1e-12)
    assert all(torch.equal(before[k], v) for k, v in moments.state_dict().items())


@pytest.mark.parametrize("size", [1, 6, 39])
def test_small_batches_are_a_weighted_sample_of_all_that_was_seen(size: int):
    """Oracle: one weighted mean and covariance, a batch k steps old having weight (1 - m)^k."""
    batches = [normal(size, 10, seed=s) * (1 + s) + s for s in range(7)]
    moments = RunningMoments(10).double()
    mean, cov = torch.zeros(0), torch.zeros(0)
    for x in batches:
        mean, cov = moments(x)
    momentum = size / 40
    age = np.repeat(np.arange(7)[::-1], size)
    weights = (1 - momentum) ** age
    samples = torch.cat(batches).numpy()
    np.testing.assert_allclose(mean, np.average(samples, axis=0, weights=weights), rtol=1e-9)
    want = np.cov(samples.T, aweights=weights, bias=True)
    np.testing.assert_allclose(cov, want, rtol=1e-8, atol=1e-9)


def test_small_batches_keep_their_own_gradient():
    moments = RunningMoments(10).double()
    moments(normal(8, 10, seed=1))
    x = normal(8, 10, seed=2).requires_grad_()
    mean, cov = moments(x)
    probe_mean, probe_cov = normal(10, seed=3), normal(10, 10, seed=4)
    got = torch.autograd.grad((mean * probe_mean).sum() + (cov * probe_cov).sum(), x)[0]
    centred = x - x.mean(0)
    own = (x.mean(0) * probe_mean).sum() + (centred.T @ centred / 8 * probe_cov).sum()
    torch.testing.assert_close(got, torch.autograd.grad(own, x)[0])


# ---------------------------------------------------------------- posterior KL and prediction


@settings(max_examples=30)
@given(samples=st.integers(1, 9), dim=st.integers(1, 9), seed=st.integers(0, 1000))
def test_posterior_kl_is_the_divergence_of_diagonal_gaussians(samples: int, dim: int, seed: int):
    mu, logvar = normal(samples, dim, seed=seed), normal(samples, dim, seed=seed + 1)
    each = distributions.kl_divergence(
        distributions.Normal(mu, (0.5 * logvar).exp()),
        distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu)),
    )
    want = each.sum(1).mean() / dim
    assert posterior_kl(mu, logvar).item() == pytest.approx(want.item(), rel=1e-12)


def test_prediction_losses_are_their_formulas():
    a, b = normal(3, 5, 4) * 2, normal(3, 5, 4, seed=1)
    error = (a - b).abs()
    smooth = torch.where(error < 1, 0.5 * error.square(), error - 0.5)
    assert prediction_loss(a, b).item() == pytest.approx(smooth.mean().item())
    assert prediction_loss(a, b, "l2").item() == pytest.approx(error.square().mean().item())
