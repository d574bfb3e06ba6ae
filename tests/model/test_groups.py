"""Exact prox, isolation of the groups, cells and the density controller, against oracles."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejepa.config import preset
from sparsejepa.encoders.encoder import save_groups
from sparsejepa.errors import UserError
from sparsejepa.model.groups import (
    LAM_UNIT,
    TRAVEL,
    DensityController,
    GroupMap,
    largest,
    partition_cells,
    prox_group_lasso,
    prox_sphere,
    ramp,
    random_pattern,
)
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.model.vit import sincos_position_embedding
from sparsejepa.study import pretrain
from sparsejepa.study.results import Probes, Task
from sparsejepa.study.runs import run_tasks
from sparsejepa.training.build import build_model
from sparsejepa.training.loop import plan

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
    model.steered_step(0.1, 0.0, 0.0, "freeze", DensityController(1), (D + 1) / (G * D))
    kept = model.block_norms() > 0
    assert kept[0].all() and kept[2, 5] and kept.sum() == D + 1


def test_the_step_reads_nothing_on_the_host():
    """On the meta device every read of a value (.item(), bool(), nonzero) raises."""
    for sphere in (True, False):
        model = GroupMap("region", D, GRID, G, P, sphere=sphere, hidden=4).to("meta")
        controller = DensityController(100).to("meta")
        model.W.grad = torch.zeros_like(model.W)
        controller.step((model.block_norms() > 0).float().mean(), 0.5)
        model.proximal_step(0.1, controller.lam, momentum=0.9)
        model.steered_step(0.1, 0.0, 0.9, "freeze", controller, 0.5)


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


# ---------------------------------------------------------------- prox


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


# ---------------------------------------------------------------- controls with random zeros


def model_of(**settings: object) -> SparseJEPA:
    config = preset("nano").replace(
        **{"patch_size": 8, "num_groups": 8, "density": 0.3, "pattern": "random", **settings}
    )
    return build_model(config, (32, 32), 20)


def kept(model: SparseJEPA) -> torch.Tensor:
    assert model.groups is not None
    return model.groups.block_norms() > 0


@given(st.integers(1, 12), st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 9))
def test_counts_are_exact_and_as_equal_as_can_be(
    groups: int, latents: int, density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    pattern = random_pattern(groups, latents, density)
    per_latent, per_group = pattern.sum(0), pattern.sum(1)
    assert int(pattern.sum()) == max(latents, round(density * groups * latents))
    assert per_latent.min() >= 1 and per_latent.max() - per_latent.min() <= 1
    assert per_group.max() - per_group.min() <= 1
    other = random_pattern(groups, latents, 1.0, like=pattern)
    assert torch.equal(other.sum(0), per_latent) and torch.equal(other.sum(1), per_group)


def test_with_given_counts_all_patterns_are_equally_likely() -> None:
    like = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()
    torch.manual_seed(0)
    found = [tuple(random_pattern(3, 3, 1.0, like).int().argmax(0).tolist()) for _ in range(1200)]
    counts = [found.count(one) for one in set(found)]
    assert len(counts) == 6 and max(abs(c - 200) for c in counts) < 4 * 200**0.5


@pytest.mark.parametrize("w_form", ["sphere", "plain"])
def test_the_zeros_come_along_the_path_of_the_density_and_stay(w_form: str) -> None:
    model = model_of(w_form=w_form)
    assert model.controller is None and model.groups is not None
    images, before = torch.randn(6, 3, 32, 32), kept(model)
    for step in range(20):
        model(images, step=step).total.backward()
        model.after_step(step)
        now, wanted = kept(model), model.rates.wanted_density(step)
        assert model.rates.lam(step) == 0
        assert int(now.sum()) == round(wanted * now.numel()) and not (now & ~before).any()
        before = now
    assert int(before.sum()) == round(0.3 * 8 * 96)
    assert before.sum(1).max() - before.sum(1).min() <= 1


def test_a_runs_counts_can_be_taken_over(tmp_path) -> None:
    source = model_of(seed=3).groups
    assert source is not None
    uneven = torch.rand(8, 96) * torch.linspace(0.3, 1, 8)[:, None]
    source.proximal_step(0.0, 0.0, keep=largest(uneven, 0.5))
    save_groups(tmp_path, source)
    model = model_of(pattern=str(tmp_path), density=0.5)
    assert model.order is not None
    final, wanted = largest(model.order, 0.5), source.block_norms() > 0
    assert torch.equal(final.sum(0), wanted.sum(0)) and torch.equal(final.sum(1), wanted.sum(1))
    with pytest.raises(UserError, match=r"that run kept 0\.5; use --density 0\.5"):
        model_of(pattern=str(tmp_path), density=0.25)
    with pytest.raises(UserError, match="its map is 8 groups by 96 latents, this run's 4 by 96"):
        model_of(pattern=str(tmp_path), num_groups=4)


def test_a_pattern_that_there_is_not_is_refused_before_any_data_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> Any:
        raise AssertionError("images are loaded")

    monkeypatch.setattr("sparsejepa.data.catalog.load_images", loaded)
    run = tmp_path / "run"

    def check(message: str, pattern: str = str(run)) -> None:
        config = preset("nano").replace(density=0.5, pattern=pattern, device="cpu")
        task = Task(config, tmp_path / "new", Probes(("scenes",)))
        for work in (lambda: pretrain(config, out=tmp_path / "new"), lambda: plan(config, loaded),
                     lambda: run_tasks([task], tmp_path / "rows.jsonl")):  # fmt: skip
            with pytest.raises(UserError, match=f"^--pattern {pattern}: {message}"):
                work()

    unknown = "not learned, random or a finished run with groups"
    check(rf"{unknown} \(did you mean 'learned'\?\)$", "leanred")
    check(rf"{unknown} \(did you mean 'random'\?\)$", "randon")
    check(f"{unknown}$")
    run.mkdir()
    check(f"{unknown}$")


@given(st.floats(0.2, 1.0), st.integers(0, 10**6))
def test_the_largest_blocks_are_kept_and_one_of_every_latent(density: float, seed: int) -> None:
    norms = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed))
    kept = largest(norms, density)
    first = torch.zeros(5, 7, dtype=torch.bool).scatter(0, norms.argmax(0, keepdim=True), True)
    assert kept[first].all() and kept.sum() == max(7, round(density * 35))
    gone, others = norms[~kept], norms[kept & ~first]
    if len(gone) and len(others):
        assert others.min() >= gone.max()
