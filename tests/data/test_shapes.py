"""Outlines and drawing against polygons filled by matplotlib and layers blended one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.path import Path

from sparsejepa.data.shapes import (
    SHAPES,
    Pixels,
    Shapes,
    instances,
    occlude,
    outline,
    outlines,
    paint,
    rasterise,
)

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


def filled(shapes: Shapes, side: int, fine: int) -> np.ndarray:
    """Return the share of every pixel [O, S, S] inside the turned polygon, from fine**2 samples."""
    spot = (np.arange(side * fine) + 0.5) / (side * fine)
    grid = np.stack(np.meshgrid(spot, spot), -1).reshape(-1, 2)
    shares = []
    for x, y, size, angle, shape in zip(*shapes[1:], strict=True):
        corners = outline(SHAPES[shape]) * size * np.exp(1j * angle)
        path = Path(np.stack([x + corners.real, y - corners.imag], 1))
        inside = path.contains_points(grid).reshape(side, fine, side, fine)
        shares.append(inside.mean((1, 3)))
    return np.array(shares)


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_have_area_pi_around_the_origin(shape):
    corners = outline(shape)
    spot = (np.arange(600) + 0.5) / 150 - 2
    grid = np.stack(np.meshgrid(spot, spot), -1).reshape(-1, 2)
    tilted = corners * np.exp(0.3j)  # else whole rows of samples lie on one side of an edge
    inside = Path(np.stack([tilted.real, tilted.imag], 1)).contains_points(grid)
    assert inside.sum() / 150**2 == pytest.approx(math.pi, rel=2e-3)
    assert grid[inside].mean(0) == pytest.approx([0, 0], abs=2e-3)
    assert outlines().reach[SHAPES.index(shape)] == pytest.approx(np.abs(corners).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_agrees_with_a_supersampled_polygon(shape):
    shapes, _ = random_shapes(8, 1, seed=SHAPES.index(shape))
    shapes = shapes._replace(shape=np.full(8, SHAPES.index(shape)))
    pixels = rasterise(shapes, SIDE)
    cover = dense(pixels, pixels.cover, 8, 8, SIDE).reshape(8, 8, SIDE, SIDE)
    cover = cover[np.arange(8), np.arange(8)]
    truth = filled(shapes, SIDE, fine=8)
    edge = (truth > 0) & (truth < 1)
    assert np.abs(cover - truth)[edge].mean() < 0.08
    assert np.abs(cover - truth)[~edge].mean() < 2e-3
    area = math.pi * (shapes.size * SIDE) ** 2
    assert cover.sum((1, 2)) == pytest.approx(area, rel=0.08)


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
    assert (instances(pixels, layer, n, SIDE).ravel() == mask).all()
    images = paint(pixels, layer, colours, rim, background).reshape(-1, 3)
    assert np.abs(images - np.clip(picture, 0, 255)).max() < 0.6


def test_the_rim_keeps_the_mean_light_of_an_object():
    x, y, size, angle = np.array([[0.5], [0.5], [0.3], [0.2]])
    one = Shapes(np.array([0]), x, y, size, angle, np.array([0]))
    pixels, black = rasterise(one, 96), np.zeros((1, 96, 96, 3), np.float32)
    means = [
        paint(pixels, np.array([0]), np.full((1, 3), 200.0), np.array([rim]), black).mean()
        for rim in (-0.45, 0.0, 0.45)
    ]
    assert means == pytest.approx([0.82 * 200 * math.pi * 0.3**2] * 3, rel=0.03)


def test_no_objects_leave_the_background():
    empty = np.zeros(0, int)
    pixels = rasterise(Shapes(empty, empty, empty, empty, empty, empty), 8)
    ground = np.full((2, 8, 8, 3), 7, np.float32)
    assert (paint(pixels, empty, np.zeros((0, 3)), np.zeros(0), ground) == 7).all()
    assert not instances(pixels, empty, 2, 8).any()
