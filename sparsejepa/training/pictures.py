"""Pictures of a run for its loggers, as arrays [H, W, 3] uint8: masks, galleries, the map W.

Drawn with numpy, enlarged to whole pixels. Letters: n images, N patches, D latents, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsejepa.data.augment import normalize
from sparsejepa.data.store import DeviceImages, ImageSet
from sparsejepa.data.stream import ImageStream, StreamImages
from sparsejepa.distributed import World, gather_rows, own_rows
from sparsejepa.interop.module import GroupActivations
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.model.masks import Masks
from sparsejepa.training.monitor import choose_images

IMAGES, SHOWN, BEST, MOST_GROUPS = 256, 8, 8, 32
"""Images of a gallery to choose from; masks shown; images per group; groups shown."""
_SIDE = 72
"""Pixels that the longer side of a shown image has at least."""
_INK, _PAPER, _EMPTY = (27, 33, 39), 255, 235
_COLOURS = ((224, 130, 20), (0, 160, 120), (204, 121, 167), (213, 94, 0), (138, 124, 200))
_DEEP = np.array((20, 74, 122), np.float32)
# Digits on 3 x 5 pixels, row by row.
_DIGITS = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001001001001", "111101111101111", "111101111001111",
)  # fmt: skip


class Pictures:
    """Draws a run's pictures from a fixed few of its training images.

    Each process of `world` embeds its share of them; the main one draws. Images that are streamed
    are read once and kept.
    """

    def __init__(
        self,
        image_set: ImageSet | ImageStream,
        images: DeviceImages | StreamImages,
        seed: int,
        world: World = World(),  # noqa: B008  (it is frozen)
    ) -> None:
        index = choose_images(image_set, IMAGES, np.random.default_rng(1))
        batches = images.batches(torch.from_numpy(index).split(64))
        self._images = torch.cat([batch.cpu() for batch in batches])  # [n, H, W, 3]
        self._own = torch.from_numpy(own_rows(np.arange(len(index)), world))
        self._mean, self._std, self._seed, self._main = (
            image_set.mean, image_set.std, seed, world.main,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, model: SparseJEPA, autocast: torch.autocast, step: int
    ) -> dict[str, np.ndarray]:
        """Return the pictures by name; nothing on processes that only help."""
        found = self._excited(model, autocast)
        if not self._main:
            return {}
        grid, images = model.sampler.grid_size, self._images.numpy()
        masks = model.sampler.sample(SHOWN, seed=self._seed, step=step)
        drawn = {"pictures/masks": draw_masks(images[:SHOWN], masks, grid)}
        if model.groups is not None and found is not None:
            cells = model.groups.cells
            cells = None if cells is None else cells.cpu().numpy()
            drawn["pictures/groups"] = draw_gallery(images, found.numpy(), grid, cells)
            norms = model.groups.block_norms().detach().float().cpu().numpy()
            drawn["pictures/w"] = draw_w(norms)
        return drawn

    def _excited(self, model: SparseJEPA, autocast: torch.autocast) -> Tensor | None:
        """Return the groups' activations on all images: [n, N, G], of regions [n, 1, G]."""
        if model.groups is None:
            return None
        activations, encoder = GroupActivations.from_map(model.groups), model.target_encoder
        device, found = activations.W.device, []
        for batch in self._images[self._own].split(64):
            pixels = normalize(batch.to(device), self._mean, self._std)
            with autocast:
                tokens = encoder(pixels.to(encoder.pos_embed.dtype))
            pooled, patches = activations(tokens.to(activations.W.dtype))
            found.append((pooled[:, None] if patches is None else patches).float().cpu())
        return gather_rows(torch.cat(found), len(self._images))


def draw_masks(images: np.ndarray, masks: Masks, grid: tuple[int, int]) -> np.ndarray:
    """Draw what the context encoder sees of images [n, H, W, 3], and outline the target blocks.

    Hidden patches are pale. Outlines of several blocks lie one inside the other.
    """
    tiles = []
    for image, context, targets in zip(enlarge(images), *map(_numpy, masks), strict=False):
        seen = np.zeros(grid[0] * grid[1], bool)
        seen[context] = True
        rows, cols = _edges(image, grid)
        y, x = (np.searchsorted(edges, np.arange(size), "right") - 1
                for edges, size in ((rows, image.shape[0]), (cols, image.shape[1])))  # fmt: skip
        pale = (255 - (255 - image.astype(np.float32)) * 0.25).astype(np.uint8)
        tile = np.where(seen.reshape(grid)[y][:, x][..., None], image, pale)
        for i, block in enumerate(targets):
            colour = _COLOURS[i % len(_COLOURS)]
            # Of a merged target only the patches are known: each has an outline.
            parts = [block] if _is_block(block, grid) else block[:, None]
            for part in parts:
                _outline(tile, part, grid, colour, inset=0 if len(parts) > 1 else i % 4)
        tiles.append(tile)
    return _sheet([tiles[i : i + 4] for i in range(0, len(tiles), 4)])


def draw_gallery(
    images: np.ndarray, activations: np.ndarray, grid: tuple[int, int], cells: np.ndarray | None
) -> np.ndarray:
    """Draw the images that excite each group most, a row per group, with its number before it.

    The most excited patch is outlined; for regions, which read whole images, the patches that the
    group predicts.

    Args:
        images: [n, H, W, 3] uint8.
        activations: [n, N, G], or [n, 1, G] of regions.
        cells: the region of each patch [N]; None for other kinds of groups.

    Rows of groups that are never excited are empty. Only the first 32 groups are drawn.
    """
    rows = []
    for g in range(min(activations.shape[2], MOST_GROUPS)):
        best = activations[:, :, g].max(1)
        order = np.argsort(-best, kind="stable")[:BEST]
        tiles = list(enlarge(images[order]))
        for tile, i in zip(tiles, order, strict=True):
            patch = np.array([activations[i, :, g].argmax()])
            patches = patch if cells is None else np.flatnonzero(cells == g)
            if best[i] > 0:
                _outline(tile, patches, grid, _COLOURS[0])
            else:
                tile[:] = _EMPTY
        rows.append(tiles)
    return _sheet(rows, numbered=True)


def draw_w(norms: np.ndarray) -> np.ndarray:
    """Draw the norms of W's columns [G, D]: a row per group, the darker the larger, zeros white.

    Latents are ordered by the group that they feed most, then by how much, so that latents of one
    group each make a staircase.
    """
    G, D = norms.shape
    owner = norms.argmax(0)
    order = np.lexsort((-norms.max(0), owner))
    share = norms[:, order] / max(float(norms.max()), 1e-12)
    # A small value is still told from zero.
    strength = np.where(share > 0, 0.12 + 0.88 * share, 0)[..., None]
    picture = (255 - strength * (255 - _DEEP)).astype(np.uint8)
    high, wide = max(3, 12 if G <= MOST_GROUPS else 3), max(1, round(576 / D))
    picture = picture.repeat(high, 0).repeat(wide, 1)
    if high >= 12:
        picture[::high] = np.minimum(picture[::high], _EMPTY)
    return picture


def enlarge(images: np.ndarray) -> np.ndarray:
    """Repeat the pixels of images [n, H, W, 3], or leave some out, to be about 72 to 144 wide."""
    side = max(images.shape[1:3])
    if side > 2 * _SIDE:
        step = side // _SIDE
        return images[:, ::step, ::step].copy()
    factor = -(-_SIDE // side)
    return images.repeat(factor, 1).repeat(factor, 2)


def _numpy(part: Tensor) -> np.ndarray:
    return part.cpu().numpy()


def _edges(image: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first pixel of each row and column of patches, and the end."""
    pairs = zip(grid, image.shape[:2], strict=True)
    rows, cols = (np.round(np.arange(n + 1) * size / n).astype(int) for n, size in pairs)
    return rows, cols


def _is_block(patches: np.ndarray, grid: tuple[int, int]) -> bool:
    """Return whether patches fill a rectangle."""
    y, x = np.divmod(patches, grid[1])
    return len(patches) == (np.ptp(y) + 1) * (np.ptp(x) + 1)


def _outline(
    tile: np.ndarray,
    patches: np.ndarray,
    grid: tuple[int, int],
    colour: Sequence[int],
    inset: int = 0,
) -> None:
    """Draw a frame of two pixels around the rectangle of patches, in place."""
    rows, cols = _edges(tile, grid)
    y, x = np.divmod(patches, grid[1])
    top, bottom = rows[y.min()] + 2 * inset, rows[y.max() + 1] - 2 * inset
    left, right = cols[x.min()] + 2 * inset, cols[x.max() + 1] - 2 * inset
    inner = tile[top + 2 : bottom - 2, left + 2 : right - 2].copy()
    tile[top:bottom, left:right] = colour
    tile[top + 2 : bottom - 2, left + 2 : right - 2] = inner


def _sheet(rows: Sequence[Sequence[np.ndarray]], *, numbered: bool = False) -> np.ndarray:
    """Put equal tiles [h, w, 3] on white paper, a gap of 4 pixels between them."""
    h, w = rows[0][0].shape[:2]
    margin, gap = (32 if numbered else 0), 4
    across = max(map(len, rows))
    paper = np.full(
        (gap + len(rows) * (h + gap), margin + gap + across * (w + gap), 3), _PAPER, np.uint8
    )
    for i, tiles in enumerate(rows):
        top = gap + i * (h + gap)
        if numbered:
            _number(paper, i, top + h // 2 - 5, gap)
        for j, tile in enumerate(tiles):
            left = margin + gap + j * (w + gap)
            paper[top : top + h, left : left + w] = tile
    return paper


def _number(paper: np.ndarray, number: int, top: int, left: int) -> None:
    """Write a number in digits of 6 x 10 pixels, in place."""
    for digit in map(int, str(number)):
        ink = np.array([c == "1" for c in _DIGITS[digit]]).reshape(5, 3).repeat(2, 0).repeat(2, 1)
        paper[top : top + 10, left : left + 6][ink] = _INK
        left += 8
