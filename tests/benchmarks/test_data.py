"""The data path's contest: both sides do the same, and every part gives its rows."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from sparsejepa.benchmarks.data import (
    CROP_RATIO,
    CROP_SCALE,
    PillowCrops,
    draw_box,
    pillow_crop,
    section,
    smooth_images,
)
from sparsejepa.benchmarks.settings import MEAN, STD, BenchSettings
from sparsejepa.data.augment import crop_and_resize, random_crops
from sparsejepa.rng import generator

TINY = BenchSettings(
    encoder="nano", img_size=16, batch=4, predictor_dim=32, predictor_depth=1, target_shape=(2, 2),
    context=5, rounds=1, quick=True,
)  # fmt: skip


def test_every_part_has_rows_beside_ours() -> None:
    result = section(TINY)
    names = [row["name"] for row in result.rows]
    for start, opponent in (
        ("crops", "Pillow + DataLoader, 2 workers"),
        ("masks on 8x8", "per image"),
        ("masks on 14x14", "per image"),
        ("JPEG", "Pillow, decode and crop"),
    ):
        part = [name for name in names if name.startswith(start)]
        assert "ours" in part[0] and any(opponent in name for name in part[1:])
    for row in result.rows:
        assert row["images_per_second"] > 0
        if "x_ours_faster" in row:
            assert row["x_ours_faster_low"] <= row["x_ours_faster"] <= row["x_ours_faster_high"]
    assert result.rows[-1]["share_of_step"] > 0 and "of a step" in result.notes[-1]


def test_pillow_cuts_out_the_same_pixels_as_ours() -> None:
    images = smooth_images(16, 32, 32)
    boxes = random_crops(16, (32, 32), CROP_SCALE, CROP_RATIO, generator(0, 0, "test"))
    ours = crop_and_resize(torch.from_numpy(images), boxes, (32, 32))
    for image, box, mine in zip(images, boxes.tolist(), ours, strict=True):
        theirs = np.asarray(pillow_crop(Image.fromarray(image), tuple(box), (32, 32)))
        # Pillow rounds to whole levels after each of its two passes.
        assert np.abs(theirs - mine.permute(1, 2, 0).numpy()).max() < 1.5


def test_boxes_have_the_distribution_of_ours() -> None:
    random.seed(0)
    theirs = np.array([draw_box(32, 32) for _ in range(20_000)])
    ours = random_crops(20_000, (32, 32), CROP_SCALE, CROP_RATIO, generator(0, 0, "test")).numpy()
    assert (theirs[:, :2] >= 0).all() and (theirs[:, :2] + theirs[:, 2:] <= 32).all()
    assert theirs.mean(0) == pytest.approx(ours.mean(0), abs=0.15)
    assert theirs.std(0) == pytest.approx(ours.std(0), abs=0.15)


def test_a_box_that_fits_nowhere_is_the_largest_in_the_middle() -> None:
    assert draw_box(10, 1000) == (0, 493, 10, 13)


def test_pillow_gives_normalised_floats() -> None:
    grey = np.full((2, 8, 8, 3), 51, np.uint8)
    x = PillowCrops(list(grey), (8, 8))[0]
    assert x.shape == (3, 8, 8) and x.dtype == torch.float32
    expected = torch.tensor([(51 / 255 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    assert torch.allclose(x, expected[:, None, None].expand(3, 8, 8))


def test_images_are_smooth_and_use_the_range() -> None:
    images = smooth_images(2, 64, 80)
    assert images.shape == (2, 64, 80, 3) and images.dtype == np.uint8
    steps = np.abs(np.diff(images.astype(int), axis=2)).mean()
    assert steps < 15 and images.std() > 30 and not math.isnan(steps)
