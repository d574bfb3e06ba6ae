"""Image files and bytes to uint8 RGB arrays of one size, on a pool of threads.

What cannot be read is left out and reported, never a reason to stop; what the user has to decide
(images of different sizes, images that are too small) is an error that names the flag.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from sparsejepa.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""What counts as an image file in a folder."""

MAX_PIXELS = 89_478_485
"""Larger images are taken for decompression bombs and left out (Pillow's own limit)."""

Item = tuple[str, Path | bytes | None]
"""Name for messages, and a file, an encoded image, or None for one that is missing."""

_TASK = 16  # images that a thread takes at once
T = TypeVar("T")


class Block(NamedTuple):
    """Some decoded images."""

    images: list[np.ndarray]
    """Each [H, W, 3] uint8, all of one size."""
    positions: list[int]
    """Which of the items they are."""
    names: list[str]
    skipped: list[tuple[str, str]]
    """(name, reason) of unreadable ones met on the way."""


class Unreadable(Exception):
    """One image cannot be used; the message says why."""


def decode(
    items: Iterable[Item], img_size: tuple[int, int] | None, *, upscale: bool, origin: str
) -> Iterator[Block]:
    """Decode images in order; block by block, so that memory stays small.

    Without `img_size` all images must have one size. With it others are resized (shorter side,
    bicubic, antialiased) and cropped around their centre. `origin` names the data in errors.

    Raises UserError: images of several sizes without `img_size`; an image smaller than `img_size`
    without `upscale`; no images; more than half of them unreadable.
    """
    workers = min(32, os.cpu_count() or 1)
    read = partial(_read_all, img_size=img_size, upscale=upscale)
    iterator, position, first = iter(items), 0, None
    skipped: list[tuple[str, str]] = []
    with ThreadPoolExecutor(workers) as pool:
        while tasks := list(_batches(islice(iterator, 2 * workers * _TASK), _TASK)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
                results = [result for task in pool.map(read, tasks) for result in task]
            images, positions, names, failed = [], [], [], []
            for (name, _), result in zip((i for task in tasks for i in task), results, strict=True):
                if isinstance(result, str):
                    failed.append((name, result))
                else:
                    first = first or (name, result.shape)
                    _check_same_size(first, (name, result.shape), origin)
                    images.append(result)
                    positions.append(position)
                    names.append(name)
                position += 1
            skipped += failed
            yield Block(images, positions, names, failed)
    if not position:
        raise UserError(f"{origin}: holds no images; add some, or copy it again")
    if 2 * len(skipped) > position:
        name, reason = skipped[0]
        raise UserError(
            f"{origin}: {len(skipped)} of {position} images cannot be read, the first is {name} "
            f"({reason}); mend or remove them"
        )


def to_rgb(source: Path | bytes) -> Image.Image:
    """Open an image as 8-bit RGB. Raises Unreadable with the reason.

    Transparency is composited on white, 16 bits are scaled to 8, of an animation the first frame
    is taken, and the EXIF orientation is honoured.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{image.width}x{image.height} pixels, enormous")
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF: the pixels are still good
                image = ImageOps.exif_transpose(image)
            return _to_8_bit_rgb(image)
    except Unreadable:
        raise
    except Exception as error:  # on damaged files Pillow's readers raise almost anything
        message = str(error) if not isinstance(error, OSError) else error.strerror or str(error)
        reason = message.split("\n")[0] or type(error).__name__
        raise Unreadable("not an image" if "cannot identify" in reason else reason) from None


def fit(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Resize the largest centred part of the shape of `size` (h, w) to that size."""
    if (image.height, image.width) == size:
        return image
    return ImageOps.fit(image, (size[1], size[0]), resample)


def _read_all(
    items: list[Item], img_size: tuple[int, int] | None, upscale: bool
) -> list[np.ndarray | str]:
    return [_read(name, source, img_size, upscale) for name, source in items]


def _read(
    name: str, source: Path | bytes | None, img_size: tuple[int, int] | None, upscale: bool
) -> np.ndarray | str:
    """Return the image [H, W, 3] uint8, or the reason why there is none."""
    try:
        if source is None:
            raise Unreadable("no image data")
        image = to_rgb(source)
    except Unreadable as error:
        return str(error)
    if img_size is not None:
        if not upscale and (image.height < img_size[0] or image.width < img_size[1]):
            raise UserError(
                f"{source if isinstance(source, Path) else name}: {image.height}x{image.width} "
                f"pixels, smaller than --img-size {_text(img_size)}; use a smaller --img-size, or "
                "--upscale to enlarge such images"
            )
        image = fit(image, img_size)
    return np.asarray(image)


def _to_8_bit_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise Unreadable("floating-point pixels have no known scale")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Unreadable("32-bit pixels have no known scale")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _check_same_size(
    first: tuple[str, tuple[int, ...]], this: tuple[str, tuple[int, ...]], origin: str
) -> None:
    if first[1] != this[1]:
        raise UserError(
            f"{origin}: images of different sizes ({first[0]} has {_text(first[1])} pixels, "
            f"{this[0]} has {_text(this[1])}); set --img-size"
        )


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _text(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
