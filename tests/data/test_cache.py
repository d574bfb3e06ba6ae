"""The cache of decoded images: same answers, no half-written folders, damage noticed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsejepa.data import cache
from sparsejepa.data.cache import Source, load
from sparsejepa.data.decode import Block
from sparsejepa.data.store import Target
from sparsejepa.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (1001, 6, 5, 3), np.uint8)
LABELS = RNG.integers(0, 3, 1001)


def source(*, stamp: str = "s", calls: list[str] | None = None, delay: float = 0.0) -> Source:
    """1,001 images in blocks of 100, every tenth unreadable: the count changes its digits."""

    def read(img_size: object, upscale: bool) -> tuple[list[Block], dict[str, Target]]:
        if calls is not None:
            calls.append("read")
        blocks = []
        for start in range(0, 1001, 100):
            kept = [i for i in range(start, min(start + 100, 1001)) if i % 10]
            names = [f"{i}.png" for i in kept]
            failed = [(f"{i}.png", "broken") for i in range(start, min(start + 100, 1001), 10)]
            blocks.append(Block(list(IMAGES[kept]), kept, names, failed))
        time.sleep(delay)
        names = ("a", "b", "c")
        return blocks, {"class": Target(LABELS, names), "zero": Target(LABELS * 0, ("0",))}

    return Source("my set!", "train", stamp, read)


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_decoded_once_and_equal_afterwards(tmp_path: Path):
    calls: list[str] = []
    first = load(source(calls=calls), tmp_path / "deep" / "cache", None, False)
    again = load(source(calls=calls), tmp_path / "deep" / "cache", None, False)
    assert calls == ["read"]
    kept = np.arange(1001)[np.arange(1001) % 10 > 0]
    for images in (first, again):
        assert isinstance(images.images, np.memmap) and not images.images.flags.writeable
        assert images.images.dtype == np.uint8 and (images.images == IMAGES[kept]).all()
        assert (images.targets["class"].values == LABELS[kept]).all()
        assert images.targets["class"].names == ("a", "b", "c")
        assert list(images.targets) == ["class", "zero"]
        assert images.files == tuple(f"{i}.png" for i in kept)
        assert images.skipped == tuple((f"{i}.png", "broken") for i in range(0, 1001, 10))
        scaled = IMAGES[kept].reshape(-1, 3) / 255
        np.testing.assert_allclose(images.mean, scaled.mean(0), rtol=1e-12)
        np.testing.assert_allclose(images.std, scaled.std(0), rtol=1e-12)
    assert first.fingerprint == again.fingerprint
    (name,) = folders(tmp_path / "deep" / "cache")
    assert name.startswith("my-set-train-")


def test_key_depends_on_source_size_and_upscale(tmp_path: Path):
    load(source(), tmp_path, None, False)
    load(source(stamp="other"), tmp_path, None, False)
    load(source(), tmp_path, (6, 5), False)
    load(source(), tmp_path, (6, 5), True)
    assert len(folders(tmp_path)) == 4


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_byte(folder / "images.npy", -1),
        lambda folder: flip_byte(folder / "images.npy", 200),
        lambda folder: flip_byte(folder / "targets.npy", -8),
        lambda folder: flip_byte(folder / "meta.json", 300),
        lambda folder: os.truncate(folder / "images.npy", 1000),
        lambda folder: os.truncate(folder / "meta.json", 50),
        lambda folder: (folder / "meta.json").write_text("[]"),
        lambda folder: (folder / "targets.npy").unlink(),
        lambda folder: shutil.rmtree(folder) or folder.mkdir(),
    ],
)
def test_damage_is_noticed_and_mended(tmp_path: Path, damage: Callable[[Path], object]):
    before = load(source(), tmp_path, None, False)
    fingerprint = before.fingerprint
    (name,) = folders(tmp_path)
    del before
    damage(tmp_path / name)
    with pytest.warns(UserWarning, match=r"damaged cache .* decoding again"):
        after = load(source(), tmp_path, None, False)
    assert after.fingerprint == fingerprint
    assert folders(tmp_path) == [name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(source(), tmp_path, None, False)


def test_large_files_are_checked_at_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "_CHUNK", 512)
    monkeypatch.setattr(cache, "_CHECK_ALL", 4096)
    load(source(), tmp_path, None, False)
    (name,) = folders(tmp_path)
    for place in (0, -1):
        flip_byte(tmp_path / name / "images.npy", place)
        with pytest.warns(UserWarning, match="damaged cache"):
            load(source(), tmp_path, None, False)
    meta = json.loads((tmp_path / name / "meta.json").read_text())
    size = (tmp_path / name / "images.npy").stat().st_size
    assert len(meta["checksums"]["images.npy"]["chunks"]) == -(-size // 512)


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path):
    """A real limit on the size of files stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"no space left .*SPARSEJEPA_CACHE") as caught:
            load(source(), tmp_path / "cache", None, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "cache") in str(caught.value)
    assert folders(tmp_path / "cache") == []
    assert len(load(source(), tmp_path / "cache", None, False)) == 900


def test_no_space_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        load(source(), tmp_path, None, False)
    assert folders(tmp_path) == []


def test_cache_folder_that_cannot_be_one(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set SPARSEJEPA_CACHE to a folder"):
        load(source(), tmp_path / "file" / "cache", None, False)


def test_errors_and_interrupts_while_decoding_leave_nothing(tmp_path: Path):
    for error in (UserError("too small"), KeyboardInterrupt()):

        def read(img_size: object, upscale: bool, error: BaseException = error):
            def blocks():
                yield Block(list(IMAGES[:5]), [0, 1, 2, 3, 4], [], [])
                raise error

            return blocks(), {}

        with pytest.raises(type(error)):
            load(Source("x", "train", "s", read), tmp_path, None, False)
        assert folders(tmp_path) == []


def _race(folder: Path, results: multiprocessing.Queue) -> None:
    results.put(load(source(delay=0.2), folder, None, False).fingerprint)


def test_processes_may_race(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    fingerprints = {results.get(timeout=60) for _ in racers}
    for racer in racers:
        racer.join()
    assert len(fingerprints) == 1 and len(folders(tmp_path)) == 1


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path: Path):
    load(source(), tmp_path, None, False)
    (name,) = folders(tmp_path)
    shutil.rmtree(tmp_path / name)
    for leftover, age in (("old", 90_000), ("young", 3600)):
        folder = tmp_path / f".{name}.{leftover}"
        folder.mkdir()
        os.utime(folder, (time.time() - age, time.time() - age))
    load(source(), tmp_path, None, False)
    assert folders(tmp_path) == [f".{name}.young", name]
