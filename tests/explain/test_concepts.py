"""What groups stand for, against brute force, scikit-learn, hand-made cases and planted truth."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from sparsejepa.evaluation.classifiers import LogisticProbe
from sparsejepa.explain import concepts
from sparsejepa.explain.concepts import (
    associations,
    correlations,
    duplicate_groups,
    group_statistics,
    match_groups,
    monosemanticity,
    row_space,
    silence_effects,
    sparsity,
)

RNG = np.random.default_rng
maps = arrays.arrays(
    np.float64,
    st.tuples(st.integers(2, 8), st.integers(1, 9)),
    elements=st.one_of(st.just(0.0), st.floats(1e-3, 1e3)),
)


# Statistics


def test_statistics_of_a_hand_made_case():
    a = np.array([[[3.0, 0, 1]], [[0, 0, 1]], [[0, 0, 1]], [[1, 0, 1]]])  # [n = 4, N = 1, G = 3]
    found = group_statistics(a)
    np.testing.assert_allclose(found.rms, [np.sqrt(2.5), 0, 1])
    np.testing.assert_allclose(found.on, [0.25, 0, 0])
    assert found.dead.tolist() == [False, True, False]


def test_statistics_in_blocks_are_those_of_all(monkeypatch: pytest.MonkeyPatch):
    a = RNG(0).gamma(1.0, size=(20, 9, 5)).astype(np.float16)
    whole = group_statistics(a)
    monkeypatch.setattr(concepts, "BLOCK", 17)
    parts = group_statistics(a)
    np.testing.assert_allclose(parts.rms, whole.rms)
    np.testing.assert_array_equal(parts.on, whole.on)
    np.testing.assert_allclose(whole.rms, np.sqrt(np.square(a.astype(float)).mean((0, 1))))
    with pytest.raises(ValueError, match="nothing"):
        group_statistics(np.zeros((0, 4, 3)))


# Monosemanticity


@given(
    arrays.arrays(np.float64, (6, 3), elements=st.one_of(st.just(0.0), st.floats(1e-3, 1e3))),
    st.integers(0, 10**6),
)
def test_monosemanticity_is_the_sum_over_pairs(a: np.ndarray, seed: int):
    e = RNG(seed).normal(size=(6, 4))
    e[seed % 6] = 0  # a row like none
    cosine = cosine_similarity(e)
    for g, value in enumerate(monosemanticity(a, e)):
        pairs = list(itertools.permutations(range(6), 2))
        weight = sum(a[n, g] * a[m, g] for n, m in pairs)
        if (a[:, g] > 0).sum() < 2:
            assert value is None
        elif value is None:  # one image outweighs all others beyond double precision
            assert weight < 1e-11 * a[:, g].max() ** 2
        elif weight > 1e-4 * a[:, g].max() ** 2:
            brute = sum(a[n, g] * a[m, g] * cosine[n, m] for n, m in pairs) / weight
            assert value == pytest.approx(brute, abs=1e-8)


def test_monosemanticity_tells_a_pure_group_from_a_mixed_one():
    y = np.repeat([0, 1], 50)
    e = np.eye(2)[y] - 0.5
    a = np.stack([y == 0, np.ones(100), np.arange(100) == 3], 1).astype(float)
    pure, mixed, single = monosemanticity(a, e)
    assert pure == pytest.approx(1) and single is None
    assert mixed == pytest.approx((49 - 50) / 99)


# Labels


def test_associations_are_scikit_learns_auc_ties_included():
    a = RNG(0).integers(0, 5, (60, 3)).astype(float)
    y = RNG(1).integers(0, 4, 60)
    found = associations(a, y, list("abcd"), permutations=20, top=None)
    for g, listed in enumerate(found):
        assert sorted(x.label for x in listed) == [0, 1, 2, 3]
        for x in listed:
            assert x.value == pytest.approx(roc_auc_score(y == x.label, a[:, g]))
            assert x.name == "abcd"[x.label]


def test_associations_find_the_planted_label_and_rarely_anything_else():
    rng = RNG(0)
    y = rng.choice(6, 400, p=[0.4, 0.3, 0.2, 0.05, 0.03, 0.02])
    a = rng.gamma(1.0, size=(400, 5))
    a[:, 2] += 2 * (y == 4)
    first = associations(a, y, "abcdef")[2][0]
    assert first.name == "e" and first.exceeds
    rare, common = (
        next(x.chance for x in associations(a, y, "abcdef", top=None)[2] if x.label == k)
        for k in (5, 0)
    )
    assert rare > common > 0.5
    runs = [associations(rng.gamma(1.0, size=(400, 5)), y, "abcdef") for _ in range(30)]
    false = [any(x.exceeds for listed in found for x in listed) for found in runs]
    assert sum(false) <= 5  # 5 % of 30 expected


def test_associations_without_a_choice_of_labels():
    a = RNG(0).normal(size=(10, 2))
    assert associations(a, np.zeros(10, int), ["only", "none"]) == [[], []]
    dead = associations(np.zeros((10, 1)), np.arange(10) % 2, ["a", "b"])[0]
    assert all(x.value == 0.5 and not x.exceeds for x in dead)
    with pytest.raises(ValueError, match="label 1"):
        associations(a, np.arange(10) % 2, ["a"])


# Likeness


def test_correlations_are_numpys():
    a, b = RNG(0).normal(size=(50, 3)), RNG(1).normal(size=(50, 4)) * 1e-5 + 3
    np.testing.assert_allclose(correlations(a, b), np.corrcoef(a.T, b.T)[:3, 3:], atol=1e-9)
    b[:, 1] = 0.1
    assert (correlations(a, b)[:, 1] == 0).all()


def test_duplicates_are_those_of_the_first():
    rng = RNG(0)
    a = rng.normal(size=(200, 5))
    a[:, 3] = 2 * a[:, 1] + 1
    a[:, 4] = a[:, 1] + 1e-3 * rng.normal(size=200)
    assert duplicate_groups(a) == [None, None, None, 1, 1]
    assert duplicate_groups(np.zeros((9, 3))) == [None] * 3


@pytest.mark.parametrize("others", [4, 6])
def test_matching_undoes_a_permutation_beside_its_chance(others: int):
    rng = RNG(0)
    a = rng.normal(size=(300, 5))
    b = np.concatenate([a[:, [3, 0, 4, 1, 2]], rng.normal(size=(300, 1))], 1)[:, :others]
    b = b + 0.3 * rng.normal(size=b.shape)
    found = match_groups(a, b)
    assert len(found.pairs) == min(5, others)
    assert all([3, 0, 4, 1, 2][j] == i for i, j in found.pairs)
    assert found.correlations.min() > 0.9 > 0.3 > found.chance_high >= found.chance
    best = max(
        sum(found.matrix[i, j] for i, j in zip(rows, columns, strict=True))
        for rows in itertools.combinations(range(5), min(5, others))
        for columns in itertools.permutations(range(others), min(5, others))
    )
    assert found.correlations.sum() == pytest.approx(best)


def test_chance_of_a_matching_in_blocks_keeps_what_place_tells():
    place = np.tile(np.eye(4), (50, 1))  # group g is the place g, in every image
    noise = RNG(0).normal(size=(2, 200, 4)) * 0.1
    alike = match_groups(place + noise[0], place + noise[1], block=4)
    assert alike.correlations.mean() == pytest.approx(alike.chance, abs=0.02)
    assert match_groups(place + noise[0], place + noise[1]).chance < 0.3
    with pytest.raises(ValueError, match="multiple"):
        match_groups(place, place, block=3)


# Silence


def test_what_a_group_sees_is_its_row_space():
    W = RNG(0).normal(size=(3, 2, 8))
    W[2] = 0
    basis = row_space(W[0])
    np.testing.assert_allclose(basis.T @ basis, np.linalg.pinv(W[0]) @ W[0], atol=1e-12)
    assert [len(row_space(w)) for w in W] == [2, 2, 0]
    assert len(row_space(np.ones((4, 8)))) == 1


def test_silencing_the_group_of_a_label_costs_more_than_chance():
    rng = RNG(0)
    x = rng.normal(size=(600, 12)).astype(np.float32)
    y = np.where(x[:, 0] + x[:, 1] > 0, "up", "down")
    W = np.zeros((3, 2, 12))
    W[0, 0, 0] = W[0, 1, 1] = W[1, 0, 5] = W[1, 1, 6] = 1
    probe = LogisticProbe(1.0).fit(x[:300], y[:300])
    vital, idle, dead = silence_effects(probe, x[300:], y[300:], W)
    assert vital.drop.value is not None and vital.drop.low is not None
    assert vital.drop.low > vital.chance_high > vital.chance > 0
    without = x[300:] * (np.arange(12) > 1)  # the first group sees two latents and no more
    lost = probe.score(x[300:], y[300:]) - probe.score(without, y[300:])
    assert vital.drop.value == pytest.approx(lost)
    assert idle.drop.value is not None and idle.drop.value < vital.drop.value / 5
    assert (idle.chance, idle.rank) == (vital.chance, 2)
    assert vital.draws.mean() == pytest.approx(vital.drop.value, abs=0.02)
    assert (dead.rank, dead.drop.value, dead.chance) == (0, 0, 0)
    with pytest.raises(ValueError, match="do not fit"):
        silence_effects(probe, x, y, W[:, :, :3])


# --- sparsity of W --------------------------------------------------------------------------------


def test_counts_of_a_small_map() -> None:
    norms = np.array([[1.0, 0, 0, 0.5], [2, 0, 3, 0], [0, 0, 0, 0]])
    found = sparsity(norms)
    assert (found["density"], found["groups_per_latent"]) == (4 / 12, 1)
    assert (found["latents_per_group_min"], found["latents_per_group_max"]) == (0, 2)
    assert found["dead_groups"] == 1
    assert found["max_usage"] == pytest.approx(13 / 14.25)


@given(maps)
def test_measures_agree_with_their_definitions(norms: np.ndarray) -> None:
    groups, latents = norms.shape
    found = sparsity(torch.from_numpy(norms).requires_grad_())
    used = [[norms[g, j] != 0 for g in range(groups)] for j in range(latents)]
    assert found["groups_per_latent"] == pytest.approx(np.mean([sum(u) for u in used]))
    assert found["density"] * groups == pytest.approx(found["groups_per_latent"])
    assert found["dead_groups"] == sum(not any(u[g] for u in used) for g in range(groups))
    columns = [c for c in norms.T if c.any()]
    hoyer = [
        (math.sqrt(groups) - c.sum() / np.linalg.norm(c)) / (math.sqrt(groups) - 1) for c in columns
    ]
    assert found["hoyer"] == pytest.approx(np.mean(hoyer) if columns else 0, abs=1e-9)
    shares = entropy(np.square(norms).sum(1)) / math.log(groups) if columns else 0
    assert found["usage_entropy"] == pytest.approx(shares, abs=1e-9)


def test_hoyer_runs_from_equal_to_one_hot_and_ignores_scale() -> None:
    assert sparsity(np.full((6, 4), 0.3))["hoyer"] == pytest.approx(0, abs=1e-12)
    assert sparsity(np.eye(6))["hoyer"] == pytest.approx(1)
    mixed = np.array([[3.0, 1], [1, 1], [0, 1]])
    scaled = np.column_stack([mixed * np.array([1e-8, 1e8]), np.zeros(3)])  # one latent unused
    assert 0 < sparsity(mixed)["hoyer"] < 1
    assert sparsity(scaled)["hoyer"] == pytest.approx(sparsity(mixed)["hoyer"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (16, 192)])
@pytest.mark.parametrize("fill", [0.0, 1e-300, 1e200])
def test_extreme_maps_give_finite_json(shape: tuple[int, int], fill: float) -> None:
    found = sparsity(np.full(shape, fill))
    assert all(type(v) in (int, float) and math.isfinite(v) for v in found.values()), found
    assert json.loads(json.dumps(found)) == found
    if fill == 0:
        assert found["density"] == found["usage_entropy"] == found["hoyer"] == 0
        assert found["dead_groups"] == shape[0]


@pytest.mark.parametrize(
    "bad", [np.ones(3), np.ones((2, 0)), np.ones((2, 2, 2)), -np.ones((2, 2)), [[math.nan, 1]]]
)
def test_what_is_no_map_is_refused(bad) -> None:
    with pytest.raises(ValueError, match="block norms"):
        sparsity(bad)
