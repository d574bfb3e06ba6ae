"""What is known of a data set without decoding it: sizes of its images, counts of classes."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from sparsejepa.data.decode import formats
from sparsejepa.data.readers import source_of
from sparsejepa.data.sources import Listing
from sparsejepa.data.store import Target

_MOST_NAMES = 10
"""Classes that a line names."""

Size = tuple[int, int]
"""Height and width."""


class Sizes(NamedTuple):
    """Sizes of the images whose header can be read."""

    smallest: Size
    """The one with the shortest side."""
    largest: Size
    """The one with the most pixels."""
    differ: bool
    smaller: int
    """Images that are smaller than what they are to be decoded to."""
    count: int


def measure(
    listings: Sequence[Listing], img_size: Size | None, sample: int | None = None
) -> Sizes | None:
    """Read the headers of all images, or of about `sample` of each listing; None if none can be."""
    tasks = [
        (listing, row)
        for listing in listings
        for row in listing.rows[:: -(-len(listing.rows) // sample) if sample else 1].tolist()
    ]
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        found = [size for size in pool.map(_size, tasks, chunksize=64) if size is not None]
    if not found:
        return None
    height, width = img_size or (0, 0)
    return Sizes(
        min(found, key=lambda size: (min(size), max(size))),
        max(found, key=lambda size: size[0] * size[1]),
        len(set(found)) > 1,
        sum(h < height or w < width for h, w in found),
        len(found),
    )


def size_problem(sizes: Sizes | None, img_size: Size | None, upscale: bool) -> str | None:
    """Return why images of these sizes are not decoded, and what to do; None if they are."""
    if sizes is None:
        return None
    least = min(sizes.smallest)
    where = f"smallest {_text(sizes.smallest)}, largest {_text(sizes.largest)}"
    if img_size is None:
        several = f"{where}: set --img-size, at most {least} (more with --upscale)"
        return several if sizes.differ else None
    if upscale or not sizes.smaller:
        return None
    wanted = img_size[0] if img_size[0] == img_size[1] else _text(img_size)
    return (
        f"{where}; {sizes.smaller} of {sizes.count} are smaller than {wanted}: --upscale or "
        f"--img-size {least}"
    )


def class_counts(targets: Mapping[str, Target]) -> dict[str, dict[str, int]]:
    """Return how many images of each class there are, by target; classes without any left out."""
    found = {}
    for key, target in targets.items():
        counts = np.bincount(target.values, minlength=len(target.names)).tolist()
        found[key] = {n: c for n, c in zip(target.names, counts, strict=True) if c}
    return found


def counts_text(counts: Mapping[str, int]) -> str:
    """Return the first classes with their counts in one line."""
    first = [f"{name} {count}" for name, count in list(counts.items())[:_MOST_NAMES]]
    rest = len(counts) - len(first)
    return ", ".join([*first, f"and {rest} more"] if rest else first)


def one_sided(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """Return a line for each target that has classes in one split only.

    `counts` are those of `class_counts`, by split.
    """
    lines = []
    for key in counts["train"]:
        parts = []
        for split, other in (("train", "test"), ("test", "train")):
            own = counts[split].get(key, {})
            alone = {n: c for n, c in own.items() if n not in counts[other].get(key, {})}
            if alone:
                total = sum(alone.values())
                images = f"{total} image{'s' * (total != 1)}"
                names = list(alone)[:_MOST_NAMES]
                more = [f"and {len(alone) - len(names)} more"] if len(alone) > len(names) else []
                parts.append(f"only in {split}: {', '.join([*names, *more])} ({images})")
        if parts:
            lines.append(f"{key}: {'; '.join(parts)}")
    return lines


def skipped_lines(skipped: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each (file, reason), or one for all of a reason that many files share."""
    by_reason: dict[str, list[str]] = {}
    for file, reason in skipped:
        by_reason.setdefault(reason, []).append(file)
    lines = []
    for reason, files in by_reason.items():
        if len(files) > _MOST_NAMES:
            lines.append(f"skipped {len(files)} files: {reason}; the first is {files[0]}")
        else:
            lines += [f"skipped {file}: {reason}" for file in files]
    return lines


def _size(task: tuple[Listing, int]) -> Size | None:
    """Return an image's size as its header has it, the orientation regarded; None without one."""
    listing, row = task
    source: Any = source_of(listing.reader, row)
    with contextlib.suppress(Exception):  # on damaged files Pillow's readers raise almost anything
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=formats()) as image:
            turned = image.format == "JPEG" and (  # others would be decoded for it
                image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            )
            return (image.width, image.height) if turned else (image.height, image.width)
    return None


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
