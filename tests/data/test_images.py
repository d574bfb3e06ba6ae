"""Decoding every kind of image file, image sets and their parts, batches, and the cache."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsejepa.data import images as module
from sparsejepa.data.images import (
    ChannelMoments,
    Decoded,
    DeviceImages,
    ImageSet,
    Source,
    Target,
    decode,
    fit,
    load,
    read_image,
    stratified,
)
from sparsejepa.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 10, 3), np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = read_image("x", data, None, False)
    assert isinstance(image, np.ndarray) and image.dtype == np.uint8
    return image.astype(int)


def reason(source: bytes | Path) -> str:
    found = read_image("x", source, None, False)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_is_unchanged(form: str):
    assert (pixels(encoded(Image.fromarray(PIXELS), form)) == PIXELS).all()
    assert (pixels(encoded(Image.fromarray(PIXELS), "WEBP", lossless=True)) == PIXELS).all()


def test_transparency_is_composited_on_white():
    alpha = RNG.integers(0, 256, (12, 10, 1)).astype(np.uint8)
    want = PIXELS * (alpha / 255) + 255 * (1 - alpha / 255)
    got = pixels(encoded(Image.fromarray(np.concatenate([PIXELS, alpha], 2))))
    assert abs(got - want).max() <= 1
    grey = pixels(encoded(Image.fromarray(np.concatenate([PIXELS[..., :1], alpha], 2), "LA")))
    assert abs(grey - (want[..., :1])).max() <= 1


def test_palette_with_and_without_a_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    see_through = pixels(encoded(image, transparency=1))
    assert see_through.tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PGM"])
def test_16_bits_are_scaled_to_8(form: str):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    if form == "PGM":
        data = b"P5 256 256 65535\n" + values.astype(">u2").tobytes()
    else:
        data = encoded(Image.fromarray(values), form)
    assert (pixels(data) == np.round(values / 257)[..., None]).all()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(form: str):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert abs(pixels(data) - [255, 0, 0]).max() <= 4


# EXIF 2.32, tag 0x0112: the sides of the picture on which row 0 and column 0 of the file lie.
ORIENTATIONS = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_honoured(orientation: int):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # white corner at the top left, wider than high
    row, column = ORIENTATIONS[orientation]
    stored = upright.transpose(1, 0, 2) if row in ("left", "right") else upright
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", exif=exif, quality=95)
    got = pixels(data)
    assert got.shape == upright.shape and abs(got - upright).mean() < 3


def test_unknown_scales_are_refused():
    assert "floating-point" in reason(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))
    deep = Image.fromarray(np.full((2, 2), 70_000, np.int32))
    assert "32-bit" in reason(encoded(deep, "TIFF"))


def test_truncated_empty_and_missing_files(tmp_path: Path):
    data = encoded(Image.fromarray(PIXELS))
    assert [reason(broken) for broken in (b"", b"text")] == ["no image data", "not an image"]
    assert all(map(reason, (data[: len(data) // 2], data[:20])))
    assert reason(tmp_path / "gone.png") == "No such file or directory"


def test_sizes_must_agree_or_be_given(tmp_path: Path):
    small, large = Image.new("RGB", (6, 8)), Image.new("RGB", (12, 8))
    items = [("small.png", encoded(small)), ("large.png", encoded(large))]
    with pytest.raises(UserError, match=r"small.png has 8x6 .* large.png has 8x12.*--img-size"):
        list(decode(items, None, upscale=False, origin="data"))
    part = decode(items, (8, 6), upscale=False, origin="data")
    assert {image.shape for _, image in part if not isinstance(image, str)} == {(8, 6, 3)}


def test_too_small_images_need_upscale(tmp_path: Path):
    path = tmp_path / "small.png"
    Image.fromarray(PIXELS).save(path)
    with pytest.raises(UserError, match=r"small.png: 12x10 pixels, .*--img-size 12x12.*--upscale"):
        list(decode([("small.png", path)], (12, 12), upscale=False, origin="data"))
    image = read_image("small.png", path, (12, 12), True)
    assert isinstance(image, np.ndarray) and image.shape == (12, 12, 3)


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_fit_keeps_the_centre_and_a_ramp(size, out):
    """Of a horizontal ramp, the middle of the result is the middle of the image."""
    ramp = np.broadcast_to(np.linspace(0, 255, size[1])[None, :, None], (*size, 3))
    image = fit(Image.fromarray(np.round(ramp).astype(np.uint8)), out)
    got = np.asarray(image).astype(float)
    assert got.shape == (*out, 3)
    assert abs(got.mean() - ramp.mean()) < 6 or size[1] == 1
    assert (np.diff(got, axis=1) >= -2).all()  # bicubic overshoots a little
    assert (np.ptp(got, axis=0) <= 2).all()


def photograph(height: int, width: int) -> Image.Image:
    """A picture with the spectrum of photographs: amplitudes fall off with the frequency."""
    rng = np.random.default_rng(3)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency**1.2
    grey, red, blue = np.fft.irfft2(spectrum, (height, width))
    planes = np.stack([grey + 0.3 * red, grey, grey + 0.3 * blue], -1)
    planes = 128 + 50 * (planes - planes.mean()) / planes.std()
    return Image.fromarray(planes.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(150, 150), (128, 128), (100, 60), (40, 64), (33, 33), (37, 37)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_large_jpeg_is_nearly_what_full_decoding_gives(size, options):
    """Decoded at a half, a quarter or an eighth, then resized: hardly further from resizing alone
    than common filters are from one another."""
    image = photograph(301, 403)
    data = encoded(image, "JPEG", quality=92, **options)
    ours = read_image("x", data, size, False)
    assert isinstance(ours, np.ndarray) and ours.shape == (*size, 3)
    whole = Image.fromarray(pixels(data).astype(np.uint8))
    box, hamming, bicubic, lanczos = (
        np.asarray(fit(whole, size, filter_)).astype(float)
        for filter_ in (Image.Resampling.BOX, Image.Resampling.HAMMING, Image.Resampling.BICUBIC,
                        Image.Resampling.LANCZOS)
    )  # fmt: skip
    usual = abs(box - lanczos)
    nearest = min((abs(ours - other) for other in (hamming, bicubic)), key=np.mean)
    assert nearest.mean() < 1.25 * usual.mean()
    assert np.quantile(nearest, 0.99) < 1.25 * np.quantile(usual, 0.99)
    assert abs(ours.mean((0, 1)) - hamming.mean((0, 1))).max() < 1


def test_a_jpeg_that_is_turned_is_turned_before_it_is_made_smaller():
    """It lies on its side in the file: 120 x 60 pixels are 60 x 120 for whoever looks at it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photograph(60, 120), "JPEG", exif=exif)
    for size in ((100, 50), (40, 20)):
        image = read_image("x", data, size, False)
        assert (
            np.asarray(fit(Image.fromarray(pixels(data).astype(np.uint8)), size)) == image
        ).all()


def test_enormous_images_are_refused_before_they_are_decoded():
    for side in (20_000, 10_000):  # Pillow itself refuses the first
        bomb = encoded(Image.new("1", (side, side)))
        assert "enormous: more than the 89 megapixels" in reason(bomb)


@settings(max_examples=300)
@given(
    form=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]),
    cut=st.one_of(st.none(), st.integers(0, 400)),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
)
def test_mutated_files_decode_or_are_reported(form, cut, edits):
    data = bytearray(encoded(Image.fromarray(PIXELS), form))
    for place, value in edits:
        data[place % len(data)] = value
    good = encoded(Image.fromarray(PIXELS))
    items = [("good", good), ("mutant", bytes(data[:cut])), ("none", None), ("also good", good)]
    part = list(decode(items, (8, 8), upscale=True, origin="test"))
    assert [name for name, _ in part] == [name for name, _ in items]
    assert part[2][1] == "no image data" and np.array_equal(part[0][1], part[3][1])
    for _, image in part:
        if isinstance(image, str):
            assert image and "\n" not in image
        else:
            assert image.shape == (8, 8, 3) and image.dtype == np.uint8


def test_many_images_keep_their_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_TASK", 3)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    images = RNG.integers(0, 256, (50, 4, 4, 3), np.uint8)
    items = [(f"i{k}", encoded(Image.fromarray(image))) for k, image in enumerate(images)]
    items[7] = ("i7", b"broken")
    found = list(decode(items, None, upscale=False, origin="test"))
    assert [name for name, _ in found] == [f"i{k}" for k in range(50)]
    assert found.pop(7) == ("i7", "not an image")
    assert (np.stack([image for _, image in found]) == np.delete(images, 7, 0)).all()


# Image sets and their parts


def image_set(labels: list[int] | None = None, count: int = 20) -> ImageSet:
    count = len(labels) if labels is not None else count
    images = RNG.integers(0, 256, (count, 5, 4, 3), np.uint8)
    targets = {}
    if labels is not None:
        names = tuple(map(str, range(max(labels) + 1)))
        targets = {"class": Target(np.array(labels), names)}
        targets["parity"] = Target(np.array(labels) % 2, ("even", "odd"))
    files = tuple(f"{i}.png" for i in range(count))
    moments = ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    return ImageSet("test", "train", images, targets, *moments, fingerprint="f", files=files)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.data())
def test_stratified_quotas_are_largest_remainders(labels, data):
    limit = data.draw(st.integers(1, len(labels)))
    array = np.array(labels)
    index = stratified(array, limit, np.random.default_rng(0))
    assert len(index) == limit and (np.diff(index) > 0).all()
    share = np.bincount(array) * limit / len(labels)
    got = np.bincount(array[index], minlength=len(share))
    assert (got >= np.floor(share)).all() and (got <= np.ceil(share)).all()
    rounded_up, not_up = (share % 1)[got > share], (share % 1)[(got < share)]
    if len(rounded_up) and len(not_up):
        assert rounded_up.min() >= not_up.max() - 1e-9


def test_subset_takes_images_labels_and_files_together():
    full = image_set([0] * 40 + [1] * 40 + [2] * 20)
    part = full.subset(10, seed=3)
    assert len(part) == 10 and part.img_size == (5, 4)
    assert np.bincount(part.targets["class"].values).tolist() == [4, 4, 2]
    index = [int(file.removesuffix(".png")) for file in part.files]
    assert (part.images == full.images[index]).all()
    for key, target in part.targets.items():
        assert (target.values == full.targets[key].values[index]).all()
        assert target.names == full.targets[key].names
    assert (part.mean, part.std) == (full.mean, full.std)
    assert full.subset(10, seed=3).fingerprint == part.fingerprint
    others = [full, *(full.subset(*which) for which in ((10, -1), (11, 3)))]
    assert full.subset(100) is full and full.subset(None) is full
    assert len({part.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_moments_are_exact():
    images = RNG.integers(0, 256, (3, 300, 400, 3), np.uint8)
    images[..., 1] //= 3
    moments = ChannelMoments()
    moments.add(images[:1])
    moments.add(images[1:])
    mean, std = moments.result().values()
    for channel in range(3):  # in whole numbers
        values = images[..., channel].astype(np.int64)
        n, total, squares = values.size, int(values.sum()), int((values**2).sum())
        assert mean[channel] == pytest.approx(total / (255 * n), rel=1e-14)
        variance = (n * squares - total**2) / (255 * n) ** 2
        assert std[channel] == pytest.approx(variance**0.5, rel=1e-13)
    constant = ChannelMoments()
    constant.add(np.full((2, 3, 3, 3), 51, np.uint8))
    mean, std = constant.result().values()
    assert mean == pytest.approx((0.2,) * 3) and std == (1 / 255,) * 3  # can be divided by


@pytest.mark.filterwarnings("error")
def test_memory_map_is_used_without_a_copy(tmp_path: Path):
    pixels = RNG.integers(0, 256, (6, 4, 4, 3), np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    images = np.load(tmp_path / "images.npy", mmap_mode="r", allow_pickle=False)
    device = DeviceImages(ImageSet("m", "train", images, {}, (0, 0, 0), (1, 1, 1)), "cpu")
    assert device._images.data_ptr() == images.ctypes.data
    assert (device.take(torch.arange(6)).numpy() == pixels).all()


@pytest.mark.parametrize("resident", [True, False])
def test_take_gathers_in_order(resident: bool):
    images = image_set(None)
    device = images.open("cpu")
    device.resident = resident  # as if it were too large for a GPU
    index = [torch.tensor([3, 3, 19, 0]), torch.tensor([5])]
    for one, batch in zip(index, device.batches(index), strict=True):
        assert batch.dtype == torch.uint8 and batch.device.type == "cpu"
        assert (batch.numpy() == images.images[one.numpy()]).all()
    device.close()


# The cache

IMAGES = RNG.integers(0, 256, (1001, 6, 5, 3), np.uint8)
LABELS = RNG.integers(0, 3, 1001)
KEPT = np.flatnonzero(np.arange(1001) % 10)


@dataclass(frozen=True, eq=False)
class Made(Source):
    """Images in order, every tenth unreadable."""

    images: np.ndarray = field(kw_only=True)
    mark: str = "s"
    calls: list[str] = field(default_factory=list)
    delay: float = 0.0
    error: BaseException | None = None

    def stamp(self) -> str:
        return self.mark

    def read(self, img_size: object, upscale: bool) -> Iterator[Decoded]:
        self.calls.append("read")
        for i, image in enumerate(self.images):
            yield (f"{i}.png", image if i % 10 else "broken")
        time.sleep(self.delay)
        if self.error:
            raise self.error


def source(**options: Any) -> Made:
    """1,001 images: their count changes its digits."""
    targets = {"class": Target(LABELS, ("a", "b", "c")), "zero": Target(LABELS * 0, ("0",))}
    options.setdefault("images", IMAGES)
    return Made("my set!", "train", targets, "my set", (("x", "no row"),), **options)


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_decoded_once_and_equal_afterwards(tmp_path: Path):
    calls: list[str] = []
    first = load(source(calls=calls), tmp_path / "deep" / "cache", None, False)
    again = load(source(calls=calls), tmp_path / "deep" / "cache", None, False)
    assert calls == ["read"]
    for images in (first, again):
        assert isinstance(images.images, np.memmap) and not images.images.flags.writeable
        assert images.images.dtype == np.uint8 and (images.images == IMAGES[KEPT]).all()
        assert (images.targets["class"].values == LABELS[KEPT]).all()
        assert images.targets["class"].names == ("a", "b", "c")
        assert list(images.targets) == ["class", "zero"]
        assert images.files == tuple(f"{i}.png" for i in KEPT)
        broken = tuple((f"{i}.png", "broken") for i in range(0, 1001, 10))
        assert images.skipped == (("x", "no row"), *broken)
        scaled = IMAGES[KEPT].reshape(-1, 3) / 255
        np.testing.assert_allclose(images.mean, scaled.mean(0), rtol=1e-12)
        np.testing.assert_allclose(images.std, scaled.std(0), rtol=1e-12)
    assert first.fingerprint == again.fingerprint
    load(source(mark="other"), tmp_path / "deep" / "cache", None, False)
    load(source(), tmp_path / "deep" / "cache", (6, 5), False)
    names = folders(tmp_path / "deep" / "cache")
    assert len(names) == 3 and all(name.startswith("my-set-train-") for name in names)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "images.npy", 1000),
        lambda folder: (folder / "meta.json").write_text("[]"),
        lambda folder: shutil.rmtree(folder) or folder.mkdir(),
    ],
)
def test_a_damaged_cache_is_named(tmp_path: Path, damage: Callable[[Path], object]):
    load(source(), tmp_path, None, False)
    (name,) = folders(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: damaged .* delete this folder, it is made anew"):
        load(source(), tmp_path, None, False)


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path):
    """A real limit on the size of files stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cache: .* free some space, or set SPARSEJEPA_CACHE"):
            load(source(), tmp_path / "cache", None, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folders(tmp_path / "cache") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set SPARSEJEPA_CACHE to a folder"):
        load(source(), tmp_path / "file" / "cache", None, False)


@pytest.mark.parametrize("error", [UserError("too small"), KeyboardInterrupt()])
def test_errors_and_interrupts_while_decoding_leave_nothing(tmp_path: Path, error: BaseException):
    with pytest.raises(type(error)):
        load(source(error=error), tmp_path, None, False)
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
