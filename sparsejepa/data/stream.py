"""Images that are read and decoded while they are needed, for more than a disk can hold decoded.

An `ImageStream` stands where an `ImageSet` does, without its array of pixels. Which images come
when is the caller's: the same indices give the same batches whatever the number of processes, so
that a run resumes at the very next image.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from sparsejepa.data.crew import Crew, Decoder, Shared
from sparsejepa.data.decode import check_readable, decode, shown
from sparsejepa.data.readers import MEMORY, Rows, source_of
from sparsejepa.data.sources import Listing
from sparsejepa.data.store import ChannelMoments, DeviceImages, Divisible, ImageSet, Target
from sparsejepa.distributed import World
from sparsejepa.errors import UserError
from sparsejepa.rng import generator

SAMPLE = 1024
"""Images from which mean, standard deviation and, if need be, the size are found."""

_SAMPLE_BLOCKS = 4  # stretches from which they are taken where images come in stretches
_TASK = 32  # images that a worker decodes at once, at most
_RING_BYTES = 2**28  # decoded images that wait at once, at most
_FEW = 100  # images seen before a share of unreadable ones says anything
_MIXED = 4096  # images of stretches that are mixed with one another, about
_MIXED_BLOCKS = 8, 64  # stretches that are: enough for some workers; so few that memory holds them


class _Names(Sequence[str]):
    """The names of a stream's images; each is made when it is asked for."""

    def __init__(self, stream: ImageStream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        rows = self._stream.rows[index]
        name = self._stream.decoder.reader.name
        return tuple(map(name, rows.tolist())) if isinstance(index, slice) else name(int(rows))


@dataclass(frozen=True, eq=False)
class ImageStream(Divisible):
    """One split of a data set that is decoded while it is read."""

    name: str
    split: str
    shared: Shared
    """A `Decoder`."""
    rows: np.ndarray
    """[N] int64: which of the reader's images these are."""
    targets: dict[str, Target]
    """First the primary target; empty if the images are unlabelled."""
    mean: tuple[float, float, float]
    """Per channel, of a fixed sample of the training split, in units of [0, 1]."""
    std: tuple[float, float, float]
    skipped: tuple[tuple[str, str], ...] = ()
    """(file, reason) of what is known beforehand not to be usable."""
    fingerprint: str = ""
    """Changes whenever the list of images or a label does."""
    max_unreadable: float = 0.5
    """Largest share of images that may be replaced by others because they cannot be read."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def decoder(self) -> Decoder:
        """How an image becomes pixels."""
        return self.shared.value

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of every image."""
        return self.decoder.img_size

    @property
    def files(self) -> Sequence[str]:
        """Where each image comes from."""
        return _Names(self)

    @property
    def blocks(self) -> np.ndarray | None:
        """Lengths of the stretches of images that are fetched together, if there are any."""
        block = self.decoder.reader.block(self.rows)
        if block is None:
            return None
        starts = np.flatnonzero(np.diff(block, prepend=-1))
        return np.diff(starts, append=len(block))

    def _take(self, index: np.ndarray, about: str) -> ImageStream:
        return replace(
            self,
            rows=self.rows[index],
            targets={key: target.take(index) for key, target in self.targets.items()},
            fingerprint=self._fingerprint_of(about),
        )


def open_stream(
    train: Listing,
    listing: Listing,
    img_size: tuple[int, int] | None,
    *,
    upscale: bool = False,
    max_unreadable: float = 0.5,
) -> ImageStream:
    """Return the stream of `listing`, with the mean and standard deviation of `train`.

    Those are of `SAMPLE` images, always the same ones, and exact if there are no more. Without
    `img_size` it is that of the first of them.

    Raises UserError: no images, images of different sizes or too small, too many unreadable ones.
    """
    train.check()
    sample = _sample(train)
    items = ((train.reader.name(row), source_of(train.reader, row)) for row in sample.tolist())
    moments, first, unreadable = ChannelMoments(), None, []
    for block in decode(items, img_size, upscale=upscale, origin=train.origin):
        unreadable += block.skipped
        if block.images:
            first = first or (block.names[0], block.images[0].shape)
            moments.add(np.stack(block.images))
    check_readable(train.origin, unreadable, len(sample), max_unreadable)
    assert first is not None  # or else all are unreadable
    mean, std = moments.result()
    own = first[0] if img_size is None else None
    decoder = Decoder(listing.check().reader, listing.origin, first[1][:2], own, upscale)
    if listing is not train:
        unreadable = []
    else:
        _warn_of_huge_groups(train)
    return ImageStream(
        listing.name,
        listing.split,
        Shared(decoder),
        listing.rows,
        listing.targets,
        mean,
        std,
        skipped=(*listing.unusable, *unreadable),
        fingerprint=_fingerprint(listing),
        max_unreadable=max_unreadable,
    )


def open_images(
    images: ImageSet | ImageStream, device: torch.device | str, workers: int | None = None
) -> DeviceImages | StreamImages:
    """Return batches of images on a device; a stream's are decoded by `workers` processes.

    By default one per CPU core that this process has, shared among those of its job on this
    machine. With 0, and on Windows always, the images are decoded when they are asked for, by
    threads.
    """
    if isinstance(images, ImageSet):
        return DeviceImages(images, device)
    if os.name != "posix":  # no pipes that can be waited for, nor files that children inherit
        workers = 0
    return StreamImages(images, device, _cores() if workers is None else workers)


def _cores() -> int:
    """Return the CPU cores for this process; those of a machine are divided among its processes.

    Not once more where each was given its own: by SLURM, or by torchrun's --numa-binding.
    """
    count = os.cpu_count() or 1
    local = World.from_environment().local_size
    if not hasattr(os, "sched_getaffinity"):
        return max(1, count // local)
    own = len(os.sched_getaffinity(0))
    if local == 1:
        return own
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun: the parent has the cores of all
        count = min(count, max(own, len(os.sched_getaffinity(os.getppid()))))
    else:
        granted = os.environ.get("SLURM_CPUS_ON_NODE", "")
        count = int(granted) if granted.isdecimal() else count
    return max(1, min(own, count // local))


class _Chunk(NamedTuple):
    """Images of one batch that a worker decodes at once."""

    size: int
    """Of the batch."""
    positions: np.ndarray
    """[n]: which images of the stream."""
    places: np.ndarray
    """[n]: where in the batch."""
    worker: int
    last: bool
    """Whether the batch is whole with it."""


class StreamImages:
    """Batches of a stream on a device; stands where `DeviceImages` does.

    An unreadable image is replaced by the next readable one of the stream, so that batches stay
    whole and the same however they are divided among processes.
    """

    def __init__(self, stream: ImageStream, device: torch.device | str, workers: int) -> None:
        self.stream, self.device, self.workers = stream, torch.device(device), workers
        self.skipped: list[tuple[str, str]] = []
        """(file, reason) of the unreadable images met so far, each once."""
        self._instead: dict[int, int] = {}
        self.unreadable: set[int] = set()
        """Their positions in the stream."""
        self._seen, self._count = np.zeros(len(stream), bool), 0
        self._crews: list[Crew] = []

    def __len__(self) -> int:
        return len(self.stream)

    @property
    def index_device(self) -> torch.device:
        """Where `take` wants its index: on the host."""
        return torch.device("cpu")

    def take(self, index: Tensor) -> Tensor:
        """Return images [B, H, W, 3] uint8 on the device, decoded now; index: [B] int64."""
        batch, positions = self._empty(len(index)), self._known(index)
        images, places = batch.numpy(), np.arange(len(index))
        block = self.stream.decoder.reader.block(self.stream.rows[positions])
        if block is not None:
            places = _together(block)
        rows = self.stream.rows[positions[places]].tolist()
        with ThreadPoolExecutor(self.workers or _cores()) as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
            results = pool.map(self.stream.decoder.read, rows)
            for place, image in zip(places, results, strict=True):
                bad = isinstance(image, str)
                images[place] = self._next_to(int(positions[place]), image) if bad else image
        self._see(positions)
        return self._send(batch)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield images [B, H, W, 3] uint8 on the device for each index [B], in order.

        Later batches are decoded meanwhile, as many as fit into the ring; `indices` is read ahead
        for them. Raises UserError when a worker dies.
        """
        indices = iter(indices)
        first = next(indices, None)
        if first is None:
            return
        indices = chain([first], indices)
        if not self.workers:
            yield from map(self.take, indices)
            return
        capacity = max(1, min(_TASK, -(-len(first) // self.workers)))
        slots = 2 * -(-len(first) // capacity) + 2 * self.workers
        bytes_each = 3 * self.stream.img_size[0] * self.stream.img_size[1]
        slots = max(2 * self.workers, min(slots, _RING_BYTES // (capacity * bytes_each)))
        own = self.stream.blocks is not None
        crew = Crew(self.stream.shared, self.workers, slots, capacity, own)
        self._crews.append(crew)
        try:
            chunks = self._chunks(indices, capacity)
            yield from self._batches(crew, chunks, deque(range(slots)))
        finally:
            self._crews.remove(crew)
            crew.close()

    def close(self) -> None:
        """End the workers of batches that were not read to the end."""
        for crew in self._crews:
            crew.close()

    def _chunks(self, indices: Iterable[Tensor], capacity: int) -> Iterator[_Chunk]:
        """Divide batches; images of one stretch go to one worker, one after the other."""
        owners = _Owners(self.workers)
        for index in indices:
            positions, places = self._known(index), np.arange(len(index))
            owner = np.zeros(len(index), np.int64)
            block = self.stream.decoder.reader.block(self.stream.rows[positions])
            if block is not None:
                places = _together(block)
                owner = owners(block[places])
            parts = [
                (worker, part)
                for worker in np.unique(owner).tolist()
                for part in _cut(places[owner == worker], capacity)
            ] or [(0, places)]
            for number, (worker, part) in enumerate(parts, 1):
                last = number == len(parts)
                yield _Chunk(len(index), positions[part], part, worker, last)

    def _batches(self, crew: Crew, chunks: Iterator[_Chunk], free: deque[int]) -> Iterator[Tensor]:
        """Put batches together from what the workers decode into the slots of the ring."""
        waiting: deque[tuple[int, _Chunk]] = deque()
        done: dict[int, list[tuple[int, str]]] = {}

        def submit() -> None:
            while free and (chunk := next(chunks, None)) is not None:
                slot = free.popleft()
                crew.submit(slot, self.stream.rows[chunk.positions], chunk.worker)
                waiting.append((slot, chunk))

        submit()
        batch = self._empty(0)
        while waiting:
            slot, chunk = waiting.popleft()
            while slot not in done:
                done.update(crew.wait())
            if not len(batch):
                batch = self._empty(chunk.size)
            images = batch.numpy()
            images[chunk.places] = crew.pixels(slot)[: len(chunk.positions)]
            for k, reason in done.pop(slot):
                images[chunk.places[k]] = self._next_to(int(chunk.positions[k]), reason)
            free.append(slot)
            self._see(chunk.positions)
            submit()
            if chunk.last:
                yield self._send(batch)
                batch = self._empty(0)

    def _empty(self, size: int) -> Tensor:
        shape = (size, *self.stream.img_size, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _send(self, batch: Tensor) -> Tensor:
        return batch.to(self.device, non_blocking=True)

    def _known(self, index: Tensor) -> np.ndarray:
        """Return the positions of an index, those known to be unreadable replaced."""
        positions = index.cpu().numpy()
        if self._instead:
            positions = np.array([self._instead.get(p, p) for p in positions.tolist()], np.int64)
        return positions

    def _next_to(self, position: int, reason: str) -> np.ndarray:
        """Return the next readable image [H, W, 3] after an unreadable one."""
        decoder, rows = self.stream.decoder, self.stream.rows
        self._list(position, reason)
        other = self._instead.get(position, position)
        for _ in range(len(self)):
            if other not in self.unreadable:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    image = decoder.read(int(rows[other]))
                if not isinstance(image, str):
                    self._instead[position] = other
                    self._see(np.array([other]))
                    return image
                self._list(other, image)
            other = (other + 1) % len(self)
        self._check(len(self))
        raise UserError(f"{decoder.origin}: no image can be read; mend or replace them")

    def _list(self, position: int, reason: str) -> None:
        if position not in self.unreadable:
            self.unreadable.add(position)
            name = self.stream.decoder.reader.name(int(self.stream.rows[position]))
            self.skipped.append((shown(name), reason))
            self._see(np.array([position]))

    def _see(self, positions: np.ndarray) -> None:
        """Count images that were looked at; stop when too many of them are unreadable."""
        new = np.unique(positions[~self._seen[positions]])
        self._seen[new] = True
        self._count += len(new)
        if self._count >= min(_FEW, len(self)):
            self._check(self._count)

    def _check(self, seen: int) -> None:
        limit = self.stream.max_unreadable
        check_readable(self.stream.decoder.origin, self.skipped, seen, limit)


class _Owners:
    """Which worker reads which stretch: new ones in turn, and each keeps what is still in use.

    So a stretch is fetched by one worker, and the workers have equally many.
    """

    def __init__(self, workers: int) -> None:
        self._workers, self._now, self._turn = workers, 0, 0
        self._owner: dict[int, int] = {}
        self._used: dict[int, int] = {}

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Return the worker [n] for each image by its stretch [n]; to be asked in order."""
        self._now += len(block)
        for one in [b for b, used in self._used.items() if used < self._now - _MIXED - len(block)]:
            del self._used[one], self._owner[one]
        for one in dict.fromkeys(block.tolist()):
            if one not in self._owner:
                self._owner[one] = self._turn % self._workers
                self._turn += 1
            self._used[one] = self._now
        return np.array([self._owner[one] for one in block.tolist()], np.int64)


def _together(block: np.ndarray) -> np.ndarray:
    """Return the places [n] of images so that those of one stretch [n] follow one another.

    Stretches stay in the order of their first image: what is read no more comes first.
    """
    _, first, inverse = np.unique(block, return_index=True, return_inverse=True)
    return np.argsort(first[inverse.reshape(-1)], kind="stable")


def mixed_blocks(count: int, images: int, window: int = _MIXED) -> int:
    """Return how many of `count` stretches of `images` are mixed with one another."""
    fewest, most = _MIXED_BLOCKS
    return min(most, max(fewest, window * count // max(1, images)))


def block_order(blocks: np.ndarray, seed: int, epoch: int, window: int = _MIXED) -> Tensor:
    """Return the order [N] int64 of an epoch over images that come in stretches.

    Args:
        blocks: lengths of the stretches, in the order of the images.
        seed, epoch: what the order is a function of.
        window: images that are mixed with one another, about: always those of 8 to 64 stretches.

    The stretches are shuffled, and then the images of every few: whoever reads on needs those few
    at a time, and none of them again.
    """
    keyed = generator(seed, epoch, "order")
    ends = torch.from_numpy(np.cumsum(blocks))
    starts = ends - torch.from_numpy(np.asarray(blocks))
    shuffled = torch.randperm(len(blocks), generator=keyed)
    mixed, none = [], torch.empty(0, dtype=torch.int64)
    for few in shuffled.split(mixed_blocks(len(blocks), int(np.sum(blocks)), window)):
        part = torch.cat([none, *(torch.arange(int(starts[i]), int(ends[i])) for i in few)])
        mixed.append(part[torch.randperm(len(part), generator=keyed)])
    return torch.cat(mixed)


def _cut(places: np.ndarray, size: int) -> list[np.ndarray]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _sample(listing: Listing) -> np.ndarray:
    """Return rows for the statistics, ascending; where images come in stretches, of a few."""
    rows, rng = listing.rows, np.random.default_rng(0)
    if len(rows) <= SAMPLE:
        return rows
    block = listing.reader.block(rows)
    if block is None:
        return rows[np.sort(rng.choice(len(rows), SAMPLE, replace=False))]
    chosen = rng.permutation(np.unique(block))[:_SAMPLE_BLOCKS]
    share = SAMPLE // len(chosen)
    return np.concatenate([rows[block == one][:share] for one in np.sort(chosen)])


def _warn_of_huge_groups(listing: Listing) -> None:
    """Say that row groups, of which the sample is still there, do not fit into the memory."""
    if not isinstance(listing.reader, Rows):
        return
    count = len(np.unique(listing.reader.block(listing.rows)))
    few = min(count, mixed_blocks(count, len(listing.rows)))
    each = listing.reader.group_bytes()
    if few * each > MEMORY:
        warnings.warn(
            f"{listing.origin}: row groups of {each / 1e6:,.0f} MB, of which {few} do "
            f"not fit into {MEMORY / 1e9:.1f} GB, so that each is fetched several times an epoch; "
            f"write the files anew with row groups of at most {MEMORY / few / 1e6:.0f} MB",
            stacklevel=3,
        )


def _fingerprint(listing: Listing) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (*listing.reader.parts(), listing.rows.tobytes()):
        digest.update(part)
    for key, target in listing.targets.items():
        digest.update(json.dumps([key, target.names]).encode() + target.values.tobytes())
    return digest.hexdigest()
