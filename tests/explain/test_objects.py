"""Object measures against scikit-learn, brute force over pixels, and hand-made masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import adjusted_rand_score

from sparsejepa.explain import objects
from sparsejepa.explain.objects import (
    assign_patches,
    fg_ari,
    kmeans_patches,
    mean_best_overlap,
    object_scores,
    pair_information,
    pair_sharing,
    patch_labels,
    position_blocks,
    upsample,
)

RNG = np.random.default_rng(0)
MEASURES = (fg_ari, mean_best_overlap)

sides = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted masks of one shape, some labels far apart."""
    shape = draw(sides)
    labels = st.sampled_from([0, 1, 2, 3, 300, 65_535])
    return tuple(draw(arrays.arrays(np.uint16, shape, elements=labels)) for _ in range(2))  # type: ignore[return-value]


@given(pairs())
def test_measures_are_brute_force(pair):
    true, predicted = pair
    ari, overlap = (measure(true, predicted) for measure in MEASURES)
    for i, (t, p) in enumerate(zip(true, predicted, strict=True)):
        labels, segments = np.unique(t[t > 0]), np.unique(p)
        if (t > 0).sum() < 2:
            assert np.isnan(ari[i])
        else:
            assert ari[i] == pytest.approx(adjusted_rand_score(t[t > 0], p[t > 0]), abs=1e-12)
        if not len(labels):
            assert np.isnan(overlap[i])
            continue
        iou = [[((t == a) & (p == b)).sum() / ((t == a) | (p == b)).sum() for b in segments]
               for a in labels]  # fmt: skip
        assert overlap[i] == pytest.approx(np.max(iou, 1).mean(), rel=1e-12)


def halves() -> np.ndarray:
    """One image of 4 x 6: background, then objects 1 and 2 of 4 x 2 pixels."""
    return np.repeat([[[0, 0, 1, 1, 2, 2]]], 4, 1)


def test_perfect_up_to_names():
    true, names = halves(), np.array([7, 3, 5])
    for measure in MEASURES:
        assert measure(true, names[true]) == 1


def test_one_segment_for_all():
    true, one = halves(), np.full((1, 4, 6), 9)
    assert fg_ari(true, one) == 0
    assert mean_best_overlap(true, one) == pytest.approx(8 / 24)  # each object a third of it


def test_background_counts_for_overlap_only():
    true = halves()
    spilled = np.where(true == 0, 1, true)  # segment 1 takes the background as well
    assert fg_ari(true, spilled) == 1
    assert mean_best_overlap(true, spilled) == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize(("predicted", "value"), [([5, 5, 5], 1), ([5, 5, 6], 0), ([4, 5, 6], 0)])
def test_a_single_object_is_whole_or_not(predicted: list[int], value: float):
    true = np.array([[[0, 1, 1, 1]]])
    assert fg_ari(true, np.array([[[0, *predicted]]])) == value


def test_empty_masks_are_left_out_of_the_mean():
    true = np.concatenate([halves(), np.zeros((1, 4, 6), int)])
    labels = patch_labels(true, (4, 6))
    for name, estimate in object_scores(true, labels, (4, 6)).items():
        assert estimate.value == 1 and estimate.note == "1 of 2 points not defined", name
    for estimate in object_scores(true[1:], labels[1:], (4, 6)).values():
        assert estimate.value is None and estimate.note


def test_assignment_is_the_argmax_in_units_of_the_rms():
    activations = RNG.random((5, 6, 4)) * [1, 10, 100, 0]
    rms = np.sqrt((activations**2).mean((0, 1)))
    expected = (activations[..., :3] / rms[:3]).argmax(2)
    assert (assign_patches(activations) == expected).all()
    assert (assign_patches(activations * [7, 1, 0.1, 1]) == expected).all()  # scale is no matter


def test_dead_groups_never_win():
    activations = np.zeros((1, 3, 3))
    activations[0, :, 2] = [0, 0, 1]
    assert (assign_patches(activations) == 2).all()  # the only living one, also where it is off
    assert (assign_patches(np.zeros((2, 3, 4))) == 0).all()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(5, 17), st.integers(5, 17))
def test_upsampling_takes_the_patch_of_a_pixels_centre(rows, columns, height, width):
    labels = np.arange(rows * columns)[None]
    found = upsample(labels, (rows, columns), (height, width))[0]
    for y in range(height):
        for x in range(width):
            row, column = int((y + 0.5) * rows / height), int((x + 0.5) * columns / width)
            assert found[y, x] == row * columns + column
    assert (patch_labels(found[None], (rows, columns)) == labels).all()


@given(arrays.arrays(np.uint8, (2, 6, 8), elements=st.integers(0, 3)))
def test_patch_labels_are_the_majority(masks):
    found, without = patch_labels(masks, (2, 2)), patch_labels(masks, (2, 2), background=False)
    for i in range(2):
        for k in range(4):
            y, x = 3 * (k // 2), 4 * (k % 2)
            counts = np.bincount(masks[i, y : y + 3, x : x + 4].ravel(), minlength=4)
            assert found[i, k] == counts.argmax()
            assert without[i, k] == (counts[1:].argmax() + 1 if counts[1:].any() else 0)


def test_kmeans_finds_separate_clusters():
    centres = np.eye(4) * 50
    kind = RNG.integers(0, 4, (6, 9))
    tokens = centres[kind] + RNG.normal(size=(6, 9, 4))
    found = kmeans_patches(centres[RNG.integers(0, 4, 500)] + RNG.normal(size=(500, 4)), tokens, 4)
    assert found.dtype == np.int64 and adjusted_rand_score(kind.ravel(), found.ravel()) == 1


def test_kmeans_on_a_part_of_many_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "KMEANS_POINTS", 50)
    train, tokens = RNG.normal(size=(200, 2)), RNG.normal(size=(3, 5, 2))
    first, again, other = (kmeans_patches(train, tokens, 3, seed) for seed in (1, 1, 2))
    assert first.shape == (3, 5) and set(np.unique(first)) <= {0, 1, 2}
    assert (first == again).all() and (first != other).any()


@pytest.mark.filterwarnings("error")
def test_kmeans_of_constant_tokens_is_one_cluster():
    assert (kmeans_patches(np.ones((20, 3)), np.ones((2, 4, 3)), 5) == 0).all()


def test_blocks_are_compact_and_the_same_everywhere():
    blocks = position_blocks((4, 4), 3, 4)
    assert blocks.shape == (3, 16) and (blocks == blocks[0]).all()
    sizes = np.bincount(blocks[0])
    assert len(sizes) == 4 and sizes.max() <= 6
    rows, columns = np.indices((4, 4)).reshape(2, -1)
    for block in range(4):
        inside = blocks[0] == block
        assert np.ptp(rows[inside]) <= 2 and np.ptp(columns[inside]) <= 2
    assert sorted(position_blocks((2, 2), 1, 64)[0]) == [0, 1, 2, 3]


def test_fg_ari_of_single_objects_says_nothing() -> None:
    masks = np.zeros((3, 4, 4), int)
    masks[:, :2] = 1
    masks[2, 2:] = 2  # only the last image has two objects
    everything = np.zeros((3, 4), int)
    alone = object_scores(masks[:2], everything[:2], (2, 2))["FG-ARI"]
    assert alone.value is None and alone.note
    found = object_scores(masks, everything, (2, 2))["FG-ARI"]
    assert found.value == pytest.approx(0) and "2 of 3" in found.note


# --- pairs of patches ----------------------------------------------------------------------------


def scene(n: int, seed: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """6x6 patches, the left and right half an object each with a common part in its tokens."""
    rng = np.random.default_rng(seed)
    objects = np.broadcast_to(np.where(np.arange(36) % 6 < 3, 1, 2), (n, 36))
    common = rng.normal(size=(n, 2, 4))
    own = rng.normal(size=(n, 36, 4))
    tokens = strength * common[:, objects[0] - 1] + np.sqrt(1 - strength**2) * own
    return tokens + 5 * np.arange(36)[:, None], objects  # place shifts every token


def test_pairs_within_an_object_share_the_information_that_was_planted():
    tokens, objects = scene(400, 0, 0.7)
    found = pair_information(tokens, objects, (6, 6))
    truth = 4 * -0.5 * np.log(1 - 0.7**4)  # correlation 0.49 in each of four dimensions
    within, across = found["one object"], found["two objects"]
    assert within.value == pytest.approx(truth, rel=0.05)
    assert within.low is not None and within.high is not None
    assert within.low < truth < within.high
    assert across.value == pytest.approx(0, abs=0.01)
    gap = found["gap"]
    assert gap.low is not None and gap.low > 0.4
    shared = {k: e.value for k, e in pair_sharing(objects, objects, (6, 6)).items()}
    assert shared == {"one object": 1, "two objects": 0, "gap": 1}


def test_pairs_without_an_effect_show_none():
    tokens, objects = scene(200, 1, 0.0)
    groups = np.random.default_rng(2).integers(0, 4, objects.shape)
    found = pair_sharing(objects, groups, (6, 6))
    for estimate in (pair_information(tokens, objects, (6, 6))["gap"], found["gap"]):
        assert estimate.low is not None and estimate.high is not None
        assert estimate.low < 0 < estimate.high
    assert found["one object"].value == pytest.approx(0.25, abs=0.02)


def test_share_of_pairs_is_a_weighted_mean_over_offsets_by_brute_force(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(objects, "LEAST", 1)
    rng = np.random.default_rng(3)
    owner, groups = rng.integers(0, 3, (2, 30, 12))
    found = pair_sharing(owner, groups, (3, 4))
    places = [divmod(p, 4) for p in range(12)]
    pairs: dict[tuple[int, int], dict[bool, list[bool]]] = {}
    for i, (p, q) in itertools.product(range(30), itertools.combinations(range(12), 2)):
        offset = (places[q][0] - places[p][0], places[q][1] - places[p][1])
        if max(map(abs, offset)) <= 2 and owner[i, p] and owner[i, q]:
            kinds = pairs.setdefault(offset, {True: [], False: []})
            kinds[owner[i, p] == owner[i, q]].append(groups[i, p] == groups[i, q])
    weights = [min(len(k[True]), len(k[False])) for k in pairs.values()]
    for name, same in (("one object", True), ("two objects", False)):
        means = [np.mean(kinds[same]) for kinds in pairs.values()]
        assert found[name].value == pytest.approx(np.average(means, weights=weights))


def test_pairs_that_are_not_there_leave_all_undefined():
    tokens, owner = scene(10, 0, 0.5)
    nothing = np.zeros_like(owner)
    for found in (
        pair_information(tokens, nothing, (6, 6)),
        pair_sharing(nothing, owner, (6, 6)),
    ):
        assert list(found) == ["one object", "two objects", "gap"]
        assert all(e.value is None and e.note for e in found.values())
