"""The proximal operators against brute force, numeric optimisation and optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejepa.model.groups import prox_group_lasso, prox_sphere


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def objective(X: torch.Tensor, W: torch.Tensor, t: float) -> torch.Tensor:
    """1/2 ||X - W||^2 + t sum_g ||X_g||, for [..., G, P]."""
    return 0.5 * (X - W).square().sum((-2, -1)) + t * X.norm(dim=-1).sum(-1)


@settings(max_examples=60)
@given(
    groups=st.integers(1, 6),
    width=st.integers(1, 4),
    t=st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0, 3.0]),
    seed=st.integers(0, 10_000),
)
def test_no_point_on_the_sphere_beats_prox_sphere(groups: int, width: int, t: float, seed: int):
    W = normal(groups, width, seed=seed, dtype=torch.float64)
    best = prox_sphere(W[..., None], t)[..., 0]
    assert best.norm().item() == pytest.approx(1, abs=1e-12)
    anywhere = normal(1000, groups, width, seed=seed + 1, dtype=torch.float64)
    sparse = anywhere * (normal(1000, groups, 1, seed=seed + 2) > 0)
    sparse = sparse[sparse.flatten(1).norm(dim=1) > 0]
    one_hot = torch.eye(groups, dtype=torch.float64)[:, :, None] * W
    near = best + torch.logspace(-6, -0.5, 500, dtype=torch.float64)[:, None, None] * anywhere[:500]
    directed = W * anywhere[:, :, :1].abs()  # the right directions, any block norms
    rivals = torch.cat([anywhere, sparse, one_hot, near, directed])
    rivals = rivals / rivals.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)
    rivals = rivals[rivals.flatten(1).norm(dim=1) > 0.5]
    assert (objective(rivals, W, t) >= objective(best, W, t) - 1e-12).all()


def test_prox_sphere_at_the_threshold():
    def norms(v: list[float], t: float) -> list[float]:
        W = torch.tensor(v, dtype=torch.float64)[:, None, None]
        return prox_sphere(W, t).norm(dim=1)[:, 0].tolist()

    assert norms([0.5, 0.25, 0.125], 0.125) == pytest.approx([0.375, 0.125, 0] / np.sqrt(0.15625))
    assert norms([0.5, 0.25, 0.25], 0.25) == [1, 0, 0]
    assert norms([0.5, 0.5], 0.5) == [1, 0]  # nothing exceeds t: the first of the largest
    assert norms([0.25, 0.5, 0.5], 0.75) == [0, 1, 0]
    assert norms([0.5, 0.5, 0.5, 0.5], 0.25) == [0.5] * 4  # equal blocks are a fixed point
    assert norms([0.5 + 1e-15, 0.5, 0.1], 0.5) == [1, 0, 0]  # just above: no underflow
    assert norms([1e-20, 3e-20], 0.0) == pytest.approx([10**-0.5, 3 * 10**-0.5])


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), t=st.floats(0, 2), dead=st.integers(0, 63))
def test_prox_sphere_keeps_directions_order_and_zero_blocks(seed: int, t: float, dead: int):
    W = normal(6, 3, 20, seed=seed)
    gone = torch.tensor([bool(dead >> g & 1) for g in range(6)])
    W[gone] = 0
    X = prox_sphere(W, torch.tensor(t))
    r, v = X.norm(dim=1), W.norm(dim=1)
    torch.testing.assert_close(r.square().sum(0), torch.ones(20))
    if gone.all():  # no direction is given: any unit vector in one group is a minimiser
        assert ((r > 0).sum(0) == 1).all()
        return
    assert (r[gone] == 0).all()
    torch.testing.assert_close(X * v[:, None], W * r[:, None], rtol=1e-5, atol=1e-6)
    assert (r[v <= t].max() if (v <= t).any() and (v > t).any(0).all() else 0) == 0
    order = v.argsort(0)
    assert (r.gather(0, order).diff(dim=0) >= -1e-6).all()


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), t=st.floats(0, 3))
def test_plain_prox_satisfies_the_optimality_condition(seed: int, t: float):
    W = normal(5, 3, 8, seed=seed, dtype=torch.float64)
    W[0, :, 0] = 0
    X = prox_group_lasso(W, t)
    v, r = W.norm(dim=1), X.norm(dim=1)
    torch.testing.assert_close(r, (v - t).clamp_min(0))  # the closed form
    # 0 is in X - W + t * subdifferential of ||X||: the residual is t X/||X||, or no longer than t.
    residual = W - X
    alive = r > 0
    unit = X / torch.where(alive, r, 1.0)[:, None]
    torch.testing.assert_close(torch.where(alive[:, None], residual, 0.0), t * unit)
    assert (residual.norm(dim=1)[~alive] <= t + 1e-12).all()
    assert X.isfinite().all() and (X[0, :, 0] == 0).all()
