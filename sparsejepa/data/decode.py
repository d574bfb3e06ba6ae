"""Image files and bytes to uint8 RGB arrays of one size, on a pool of threads.

What cannot be read is left out and reported, and is no reason to stop unless it is too much; what
the user has to decide (images of different sizes, images that are too small) is an error that names
the flag. Loads no torch: the processes that decode a stream need none.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sparsejepa.errors import SizesDiffer, UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""What counts as an image file in a folder."""

MAX_PIXELS = 89_478_485
"""Larger images are taken for decompression bombs and left out (Pillow's own limit)."""

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "DIB", "WEBP", "TIFF", "JPEG2000", "AVIF")
"""What Pillow may take a file for, whatever its name says: others of its readers start programs."""

Item = tuple[str, str | Path | bytes | None]
"""Name for messages, and a file, an encoded image, or None for one that is missing."""

_TASK = 16  # images that a thread takes at once
_STRIP = 2**22  # pixels that are converted at once: bounds the memory that conversions take
_LARGE = 2**24  # pixels of an image that is decoded alone: 64 MiB, and as much for its copy
_SHRINKS = 1.5  # from where on the cheaper filter will do
_alone = threading.Lock()
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
    antialiased) and cropped around their centre. `origin` names the data in errors.

    Raises UserError: images of several sizes without `img_size`; an image smaller than `img_size`
    without `upscale`; no images.
    """
    workers = min(32, os.cpu_count() or 1)
    read = partial(_read_all, img_size=img_size, upscale=upscale)
    iterator, position, first = iter(items), 0, None
    with ThreadPoolExecutor(workers) as pool:
        while tasks := list(_batches(islice(iterator, 2 * workers * _TASK), _TASK)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
                results = [result for task in pool.map(read, tasks) for result in task]
            images, positions, names, failed = [], [], [], []
            for (name, _), result in zip((i for task in tasks for i in task), results, strict=True):
                if isinstance(result, str):
                    failed.append((shown(name), result))
                else:
                    first = first or (name, result.shape)
                    check_same_size(first, (name, result.shape), origin)
                    images.append(result)
                    positions.append(position)
                    names.append(name)
                position += 1
            yield Block(images, positions, names, failed)
    if not position:
        raise UserError(f"{origin}: holds no images; add some, or copy it again")


def check_readable(
    origin: str, skipped: Sequence[tuple[str, str]], total: int, max_unreadable: float
) -> None:
    """Raise UserError if more than the share `max_unreadable` of `total` images, or all of them,
    are in `skipped`, (name, reason) each."""
    if skipped and (len(skipped) > max_unreadable * total or len(skipped) == total):
        name, reason = skipped[0]
        raise UserError(
            f"{origin}: {len(skipped)} of {total} images cannot be read, the first is {name} "
            f"({reason}); mend or remove them, or allow more with --max-unreadable"
        )


def shown(name: str) -> str:
    """Return a file's name as it can be printed: one line, in characters that every screen has."""
    if name.isprintable():
        return name
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name
    )


def check_same_size(
    first: tuple[str, tuple[int, ...]], this: tuple[str, tuple[int, ...]], origin: str
) -> None:
    """Raise SizesDiffer unless two images, (name, shape) each, have the same size."""
    if first[1] != this[1]:
        raise SizesDiffer(
            f"{origin}: images of different sizes ({shown(first[0])} has {_text(first[1])} pixels, "
            f"{shown(this[0])} has {_text(this[1])}); set --img-size (img_size= in Python)"
        )


def size_pair(img_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return height and width from one number or two. Raises UserError for anything else."""
    if img_size is None:
        return None
    sizes = img_size if isinstance(img_size, list | tuple) else (img_size, img_size)
    if len(sizes) != 2 or not all(isinstance(n, int | np.integer) and n > 0 for n in sizes):
        raise UserError(f"img_size {img_size!r}: must be one whole number, or height and width")
    return int(sizes[0]), int(sizes[1])


def to_rgb(source: str | Path | bytes) -> Image.Image:
    """Open an image as 8-bit RGB. Raises Unreadable with the reason.

    Transparency is composited on white, 16 bits are scaled to 8, of an animation the first frame
    is taken, and the EXIF orientation is honoured.
    """
    return _load(source, None)[0]


def _load(
    source: str | Path | bytes, img_size: tuple[int, int] | None
) -> tuple[Image.Image, tuple[float, float]]:
    """As `to_rgb`, perhaps smaller, but no smaller than `img_size` (h, w).

    A JPEG at least twice as large, and upright, is decoded at a half, a quarter or an eighth: its
    coefficients give those sizes in a fraction of the time. Returns also the picture's width and
    height, which the pixels exceed where those do not divide the file's.
    """
    wanted = None if img_size is None else (img_size[1], img_size[0])
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=formats()) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise Unreadable(_enormous(pixels))
            upright = image.format == "JPEG" and _upright(image)
            reduced = None
            if upright and wanted is not None:
                reduced = image.draft(None, wanted)
            with _alone if pixels > _LARGE else contextlib.nullcontext():
                image.load()
                with contextlib.suppress(Exception):  # damaged EXIF: the pixels are still good
                    if not upright:
                        ImageOps.exif_transpose(image, in_place=True)
                rgb = to_8_bit_rgb(image)
                return rgb, reduced[1][2:] if reduced else rgb.size
    except Unreadable:
        raise
    except Image.DecompressionBombError as error:  # Pillow says how many pixels in words only
        pixels = re.search(r"\d+", str(error))
        raise Unreadable(_enormous(int(pixels[0]) if pixels else 2 * MAX_PIXELS)) from None
    except Exception as error:  # on damaged files Pillow's readers raise almost anything
        message = str(error) if not isinstance(error, OSError) else error.strerror or str(error)
        reason = shown(message.split("\n")[0]) or type(error).__name__
        raise Unreadable("not an image" if "cannot identify" in reason else reason) from None


def _enormous(pixels: int) -> str:
    most = MAX_PIXELS // 10**6
    return f"enormous: {pixels // 10**6} megapixels, more than the {most} that are read; shrink it"


def _upright(image: Image.Image) -> bool:
    """Whether a JPEG's pixels lie as the picture does; other formats may say so behind them."""
    with contextlib.suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return True


def fit(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling | None = None,
    extent: tuple[float, float] | None = None,
) -> Image.Image:
    """Resize the largest centred part of the shape of `size` (h, w) to that size.

    Antialiased; bicubic by default, or Hamming where the image shrinks 1.5 times or more: nearly as
    sharp then, and takes two thirds of the time. `extent` is the width and height of the picture
    within the image, from its upper left corner; all of it if not given.
    """
    width, height = extent or image.size
    if image.size == (size[1], size[0]) == (width, height):
        return image
    if resample is None:
        shrinks = min(height / size[0], width / size[1]) >= _SHRINKS
        resample = Image.Resampling.HAMMING if shrinks else Image.Resampling.BICUBIC
    wide, high = min(width, height * size[1] / size[0]), min(height, width * size[0] / size[1])
    left, top = (width - wide) / 2, (height - high) / 2
    return image.resize((size[1], size[0]), resample, (left, top, left + wide, top + high))


def read_image(
    name: str,
    source: str | Path | bytes | None,
    img_size: tuple[int, int] | None,
    upscale: bool,
) -> np.ndarray | str:
    """Return the image [H, W, 3] uint8, or the reason why there is none.

    Raises UserError for one that is smaller than `img_size` without `upscale`.
    """
    try:
        if source is None:
            raise Unreadable("no image data")
        image, extent = _load(source, img_size)
    except Unreadable as error:
        return str(error)
    if img_size is not None:
        if not upscale and (image.height < img_size[0] or image.width < img_size[1]):
            where = name if isinstance(source, bytes) else str(source)
            raise UserError(
                f"{shown(where)}: {image.height}x{image.width} "
                f"pixels, smaller than --img-size {_text(img_size)}; use a smaller --img-size, or "
                "--upscale to enlarge such images"
            )
        image = fit(image, img_size, extent=extent)
    return np.asarray(image)


@functools.cache
def formats() -> tuple[str, ...]:
    """Return what Pillow may take a file for, as far as this build of it can."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _read_all(
    items: list[Item], img_size: tuple[int, int] | None, upscale: bool
) -> list[np.ndarray | str]:
    return [read_image(name, source, img_size, upscale) for name, source in items]


def to_8_bit_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB. Raises Unreadable for pixels whose scale is not known."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise Unreadable("floating-point pixels have no known scale")
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(_strip_to_rgb(strip), (0, top))
    return result


def _strip_to_rgb(image: Image.Image) -> Image.Image:
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


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _text(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
