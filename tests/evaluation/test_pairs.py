"""Pairs of patches: planted information, no effect, brute force, and what is not there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparsejepa.evaluation.pairs import pair_information, pair_sharing

RNG = np.random.default_rng


def scene(n: int, seed: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """6x6 patches, the left and right half an object each with a common part in its tokens."""
    rng = RNG(seed)
    objects = np.broadcast_to(np.where(np.arange(36) % 6 < 3, 1, 2), (n, 36))
    common = rng.normal(size=(n, 2, 4))
    own = rng.normal(size=(n, 36, 4))
    tokens = strength * common[:, objects[0] - 1] + np.sqrt(1 - strength**2) * own
    return tokens + 5 * np.arange(36)[:, None], objects  # place shifts every token


def test_pairs_within_an_object_share_the_information_that_was_planted():
    tokens, objects = scene(400, 0, 0.7)
    found = pair_information(tokens, objects, (6, 6))
    truth = 4 * -0.5 * np.log(1 - 0.7**4)  # correlation 0.49 in each of four dimensions
    within, across = found["within"], found["across"]
    assert within.value == pytest.approx(truth, rel=0.05)
    assert within.low is not None and within.high is not None
    assert within.low < truth < within.high
    assert across.value == pytest.approx(0, abs=0.01)
    gap = found["gap"]
    assert gap.low is not None and gap.low > 0.4
    shared = {k: e.value for k, e in pair_sharing(objects, objects, (6, 6)).items()}
    assert shared["within"] == shared["chance"] == 1  # the place says it all
    assert shared["across"] == 0 and shared["gap"] == 1


def test_pairs_without_an_effect_show_none():
    tokens, objects = scene(200, 1, 0.0)
    groups = RNG(2).integers(0, 4, objects.shape)
    found = pair_sharing(objects, groups, (6, 6))
    for estimate in (pair_information(tokens, objects, (6, 6))["gap"], found["gap"]):
        assert estimate.low is not None and estimate.high is not None
        assert estimate.low < 0 < estimate.high
    assert found["chance"].value == pytest.approx(0.25, abs=0.01)
    assert found["within"].value == pytest.approx(0.25, abs=0.02)


def test_share_of_pairs_is_a_weighted_mean_over_offsets_by_brute_force():
    rng = RNG(3)
    objects, groups = rng.integers(0, 3, (2, 30, 12))
    found = pair_sharing(objects, groups, (3, 4), least=1)
    places = [divmod(p, 4) for p in range(12)]
    pairs: dict[tuple[int, int], dict[bool, list[bool]]] = {}
    for i, (p, q) in itertools.product(range(30), itertools.combinations(range(12), 2)):
        offset = (places[q][0] - places[p][0], places[q][1] - places[p][1])
        if max(map(abs, offset)) <= 2 and objects[i, p] and objects[i, q]:
            kinds = pairs.setdefault(offset, {True: [], False: []})
            kinds[objects[i, p] == objects[i, q]].append(groups[i, p] == groups[i, q])
    weights = [min(len(k[True]), len(k[False])) for k in pairs.values()]
    for name, same in (("within", True), ("across", False)):
        means = [np.mean(kinds[same]) for kinds in pairs.values()]
        assert found[name].value == pytest.approx(np.average(means, weights=weights))


def test_pairs_that_are_not_there_leave_all_undefined():
    tokens, objects = scene(10, 0, 0.5)
    nothing = np.zeros_like(objects)
    for found in (
        pair_information(tokens, nothing, (6, 6)),
        pair_sharing(nothing, objects, (6, 6)),
    ):
        assert {"within", "across", "gap"} <= set(found)
        assert all(e.value is None and e.note for e in found.values())
    for grid in ((5, 6), (6, 5)):
        with pytest.raises(ValueError, match="grid"):
            pair_information(tokens, objects, grid)
        with pytest.raises(ValueError, match="grid"):
            pair_sharing(objects, objects, grid)
    with pytest.raises(ValueError, match="do not fit"):
        pair_information(tokens, objects[:, :4], (6, 6))
    with pytest.raises(ValueError, match="do not fit"):
        pair_sharing(objects, objects[:, :4], (6, 6))
