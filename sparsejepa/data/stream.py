"""Images that are read and decoded while they are needed, for more than a disk can hold decoded.

An `ImageStream` stands where an `ImageSet` does, without its array of pixels. PyTorch's DataLoader
runs the worker processes. Which images come when is the caller's: the same indices give the same
batches whatever the number of workers, so that a run resumes at the very next image.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsejepa.data.folders import Listing, Reader
from sparsejepa.data.images import (
    Batches,
    ChannelMoments,
    Images,
    check_readable,
    check_same_size,
    decode,
    read_image,
    shown,
)
from sparsejepa.distributed import World
from sparsejepa.errors import UserError

SAMPLE = 1024
"""Images from which mean, standard deviation and, if need be, the size are found."""
_FEW = 100  # images seen before a share of unreadable ones says anything
_AHEAD = 2  # parts of batches that each worker decodes ahead
_SHARED_MEMORY = "/dev/shm"
_LESS = "use fewer --workers (0 decodes without processes) or a smaller --batch-size"


@dataclass(frozen=True, eq=False)
class ImageStream(Images):
    """One split of a data set that is decoded while it is read.

    Mean and standard deviation are those of a fixed sample of the training split; `skipped` has
    what is known beforehand not to be usable.
    """

    images: Reader
    rows: np.ndarray = field(kw_only=True)
    """[N] int64: which of the reader's images these are."""
    size: tuple[int, int] = field(kw_only=True)
    first: str | None = field(kw_only=True)
    """The image whose own size that is; None if others are resized to it."""
    upscale: bool = field(kw_only=True)
    origin: str = field(kw_only=True)
    """Names the data in errors."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of every image."""
        return self.size

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Where each image comes from."""
        return tuple(map(self.images.name, self.rows.tolist()))

    def read(self, position: int) -> np.ndarray | str:
        """Return one image [H, W, 3] uint8, or the reason why there is none.

        Raises UserError for an image of another size, or too small.
        """
        size = self.img_size if self.first is None else None
        name, source = self.images.item(int(self.rows[position]))
        image = read_image(name, source, size, self.upscale)
        if self.first is not None and not isinstance(image, str):
            check_same_size((self.first, (*self.img_size, 3)), (name, image.shape), self.origin)
        return image

    def open(self, device: torch.device | str, workers: int | None = None) -> StreamImages:
        """Return batches on a device, decoded by `workers` processes.

        By default one per CPU core that this process has, shared among those of its job on this
        machine. With 0 the images are decoded when they are asked for, by threads.
        """
        return StreamImages(self, device, _cores() if workers is None else workers)

    def _take(self, index: np.ndarray, about: str, **own: Any) -> ImageStream:
        return super()._take(index, about, rows=self.rows[index])


def open_stream(
    train: Listing, listing: Listing, img_size: tuple[int, int] | None, *, upscale: bool = False
) -> ImageStream:
    """Return the stream of `listing`, with the mean and standard deviation of `train`.

    Those are of `SAMPLE` images, always the same ones, and exact if there are no more. Without
    `img_size` (h, w) it is that of the first of them.

    Raises UserError: no images, images of different sizes or too small, too many unreadable ones.
    """
    sample, moments, first, unreadable = train.rows, ChannelMoments(), None, []
    if len(sample) > SAMPLE:
        rng = np.random.default_rng(0)
        sample = sample[np.sort(rng.choice(len(sample), SAMPLE, replace=False))]
    for name, image in decode(train.items(sample), img_size, upscale=upscale, origin=train.origin):
        if isinstance(image, str):
            unreadable.append((shown(name), image))
        else:
            first = first or (name, image.shape)
            moments.add(image)
    check_readable(train.origin, unreadable, len(sample))
    assert first is not None  # or else all are unreadable
    next(listing.items())
    return ImageStream(
        listing.name,
        listing.split,
        listing.reader,
        listing.targets,
        **moments.result(),
        skipped=(*listing.unusable, *(unreadable if listing is train else ())),
        fingerprint=listing.digest(),
        rows=listing.rows,
        size=first[1][:2],
        first=first[0] if img_size is None else None,
        upscale=upscale,
        origin=listing.origin,
    )


def _cores() -> int:
    """Return the CPU cores for this process; those of a machine are divided among its processes.

    Not once more where each was given its own by torchrun's --numa-binding.
    """
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # macOS
    own, local = len(affinity(0)), World.from_environment().local_size
    # The parent, torchrun, has the cores of all.
    return own if local == 1 else max(1, min(own, len(affinity(os.getppid())) // local))


_Part = tuple[Tensor, "list[tuple[int, str]]", str]
"""Images [n, H, W, 3] uint8, (place, reason) of unreadable ones, and an error if there is one."""


class _Pixels(Dataset[_Part]):
    """Parts of batches for the DataLoader."""

    def __init__(self, stream: ImageStream) -> None:
        self.stream = stream

    def __getitems__(self, positions: list[int]) -> _Part:
        """Decode the images at some positions of the stream, into memory that is shared."""
        failed = []
        try:
            images = torch.empty((len(positions), *self.stream.img_size, 3), dtype=torch.uint8)
            images.share_memory_()  # here and not on the way back, where a failure is lost
            for place, image in enumerate(map(self.stream.read, positions)):
                if isinstance(image, str):
                    failed.append((place, image))
                else:
                    images[place] = torch.from_numpy(image)
        except UserError as error:
            return torch.empty(0), [], str(error)
        except RuntimeError as error:
            return torch.empty(0), [], f"{_SHARED_MEMORY}: {error}; {_LESS}"
        return images, failed, ""


def _as_it_is(part: Any) -> Any:
    return part


def _begin_work(number: int) -> None:
    """Set up a worker process: signals are the trainer's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files


class StreamImages(Batches):
    """Batches of a stream on a device.

    An unreadable image is replaced by the next readable one of the stream, so that batches stay
    whole and the same however they are divided among processes.
    """

    index_device = torch.device("cpu")

    def __init__(self, stream: ImageStream, device: torch.device | str, workers: int) -> None:
        self.stream, self.device, self.workers = stream, torch.device(device), workers
        self.skipped, self.unreadable = [], set()
        self._seen = np.zeros(len(stream), bool)
        self._running: list[Generator[Tensor, None, None]] = []

    def take(self, index: Tensor) -> Tensor:
        """Return images [B, H, W, 3] uint8 on the device, decoded now; index: [B] int64."""
        positions = index.cpu().numpy()
        batch = self._empty(len(positions))
        images = batch.numpy()
        with ThreadPoolExecutor(self.workers or _cores()) as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
            for place, image in enumerate(pool.map(self.stream.read, positions)):
                bad = isinstance(image, str)
                images[place] = self._next_to(int(positions[place]), image) if bad else image
        self._see(positions)
        return batch.to(self.device, non_blocking=True)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield images [B, H, W, 3] uint8 on the device for each index [B], in order.

        Each worker decodes its part of a batch, and `_AHEAD` batches are on their way. Raises
        UserError if a worker died, or met an image that is the user's to mend.
        """
        if not self.workers:
            return map(self.take, indices)
        self._running.append(self._batches(indices))
        return self._running[-1]

    def close(self) -> None:
        """End the workers of batches that were not read to the end."""
        while self._running:
            self._running.pop().close()

    def _batches(self, indices: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        plan: deque[np.ndarray] = deque()
        indices = iter(indices)
        first = next(indices, None)
        if first is None:
            return
        _check_shared_memory(len(first) * 3 * math.prod(self.stream.img_size))

        def parts() -> Iterator[list[int]]:
            for index in chain([first], indices):
                plan.append(index.cpu().numpy())
                yield from (part.tolist() for part in np.array_split(plan[-1], self.workers))

        decoded = self._start(parts())
        while plan:
            positions = plan.popleft()
            batch, start = self._empty(len(positions)), 0
            images = batch.numpy()
            for _ in range(self.workers):
                part, failed, error = self._receive(decoded)
                if error:
                    raise UserError(error)
                images[start : start + len(part)] = part.numpy()
                for k, reason in failed:
                    images[start + k] = self._next_to(int(positions[start + k]), reason)
                start += len(part)
            self._see(positions)
            yield batch.to(self.device, non_blocking=True)

    def _start(self, parts: Iterator[list[int]]) -> Iterator[_Part]:
        """Start the workers. They end when what is returned here is no longer referred to.

        On Linux they are forked: they share the list of images, and a script needs no guard.
        """
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if main and os.name == "posix" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of more workers than cores, of forks beside threads
            decoded = iter(
                DataLoader(
                    _Pixels(self.stream),
                    batch_sampler=parts,  # type: ignore[arg-type]
                    num_workers=self.workers,
                    prefetch_factor=_AHEAD,
                    collate_fn=_as_it_is,
                    worker_init_fn=_begin_work,
                    multiprocessing_context="fork" if sys.platform == "linux" else None,
                    generator=torch.Generator(),  # leaves the global one alone
                )
            )
        if before is not None:
            # PyTorch's handler would raise wherever the trainer is; `_receive` finds out as well.
            signal.signal(signal.SIGCHLD, before)
        return decoded

    def _receive(self, decoded: Iterator[_Part]) -> _Part:
        try:
            return next(decoded)
        except (RuntimeError, OSError, EOFError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"a process that decodes images died ({reason}), perhaps for want of memory; "
                f"{_LESS}, and --resume"
            ) from None

    def _empty(self, size: int) -> Tensor:
        shape = (size, *self.stream.img_size, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _next_to(self, position: int, reason: str) -> np.ndarray:
        """Return the next readable image [H, W, 3] after an unreadable one."""
        other = position
        self._list(position, reason)
        for _ in range(len(self.stream)):
            if other not in self.unreadable:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    image = self.stream.read(other)
                if not isinstance(image, str):
                    return image
                self._list(other, image)
            other = (other + 1) % len(self.stream)
        raise UserError(f"{self.stream.origin}: no image can be read; mend or replace them")

    def _list(self, position: int, reason: str) -> None:
        self._seen[position] = True
        if position not in self.unreadable:
            self.unreadable.add(position)
            name = self.stream.images.name(int(self.stream.rows[position]))
            self.skipped.append((shown(name), reason))

    def _see(self, positions: np.ndarray) -> None:
        """Count images that were looked at; stop when too many of them are unreadable."""
        self._seen[positions] = True
        if self.unreadable and (seen := int(self._seen.sum())) >= min(_FEW, len(self.stream)):
            check_readable(self.stream.origin, self.skipped, seen)


def _check_shared_memory(batch_bytes: int) -> None:
    """Raise UserError if the batches that are decoded ahead do not fit into /dev/shm.

    Those of all processes of the job on this machine.
    """
    if os.path.isdir(_SHARED_MEMORY):
        free = shutil.disk_usage(_SHARED_MEMORY).free
        need = (_AHEAD + 1) * batch_bytes * World.from_environment().local_size
        if free < need:
            raise UserError(
                f"{_SHARED_MEMORY}: {free / 1e6:.0f} MB are free, and --workers need "
                f"{need / 1e6:.0f} MB; enlarge it (docker run --shm-size), or {_LESS}"
            )
