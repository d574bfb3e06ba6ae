"""Reading and decoding image files: ours beside its own decoder alone and beside torchvision.

    python -m sparsejepa.benchmarks.loading --workers 2 --rounds 7 --json OUT

All take turns on the same JPEG files, which lie in the page cache, with the same number of worker
processes. Of each the images per second are counted in the steady state: between two batches of one
run, the first of them behind whatever was decoded ahead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsejepa.benchmarks import settings as bench
from sparsejepa.benchmarks.peers import installed
from sparsejepa.benchmarks.settings import BenchSettings, Section
from sparsejepa.benchmarks.timing import Timing, entries, ratios, spread
from sparsejepa.data.augment import Augment
from sparsejepa.data.catalog import stream_dataset
from sparsejepa.data.crew import worker_environment
from sparsejepa.data.stream import open_images
from sparsejepa.environment import environment
from sparsejepa.files import write_text
from sparsejepa.rng import generator

CASES = ((375, 500, 224), (256, 256, 128), (64, 64, 64))
"""Height and width of the files, and side of what they are decoded to."""

_FILES, _BATCH = 128, 64
_AHEAD = 6  # batches before counting begins: more than any of the contenders decodes ahead

# Decodes a share of the files and nothing else: the loop of a worker without what surrounds it.
_ALONE = """
import sys, time
from pathlib import Path
from sparsejepa.data.decode import read_image
side, passes, *files = sys.argv[1:]
paths = [Path(file) for file in files]
read_image("", paths[0], (int(side), int(side)), False)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(passes)):
    for path in paths:
        read_image("", path, (int(side), int(side)), False)
print("done", flush=True)
"""

Contender = Callable[[], float]


def section(settings: BenchSettings) -> Section:
    """Measure all cases with two workers."""
    return measure(2, settings.rounds, quick=settings.quick)


def measure(workers: int, rounds: int, *, quick: bool = False) -> Section:
    """Return images per second of every contender, and how ours compares."""
    result = Section("loading", "Reading and decoding files")
    for height, width, side in CASES:
        passes = 1 if quick else round(6 * (224 / side) ** 2)  # about as many seconds each
        with tempfile.TemporaryDirectory() as folder:
            size = _write(Path(folder), 64 if quick else _FILES, height, width)
            title = f"{width}x{height} to {side}"
            contenders = _contenders(Path(folder), side, workers, passes)
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for contender in contenders.values():
                contender()
            for _ in range(rounds):
                for name, contender in contenders.items():
                    seconds[name].append(contender())
            timings = {name: Timing(f"{title}, {name}", tuple(s)) for name, s in seconds.items()}
        ours = timings["ours"]
        for timing in timings.values():
            row = timing.row(
                **entries("images_per_second", spread([1 / s for s in timing.seconds]))
            )
            result.rows.append(row | entries("x_ours_faster", ratios(timing, ours)))
        share, low, high = ratios(timings["decoder alone"], ours)
        result.notes.append(
            f"{title}, {size / 1000:.0f} kB a file: ours delivers {share:.0%} ({low:.0%} to "
            f"{high:.0%}) of what its decoder alone does"
        )
    return result


def _contenders(folder: Path, side: int, workers: int, passes: int) -> dict[str, Contender]:
    """Each returns the seconds that it takes for an image."""
    files = sorted((folder / "train").rglob("*.jpg"))
    stream = stream_dataset(folder, img_size=(side, side))
    augment = Augment((side, side), mean=stream.mean, std=stream.std)

    def order() -> Iterator[Tensor]:
        for epoch in range(10**6):
            yield from torch.randperm(len(stream), generator=generator(0, epoch, "o")).split(_BATCH)

    def ours() -> float:
        images = open_images(stream, "cpu", workers)
        return _rate(images.batches(order()), len(files) * passes)

    def augmented() -> float:
        images = open_images(stream, "cpu", workers)
        batches = (augment(x, generator(0, 0, "a")) for x in images.batches(order()))
        return _rate(batches, len(files) * passes)

    found: dict[str, Contender] = {
        "ours": ours,
        "ours, cropped and normalised as well": augmented,
        "decoder alone": lambda: _alone(files, side, workers, passes),
    }
    if installed("torchvision"):
        found["torchvision ImageFolder + DataLoader"] = lambda: _rate(
            _usual(folder, side, workers), len(files) * passes
        )
    return found


def _rate(batches: Iterator[Tensor], images: int) -> float:
    """Return the seconds for an image in the steady state of some endless batches."""
    torch.set_num_threads(1)
    next(islice(batches, _AHEAD, None))
    began, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch)
        if count >= images:
            break
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]
    return seconds / count


def _alone(files: list[Path], side: int, workers: int, passes: int) -> float:
    """Return the seconds for an image of as many processes that do nothing but decode."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _ALONE, str(side), str(passes), *map(str, files[i::workers])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=worker_environment(),
        )
        for i in range(workers)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    began = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "done\n"
    seconds = time.perf_counter() - began
    for process in processes:
        process.communicate()
    return seconds / (len(files) * passes)


def _usual(folder: Path, side: int, workers: int) -> Iterator[Tensor]:
    """The usual pipeline, batch after batch without end."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(side, (0.5, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(bench.MEAN, bench.STD),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(folder / "train"), transform),
        _BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
    )
    while True:
        for x, _ in loader:
            yield x


def _write(folder: Path, count: int, height: int, width: int) -> float:
    """Write JPEG files with the spectrum of photographs; return their mean size in bytes."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    sizes = []
    for i in range(count):
        grey, *colour = rng.normal(size=(3, height, width))
        planes = np.fft.rfft2([grey, *(0.3 * c for c in colour)]) / frequency**1.2
        grey, red, blue = np.fft.irfft2(planes, (height, width))
        picture = np.stack([grey + red, grey, grey + blue], -1)
        picture = 128 + 55 * (picture - picture.mean()) / picture.std()
        path = folder / ("train" if i else "val") / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return float(np.mean(sizes))


def main(words: list[str]) -> dict[str, Any]:
    """Measure as the command line says and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="shows that everything works")
    parser.add_argument("--json", type=Path, help="file to write, of one line")
    args = parser.parse_args(words)
    found = measure(args.workers, args.rounds, quick=args.quick)
    for row in found.rows:
        print(
            "{name}: {images_per_second:,.0f} images/s; ours {x_ours_faster:.2f} times ("
            "{x_ours_faster_low:.2f} to {x_ours_faster_high:.2f}) as fast".format(**row)
        )
    print(*found.notes, sep="\n")
    line = {"workers": args.workers, "environment": environment(), "loading": found.rows}
    if args.json:
        write_text(args.json, json.dumps(line) + "\n")
    return line


if __name__ == "__main__":
    main(sys.argv[1:])
