"""The cache of decoded images: one folder per source, image size and format.

A folder holds images.npy (uint8 [N, H, W, 3]), targets.npy (int64 [T, N]) and meta.json with the
names, statistics and checksums.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sparsejepa.data.decode import Block, check_readable
from sparsejepa.data.store import ChannelMoments, ImageSet, Target, triple
from sparsejepa.errors import UserError

CACHE_FORMAT = 2
"""Part of a cache's key: raise it when the same source would decode to something else."""

_CHUNK = 2**24  # bytes per checksum
_CHECK_ALL = 2**30  # larger files are checked at 64 places instead of wholly


@dataclass(frozen=True)
class Source:
    """One split before it is decoded."""

    name: str
    split: str
    stamp: str
    """Changes when the files do; part of the cache's key."""
    read: Callable[[tuple[int, int] | None, bool], tuple[Iterable[Block], dict[str, Target]]]
    """(img_size, upscale) -> decoded blocks, and targets of all items, readable or not."""
    masks: Callable[[ImageSet], np.ndarray | None] | None = None
    """The decoded split -> object masks [N, H, W], if any; they are not cached."""
    origin: str = ""
    """Names the data in errors."""
    unusable: int = 0
    """How many entries are left out before decoding, for another reason than being unreadable."""


def load(
    source: Source,
    cache_dir: Path,
    img_size: tuple[int, int] | None,
    upscale: bool,
    max_unreadable: float = 0.5,
) -> ImageSet:
    """Return the decoded split from the cache; decode it into the cache first if need be.

    The cache is written beside its place and renamed, so that a reader never sees half of it and
    processes may race. A damaged one is decoded again, with a warning. Mean and standard deviation
    are those of this split.

    Raises UserError when the cache folder cannot be written, from decoding, and when more than the
    share `max_unreadable` of the images cannot be read.
    """
    text = json.dumps([CACHE_FORMAT, source.split, source.stamp, img_size, upscale])
    key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).strip("-.") or "images"
    path = cache_dir / f"{slug}-{source.split}-{key}"
    if path.exists():
        try:
            images = _open(path, source)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path}: damaged cache ({error}); decoding again", stacklevel=2)
        else:
            _check(source, len(images), images.skipped, max_unreadable)
            return images
    blocks, targets = source.read(img_size, upscale)
    partial = cache_dir / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        partial.mkdir()
        kept, skipped = _write(partial, source, blocks, targets)
        _check(source, kept, skipped, max_unreadable)
        return _publish(partial, path, source)
    except OSError as error:  # reading the source raises UserError: this is the cache's disk
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "no space left" if full else error.strerror or str(error)
        remedy = "free some or set" if full else "set"
        raise UserError(
            f"{cache_dir}: {reason} for the decoded images; {remedy} SPARSEJEPA_CACHE to a folder "
            "on another disk"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(
    source: Source, kept: int, skipped: Sequence[tuple[str, str]], max_unreadable: float
) -> None:
    unreadable = skipped[source.unusable :]
    check_readable(source.origin, unreadable, kept + len(unreadable), max_unreadable)


def _write(
    folder: Path, source: Source, blocks: Iterable[Block], targets: dict[str, Target]
) -> tuple[int, list[tuple[str, str]]]:
    """Write a cache; return how many images it has and what was left out."""
    moments, positions, files, skipped = ChannelMoments(), [], [], []
    shape: tuple[int, ...] = (0,)
    with (folder / "images.npy").open("wb") as file:
        for block in blocks:
            positions += block.positions
            files += block.names
            skipped += block.skipped
            if block.images:
                images = np.stack(block.images)
                moments.add(images)
                if not file.tell():
                    _write_header(file, images.shape)
                file.write(images.data)
                shape = (len(positions), *images.shape[1:])
        file.seek(0)
        _write_header(file, shape)
        _sync(file)
    kept = {key: target.take(np.array(positions, np.int64)) for key, target in targets.items()}
    with (folder / "targets.npy").open("wb") as file:
        values = [t.values for t in kept.values()]
        np.save(file, np.array(values, np.int64).reshape(len(kept), len(positions)))
        _sync(file)
    mean, std = moments.result()
    meta = {
        "format": CACHE_FORMAT,
        "name": source.name,
        "split": source.split,
        "targets": {k: t.names for k, t in kept.items()},
        "notes": {k: t.note for k, t in kept.items() if t.note},
        "mean": mean,
        "std": std,
        "skipped": skipped,
        "files": files,
        "checksums": {f: _checksums(folder / f) for f in ("images.npy", "targets.npy")},
    }
    with (folder / "meta.json").open("w", encoding="utf-8") as file:
        file.write(json.dumps({**meta, "digest": _digest(meta)}))
        _sync(file)
    return len(positions), skipped


def _open(folder: Path, source: Source) -> ImageSet:
    """Open a cache. Raises ValueError, KeyError, TypeError or OSError when it is damaged."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta.pop("digest") != _digest(meta):
        raise ValueError("meta.json is not as it was written")
    for name, written in meta["checksums"].items():
        _verify(folder / name, written)
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    values = np.load(folder / "targets.npy", allow_pickle=False)
    names, notes = meta["targets"], meta.get("notes", {})
    return ImageSet(
        name=source.name,
        split=source.split,
        images=images,
        targets={
            key: Target(own, tuple(names[key]), notes.get(key, ""))
            for key, own in zip(names, values, strict=True)
        },
        mean=triple(meta["mean"]),
        std=triple(meta["std"]),
        skipped=tuple((file, reason) for file, reason in meta["skipped"]),
        fingerprint=_digest([meta["checksums"], names]),
        files=tuple(meta["files"]),
    )


def _publish(partial: Path, path: Path, source: Source) -> ImageSet:
    """Move a finished cache into place, or take the one that another process has put there."""
    _sync_folder(partial)
    for _ in range(2):
        try:
            partial.rename(path)
            _sync_folder(path.parent)
            break
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return _open(path, source)
        damaged = partial.with_name(partial.name + "-damaged")
        path.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    return _open(path, source)


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    """An .npy header; numpy pads it, so that its length does not depend on the number of images."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _checksums(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        return {"size": size, "chunks": [_chunk(file, i) for i in range(-(-size // _CHUNK))]}


def _verify(path: Path, written: dict[str, Any]) -> None:
    if path.stat().st_size != written["size"]:
        raise ValueError(f"{path.name} has another size")
    count = len(written["chunks"])
    places = range(count) if written["size"] <= _CHECK_ALL else np.linspace(0, count - 1, 64)
    with path.open("rb") as file:
        for i in sorted({int(place) for place in places}):
            if _chunk(file, i) != written["chunks"][i]:
                raise ValueError(f"{path.name} is not as it was written")


def _chunk(file: IO[bytes], index: int) -> str:
    file.seek(index * _CHUNK)
    return hashlib.blake2b(file.read(_CHUNK), digest_size=16).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed while writing left here more than a day ago."""
    for old in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 86_400:
                shutil.rmtree(old, ignore_errors=True)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
