"""What groups stand for, against scikit-learn, NumPy, hand-made cases and planted truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sparsejepa.evaluation.classifiers import LogisticProbe
from sparsejepa.explain.concepts import associations, match_groups, row_space, silence_effects

RNG = np.random.default_rng


def test_associations_are_scikit_learns_auc_ties_included():
    a = RNG(0).integers(0, 5, (60, 3)).astype(float)
    y = RNG(1).integers(0, 4, 60)
    found = associations(a, y, list("abcd"), permutations=20)
    for g, listed in enumerate(found):
        assert sorted(name for name, _, _ in listed) == list("abcd")
        for name, value, _ in listed:
            assert value == pytest.approx(roc_auc_score(y == "abcd".index(name), a[:, g]))


def test_associations_find_the_planted_label_and_rarely_anything_else():
    rng = RNG(0)
    y = rng.choice(6, 400, p=[0.4, 0.3, 0.2, 0.05, 0.03, 0.02])
    a = rng.gamma(1.0, size=(400, 5))
    a[:, 2] += 2 * (y == 4)
    listed = associations(a, y, "abcdef")[2]
    name, value, chance = listed[0]
    assert name == "e" and value > chance
    levels = {name: chance for name, _, chance in listed}
    assert levels["f"] > levels["a"] > 0.5  # a rare label and a common one
    runs = [associations(rng.gamma(1.0, size=(400, 5)), y, "abcdef") for _ in range(30)]
    false = [any(value > c for listed in found for _, value, c in listed) for found in runs]
    assert sum(false) <= 5  # 5 % of 30 expected


def test_associations_without_a_choice_of_labels():
    a = RNG(0).normal(size=(10, 2))
    assert associations(a, np.zeros(10, int), ["only", "none"]) == [[], []]
    dead = associations(np.zeros((10, 1)), np.arange(10) % 2, ["a", "b"])[0]
    assert all(value == 0.5 <= chance for _, value, chance in dead)


@pytest.mark.parametrize("others", [4, 6])
def test_matching_undoes_a_permutation_beside_its_chance(others: int):
    rng = RNG(0)
    a = rng.normal(size=(300, 5))
    b = np.concatenate([a[:, [3, 0, 4, 1, 2]], rng.normal(size=(300, 1))], 1)[:, :others]
    b = b + 0.3 * rng.normal(size=b.shape)
    found = match_groups(a[:, None], b[:, None])
    np.testing.assert_allclose(found.matrix, np.corrcoef(a.T, b.T)[:5, 5:], atol=1e-9)
    assert len(found.pairs) == min(5, others)
    assert all([3, 0, 4, 1, 2][j] == i for i, j in found.pairs)
    assert found.correlations.min() > 0.9 > 0.3 > found.chance_high >= found.chance
    best = max(
        sum(found.matrix[i, j] for i, j in zip(rows, columns, strict=True))
        for rows in itertools.combinations(range(5), min(5, others))
        for columns in itertools.permutations(range(others), min(5, others))
    )
    assert found.correlations.sum() == pytest.approx(best)


def test_chance_of_a_matching_keeps_what_place_tells():
    place = np.tile(np.eye(4), (50, 1, 1))  # group g is the place g, in every image
    noise = RNG(0).normal(size=(2, 50, 4, 4)) * 0.1
    alike = match_groups(place + noise[0], place + noise[1])
    assert alike.correlations.mean() == pytest.approx(alike.chance, abs=0.02)
    assert alike.chance > 0.5
    assert alike.chance_high >= alike.chance
    assert (match_groups(np.full((9, 1, 2), 0.1), RNG(0).normal(size=(9, 1, 2))).matrix == 0).all()


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
    assert vital.drop.low > vital.chance > 0
    without = x[300:] * (np.arange(12) > 1)  # the first group sees two latents and no more
    lost = probe.score(x[300:], y[300:]) - probe.score(without, y[300:])
    assert vital.drop.value == pytest.approx(lost)
    assert idle.drop.value is not None and idle.drop.value < vital.drop.value / 5
    assert (idle.chance, idle.rank) == (vital.chance, 2)
    assert vital.draws.mean() == pytest.approx(vital.drop.value, abs=0.02)
    assert (dead.rank, dead.drop.value, dead.chance) == (0, 0, 0)
