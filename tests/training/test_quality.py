"""Rank and spread of embeddings against numpy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejepa.training.monitor import rankme


def rankme_by_svd(x: np.ndarray) -> float:
    sigma = np.linalg.svd(x, compute_uv=False)
    p = sigma / sigma.sum()
    p = p[p > 0]
    return math.exp(-(p * np.log(p)).sum())


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 30), seed=st.integers(0, 999))
def test_rankme_is_the_entropy_of_numpys_singular_values(n: int, d: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(n, d)) * np.logspace(0, -3, d) + 0.3
    value = rankme(x)
    assert value == pytest.approx(rankme_by_svd(x), rel=1e-5)
    assert 1 - 1e-9 <= value <= min(n, d) + 1e-9


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equal_singular_values_is_the_rank(rank: int) -> None:
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(20, rank)))
    right, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, rank)))
    assert rankme(torch.from_numpy(q @ right.T)) == pytest.approx(rank, rel=1e-5)


def test_rankme_of_two_singular_values_in_closed_form() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(x) == pytest.approx(math.exp(entropy))


def test_rankme_ignores_scale_and_rotation() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.linalg.qr(x[:6]).Q
    assert rankme(1e-20 * x @ q) == pytest.approx(rankme(x), rel=1e-9)


def test_rankme_is_not_centred_and_safe_where_nothing_varies() -> None:
    assert rankme(torch.full((30, 5), 0.7)) == pytest.approx(1, abs=1e-6)
    assert rankme(torch.zeros(30, 5)) == 0
    assert math.isnan(rankme(torch.tensor([[1.0, math.nan]])))
