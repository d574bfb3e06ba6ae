"""Noise and shuffled patches in place of the true images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from sparsejepa.data.corrupt import corrupt
from sparsejepa.data.images import ImageSet, Target

MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.15, 0.2)


def image_set(count: int = 20, size: tuple[int, int] = (8, 12)) -> ImageSet:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *size, 3), np.uint8)
    labels = {"class": Target(np.arange(count) % 3, ("a", "b", "c"))}
    files = tuple(f"{i}.png" for i in range(count))
    return ImageSet("set", "train", images, labels, MEAN, STD, (("x", "damaged"),), "f", files)


def corrupted(images: ImageSet, kind: Any, folder: Path, **options: Any) -> ImageSet:
    return corrupt(images, kind, **{"seed": 0, "patch_size": 4, "cache_dir": folder, **options})


def patches(image: np.ndarray, side: int) -> list[bytes]:
    height, width = image.shape[:2]
    return [
        image[y : y + side, x : x + side].tobytes()
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]


def test_noise_has_the_moments_of_a_clipped_normal(tmp_path: Path):
    images = image_set(120, (32, 32))
    pixels = corrupted(images, "noise", tmp_path).images.reshape(-1, 3).astype(float)
    for channel in range(3):
        level = np.arange(256)
        edges = np.concatenate([[-np.inf], level[:-1] + 0.5, [np.inf]]) / 255
        share = np.diff(norm.cdf(edges, MEAN[channel], STD[channel]))  # rounded and clipped
        mean = share @ level
        std = np.sqrt(share @ (level - mean) ** 2)
        values, error = pixels[:, channel], std / np.sqrt(len(pixels))
        assert abs(values.mean() - mean) < 4 * error
        assert abs(values.std() - std) < 4 * error
    flat = ((pixels - pixels.mean(0)) / pixels.std(0)).reshape(120, -1)
    assert abs(np.corrcoef(pixels.T) - np.eye(3)).max() < 0.02, "channels are independent"
    assert abs(np.corrcoef(flat) - np.eye(120)).max() < 0.1, "images are independent"


def test_each_image_is_shuffled_in_an_order_of_its_own(tmp_path: Path):
    images = image_set(40, (16, 16))
    shuffled = corrupted(images, "shuffle", tmp_path)
    orders = set()
    for before, after in zip(images.images, shuffled.images, strict=True):
        was = patches(before, 4)
        assert sorted(patches(after, 4)) == sorted(was)
        orders.add(tuple(was.index(patch) for patch in patches(after, 4)))
    assert len(orders) == 40


@pytest.mark.parametrize("kind", ["noise", "shuffle"])
def test_everything_but_the_images_stays(kind: str, tmp_path: Path):
    images = replace(image_set(), masks=np.ones((20, 8, 12), np.uint8))
    made = corrupted(images, kind, tmp_path)
    assert made.images.dtype == np.uint8 and made.images.shape == images.images.shape
    assert (made.images != images.images).any((1, 2, 3)).all()
    assert made.targets["class"].values.tolist() == images.targets["class"].values.tolist()
    assert (made.mean, made.std) == (MEAN, STD)
    assert (made.files, made.skipped, made.name) == (images.files, images.skipped, images.name)
    assert made.masks is None


@pytest.mark.parametrize("kind", ["noise", "shuffle"])
def test_images_depend_on_seed_and_position_alone(kind: str, tmp_path: Path):
    images = image_set()
    made = corrupted(images, kind, tmp_path / "a")
    again = corrupted(images, kind, tmp_path / "b")
    assert (again.images == made.images).all() and again.fingerprint == made.fingerprint
    part = replace(images, images=images.images[:7], targets={}, files=(), fingerprint="part")
    assert (corrupted(part, kind, tmp_path / "b").images == made.images[:7]).all()
    other = corrupted(images, kind, tmp_path / "a", seed=1)
    assert (other.images != made.images).any((1, 2, 3)).all()


def test_fingerprints_tell_corruptions_apart(tmp_path: Path):
    images = image_set()
    made = [
        images,
        corrupted(images, "noise", tmp_path),
        corrupted(images, "noise", tmp_path, seed=1),
        corrupted(images, "shuffle", tmp_path),
        corrupted(images, "shuffle", tmp_path, seed=1),
        corrupted(images, "shuffle", tmp_path, patch_size=2),
        corrupted(
            replace(images, images=images.images[::-1], fingerprint="g"), "shuffle", tmp_path
        ),
    ]
    assert len({found.fingerprint for found in made}) == len(made)
    noise = corrupted(images, "noise", tmp_path, patch_size=2)
    assert noise.fingerprint == made[1].fingerprint, "noise has no patches"
