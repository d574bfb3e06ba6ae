"""Image sets, stratified subsets, statistics, and batches on a device."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsejepa.data import store
from sparsejepa.data.store import ChannelMoments, DeviceImages, ImageSet, Target, stratified

RNG = np.random.default_rng(0)


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


def test_stratified_chooses_all_images_of_a_class_alike():
    labels = np.repeat([0, 1], [30, 10])
    chosen = np.zeros(40)
    for seed in range(600):
        chosen[stratified(labels, 20, np.random.default_rng(seed))] += 1
    assert abs(chosen - 300).max() < 4.5 * np.sqrt(600 / 4)


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


def test_subset_is_a_function_of_seed_and_limit():
    full = image_set([0, 1] * 30)
    same, again = full.subset(12, seed=1), full.subset(12, seed=1)
    assert same.files == again.files and same.fingerprint == again.fingerprint
    others = [full.subset(12, seed=2), full.subset(13, seed=1), full]
    assert len({same.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert others[0].files != same.files


def test_a_negative_seed_is_a_seed():
    images = image_set([0, 1] * 10)
    chosen = images.subset(5, seed=-1)
    assert len(chosen) == 5 and (chosen.images == images.subset(5, seed=-1).images).all()


def test_subset_without_labels_or_of_everything():
    full = image_set(None)
    assert len(full.subset(7)) == 7 and full.primary is None
    assert full.subset(20) is full and full.subset(99) is full and full.subset(None) is full


def test_moments_are_exact():
    images = RNG.integers(0, 256, (3, 300, 400, 3), np.uint8)  # more than one block of 2^18 pixels
    images[..., 1] //= 3
    moments = ChannelMoments()
    moments.add(images[:1])
    moments.add(images[1:])
    mean, std = moments.result()
    for channel in range(3):  # in whole numbers
        values = images[..., channel].astype(np.int64)
        n, total, squares = values.size, int(values.sum()), int((values**2).sum())
        assert mean[channel] == pytest.approx(total / (255 * n), rel=1e-14)
        variance = (n * squares - total**2) / (255 * n) ** 2
        assert std[channel] == pytest.approx(variance**0.5, rel=1e-13)


def test_constant_channel_can_be_divided_by():
    moments = ChannelMoments()
    moments.add(np.full((2, 3, 3, 3), 51, np.uint8))
    mean, std = moments.result()
    assert mean == pytest.approx((0.2,) * 3) and std == (1 / 255,) * 3


@pytest.mark.parametrize("resident", [True, False])
def test_take_gathers_in_order(resident: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DeviceImages, "_fits", lambda self: resident)
    images = image_set(None)
    device = DeviceImages(images, "cpu")
    assert device.resident is resident and len(device) == 20
    index = torch.tensor([3, 3, 19, 0])
    batch = device.take(index)
    assert batch.dtype == torch.uint8 and batch.device.type == "cpu"
    assert (batch.numpy() == images.images[index.numpy()]).all()


@pytest.mark.filterwarnings("error")
def test_memory_map_is_used_without_a_copy(tmp_path: Path):
    pixels = RNG.integers(0, 256, (6, 4, 4, 3), np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    images = np.load(tmp_path / "images.npy", mmap_mode="r", allow_pickle=False)
    device = DeviceImages(ImageSet("m", "train", images, {}, (0, 0, 0), (1, 1, 1)), "cpu")
    assert device._images.data_ptr() == images.ctypes.data
    assert (device.take(torch.arange(6)).numpy() == pixels).all()


def test_a_set_is_resident_on_a_gpu_below_60_percent(monkeypatch: pytest.MonkeyPatch):
    images = image_set(None)
    device = DeviceImages(images, "cpu")
    device.device = namedtuple("Device", "type")("cuda")  # type: ignore[assignment]
    for free, fits in ((images.images.nbytes / 0.59, True), (images.images.nbytes / 0.61, False)):
        monkeypatch.setattr(store.torch.cuda, "mem_get_info", lambda _, free=free: (free, 2 * free))
        assert device._fits() is fits
