"""Images as uint8 arrays of one size: decoded from files, cached, divided, put on a device.

An `ImageSet` is one split of a data set, decoded, usually a memory map of the cache; its batches on
a device are `DeviceImages`. `Images` and `Batches` are what these have in common with streams,
which decode while they are read. Letters: N images of a set, B of a batch, H x W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from sparsejepa.errors import SizesDiffer, UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""What counts as an image file in a folder."""
MAX_PIXELS = 89_478_485
"""Larger images are taken for decompression bombs and left out (Pillow's own limit)."""
_ENORMOUS = f"enormous: more than the {MAX_PIXELS // 10**6} megapixels that are read; shrink it"
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "DIB", "WEBP", "TIFF", "JPEG2000", "AVIF")
"""What Pillow may take a file for, whatever its name says: others of its readers start programs."""
_TASK = 16  # images that a thread decodes at once
_HOLDOUT_SEED = 0x5E7A51DE

Item = tuple[str, "str | Path | bytes | None"]
"""Name for messages, and a file, an encoded image, or None for one that is missing."""
Decoded = tuple[str, "np.ndarray | str"]
"""Name, and the pixels [H, W, 3] uint8 or the reason why there are none."""


# --- Decoding -------------------------------------------------------------------------------------


def decode(
    items: Iterable[Item], img_size: tuple[int, int] | None, *, upscale: bool, origin: str
) -> Iterator[Decoded]:
    """Decode images in order on a pool of threads, some at a time, so that memory stays small.

    Without `img_size` (h, w) all images must have one size. With it others are resized (shorter
    side, antialiased) and cropped around their centre. `origin` names the data in errors.

    Raises UserError: images of several sizes without `img_size`; an image smaller than `img_size`
    without `upscale`.
    """
    workers = min(32, os.cpu_count() or 1)
    iterator, first = iter(items), None

    def read(some: list[Item]) -> list[Decoded]:
        return [(name, read_image(name, source, img_size, upscale)) for name, source in some]

    with ThreadPoolExecutor(workers) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        while tasks := [t for _ in range(2 * workers) if (t := list(islice(iterator, _TASK)))]:
            for part in pool.map(read, tasks):
                for name, image in part:
                    if not isinstance(image, str):
                        first = first or (name, image.shape)
                        check_same_size(first, (name, image.shape), origin)
                    yield name, image


def read_image(
    name: str, source: str | Path | bytes | None, img_size: tuple[int, int] | None, upscale: bool
) -> np.ndarray | str:
    """Return the image [H, W, 3] uint8, or the reason why there is none.

    Transparency is composited on white, 16 bits are scaled to 8, of an animation the first frame is
    taken, and the EXIF orientation is honoured. Raises UserError for an image that is smaller than
    `img_size` (h, w) without `upscale`.
    """
    if not source:
        return "no image data"
    try:
        image, extent = _open_image(source, img_size)
    except Image.DecompressionBombError:
        return _ENORMOUS
    except Exception as error:  # on damaged files Pillow's readers raise almost anything
        message = str(error) if not isinstance(error, OSError) else error.strerror or str(error)
        reason = shown(message.split("\n")[0]) or type(error).__name__
        return "not an image" if "cannot identify" in reason else reason
    if img_size is None:
        return np.asarray(image)
    if not upscale and (image.height < img_size[0] or image.width < img_size[1]):
        where = name if isinstance(source, bytes) else str(source)
        raise UserError(
            f"{shown(where)}: {image.height}x{image.width} pixels, smaller than --img-size "
            f"{_text(img_size)}; use a smaller --img-size, or --upscale to enlarge such images"
        )
    return np.asarray(fit(image, img_size, extent=extent))


def _open_image(
    source: str | Path | bytes, img_size: tuple[int, int] | None
) -> tuple[Image.Image, tuple[float, float]]:
    """Open an image as 8-bit RGB; return also the width and height of the picture within it.

    An upright JPEG at least twice as large as `img_size` (h, w) is decoded at a half, a quarter or
    an eighth: its coefficients give those sizes in a fraction of the time, and some pixels more
    where they do not divide the file's.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file, formats=formats()) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        upright, reduced = image.format == "JPEG", None  # other formats say it behind the pixels
        with contextlib.suppress(Exception):  # damaged EXIF: the pixels are still good
            upright &= image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if upright and img_size is not None:
            reduced = image.draft(None, (img_size[1], img_size[0]))
        image.load()
        with contextlib.suppress(Exception):
            if not upright:
                ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image)
        return rgb, reduced[1][2:] if reduced else rgb.size


@functools.cache
def formats() -> tuple[str, ...]:
    """Return what Pillow may take a file for, as far as this build of it can."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB. Raises ValueError for pixels whose scale is not known."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known scale")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no known scale")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
        shrinks = min(height / size[0], width / size[1]) >= 1.5
        resample = Image.Resampling.HAMMING if shrinks else Image.Resampling.BICUBIC
    wide, high = min(width, height * size[1] / size[0]), min(height, width * size[0] / size[1])
    left, top = (width - wide) / 2, (height - high) / 2
    return image.resize((size[1], size[0]), resample, (left, top, left + wide, top + high))


def shown(name: str) -> str:
    """Return a file's name as it can be printed: one line, in characters that every screen has."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
    return name if name.isprintable() else "".join(escaped)


def check_readable(origin: str, skipped: Sequence[tuple[str, str]], total: int) -> None:
    """Raise UserError if more than half of `total` images are in `skipped`, (name, reason) each."""
    if len(skipped) > total / 2:
        name, reason = skipped[0]
        raise UserError(
            f"{origin}: {len(skipped)} of {total} images cannot be read, the first is {name} "
            f"({reason}); mend or remove them"
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


def _text(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"


# --- Sets of images -------------------------------------------------------------------------------


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


@dataclass(frozen=True, eq=False)
class Images(ABC):
    """One split of a data set, of one image size, with labels: an `ImageSet` or a stream."""

    name: str
    split: str
    images: Any
    """The pixels, or what decodes them."""
    targets: dict[str, Target]
    """First the primary target; empty if the images are unlabelled."""
    mean: tuple[float, float, float]
    """Per channel, of the training split, in units of [0, 1]."""
    std: tuple[float, float, float]
    skipped: tuple[tuple[str, str], ...] = ()
    """(file, reason) of what could not be used."""
    fingerprint: str = ""
    """Changes whenever an image (of a stream: the list of images) or a label does."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def img_size(self) -> tuple[int, int]:
        """Height and width of every image."""

    @abstractmethod
    def open(self, device: torch.device | str, workers: int | None = None) -> Batches:
        """Return batches on a device; a stream's are decoded by `workers` processes."""

    @property
    def primary(self) -> Target | None:
        """The first target, if there is one."""
        return next(iter(self.targets.values()), None)

    def subset(self, limit: int | None, seed: int = 0) -> Self:
        """Return `limit` images at random, each class in proportion; all if there are not more.

        Reading order, mean and standard deviation stay those of the whole split.
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

    def _take(self, index: np.ndarray, about: str, **own: Any) -> Self:
        """Return the images at `index`; `about` tells them from others in the fingerprint."""
        targets = {key: target.take(index) for key, target in self.targets.items()}
        fingerprint = _digest(f"{self.fingerprint}/{about}".encode())
        return replace(self, targets=targets, fingerprint=fingerprint, **own)

    def _draw(self, count: int, seed: int) -> np.ndarray:
        labels = self.primary.values if self.primary else np.zeros(len(self), np.int64)
        return stratified(labels, count, np.random.default_rng(seed % 2**64))


@dataclass(frozen=True, eq=False)
class ImageSet(Images):
    """One split of a data set, decoded."""

    images: np.ndarray
    """[N, H, W, 3] uint8, usually a read-only memory map."""
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

    def open(self, device: torch.device | str, workers: int | None = None) -> DeviceImages:
        """Return batches on a device; nothing is to be decoded, so `workers` has no effect."""
        return DeviceImages(self, device)

    def _take(self, index: np.ndarray, about: str, **own: Any) -> ImageSet:
        files = tuple(self.files[i] for i in index) if self.files else ()
        masks = None if self.masks is None else self.masks[index]
        return super()._take(index, about, images=self.images[index], files=files, masks=masks)


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
    """Exact per-channel mean and standard deviation of uint8 images."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), np.int64)

    def add(self, image: np.ndarray) -> None:
        """Count the pixels of an image [H, W, 3]."""
        for channel, values in enumerate(image.reshape(-1, 3).T):
            self.counts[channel] += np.bincount(values, minlength=256)

    def result(self) -> dict[str, tuple[float, float, float]]:
        """Return `mean` and `std` in units of [0, 1].

        A constant channel gets the standard deviation 1/255, so that dividing by it is safe.
        """
        level = np.arange(256) / 255
        total = np.maximum(self.counts.sum(1), 1)
        mean = self.counts @ level / total
        std = np.sqrt((self.counts * (level - mean[:, None]) ** 2).sum(1) / total)
        return {"mean": _triple(mean), "std": _triple(np.where(std > 0, std, 1 / 255))}


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    first, second, third = (float(v) for v in values)
    return first, second, third


# --- Batches on a device --------------------------------------------------------------------------

DEVICE_SHARE = 0.6
"""A set is copied to a GPU when it takes less than this share of the free memory."""


class Batches(ABC):
    """Batches of images on a device."""

    device: torch.device
    skipped: list[tuple[str, str]]
    """(file, reason) of images that could not be used."""
    unreadable: set[int]
    """Positions of those that a stream replaces by others."""
    index_device: torch.device
    """Where `take` wants its index; from elsewhere the host waits for it."""

    @abstractmethod
    def take(self, index: Tensor) -> Tensor:
        """Return images [B, H, W, 3] uint8 on the device; index: [B] int64."""

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each index, in order."""
        return map(self.take, indices)

    def close(self) -> None:  # noqa: B027
        """End what works in the background, if anything does."""


class DeviceImages(Batches):
    """Batches of an image set on a device.

    On the CPU they come from the memory map itself, on a GPU from a copy if that takes less than
    `DEVICE_SHARE` of the free memory. Otherwise each batch is gathered on the host and sent over.
    """

    def __init__(self, image_set: ImageSet, device: torch.device | str) -> None:
        self.device = torch.device(device)
        with warnings.catch_warnings():
            # The map is read-only and so is everything that is done with the tensor.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._host = torch.from_numpy(image_set.images)
        self.skipped, self.unreadable = list(image_set.skipped), set()
        self.resident = True
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            self.resident = self._host.nbytes < DEVICE_SHARE * free
        self._images = self._host.to(self.device) if self.resident else self._host
        self.index_device = self._images.device

    def take(self, index: Tensor) -> Tensor:
        """Return images [B, H, W, 3] uint8 on the device; index: [B] int64."""
        if self.resident:
            return self._images.index_select(0, index.to(self.device, non_blocking=True))
        batch = self._host.index_select(0, index.cpu())
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)


# --- The cache ------------------------------------------------------------------------------------

CACHE_FORMAT = 3
"""Part of a cache's key: raise it when the same source would decode to something else."""
_CHUNK = 2**24  # bytes per checksum


@dataclass(frozen=True, eq=False)
class Source(ABC):
    """One split before it is decoded."""

    name: str
    split: str
    targets: dict[str, Target]
    """Of all images, readable or not."""
    origin: str
    """Names the data in errors."""
    unusable: tuple[tuple[str, str], ...] = ()
    """(file, reason) of what is left out before decoding."""
    about: str = ""
    """Where the test split comes from, for people."""

    @abstractmethod
    def stamp(self) -> str:
        """Return what changes when the files or labels do: part of the cache's key."""

    @abstractmethod
    def read(self, img_size: tuple[int, int] | None, upscale: bool) -> Iterator[Decoded]:
        """Yield the decoded images, in order."""

    def masks(self, images: ImageSet) -> np.ndarray | None:
        """Return object masks [N, H, W] of the decoded split, if there are any."""
        return None


@contextlib.contextmanager
def filled(path: Path) -> Iterator[Path]:
    """Give a folder beside `path` to write to, which becomes `path` at the end.

    Processes may race. Raises UserError when the disk does not take it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        if not path.exists():  # else another process has written it meanwhile
            raise UserError(
                f"{path.parent}: {error.strerror or error} for the cached images; free some "
                "space, or set SPARSEJEPA_CACHE to a folder on another disk"
            ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cache_path(cache_dir: Path, name: str, split: str, *key: Any) -> Path:
    """Return the place in the cache of what is made from a split; `key` tells versions apart."""
    digest = hashlib.blake2b(json.dumps([split, *key]).encode(), digest_size=8).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "images"
    return cache_dir / f"{slug}-{split}-{digest}"


def load(
    source: Source, cache_dir: Path, img_size: tuple[int, int] | None, upscale: bool
) -> ImageSet:
    """Return the decoded split from the cache; decode it into the cache first if need be.

    A cache is a folder with images.npy (uint8 [N, H, W, 3]), kept.npy (int64 [N], which of the
    source's images these are) and meta.json.

    Raises UserError when the cache cannot be written or is damaged, from decoding, and when more
    than half of the images cannot be read.
    """
    key = (CACHE_FORMAT, source.stamp(), img_size, upscale)
    path = cache_path(cache_dir, source.name, source.split, *key)
    if not path.exists():
        with filled(path) as folder:
            _write_cache(folder, source, source.read(img_size, upscale))
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        kept = np.load(path / "kept.npy", allow_pickle=False)
        images = ImageSet(
            name=source.name,
            split=source.split,
            images=np.load(path / "images.npy", mmap_mode="r", allow_pickle=False),
            targets={key: target.take(kept) for key, target in source.targets.items()},
            mean=_triple(meta["mean"]),
            std=_triple(meta["std"]),
            skipped=(*source.unusable, *((file, reason) for file, reason in meta["skipped"])),
            fingerprint=meta["fingerprint"],
            files=tuple(meta["files"]),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: damaged ({error}); delete this folder, it is made anew") from None
    unreadable = images.skipped[len(source.unusable) :]
    check_readable(source.origin, unreadable, len(images) + len(unreadable))
    return images


def _write_cache(folder: Path, source: Source, decoded: Iterable[Decoded]) -> None:
    moments, shape = ChannelMoments(), (0,)
    kept, files, skipped = list[int](), list[str](), list[tuple[str, str]]()
    with (folder / "images.npy").open("wb") as file:
        for position, (name, image) in enumerate(decoded):
            if isinstance(image, str):
                skipped.append((shown(name), image))
                continue
            if not kept:
                _write_header(file, (0, *image.shape))
            kept.append(position)
            files += [name] if name else []
            moments.add(image)
            file.write(np.ascontiguousarray(image).data)
            shape = (len(kept), *image.shape)
        file.seek(0)
        _write_header(file, shape)
        file.flush()
        os.fsync(file.fileno())
    np.save(folder / "kept.npy", np.array(kept, np.int64))
    values = [target.values[kept] for target in source.targets.values()]
    labels = io.BytesIO()
    np.save(labels, np.array(values, np.int64).reshape(len(values), len(kept)))
    with (folder / "images.npy").open("rb") as file:
        sums = {"images.npy": _checksums(file), "targets.npy": _checksums(labels)}
    names = {key: target.names for key, target in source.targets.items()}
    fingerprint = _digest(json.dumps([sums, names]).encode())
    meta = {"skipped": skipped, "files": files, "fingerprint": fingerprint, **moments.result()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    """An .npy header; numpy pads it, so that its length does not depend on the number of images."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _checksums(file: IO[bytes]) -> dict[str, Any]:
    """Return the size of an open file and the sum of every 16 MiB, as the fingerprint wants it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return {"size": size, "chunks": [_digest(c) for c in iter(lambda: file.read(_CHUNK), b"")]}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
