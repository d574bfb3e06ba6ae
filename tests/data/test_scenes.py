"""The built-in images: bijection, determinism, occlusion by brute force, a count well hidden."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path
from scipy.ndimage import laplace
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sparsejepa.data import scenes
from sparsejepa.data.scenes import (
    SHAPES,
    Pictures,
    Pixels,
    Scenes,
    Shapes,
    SingleObjects,
    occlude,
    outline,
    outlines,
    paint,
    rasterise,
)

SINGLE = SingleObjects()
REACH = outlines().reach


@pytest.fixture(scope="module")
def batch() -> Pictures:
    """Return 8,000 scenes at 32 pixels."""
    return Scenes(seed=0).render(np.arange(8000), 32)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


# Random numbers


def test_the_hash_is_splitmix64():
    # The first outputs of SplitMix64 seeded with 0, as published with the reference code.
    states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert scenes._mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


# Single objects


def index_of(factors: np.ndarray) -> Any:
    return np.ravel_multi_index(tuple(factors.T), SINGLE.LEVELS)


def test_every_combination_has_an_index():
    assert len(SINGLE) == math.prod(len(names) for names in SINGLE.FACTORS.values())
    index = np.arange(len(SINGLE))
    assert (index_of(SINGLE.factors(index)) == index).all()


def test_single_object_masks_have_the_area_and_the_place_of_the_factors():
    index = np.random.default_rng(0).choice(len(SINGLE), 200)
    _, _, size, _, x, y, ground = SINGLE.factors(index).T
    images, masks, *_ = SINGLE.render(index, 128)
    assert set(np.unique(masks)) == {0, 1}
    radius = np.array(SINGLE.SIZES)[size]
    assert masks.mean((1, 2)) == pytest.approx(math.pi * radius**2, rel=0.04)
    spot = (np.arange(128) + 0.5) / 128
    centre = [(masks * axis).sum((1, 2)) / masks.sum((1, 2)) for axis in (spot, spot[:, None])]
    assert centre[0] == pytest.approx(np.array(SINGLE.PLACES)[x], abs=4e-3)
    assert centre[1] == pytest.approx(np.array(SINGLE.PLACES)[y], abs=4e-3)
    colours = np.array(list(scenes.BACKGROUNDS.values()))[ground]
    changed = (images != colours[:, None, None]).any(-1)
    assert changed[masks == 1].all()
    assert (changed.sum((1, 2)) < masks.sum((1, 2)) + 10 * 128 * radius).all()


# Determinism


@pytest.mark.parametrize("side", [32, 64])
def test_an_image_does_not_depend_on_its_batch(side):
    index = np.arange(1000, 1075)
    order = np.random.default_rng(0).permutation(75)[:40]
    whole, part = (Scenes(3).render(rows, side) for rows in (index, index[order]))
    for name in ("images", "masks", "count", "factors"):
        assert (getattr(whole, name)[order] == getattr(part, name)).all()
    for name, values in vars(whole.objects).items():
        np.testing.assert_array_equal(values[order], getattr(part.objects, name))
    alone = Scenes(3).render(index[7:8], side)
    assert (alone.images[0] == whole.images[7]).all()
    alone = SINGLE.render(index[order], side).images
    assert (SINGLE.render(index, side).images[order] == alone).all()


def test_the_labels_of_an_index_never_change():
    known = [[0, 2, 0, 5], [2, 1, 5, 5], [7, 0, 2, 3], [6, 5, 2, 3], [4, 5, 6, 5]]
    assert Scenes(0).factors(np.array([0, 1, 2, 3, 10**9])).tolist() == known
    assert (Scenes(0).factors(np.arange(80)) != Scenes(1).factors(np.arange(80))).any()


# Labels and object table


def test_a_scene_has_two_shapes_and_two_colours_and_the_label_is_the_frequent_one(batch):
    objects = batch.objects
    assert (objects.present.sum(1) == batch.count).all()
    assert (np.sort(batch.count.reshape(-1, 8), 1) == np.arange(3, 11)).all()  # every eight
    for values, column in ((objects.shape, 1), (objects.colour, 2)):
        main = values == batch.factors[:, [column]]
        assert (main.sum(1) == -(-3 * batch.count // 5)).all()
        other = np.where(objects.present & ~main, values, -1)
        assert (
            np.where(other >= 0, other, other.max(1, keepdims=True)) == other.max(1)[:, None]
        ).all()
        assert (other.max(1) >= 0).all()
    assert (objects.shape[~objects.present] == -1).all()
    assert (objects.colour[~objects.present] == -1).all()
    for values in (objects.x, objects.y, objects.size, objects.angle, objects.visible):
        assert (np.isnan(values) == ~objects.present).all()


def test_scene_objects_stay_inside_the_frame(batch):
    reach = batch.objects.size * REACH[batch.objects.shape]
    for place in (batch.objects.x, batch.objects.y):
        present = batch.objects.present
        assert (place - reach)[present].min() > -1e-9
        assert (place + reach)[present].max() < 1 + 1e-9


# Occlusion


def whole_pixel_shares(batch: Pictures) -> np.ndarray:
    """Return the shares [n, 10] of an object's pixels, drawn alone, that its mask still holds."""
    side, objects = batch.masks.shape[1], batch.objects
    image, column = np.nonzero(objects.present)
    fields = (objects.x, objects.y, objects.size, objects.angle, objects.shape)
    pixels = rasterise(Shapes(image, *(v[image, column] for v in fields)), side)
    own = np.bincount(pixels.owner[pixels.cover >= 0.5])
    bins = 11 * np.arange(len(batch.masks))[:, None] + batch.masks.reshape(-1, side**2)
    seen = np.bincount(bins.ravel(), minlength=11 * len(bins)).reshape(-1, 11)
    shares = np.full(objects.present.shape, np.nan)
    shares[image, column] = seen[image, column + 1] / own
    return shares


def test_a_quarter_of_every_object_can_be_seen(batch):
    assert np.nanmin(batch.objects.visible) >= 0.25
    assert np.nanmin(whole_pixel_shares(Scenes(6).render(np.arange(3000), 32))) >= 0.25
    assert np.nanquantile(batch.objects.visible, 0.05) < 0.6  # and some of them do hide
    finer = Scenes(0).render(np.arange(800), 64)
    shares = whole_pixel_shares(finer)
    assert np.nanmin(shares) >= 0.25
    assert np.nanmax(np.abs(shares - finer.objects.visible)) < 0.1


def test_the_lattice_of_last_resort_keeps_objects_visible(monkeypatch):
    monkeypatch.setattr(Scenes, "ATTEMPTS", 0)
    crowded = Scenes(1).render(np.arange(2000), 32)
    assert np.nanmin(crowded.objects.visible) >= 0.25
    assert np.nanmin(whole_pixel_shares(crowded)) >= 0.25


def test_masks_and_visible_shares_agree_with_polygons_laid_over_each_other():
    side = 160
    scene = Scenes(5).render(np.arange(16), side)
    spot = (np.arange(side) + 0.5) / side
    grid = np.stack(np.meshgrid(spot, spot), -1).reshape(-1, 2)
    for n, objects in enumerate(scene.masks):
        mask, own = np.zeros(side**2, int), []
        for k in range(scene.count[n]):
            x, y, size, angle = (
                getattr(scene.objects, name)[n, k] for name in ("x", "y", "size", "angle")
            )
            corners = outline(SHAPES[scene.objects.shape[n, k]])
            corners = corners[:: max(1, len(corners) // 64)] * size * np.exp(1j * angle)
            inside = Path(np.stack([x + corners.real, y - corners.imag], 1)).contains_points(grid)
            mask[inside] = k + 1
            own.append(inside.sum())
            assert own[-1] / side**2 == pytest.approx(math.pi * size**2, rel=0.03)
        seen = np.bincount(mask, minlength=11)[1 : scene.count[n] + 1]
        assert (mask == objects.ravel()).mean() > 0.995
        assert seen / own == pytest.approx(scene.objects.visible[n, : scene.count[n]], abs=0.04)


# Resolution


def test_an_index_is_the_same_scene_at_every_resolution():
    index = np.arange(40)
    for coarse, fine in ((32, 64), (32, 128), (64, 128), (48, 96)):
        low, high = Scenes(4).render(index, coarse), Scenes(4).render(index, fine)
        for name, values in vars(low.objects).items():
            np.testing.assert_array_equal(values, getattr(high.objects, name))
        k = fine // coarse
        shrunk = high.images.reshape(40, coarse, k, coarse, k, 3).mean((2, 4))
        error = np.abs(shrunk - low.images)
        assert error.mean() < 2.5
        assert np.quantile(error, 0.99) < 25
        centre = high.masks[:, k // 2 :: k, k // 2 :: k]
        assert (centre == low.masks).mean() > 0.93
    small, large = (SINGLE.render(index * 997, side).images.astype(float) for side in (32, 128))
    error = np.abs(large.reshape(40, 32, 4, 32, 4, 3).mean((2, 4)) - small)
    assert error.mean() < 0.5


# The count is hidden from simple statistics


def summaries(batch: Pictures) -> np.ndarray:
    """Return visible area, mean colour and standard deviation of the colour [n, 7]."""
    area = (batch.masks > 0).mean((1, 2))[:, None]
    return np.column_stack([area, batch.images.mean((1, 2)), batch.images.std((1, 2))])


def test_area_and_colour_do_not_rank_the_count(batch):
    # One standard error is 0.011; the first column is the area, which occlusion moves a little.
    for column, limit in zip(summaries(batch).T, (0.1, *[0.045] * 6), strict=True):
        assert abs(rank_correlation(column, batch.count)) < limit


def test_linear_probes_of_statistics_and_pixels_stay_near_chance(batch):
    # Chance is 1/8; the standard error of a score on 4,000 scenes is 0.005.
    train, test = slice(0, 4000), slice(4000, 8000)
    x, count = summaries(batch), batch.count
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    assert probe.fit(x[train], count[train]).score(x[test], count[test]) < 0.15
    pixels = batch.images.reshape(8000, -1) / np.float32(255) - np.float32(0.4)
    for alpha in (100, 10_000):
        probe = RidgeClassifier(alpha=alpha).fit(pixels[train], count[train])
        assert probe.score(pixels[test], count[test]) < 0.15


def test_the_count_is_there_for_those_who_look(batch):
    assert all(
        len(np.unique(mask)) - 1 == count
        for mask, count in zip(batch.masks[:2000], batch.count, strict=False)
    )
    # Many small objects have more edges than few large ones: relative contrast of fine detail.
    grey = batch.images.mean(-1)
    detail = np.abs(laplace(grey, axes=(1, 2))).mean((1, 2)) / grey.std((1, 2))
    assert rank_correlation(detail, batch.count) > 0.4


# Drawing, against polygons filled by matplotlib and layers blended one by one

SIDE = 24


def random_shapes(n: int, each: int, seed: int) -> tuple[Shapes, np.ndarray]:
    """Return `each` objects on each of n images in layers, and their layers."""
    rng = np.random.default_rng(seed)
    layer, image = (grid.ravel() for grid in np.mgrid[:each, :n])
    x, y = rng.uniform(0.3, 0.7, (2, n * each))
    size, angle = rng.uniform(0.08, 0.18, n * each), rng.uniform(0, 2 * math.pi, n * each)
    return Shapes(image, x, y, size, angle, rng.integers(0, len(SHAPES), n * each)), layer


def dense(pixels: Pixels, values: np.ndarray, objects: int, n: int, side: int) -> np.ndarray:
    """Return the values [Q] as images [objects, n * S * S]."""
    images = np.zeros((objects, n * side * side))
    images[pixels.owner, pixels.at] = values
    return images


def test_layers_hide_each_other_as_blended_one_by_one():
    n, each = 6, 5
    shapes, layer = random_shapes(n, each, seed=1)
    pixels = rasterise(shapes, SIDE)
    shown, through = occlude(pixels, layer, n * SIDE**2)

    cover = dense(pixels, pixels.cover, n * each, n, SIDE)
    depth = dense(pixels, pixels.depth, n * each, n, SIDE)
    rng = np.random.default_rng(2)
    colours, rim = rng.uniform(0, 255, (n * each, 3)), rng.uniform(-0.4, 0.4, n * each)
    background = rng.uniform(0, 255, (n, SIDE, SIDE, 3)).astype(np.float32)
    picture, mask = background.reshape(-1, 3).astype(float), np.zeros(n * SIDE**2)
    weight = np.zeros_like(cover)
    for front in range(n * each):  # the list ascends in layers
        weight *= 1 - cover[front]
        weight[front] = cover[front]
        light = 0.82 + rim[front] * (depth[front] ** 4 - 1 / 3)
        painted = light[:, None] * colours[front]
        picture = picture * (1 - cover[front, :, None]) + painted * cover[front, :, None]
        mask[cover[front] >= 0.5] = layer[front] + 1

    assert dense(pixels, shown, n * each, n, SIDE) == pytest.approx(weight, abs=1e-5)
    assert through == pytest.approx(1 - weight.sum(0), abs=1e-5)
    images, masks = paint(shapes, layer, colours, rim, background)
    assert (masks.ravel() == mask).all()
    assert np.abs(images.reshape(-1, 3) - np.clip(picture, 0, 255)).max() < 0.6
