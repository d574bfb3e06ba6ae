"""Images to pretrain on in place of the true ones: a control for what pretraining learns.

Each image is drawn by a generator of its own, keyed on its position and a seed, so that nothing
depends on how many are drawn at once. The result is kept in the cache like decoded images: sets
larger than the memory will do, and all runs with one seed share it.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from sparsejepa.data.images import Decoded, ImageSet, Source, load
from sparsejepa.rng import derive_seed

Draw = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def corrupt(
    image_set: ImageSet,
    corruption: Literal["noise", "shuffle"],
    *,
    seed: int,
    patch_size: int,
    cache_dir: Path,
) -> ImageSet:
    """Return the set with other images under the same labels, and with another fingerprint.

    Mean and standard deviation stay those of the true images, on which the encoder is used later.

    Arguments:
        image_set: the images, of a size that `patch_size` divides.
        corruption: noise: independent normal pixels with the set's mean and standard deviation,
            clipped to 0..255; shuffle: each image's patches in an order of its own.
        seed: of the draws, together with each image's position in the set.
        patch_size: side of a patch in pixels; only shuffle depends on it.
        cache_dir: where decoded images are kept.

    Raises UserError when the cache folder cannot be written.
    """
    if corruption == "noise":
        draw = partial(_noise, mean=image_set.mean, std=image_set.std)
        about = [corruption, image_set.mean, image_set.std]
    else:
        draw = partial(_shuffle, patch_size=patch_size)
        about = [corruption, patch_size]

    def read(*_: object) -> Iterator[list[Decoded]]:
        return _blocks(image_set, draw, seed, corruption)

    # This module's own text is part of the cache's key: changed code, new images.
    code = inspect.getsource(sys.modules[__name__])
    stamp = json.dumps([code, image_set.fingerprint, seed, about])
    name = f"{image_set.name}-{corruption}"
    source = Source(name, image_set.split, stamp, read, image_set.targets)
    drawn = load(source, cache_dir, None, False)
    return replace(image_set, images=drawn.images, fingerprint=drawn.fingerprint, masks=None)


def _blocks(image_set: ImageSet, draw: Draw, seed: int, purpose: str) -> Iterator[list[Decoded]]:
    for i, image in enumerate(image_set.images):
        yield [("", draw(image, np.random.default_rng(derive_seed(seed, i, purpose))))]


def _noise(
    image: np.ndarray,
    rng: np.random.Generator,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> np.ndarray:
    """Noise uint8 [H, W, 3] of the size of `image`; mean and std in units of [0, 1]."""
    normal = rng.standard_normal(image.shape, np.float32)
    pixels = normal * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    return np.clip(np.rint(255 * pixels), 0, 255).astype(np.uint8)


def _shuffle(image: np.ndarray, rng: np.random.Generator, patch_size: int) -> np.ndarray:
    """The patches of `image` [H, W, 3] in another order."""
    height, width, channels = image.shape
    grid = (height // patch_size, width // patch_size)
    patches = image.reshape(grid[0], patch_size, grid[1], patch_size, channels).swapaxes(1, 2)
    patches = patches.reshape(-1, *patches.shape[2:])
    patches = patches[rng.permutation(len(patches))]
    return patches.reshape(*grid, *patches.shape[1:]).swapaxes(1, 2).reshape(image.shape)
