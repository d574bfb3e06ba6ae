"""The built-in images: single objects on a factor grid, and scenes of 3 to 10 objects.

Lengths are shares of the image's side; x and y are measured from its top left corner, so an index
means the same picture at every resolution. Every random number is a hash of (seed, field, index,
object, attempt): a picture never depends on which others are rendered with it. An object touches
few pixels, so drawing works on the list of (object, pixel) pairs instead of on whole images.

Letters: n images, S pixels per side, O objects in a flat list, Q (object, pixel) pairs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np

from sparsejepa.data.images import Decoded, ImageSet, Source, Target
from sparsejepa.errors import UserError

SHAPES = ("ellipse", "square", "triangle", "star", "heart", "cross")
TURN = 2048  # angles at which an outline is tabulated; a power of two

# Object and background have the same mean colour. Otherwise a linear probe of the pixels would see
# how often each place is covered, and so whether objects are few and large or many and small.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (235, 220, 60),
    "green": (40, 180, 70),
    "cyan": (40, 215, 220),
    "blue": (40, 95, 230),
    "purple": (135, 50, 190),
    "pink": (245, 150, 205),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "charcoal": (48, 50, 56),
    "slate": (98, 104, 122),
    "olive": (108, 100, 70),
    "brown": (114, 80, 68),
    "sand": (182, 164, 136),
    "silver": (182, 180, 188),
}
RIM = 0.45  # strength of the shading towards an object's edge
MIN_COUNT, MAX_COUNT = 3, 10
MIN_VISIBLE = 0.25  # share of itself that every object shows, in whole pixels as in area
LEAST_SHARE = 0.30  # the area is measured on REFERENCE pixels a side: keep clear of the limit
REFERENCE = 32


# --- Drawing flat shapes with smooth edges --------------------------------------------------------


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
    """A flat list of objects, each field [O]."""

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

    `layer` [O] ascends from the back to the front; a layer has every pixel at most once.
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
    shapes: Shapes, layer: np.ndarray, colours: np.ndarray, rim: np.ndarray, background: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [n, S, S, 3] of the objects on `background` [n, S, S, 3], and masks.

    Colours, [O, 3] and of the background, are in units of 1/255; `layer` [O] is that of `occlude`.
    The sign of `rim` [O] says whether an object is lighter or darker towards its edge, which parts
    it from neighbours of the same colour; the object's mean light, 0.82 of its colour, does not
    depend on it. A mask uint8 [n, S, S] has 1 + the layer of the foremost object that covers at
    least half of the pixel, else 0.
    """
    n, side = background.shape[:2]
    total, pixels = n * side**2, rasterise(shapes, side)
    shown, through = occlude(pixels, layer, total)
    shown *= 0.82 + rim.astype(np.float32)[pixels.owner] * (pixels.depth**4 - np.float32(1 / 3))
    ground = background.reshape(total, 3)
    images, masks = np.empty((total, 3), np.uint8), np.zeros(total, np.uint8)
    for channel in range(3):
        colour = colours[:, channel].astype(np.float32)[pixels.owner]
        light = ground[:, channel] * through + np.bincount(pixels.at, shown * colour, total)
        images[:, channel] = np.clip(light + 0.5, 0, 255)
    inside = np.flatnonzero(pixels.cover >= 0.5)
    # Layers ascend, and of several writes to one pixel the last one stays.
    masks[pixels.at[inside]] = layer[pixels.owner[inside]] + 1
    return images.reshape(background.shape), masks.reshape(n, side, side)


# --- Numbers and indices --------------------------------------------------------------------------


def uniform(seed: int, field: str, *counters: np.ndarray) -> np.ndarray:
    """Return float64 numbers in [0, 1): a hash of the seed, the field's name and whole numbers.

    The counters broadcast against each other and give the result its shape. Each part is absorbed
    by one round of SplitMix64's finaliser (Steele, Lea and Flood 2014).
    """
    name = np.uint64(zlib.crc32(field.encode()))
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        state = _mix(_mix(np.array(seed % 2**64, np.uint64)) ^ name)
        for counter in counters:
            state = _mix(state ^ counter.astype(np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _palette(colours: dict[str, tuple[int, int, int]], chosen: np.ndarray) -> np.ndarray:
    return np.array(list(colours.values()), np.float32)[chosen]


def _chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, n)) for i in range(0, max(n, 1), size))


def _in_chunks(n: int, side: int, draw: Callable[[slice], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return images and masks of n images, drawn so few at a time that a processor's cache holds
    the working arrays."""
    images, masks = zip(*map(draw, _chunks(n, max(1, 2**16 // side**2))), strict=True)
    return np.concatenate(images), np.concatenate(masks)


# --- The two kinds of images ----------------------------------------------------------------------


class Pictures(NamedTuple):
    """Rendered images and what is in them."""

    images: np.ndarray  # uint8 [n, S, S, 3]
    masks: np.ndarray  # uint8 [n, S, S]: 0 background, k + 1 the object in column k of the table
    factors: np.ndarray  # int64 [n, factors], in the order of FACTORS
    objects: Any = None  # SceneObjects of scenes

    @property
    def count(self) -> np.ndarray:
        """The number of objects of scenes, int64 [n], 3 to 10."""
        return self.factors[:, 0] + MIN_COUNT


class SingleObjects:
    """One object per image on a grid of seven factors, in the manner of dSprites and 3D Shapes.

    Every combination has an index, which counts with the last factor fastest, and lies whole inside
    the frame; nothing is random. Orientations stay below 60 degrees since a star repeats after 72
    and a square after 90: all values can be told apart on all shapes.
    """

    SIZES: ClassVar = (0.10, 0.13, 0.16, 0.19)  # radius of the disc of the same area
    ANGLES: ClassVar = (0, 18, 36, 54)  # degrees, counter-clockwise
    PLACES: ClassVar = (0.32, 0.392, 0.464, 0.536, 0.608, 0.68)
    FACTORS: ClassVar[dict[str, tuple[str, ...]]] = {
        "shape": SHAPES,
        "colour": tuple(COLOURS),
        "size": tuple(f"{value:g}" for value in SIZES),
        "orientation": tuple(f"{value}°" for value in ANGLES),
        "x": tuple(f"{value:g}" for value in PLACES),
        "y": tuple(f"{value:g}" for value in PLACES),
        "background": tuple(BACKGROUNDS),
    }
    LEVELS: ClassVar = tuple(len(names) for names in FACTORS.values())

    def __len__(self) -> int:
        return math.prod(self.LEVELS)

    def factors(self, index: np.ndarray) -> np.ndarray:
        """Return the factor values int64 [n, 7] of images [n], in the order of FACTORS."""
        return np.stack(np.unravel_index(index, self.LEVELS), 1).astype(np.int64)

    def render(self, index: np.ndarray, side: int = 32) -> Pictures:
        """Return the images of the indices [n] at S = `side` pixels."""
        factors, places = self.factors(index), np.array(self.PLACES)

        def draw(part: slice) -> tuple[np.ndarray, np.ndarray]:
            shape, colour, size, angle, x, y, ground = factors[part].T
            rows = np.arange(len(shape))
            sizes, angles = np.array(self.SIZES)[size], np.radians(self.ANGLES)[angle]
            shapes = Shapes(rows, places[x], places[y], sizes, angles, shape)
            flat = _palette(BACKGROUNDS, ground)[:, None, None]
            flat = np.broadcast_to(flat, (len(rows), side, side, 3))
            rim = np.full(len(rows), -RIM)
            return paint(shapes, np.zeros(len(rows), int), _palette(COLOURS, colour), rim, flat)

        return Pictures(*_in_chunks(len(factors), side, draw), factors)


@dataclass(frozen=True)
class SceneObjects:
    """The objects of n scenes, each field [n, 10], from the back to the front.

    Where a scene has fewer than ten objects, numbers are NaN and classes -1.
    """

    present: np.ndarray  # bool: is there an object in this column?
    x: np.ndarray  # centroid, share of the image's side
    y: np.ndarray
    size: np.ndarray  # radius of the disc of the same area
    angle: np.ndarray  # radians, counter-clockwise
    shape: np.ndarray  # int64, position in SHAPES
    colour: np.ndarray  # int64, position in COLOURS
    visible: np.ndarray  # share of the object's area that the objects in front leave to be seen


class Scenes:
    """Scenes of 3 to 10 overlapping objects; the count is the label, as in CLEVR/Count of VTAB.

    Every aligned run of eight indices has every count once. The other labels are the background
    and the shape and the colour of most objects: a scene has two shapes and two colours, and
    three fifths of its objects, rounded up, have the first of them.

    Nothing simple gives the count away. Objects share a total area that is drawn without regard
    to their number, numbers of colours and of shapes are the same everywhere, and lighting,
    gradient and texture vary. At least a quarter of every object can be seen.
    """

    FACTORS: ClassVar[dict[str, tuple[str, ...]]] = {
        "count": tuple(str(count) for count in range(MIN_COUNT, MAX_COUNT + 1)),
        "shape": SHAPES,
        "colour": tuple(COLOURS),
        "background": tuple(BACKGROUNDS),
    }
    AREA: ClassVar = (0.24, 0.39)  # least and greatest sum of the objects' areas
    ATTEMPTS: ClassVar = 30  # places that an object tries

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def factors(self, index: np.ndarray) -> np.ndarray:
        """Return the labels int64 [n, 4] of scenes [n], in the order of FACTORS."""
        run = self._uniform("count", (index // 8)[:, None], np.arange(8)).argsort(1)
        count = run[np.arange(len(index)), index % 8]
        levels = [len(names) for names in self.FACTORS.values()][1:]
        others = self._uniform("labels", index[:, None], np.arange(3)) * levels
        return np.column_stack([count, others.astype(np.int64)])

    def objects(self, index: np.ndarray) -> SceneObjects:
        """Return the objects of scenes [n]; they are the same at every resolution."""
        tables = [vars(self._arrange(index[part])) for part in _chunks(len(index), 512)]
        return SceneObjects(**{k: np.concatenate([t[k] for t in tables]) for k in tables[0]})

    def render(self, index: np.ndarray, side: int = 32) -> Pictures:
        """Return the scenes of the indices [n] at S = `side` pixels."""
        factors, objects = self.factors(index), self.objects(index)
        tone = 0.85 + 0.3 * self._uniform("tone", index[:, None], np.arange(MAX_COUNT))
        # Dark rims alone would tell: at the frame's edge mostly rims are seen, broad ones of few.
        rim = np.where(self._uniform("rim", index) < 0.5, -RIM, RIM)
        fields = (objects.x, objects.y, objects.size, objects.angle, objects.shape)

        def draw(part: slice) -> tuple[np.ndarray, np.ndarray]:
            layer, image = np.nonzero(objects.present[part].T)
            listed = part.start + image, layer
            light, ground = self._background(index[part], factors[part, 3], side)
            colours = _palette(COLOURS, objects.colour[listed])
            colours *= (light[image] * tone[listed])[:, None]
            shapes = Shapes(image, *(values[listed] for values in fields))
            return paint(shapes, layer, colours, rim[listed[0]], ground)

        return Pictures(*_in_chunks(len(index), side, draw), factors, objects)

    def _uniform(self, field: str, *counters: np.ndarray) -> np.ndarray:
        return uniform(self.seed, f"scenes/{field}", *counters)

    def _arrange(self, index: np.ndarray) -> SceneObjects:
        """Draw the objects of scenes [n] and find each a place where it can be seen."""
        labels, slots = self.factors(index), np.arange(MAX_COUNT)
        count = labels[:, :1] + MIN_COUNT
        present = slots < count
        share = np.where(present, 0.7 + 0.6 * self._uniform("size", index[:, None], slots), 0)
        least, greatest = self.AREA
        area = least + (greatest - least) * self._uniform("area", index[:, None])
        area *= 1 + 0.15 / count  # few large objects hide more of each other: level what is seen
        size = np.sqrt(area * share / share.sum(1, keepdims=True) / math.pi)
        angle = 2 * math.pi * self._uniform("angle", index[:, None], slots)
        shape = self._assign("shape", index, labels[:, [1]], count)
        colour = self._assign("colour", index, labels[:, [2]], count)
        x, y, visible = self._place(index, count[:, 0], size, angle, shape)
        numbers = (np.where(present, v, np.nan) for v in (x, y, size, angle, visible))
        x, y, size, angle, visible = numbers
        shape, colour = (np.where(present, v, -1) for v in (shape, colour))
        return SceneObjects(present, x, y, size, angle, shape, colour, visible)

    def _assign(
        self, name: str, index: np.ndarray, main: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        """Return each object's shape or colour [n, 10]: mostly `main` [n, 1], else one other."""
        levels, slots = len(self.FACTORS[name]), np.arange(MAX_COUNT)
        step = 1 + self._uniform(f"second {name}", index[:, None]) * (levels - 1)
        draw = self._uniform(f"main {name}", index[:, None], slots) + (slots >= count)
        rank = draw.argsort(1).argsort(1)
        return np.where(rank < (3 * count + 4) // 5, main, (main + step.astype(np.int64)) % levels)

    def _place(
        self,
        index: np.ndarray,
        count: np.ndarray,
        size: np.ndarray,
        angle: np.ndarray,
        shape: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return x, y and visible share [n, 10] of objects, all whole inside the frame.

        Every scene places its objects from the front to the back, all scenes side by side: what
        lies in front of an object is settled, so whether enough of it shows is known at once, and
        if not it tries elsewhere. Enough is drawn per scene and falls with every attempt. If an
        object has no place after ATTEMPTS, its scene is laid out on a lattice.
        """
        n, slots, columns = len(index), np.arange(MAX_COUNT), np.ceil(np.sqrt(count))[:, None]
        lines = np.ceil(count[:, None] / columns)
        cells = (slots % columns / (columns - 1), slots // columns / (lines - 1))
        margin = size * outlines().reach[shape]
        wanted = LEAST_SHARE + 0.6 * self._uniform("separation", index)
        x, y, visible = np.zeros((3, n, MAX_COUNT))
        through = np.ones((n, REFERENCE**2), np.float32)  # what the objects placed so far leave
        free = np.ones((n, REFERENCE**2), bool)
        slot, attempt, lattice = count - 1, np.zeros(n, int), np.zeros(n, bool)
        while len(scene := np.flatnonzero(slot >= 0)):
            k, trial, fixed = slot[scene], attempt[scene], lattice[scene]
            edge = margin[scene, k]
            for axis, place, cell in (("x", x, cells[0]), ("y", y, cells[1])):
                draw = self._uniform(axis, index[scene], k, trial)
                place[scene, k] = edge + (1 - 2 * edge) * np.where(fixed, cell[scene, k], draw)
            drawn = (values[scene, k] for values in (x, y, size, angle, shape))
            owner, at, cover, _ = rasterise(Shapes(np.arange(len(scene)), *drawn), REFERENCE)
            at = scene[owner], at % REFERENCE**2
            inside = cover >= 0.5
            share = np.bincount(owner, cover * through[at]) / np.bincount(owner, cover)
            counted = np.bincount(owner, inside & free[at]) / np.bincount(owner, inside)
            enough = np.maximum(wanted[scene] - 0.02 * trial, LEAST_SHARE)
            settled = fixed | ((share >= enough) & (counted >= MIN_VISIBLE))
            visible[scene, k] = share
            kept = settled[owner]
            at = at[0][kept], at[1][kept]
            through[at] *= 1 - cover[kept]
            free[at] &= ~inside[kept]
            slot[scene] -= settled
            attempt[scene] = np.where(settled, 0, trial + 1)
            lost = scene[(attempt[scene] >= self.ATTEMPTS) & ~fixed]
            lattice[lost], slot[lost], attempt[lost] = True, count[lost] - 1, 0
            through[lost], free[lost] = 1, True
        return x, y, visible

    def _background(
        self, index: np.ndarray, kind: np.ndarray, side: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the lighting [n] and the backgrounds float32 [n, S, S, 3] in units of 1/255."""
        draw = self._uniform("background", index[:, None], np.arange(7)).astype(np.float32)
        light, slope, toward, wave, turn, pitch, phase = draw.T[..., None]
        light = 0.7 + 0.4 * light
        middle = ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)
        # A gradient and a wave; sin(a + b) = sin a cos b + cos a sin b makes their sum a product.
        toward, turn = 2 * np.pi * toward, np.pi * turn
        pitch = 2 * np.pi * (1.5 + 2.5 * pitch)
        a, b = pitch * np.cos(turn) * middle + 2 * np.pi * phase, pitch * np.sin(turn) * middle
        one, slope, wave = np.ones_like(a), 0.5 * slope, 0.12 * wave
        across = [one + slope * np.cos(toward) * middle, one, wave * np.sin(a), wave * np.cos(a)]
        down = [one, slope * np.sin(toward) * middle, np.cos(b), np.sin(b)]
        field = light[..., None] * (np.stack(down, 2) @ np.stack(across, 1))
        return light[:, 0], field[..., None] * _palette(BACKGROUNDS, kind)[:, None, None]


# --- As data sets ---------------------------------------------------------------------------------

SCENES = {
    "scenes": "scenes of 3 to 10 objects; labels: count, shape, colour, background",
    "scenes:single": "single objects on a grid of seven factors, one label per factor",
}
SCENE_COUNTS = {"train": 20_000, "test": 5_000}
SCENES_VERSION = 1
"""Part of the cache's key: raise it when an index would be drawn as another picture."""


@dataclass(frozen=True, eq=False)
class Drawn(Source):
    """Images that are rendered into the cache; they have no names."""

    kind: Scenes | SingleObjects = field(kw_only=True)
    index: np.ndarray = field(kw_only=True)
    side: int = field(kw_only=True)

    def stamp(self) -> str:
        """Return what the pictures depend on, beside the name."""
        return f"{SCENES_VERSION}/{self.index[0]}/{len(self.index)}/{self.side}"

    def read(self, img_size: tuple[int, int] | None, upscale: bool) -> Iterator[Decoded]:
        """Yield the images."""
        yield from (("", image) for part in self._pictures() for image in part.images)

    def masks(self, images: ImageSet) -> np.ndarray:
        """Return object masks uint8 [N, S, S]."""
        return np.concatenate([part.masks for part in self._pictures()])

    def _pictures(self) -> Iterator[Pictures]:
        parts = _chunks(len(self.index), 500)
        return (self.kind.render(self.index[part], self.side) for part in parts)


def scene_sources(name: str, img_size: tuple[int, int] | None) -> dict[str, Source]:
    """Return the train and test images of one of `SCENES`, to be rendered into the cache.

    Raises UserError for sizes that are not square, or smaller than 16 pixels.
    """
    side = (img_size or (REFERENCE, REFERENCE))[0]
    if img_size is not None and img_size[1] != side:
        raise UserError(f"--img-size {side} {img_size[1]}: the built-in scenes are square")
    if side < 16:
        raise UserError(f"--img-size {side} is too small for the built-in scenes: 16 or more")
    kind = Scenes() if name == "scenes" else SingleObjects()
    start, sources = 0, {}
    for split, count in SCENE_COUNTS.items():
        index = np.arange(start, start + count)
        if isinstance(kind, SingleObjects):
            index = np.random.default_rng(0).permutation(len(kind))[index]
        columns = zip(kind.FACTORS.items(), kind.factors(index).T, strict=True)
        targets = {key: Target(values, names) for (key, names), values in columns}
        sources[split] = Drawn(name, split, targets, name, kind=kind, index=index, side=side)
        start += count
    return sources
