"""Reading, decoding and cropping image files: ours beside torchvision's usual pipeline.

    python bench/data.py

The files are JPEG in the page cache; counted is the steady state, behind what is decoded ahead.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
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

from sparsejepa.data.augment import Augment
from sparsejepa.data.catalog import stream_dataset
from sparsejepa.rng import generator

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
    side, batch = settings.img_size, settings.batch_size
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_files(folder, settings)
        stream = stream_dataset(folder, img_size=(side, side))
        augment = Augment((side, side), mean=stream.mean, std=stream.std)

        def ours() -> Iterator[Tensor]:
            order = (torch.randperm(len(stream)).split(batch) for _ in range(10**6))
            flat = chain.from_iterable(order)
            yield from stream.open("cpu", settings.workers).batches(flat)

        def cropped() -> Iterator[Tensor]:
            return (augment(x, generator(0, 0, "augment")) for x in ours())

        contenders: dict[str, Callable[[], Iterator[Tensor]]] = {
            "ours": ours,
            "ours, cropped and normalised as well": cropped,
            "torchvision ImageFolder + DataLoader": lambda: usual(folder, settings),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(settings.rounds):
            for name, make in contenders.items():
                seconds[name].append(steady(make(), settings.images))
    rows = [
        {"": name, "images/s": rates(1, s), "ours is faster by": ratios(s, seconds["ours"])}
        for name, s in seconds.items()
    ]
    size = f"{settings.width}x{settings.height} to {side}"
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


def usual(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """The usual pipeline, batch after batch without end."""
    crop, flip = v1.RandomResizedCrop(settings.img_size, (0.5, 1.0)), v1.RandomHorizontalFlip()
    normalise = v1.Normalize((0.5,) * 3, (0.25,) * 3)
    transform = v1.Compose([crop, flip, v1.ToTensor(), normalise])
    images, workers = datasets.ImageFolder(str(folder / "train"), transform), settings.workers
    loader = DataLoader(images, settings.batch_size, shuffle=True, num_workers=workers,
                        persistent_workers=workers > 0)  # fmt: skip
    while True:
        for x, _ in loader:
            yield x


def write_files(folder: Path, settings: Settings) -> None:
    """Write JPEG files in two class folders: noise whose power falls as that of photographs."""
    rng, size = np.random.default_rng(0), (settings.height, settings.width)
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None])
    frequency[0, 0] = 1
    for i in range(settings.files + 1):
        noise = np.fft.rfft2(rng.normal(size=(3, *size))) / frequency**1.2
        planes = np.fft.irfft2(noise, size).transpose(1, 2, 0)
        picture = 128 + 55 * (planes - planes.mean()) / planes.std()
        path = folder / ("train" if i else "val") / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)


if __name__ == "__main__":
    script(main, Settings)
