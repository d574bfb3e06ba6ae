"""Object masks from files: masks/ beside images/, one file per image, of the same name."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from sparsejepa.data.decode import EXTENSIONS, fit, formats
from sparsejepa.data.store import ImageSet
from sparsejepa.errors import UserError

LARGEST = 65_535
"""Masks are kept in 16 bits."""

_ORIENTATION = 0x0112  # EXIF; from 5 on, width and height change places


def read_masks(images: Path, masks: Path, image_set: ImageSet) -> np.ndarray | None:
    """Return the masks [N, H, W] of an image set that was read from the folder `images`.

    Grey and palette values are the labels, 0 is the background. A mask has the size of its image's
    file and is cropped and resized like it, to the nearest pixel. With several files of one name,
    a PNG comes first. An image without a readable mask gets an empty one, with a warning; without
    any mask, or if all are empty, the result is None. uint8 if that holds the labels, else uint16.

    Raises UserError: a mask of another size than its image, in colour, or with labels over 65,535.
    """
    if not masks.is_dir():
        return None
    found = _by_name(masks)
    files = [found.get(os.path.splitext(file)[0]) for file in image_set.files]
    read = partial(_read, size=image_set.img_size)
    result = np.zeros((len(image_set), *image_set.img_size), np.uint16)
    missing: list[str] = []
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        pairs = zip((images / file for file in image_set.files), files, strict=True)
        position = 0
        while part := list(islice(pairs, 4096)):  # else all masks would wait in memory
            for mask in pool.map(read, part):
                if mask is None:
                    missing.append(image_set.files[position])
                else:
                    result[position] = mask
                position += 1
    if missing:
        warnings.warn(
            f"{masks}: no readable mask for {len(missing)} of {len(image_set)} images of the "
            f"{image_set.split} split, the first is {missing[0]}; they count as background",
            stacklevel=2,
        )
    if not result.any():
        if len(missing) < len(image_set):
            warnings.warn(f"{masks}: all masks are empty; nothing to compare with", stacklevel=2)
        return None
    return result.astype(np.uint8) if result.max() < 256 else result


def _by_name(folder: Path) -> dict[str, Path]:
    """Return the image files below a folder by their path without its ending."""
    files = [path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS]
    files.sort(key=lambda path: EXTENSIONS.index(path.suffix.lower()), reverse=True)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def _read(pair: tuple[Path, Path | None], size: tuple[int, int]) -> np.ndarray | None:
    """Return one mask [H, W], None if there is none that can be read."""
    path, mask_path = pair
    if mask_path is None:
        return None
    try:
        with Image.open(mask_path, formats=formats()) as mask:
            mask.load()
            labels = np.asarray(mask)
        with Image.open(path, formats=formats()) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION, 1) >= 5:
                width, height = height, width
    except Exception:  # on damaged files Pillow's readers raise almost anything
        return None
    if labels.ndim != 2 or mask.mode == "F":
        raise UserError(
            f"{mask_path}: a mask is a grey or palette image whose values are labels, "
            f"this one is {mask.mode}; convert it"
        )
    if labels.shape != (height, width):
        raise UserError(
            f"{mask_path}: {labels.shape[0]}x{labels.shape[1]} pixels, but its image has "
            f"{height}x{width}; make it the same size"
        )
    if labels.min() < 0 or labels.max() > LARGEST:
        raise UserError(f"{mask_path}: labels must be from 0 to {LARGEST}")
    if labels.shape == size:
        return labels
    whole = Image.fromarray(labels.astype(np.int32))  # 32 bits: a mode that can be resized
    return np.asarray(fit(whole, size, Image.Resampling.NEAREST))
