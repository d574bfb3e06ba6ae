"""Sparsity measures against hand-made maps, brute-force definitions and their known properties."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import entropy

from sparsejepa.evaluation import sparsity

maps = arrays.arrays(
    np.float64,
    st.tuples(st.integers(2, 8), st.integers(1, 9)),
    elements=st.one_of(st.just(0.0), st.floats(1e-3, 1e3)),
)
PER_LATENT = (sparsity.hoyer, sparsity.gini, sparsity.treves_rolls)


def test_counts_of_a_small_map():
    norms = np.array([[1.0, 0, 0, 0.5], [2, 0, 3, 0], [0, 0, 0, 0]])
    assert sparsity.density(norms) == 4 / 12
    assert sparsity.groups_per_latent(norms) == 1
    assert sparsity.latents_per_group(norms).tolist() == [2, 2, 0]
    assert sparsity.dead_groups(norms) == 1
    np.testing.assert_allclose(sparsity.usage(norms), np.array([1.25, 13, 0]) / 14.25)
    summary = sparsity.summary(norms)
    assert summary["w_nonzero"] == 4 and summary["w_total"] == 12
    assert summary["dead_latents"] == 1 and summary["single_group_latents"] == 0.5
    assert (summary["latents_per_group_min"], summary["latents_per_group_max"]) == (0, 2)
    assert summary["max_usage"] == pytest.approx(13 / 14.25)


@given(maps)
def test_counts_agree_with_loops(norms: np.ndarray):
    groups, latents = norms.shape
    used = [[norms[g, j] != 0 for g in range(groups)] for j in range(latents)]
    assert sparsity.groups_per_latent(norms) == pytest.approx(np.mean([sum(u) for u in used]))
    assert sparsity.density(norms) * groups == pytest.approx(sparsity.groups_per_latent(norms))
    assert sparsity.latents_per_group(norms).sum() == sum(map(sum, used))
    assert sparsity.dead_groups(norms) == sum(not any(u[g] for u in used) for g in range(groups))


@given(maps)
def test_usage_entropy_is_scipys(norms: np.ndarray):
    got = sparsity.usage_entropy(norms)
    if norms.any():
        assert got == pytest.approx(entropy(np.square(norms).sum(1)), abs=1e-12)
        share = sparsity.usage_entropy(norms, normalized=True)
        assert share == pytest.approx(got / math.log(len(norms)))
        assert 0 <= share <= 1 + 1e-12
    else:
        assert got == 0


@given(maps)
def test_per_latent_measures_agree_with_their_definitions(norms: np.ndarray):
    groups = len(norms)
    columns = [c for c in norms.T if c.any()]
    if not columns:
        assert [measure(norms) for measure in PER_LATENT] == [0, 0, 0]
        return
    hoyer = [
        (math.sqrt(groups) - np.abs(c).sum() / np.linalg.norm(c)) / (math.sqrt(groups) - 1)
        for c in columns
    ]
    # Gini: mean absolute difference over all ordered pairs, over twice the mean.
    gini = [
        np.abs(c[:, None] - c).sum() / (2 * groups**2 * c.mean()) * groups / (groups - 1)
        for c in columns
    ]
    rolls = [(1 - c.mean() ** 2 / (c**2).mean()) / (1 - 1 / groups) for c in columns]
    assert sparsity.hoyer(norms) == pytest.approx(np.mean(hoyer), abs=1e-9)
    assert sparsity.gini(norms) == pytest.approx(np.mean(gini), abs=1e-9)
    assert sparsity.treves_rolls(norms) == pytest.approx(np.mean(rolls), abs=1e-9)


@pytest.mark.parametrize("measure", PER_LATENT)
def test_per_latent_measures_run_from_equal_to_one_hot_and_ignore_scale(measure):
    assert measure(np.full((6, 4), 0.3)) == pytest.approx(0, abs=1e-12)
    assert measure(np.eye(6)) == pytest.approx(1)
    mixed = np.array([[3.0, 1], [1, 1], [0, 1]])
    assert 0 < measure(mixed) < 1
    assert measure(mixed * np.array([1e-8, 1e8])) == pytest.approx(measure(mixed))
    padded = np.column_stack([mixed, np.zeros(3)])  # an unused latent says nothing
    assert measure(padded) == pytest.approx(measure(mixed))
    assert measure(np.array([[3.0], [1], [0]])) > measure(np.array([[2.0], [1.5], [0.5]]))


def test_usage_entropy_limits():
    assert sparsity.usage_entropy(np.ones((8, 5))) == pytest.approx(math.log(8))
    one = np.zeros((8, 5))
    one[3] = 2
    assert sparsity.usage_entropy(one) == 0
    assert sparsity.usage_entropy(np.ones((8, 5)), normalized=True) == pytest.approx(1)
    assert sparsity.usage_entropy(np.ones((1, 5)), normalized=True) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (16, 192)])
@pytest.mark.parametrize("fill", [0.0, 1e-300, 1e200])
def test_extreme_maps_give_finite_json(shape: tuple[int, int], fill: float):
    summary = sparsity.summary(np.full(shape, fill))
    assert all(type(v) in (int, float) and math.isfinite(v) for v in summary.values()), summary
    assert json.loads(json.dumps(summary)) == summary
    if fill == 0:
        assert summary["density"] == 0 and summary["dead_groups"] == shape[0]
        assert summary["usage_entropy"] == summary["hoyer"] == summary["gini"] == 0


@given(maps)
def test_torch_and_numpy_agree(norms: np.ndarray):
    tensor = torch.from_numpy(norms).requires_grad_()
    assert sparsity.summary(tensor) == sparsity.summary(norms)
    assert isinstance(sparsity.latents_per_group(tensor), np.ndarray)
    assert sparsity.density(tensor.detach().bfloat16()) == sparsity.density(norms)


@pytest.mark.parametrize(
    "bad", [np.ones(3), np.ones((2, 0)), np.ones((2, 2, 2)), -np.ones((2, 2)), [[math.nan, 1]]]
)
def test_what_is_no_map_is_refused(bad):
    with pytest.raises(ValueError, match="block norms"):
        sparsity.density(bad)
