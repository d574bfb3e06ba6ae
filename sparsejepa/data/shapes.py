"""Drawing flat shapes with smooth edges: many small objects on many images in one pass.

An object touches few pixels, so everything works on the list of (object, pixel) pairs instead of
on whole images. Edges are anti-aliased analytically: a pixel's share inside an outline follows
from the signed distance of its centre.

Letters: n images, S pixels per side, O objects in a flat list, Q (object, pixel) pairs.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

SHAPES = ("ellipse", "square", "triangle", "star", "heart", "cross")
TURN = 2048  # angles at which an outline is tabulated; a power of two


def outline(shape: str) -> np.ndarray:
    """Return a shape's corners, complex [V], counter-clockwise, with the imaginary axis upwards.

    The centroid is 0 and the area is pi: whatever the shape, an object's size is the radius of the
    disc that has its area.
    """
    turn = np.linspace(0, 2 * math.pi, 512, endpoint=False)
    quarters = 1j ** np.arange(4)
    if shape == "ellipse":
        corners = 1.4 * np.cos(turn) + 1j / 1.4 * np.sin(turn)
    elif shape == "square":
        corners = (1 + 1j) * quarters
    elif shape == "triangle":
        corners = 1j * np.exp(2j * math.pi / 3 * np.arange(3))
    elif shape == "star":
        corners = 1j * np.exp(2j * math.pi / 10 * np.arange(10)) * np.tile([1, 0.5], 5)
    elif shape == "cross":
        corners = np.outer(quarters, [1 - 0.4j, 1 + 0.4j, 0.4 + 0.4j]).ravel()
    else:
        height = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        corners = 1j * height - 16 * np.sin(turn) ** 3
    after = np.roll(corners, -1)
    cross = (corners.conj() * after).imag  # twice the signed area of each edge's triangle with 0
    centroid = ((corners + after) * cross).sum() / (3 * cross.sum())
    return (corners - centroid) * math.sqrt(2 * math.pi / cross.sum())


class Outlines(NamedTuple):
    """All outlines in polar form; every shape is seen whole from its centroid."""

    radius: np.ndarray  # [shapes * TURN] distance of the outline from the centroid, size 1
    slant: np.ndarray  # [shapes * TURN] cosine between that ray and the outline's normal
    reach: np.ndarray  # [shapes] largest distance of the outline


@cache
def outlines() -> Outlines:
    """Tabulate the outlines of SHAPES."""
    angles = (np.arange(TURN) + 0.5) * 2 * math.pi / TURN
    ray = np.exp(1j * angles)
    radius, slant, reach = [], [], []
    for shape in SHAPES:
        corners = outline(shape)
        start = np.angle(corners) % (2 * math.pi)
        corners = np.roll(corners, -int(np.argmin(start)))
        edge = np.searchsorted(np.sort(start), angles) - 1
        normal = np.roll(corners, -1) - corners
        normal = (-1j * normal / np.abs(normal))[edge]
        cosine = (ray * normal.conj()).real
        radius.append((corners[edge] * normal.conj()).real / cosine)
        # In the heart's cusp the outline runs along the ray: without a bound its edge would smear.
        slant.append(np.maximum(cosine, 0.25))
        reach.append(np.abs(corners).max())
    radius, slant = (np.concatenate(table).astype(np.float32) for table in (radius, slant))
    return Outlines(radius, slant, np.array(reach))


class Shapes(NamedTuple):
    """A flat list of objects, each field [O]. Lengths are shares of the image's side."""

    image: np.ndarray  # row of the batch
    x: np.ndarray  # centroid, from the left edge
    y: np.ndarray  # from the top edge
    size: np.ndarray  # radius of the disc of the same area
    angle: np.ndarray  # radians, counter-clockwise
    shape: np.ndarray  # position in SHAPES


class Pixels(NamedTuple):
    """The pixels that objects cover at least in part, each field [Q], in the objects' order."""

    owner: np.ndarray  # position of the object in the list
    at: np.ndarray  # position of the pixel in [n, S, S], flattened
    cover: np.ndarray  # share of the pixel inside the outline
    depth: np.ndarray  # 0 at the centroid, 1 on the outline


def rasterise(objects: Shapes, side: int) -> Pixels:
    """Return the pixels that the objects cover on images of S = `side` pixels per side."""
    table = outlines()
    x, y, size = (values * side for values in (objects.x, objects.y, objects.size))
    reach = size * table.reach[objects.shape] + 1
    left, top = (np.maximum(np.floor(c - reach), 0).astype(np.int32) for c in (x, y))
    width, height = (
        np.minimum(np.ceil(c + reach), side).astype(np.int32) - first
        for c, first in ((x, left), (y, top))
    )
    area = width * height
    owner = np.repeat(np.arange(len(area)), area)

    def spread(values: np.ndarray, kind: type = np.float32) -> np.ndarray:
        return np.repeat(values.astype(kind), area)

    step = np.arange(len(owner), dtype=np.int32) - spread(np.cumsum(area) - area, np.int32)
    row, column = np.divmod(step, spread(width, np.int32))
    right = column + spread(left + 0.5 - x)
    up = spread(y - top - 0.5) - row
    turn = np.arctan2(up, right) * np.float32(TURN / (2 * math.pi))
    turn += spread((-objects.angle * (TURN / (2 * math.pi))) % TURN + TURN)
    ray = (turn.astype(np.int32) & (TURN - 1)) + spread(objects.shape * TURN, np.int32)
    distance = np.sqrt(right * right + up * up)
    edge = table.radius[ray] * spread(size)
    # Exact for an edge that runs along the pixel grid, and close for all others.
    cover = np.clip(0.5 - (distance - edge) * table.slant[ray], 0, 1)
    touched = np.flatnonzero(cover > 0)
    owner = owner[touched]
    at = ((objects.image * side + top) * side + left)[owner] + (row * side + column)[touched]
    return Pixels(owner, at, cover[touched], np.minimum(distance / edge, 1)[touched])


def occlude(pixels: Pixels, layer: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of its pixel shows each object [Q], and the background [`total` pixels].

    `layer` [O] ascends from the back to the front; the objects of one layer lie on different
    images, so that a layer has every pixel at most once.
    """
    shown = np.empty_like(pixels.cover)
    through = np.ones(total, np.float32)  # what the layers in front leave
    layers = layer[pixels.owner]
    for front in range(layer.max(initial=-1), -1, -1):
        part = slice(*np.searchsorted(layers, (front, front + 1)))
        at = pixels.at[part]
        shown[part] = pixels.cover[part] * through[at]
        through[at] -= shown[part]
    return shown, through


def paint(
    pixels: Pixels,
    layer: np.ndarray,
    colours: np.ndarray,
    rim: np.ndarray,
    background: np.ndarray,
) -> np.ndarray:
    """Return images uint8 [n, S, S, 3]: objects of `colours` [O, 3] on `background` [n, S, S, 3].

    Colours are in units of 1/255; `layer` [O] is that of `occlude`. The sign of `rim` [O] says
    whether an object is lighter or darker towards its edge, which parts it from neighbours of the
    same colour; the object's mean light, 0.82 of its colour, does not depend on it.
    """
    total = background.size // 3
    shown, through = occlude(pixels, layer, total)
    shown *= 0.82 + rim.astype(np.float32)[pixels.owner] * (pixels.depth**4 - np.float32(1 / 3))
    ground = background.reshape(total, 3)
    images = np.empty((total, 3), np.uint8)
    for channel in range(3):
        colour = colours[:, channel].astype(np.float32)[pixels.owner]
        light = ground[:, channel] * through + np.bincount(pixels.at, shown * colour, total)
        images[:, channel] = np.clip(light + 0.5, 0, 255)
    return images.reshape(background.shape)


def instances(pixels: Pixels, layer: np.ndarray, n: int, side: int) -> np.ndarray:
    """Return masks uint8 [n, S, S]: 0, or 1 + the layer of the object that the pixel shows.

    That is the foremost one that covers at least half of the pixel.
    """
    masks = np.zeros(n * side**2, np.uint8)
    inside = np.flatnonzero(pixels.cover >= 0.5)
    # Layers ascend, and of several writes to one pixel the last one stays.
    masks[pixels.at[inside]] = layer[pixels.owner[inside]] + 1
    return masks.reshape(n, side, side)
