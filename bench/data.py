"""Reading and decoding image files: ours beside torchvision's usual pipeline.

    python bench/data.py

The files are JPEG in the page cache; counted is the steady state, behind what is decoded ahead.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import rates, ratios, script, show
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as v1

from sparsejepa.data.catalog import stream_dataset

_AHEAD = 6  # batches before counting begins: more than any of the contenders decodes ahead


@dataclass(frozen=True)
class Settings:
    """Time reading and decoding of image files."""

    height: int = 375
    width: int = 500
    img_size: int = 224
    files: int = 128
    batch_size: int = 64
    images: int = 768
    """Images per number."""
    workers: int = 2
    rounds: int = 7
    """Numbers per contender: medians and quartiles are over these."""
    threads: int | None = 1


def main(settings: Settings) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as made:
        write_files(Path(made), settings)
        contenders = {"ours": ours, "torchvision ImageFolder + DataLoader": usual}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(settings.rounds):
            for name, make in contenders.items():
                seconds[name].append(steady(make(Path(made), settings), settings.images))
    rows = [
        {"": name, "images/s": rates(1, s), "ours is faster by": ratios(s, seconds["ours"])}
        for name, s in seconds.items()
    ]
    size = f"{settings.width}x{settings.height} to {settings.img_size}"
    show(f"Files of {size}, {settings.workers} workers", rows)


def steady(batches: Iterator[Tensor], images: int) -> float:
    """Return the seconds for an image in the steady state of some endless batches."""
    next(islice(batches, _AHEAD, None))
    began, count = time.perf_counter(), 0
    while count < images:
        count += len(next(batches))
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]
    return seconds / count


def ours(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """Our stream, batch after batch without end; crops are cut on the device."""
    stream = stream_dataset(folder, img_size=(settings.img_size, settings.img_size))
    order = (torch.randperm(len(stream)).split(settings.batch_size) for _ in range(10**6))
    yield from stream.open("cpu", settings.workers).batches(chain.from_iterable(order))


def usual(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """The usual pipeline, batch after batch without end."""
    crop, flip = v1.RandomResizedCrop(settings.img_size, (0.5, 1.0)), v1.RandomHorizontalFlip()
    transform = v1.Compose([crop, flip, v1.ToTensor(), v1.Normalize((0.5,) * 3, (0.25,) * 3)])
    images, workers = datasets.ImageFolder(str(folder / "train"), transform), settings.workers
    loader = DataLoader(images, settings.batch_size, shuffle=True, num_workers=workers,
                        persistent_workers=workers > 0)  # fmt: skip
    while True:
        for x, _ in loader:
            yield x


def write_files(folder: Path, settings: Settings) -> None:
    """Write JPEG files of smooth noise in two class folders."""
    rng, size = np.random.default_rng(0), (settings.width, settings.height)
    for i in range(settings.files + 1):
        noise = rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
        path = folder / ("train" if i else "val") / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


if __name__ == "__main__":
    script(main, Settings)
