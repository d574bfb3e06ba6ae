"""Decoded images as one uint8 array, usually a memory map, and batches of them on a device.

Nothing here knows where images come from (`catalog` does); this is what the rest of the package
works with. Letters: N images of a set, B of a batch, H x W pixels.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from sparsejepa.errors import UserError

_HOLDOUT_SEED = 0x5E7A51DE

DEVICE_SHARE = 0.6
"""A set is copied to a GPU when it takes less than this share of the free memory."""


@dataclass(frozen=True, eq=False)
class Target:
    """One label per image: values [N] int64, each an index into `names`."""

    values: np.ndarray
    names: tuple[str, ...]
    note: str = ""
    """What was done to the values: numbers cut into bins."""

    def take(self, index: np.ndarray) -> Target:
        """Return the target of the chosen images: their positions, or [N] bool."""
        return replace(self, values=self.values[index])


class Divisible(ABC):
    """Images with labels, of which parts can be taken."""

    name: str
    targets: dict[str, Target]
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def primary(self) -> Target | None:
        """The first target, if there is one."""
        return next(iter(self.targets.values()), None)

    def subset(self, limit: int | None, seed: int = 0) -> Self:
        """Return `limit` images at random, each class in proportion; all if there are not more.

        Reading order is kept; mean and standard deviation stay those of the whole training split,
        so that runs on subsets of different size see equally scaled pixels.
        """
        if limit is None or limit >= len(self):
            return self
        return self._take(self._draw(limit, seed), f"{limit}/{seed}")

    def split_off(self, count: int) -> tuple[Self, Self]:
        """Return the rest and `count` images at random, each class in proportion.

        The draw has a seed of its own: whoever sets images aside gets the same ones.
        """
        if not 0 < count < len(self):
            raise UserError(f"--holdout {count}: {self.name} has {len(self)} training images")
        aside = self._draw(count, _HOLDOUT_SEED)
        rest = np.setdiff1d(np.arange(len(self)), aside)
        return self._take(rest, f"without {count}"), self._take(aside, f"aside {count}")

    @abstractmethod
    def _take(self, index: np.ndarray, about: str) -> Self:
        """Return the images at `index`; `about` tells them from others in the fingerprint."""

    def _draw(self, count: int, seed: int) -> np.ndarray:
        """Return the ascending indices of `count` images, each class in proportion."""
        labels = self.primary.values if self.primary else np.zeros(len(self), np.int64)
        return stratified(labels, count, np.random.default_rng(seed % 2**64))

    def _fingerprint_of(self, about: str) -> str:
        digest = hashlib.blake2b(f"{self.fingerprint}/{about}".encode(), digest_size=16)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageSet(Divisible):
    """One split of a data set, decoded and of one image size."""

    name: str
    split: str
    images: np.ndarray
    """[N, H, W, 3] uint8, usually a read-only memory map."""
    targets: dict[str, Target]
    """First the primary target; empty if the images are unlabelled."""
    mean: tuple[float, float, float]
    """Per channel, of the training split, in units of [0, 1]."""
    std: tuple[float, float, float]
    skipped: tuple[tuple[str, str], ...] = ()
    """(file, reason) of what could not be used."""
    fingerprint: str = ""
    """Changes whenever an image or a label does."""
    files: tuple[str, ...] = field(default=(), repr=False)
    """Where each image comes from, relative to the folder; empty when images are not files."""
    masks: np.ndarray | None = field(default=None, repr=False)
    """[N, H, W] uint8 or uint16: 0 the background, k the k-th object; None if not known."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of every image."""
        return self.images.shape[1], self.images.shape[2]

    def _take(self, index: np.ndarray, about: str) -> ImageSet:
        return replace(
            self,
            images=self.images[index],
            targets={key: target.take(index) for key, target in self.targets.items()},
            files=tuple(self.files[i] for i in index) if self.files else (),
            masks=None if self.masks is None else self.masks[index],
            fingerprint=self._fingerprint_of(about),
        )


def stratified(labels: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Choose `limit` of the labels [N], each class in proportion (largest remainders).

    Returns ascending indices; ties between remainders are broken at random.
    """
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, random within
    counts = np.bincount(labels)
    share = counts * (limit / max(1, len(labels)))
    quota = np.floor(share).astype(np.int64)
    remainder = (share - quota) + rng.random(len(counts)) * 1e-9
    quota[np.argsort(-remainder)[: limit - quota.sum()]] += 1
    starts = np.cumsum(counts) - counts
    chosen = [order[s : s + q] for s, q in zip(starts, quota, strict=True)]
    return np.sort(np.concatenate(chosen))


class ChannelMoments:
    """Exact per-channel mean and standard deviation of uint8 images, block by block."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), np.int64)

    def add(self, images: np.ndarray) -> None:
        """Count the pixels of images [n, H, W, 3]."""
        pixels = images.reshape(-1, 3)
        for start in range(0, len(pixels), 2**18):  # bincount makes 64-bit copies: keep them small
            for channel, values in enumerate(pixels[start : start + 2**18].T):
                self.counts[channel] += np.bincount(values, minlength=256)

    def result(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation in units of [0, 1].

        A constant channel gets the standard deviation 1/255, so that dividing by it is safe.
        """
        level = np.arange(256) / 255
        total = np.maximum(self.counts.sum(1), 1)
        mean = self.counts @ level / total
        variance = (self.counts * (level - mean[:, None]) ** 2).sum(1) / total
        std = np.sqrt(variance)
        return triple(mean), triple(np.where(std > 0, std, 1 / 255))


class DeviceImages:
    """Batches of an image set on a device.

    The set is resident when it fits: on the CPU it is the memory map itself, without a copy, on a
    GPU a copy if that takes less than 60 % of the free memory. Otherwise each batch is gathered on
    the host and sent over.
    """

    def __init__(self, image_set: ImageSet, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._host = _as_tensor(image_set.images)
        self.skipped = list(image_set.skipped)
        """(file, reason) of what could not be used."""
        self.resident = self._fits()
        self._images = self._host.to(self.device) if self.resident else self._host

    def __len__(self) -> int:
        return len(self._host)

    @property
    def index_device(self) -> torch.device:
        """Where `take` wants its index: with the images."""
        return self._images.device

    def take(self, index: Tensor) -> Tensor:
        """Return images [B, H, W, 3] uint8 on the device; index: [B] int64.

        The index belongs on `index_device`; from elsewhere the host waits for it.
        """
        if self.resident:
            return self._images.index_select(0, index.to(self.device, non_blocking=True))
        batch = self._host.index_select(0, index.cpu())
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each index, in order."""
        return map(self.take, indices)

    def close(self) -> None:
        """Nothing to end: here for the sake of `stream.StreamImages`."""

    def _fits(self) -> bool:
        if self.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return self._host.nbytes < DEVICE_SHARE * free


def triple(values: Iterable[float]) -> tuple[float, float, float]:
    """Three floats, one per channel."""
    first, second, third = (float(v) for v in values)
    return first, second, third


def _as_tensor(images: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # The map is read-only and so is everything that is done with the tensor.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(images)
