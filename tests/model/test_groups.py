"""Exact prox, isolation of the groups, cells and the density controller, against oracles."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejepa.errors import UserError
from sparsejepa.model.groups import (
    LAM_UNIT,
    TRAVEL,
    DensityController,
    GroupMap,
    partition_cells,
    prox_group_lasso,
    prox_sphere,
    ramp,
)
from sparsejepa.model.vit import sincos_position_embedding

KINDS = ("region", "concept", "feature")
GRID, D, G, P, B, C = (4, 4), 24, 4, 3, 5, 6


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def group_map(kind: str, *, seed: int = 0, **kwargs) -> GroupMap:
    torch.manual_seed(seed)
    model = GroupMap(kind, D, GRID, G, P, hidden=32, **kwargs)  # type: ignore[arg-type]
    with torch.no_grad():  # biases and outputs of a size that shows every path
        for name, parameter in model.networks.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if name in "Bbc" else 0.7))
    return model


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens [B, C, D], their patches [B, C] and all other patches [B, N - C]."""
    order = torch.rand(B, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return normal(B, C, D, seed=seed), order[:, :C], order[:, C:]


# ---------------------------------------------------------------- cells


@settings(max_examples=150)
@given(rows=st.integers(1, 20), cols=st.integers(1, 20), data=st.data())
def test_cells_are_rectangles_that_tile_any_grid(rows: int, cols: int, data: st.DataObject):
    groups = data.draw(st.integers(1, rows * cols))
    cells = partition_cells((rows, cols), groups).view(rows, cols)
    sizes = torch.bincount(cells.flatten(), minlength=groups)
    assert len(sizes) == groups and sizes.min() >= 1
    for g in range(groups):
        r, c = (cells == g).nonzero().T
        assert (r.max() - r.min() + 1) * (c.max() - c.min() + 1) == len(r)
    # Nearly equal: halving either side of a cell is the worst that rounding does.
    assert sizes.max() <= 4 * sizes.min()
    if rows % groups == 0 or cols % groups == 0:
        assert sizes.max() == sizes.min()


@pytest.mark.parametrize("groups", [0, 17])
def test_impossible_cells_are_refused(groups: int):
    with pytest.raises(UserError, match=r"--num-groups .* 4x4 patches"):
        partition_cells((4, 4), groups)


def test_feature_groups_must_divide_the_width():
    with pytest.raises(UserError, match="--num-groups 5 does not divide the width 24"):
        GroupMap("feature", 24, GRID, 5)


# ---------------------------------------------------------------- the map


def reference(model: GroupMap, z: torch.Tensor, context: torch.Tensor, query: torch.Tensor):
    """The prediction in float64, patch by patch and group by group, from the formulas."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    W, z = w["W"], z.double()
    net = {k.removeprefix("networks."): v for k, v in w.items() if k.startswith("networks.")}

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    out = torch.zeros(*query.shape, D, dtype=torch.float64)
    if model.kind == "region":
        pooled = z.mean(1)
        pooled = (pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + 1e-5).sqrt()
        cells = partition_cells(GRID, G)
        for b in range(B):
            for i, n in enumerate(query[b].tolist()):
                g = cells[n]
                hidden = gelu(net["A"][g] @ (W[g] @ pooled[b]) + net["b"][g] + net["position"][n])
                out[b, i] = net["B"][g] @ hidden + net["c"][g, 0]
        return out
    flat = z.flatten(0, 1)
    z = ((flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()).view_as(z)
    position = sincos_position_embedding(GRID, 32).double()
    share = D // G
    for g in range(G):
        A_key, A_value = net["A"][g].chunk(2)
        E_key, E_value, E_query, E_hidden = net["E"][g].chunk(4)
        for b in range(B):
            u, p = z[b] @ W[g].T, position[context[b]]
            key, value = u @ A_key.T + p @ E_key.T, u @ A_value.T + p @ E_value.T
            for i, n in enumerate(query[b].tolist()):
                score = key @ (net["mask_token"][g] + E_query @ position[n]) / math.sqrt(32)
                seen = score.softmax(0) @ value
                hidden = gelu(net["M"][g] @ seen + E_hidden @ position[n] + net["b"][g])
                part = net["B"][g] @ hidden + net["c"][g]
                if model.kind == "concept":
                    out[b, i] += part
                else:
                    out[b, i, g * share : (g + 1) * share] = part
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_is_the_documented_formula(kind: str):
    model, (z, context, query) = group_map(kind), batch()
    got = model(z, context, query)
    assert got.shape == (B, 10, D)
    torch.testing.assert_close(
        got.double(), reference(model, z, context, query), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_without_blocks_reaches_nothing_and_no_latent_reaches_another(kind: str):
    model, (z, context, query) = group_map(kind), batch()
    with torch.no_grad():
        model.W[:, :, 5] = 0
    z.requires_grad_()
    gradient = torch.autograd.grad(model(z, context, query).square().sum(), z)[0]
    assert (gradient[..., 5] == 0).all()
    assert (gradient.abs().sum((0, 1)) > 0).sum() == D - 1


@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_serve_evaluation_and_activations(kind: str):
    model, (z, context, query) = group_map(kind), batch()
    model.norm.momentum = None  # a plain average, so one batch is enough
    model(z, context, query)
    mean, var = model.norm.running_mean, model.norm.running_var
    assert mean is not None and var is not None
    seen = z.mean(1) if kind == "region" else z.flatten(0, 1)
    torch.testing.assert_close(mean, seen.mean(0))
    torch.testing.assert_close(var, seen.var(0))
    before = copy.deepcopy(model.state_dict())
    got = model.group_activations(z)
    latents = (z - mean) / (var + 1e-5).sqrt()
    want = torch.stack([(latents @ W.T).norm(dim=-1) for W in model.W], dim=-1)
    torch.testing.assert_close(got, want)
    model.eval()
    model(z, context, query)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_start(kind: str):
    torch.manual_seed(0)
    sphere, plain = (
        GroupMap(kind, 96, (8, 8), 16, 6, sphere=s)  # type: ignore[arg-type]
        for s in (True, False)
    )
    torch.testing.assert_close(sphere.W.square().sum((0, 1)), torch.ones(96))
    assert (sphere.block_norms() - 0.25).abs().mean() < 0.05
    # The plain form has no lower bound, so it starts where the penalty alone does not empty it.
    plain.proximal_step(TRAVEL / 8, LAM_UNIT)
    assert (plain.block_norms() > 0).float().mean() > 0.99
    # Unit variance of the hidden units' input, in both forms.
    z = torch.randn(64, 96)
    for model in (sphere, plain):
        u = torch.einsum("gpd,bd->bgp", model.W, z)
        if model is sphere:
            first = torch.einsum("ghp,bgp->bgh", model.networks.A, u)
            assert first.std().item() == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------- the step on W


@pytest.mark.parametrize("sphere", [True, False])
def test_proximal_step_is_a_step_along_the_mean_gradient_then_prox(sphere: bool):
    model = group_map("region", sphere=sphere)
    W, gradients = model.W.detach().clone(), [normal(G, P, D, seed=s) * 1e-3 for s in (4, 5)]
    for i, (gradient, momentum) in enumerate(zip(gradients, (0.0, 0.75), strict=True)):
        model.W.grad = gradient.clone()
        model.proximal_step(0.05, torch.tensor(16 * LAM_UNIT), momentum=momentum)
        mean = gradient if i == 0 else 0.75 * gradients[0] + 0.25 * gradient
        pull = -mean / mean.square().sum(1).mean().sqrt()
        W = (prox_sphere if sphere else prox_group_lasso)(W + 0.05 * pull, 0.1)
        torch.testing.assert_close(model.W.detach(), W)
        torch.testing.assert_close(model.pull().square().sum(1).mean(), torch.tensor(1.0))
    assert model.W.grad is None and model.W.requires_grad
    model.proximal_step(0.0, 1.0)  # no gradient, no way to go
    torch.testing.assert_close(model.W.detach(), W)


@pytest.mark.parametrize("sphere", [True, False])
def test_a_kept_pattern_stays_and_the_rest_moves_without_shrinkage(sphere: bool):
    model = group_map("region", sphere=sphere)
    keep = (normal(G, D, seed=1) > 0) | (torch.arange(G)[:, None] == 0)
    W, gradient = model.W.detach().clone(), normal(*model.W.shape, seed=4)
    for _ in range(2):
        model.W.grad = gradient.clone()
        model.proximal_step(0.1, 1e9, keep=keep)
        assert torch.equal(model.block_norms() > 0, keep)
        unit = gradient.square().sum(1)[keep].mean().sqrt()  # of the blocks that stay alone
        W = (W - 0.1 * gradient / unit) * keep[:, None]
        W = W / W.square().sum((0, 1)).sqrt() if sphere else W
        torch.testing.assert_close(model.W.detach(), W)


def test_the_strongest_blocks_count_what_the_data_want():
    model = group_map("region")
    with torch.no_grad():
        model.W[1:] = 0
    model.mean_gradient[2, 0, 5] = -1.0  # a zero block that the data pull at, and no other
    kept = model.strongest((D + 1) / (G * D), 0.1)
    assert kept[0].all() and kept[2, 5] and kept.sum() == D + 1


def test_the_step_reads_nothing_on_the_host():
    """On the meta device every read of a value (.item(), bool(), nonzero) raises."""
    for sphere in (True, False):
        model = GroupMap("region", D, GRID, G, P, sphere=sphere, hidden=4).to("meta")
        controller = DensityController(100).to("meta")
        model.W.grad = torch.zeros_like(model.W)
        controller.step((model.block_norms() > 0).float().mean(), 0.5)
        model.proximal_step(0.1, controller.lam, momentum=0.9)
        model.proximal_step(0.1, controller.lam, keep=model.strongest(0.5, 0.1))


# ---------------------------------------------------------------- density controller


def steered(
    target: float, steps: int, *, sphere: bool = True, noise: float = 1.0, dim: int = 24
) -> list[float]:
    """Return the density at each step of a run in which the data pull W to a fixed point.

    The pull is of lognormal strength per block; `noise` times as strong is the noise of a batch.
    """
    torch.manual_seed(0)
    model = GroupMap("region", dim, GRID, 16, 4, sphere=sphere, hidden=2)
    controller = DensityController(steps)
    goal = torch.randn_like(model.W) * torch.exp(1.5 * torch.randn(16, 1, dim))
    goal = goal / goal.square().sum((0, 1)).sqrt()
    course = []
    for i in range(steps):
        pull = goal - model.W.detach()
        size = pull.square().mean().sqrt()
        model.W.grad = -pull + noise * size * torch.randn_like(pull)
        density = (model.block_norms() > 0).float().mean()
        controller.step(density, 1 + (target - 1) * ramp(i / steps))
        window = min(i + 1, 0.2 * steps)
        model.proximal_step(4 / steps, controller.lam, momentum=1 - 1 / window)
        course.append(float(density))
    return course


@pytest.mark.parametrize("target", [1 / 16, 0.25, 0.75])
@pytest.mark.parametrize(("noise", "sphere"), [(0.0, True), (2.0, True), (1.0, False)])
def test_the_density_settles_where_it_is_wanted(target: float, noise: float, sphere: bool):
    tail = steered(target, 400, noise=noise, sphere=sphere)[300:]
    assert abs(np.mean(tail) - target) < 0.04
    assert np.std(tail) < 0.04


def test_lambda_stays_in_its_limits_and_moves_the_right_way():
    controller = DensityController(10)
    start = float(controller.lam)
    controller.step(0.9, 0.5)
    assert float(controller.lam) > start
    controller.step(torch.tensor(0.1), 0.5)
    assert float(controller.lam) < start
    for density, wanted, limit in ((1.0, 0.0, 1e4), (0.0, 1.0, 1e-8)):
        for _ in range(100):
            controller.step(density, wanted)
        assert float(controller.lam) == pytest.approx(limit, rel=1e-4)
        assert math.isfinite(float(controller.integral))
