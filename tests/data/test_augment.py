"""Augmentation against torch's antialiased resize and torchvision's crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparsejepa.data.augment import (
    Augment,
    crop_and_resize,
    normalize,
    random_crops,
    resize_weights,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    shape = (batch, height, width, 3)
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


def standardized(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, h, w] in [0, 255], in float64, the textbook way."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    return (pixels.double() / 255 - mean) / std


# To a single column, torch's antialiased resize repeats the first row: widths start at 2.
OUT_SIZES = st.tuples(st.integers(1, 40), st.integers(2, 40))


@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), out=OUT_SIZES, data=st.data())
def test_crop_and_resize_is_interpolate_with_antialias(size, out, data):
    height, width = size
    images = random_images(3, height, width)
    boxes = []
    for _ in range(3):
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
        boxes.append((top, left, h, w))
    flip = torch.tensor([False, True, False])
    result = crop_and_resize(images, torch.tensor(boxes), out, flip)
    for image, (top, left, h, w), mirrored, got in zip(images, boxes, flip, result, strict=True):
        crop = image[top : top + h, left : left + w].permute(2, 0, 1)[None].double()
        want = F.interpolate(crop, out, mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(
            got.double(), want.flip(2) if mirrored else want, atol=2e-3, rtol=0
        )


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_resize_weights_are_averages_over_the_interval(in_size, out_size, data):
    length = data.draw(st.integers(1, in_size))
    start = data.draw(st.integers(0, in_size - length))
    weights = resize_weights(torch.tensor([start]), torch.tensor([length]), in_size, out_size)[0]
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(out_size))
    assert (weights[:, :start] == 0).all() and (weights[:, start + length :] == 0).all()
    torch.testing.assert_close(weights.flip(1), resize_weights(
        torch.tensor([in_size - start - length]), torch.tensor([length]), in_size, out_size
    )[0].flip(0))  # fmt: skip


def test_whole_image_without_flip_is_the_identity():
    images = random_images(5, 24, 24)
    augment = Augment(
        (24, 24), mean=MEAN, std=STD, crop_scale=(1, 1), crop_ratio=(1, 1), flip=False
    )
    result = augment(images, generator())
    assert result.dtype == torch.float32 and result.shape == (5, 3, 24, 24)
    plain = normalize(images, MEAN, STD)
    assert result.is_contiguous() and plain.is_contiguous()
    torch.testing.assert_close(result, plain, atol=1e-5, rtol=0)
    want = standardized(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(plain.double(), want, atol=1e-5, rtol=0)


def test_flip_mirrors_about_half_of_the_images():
    images = random_images(400, 6, 6)
    augment = Augment((6, 6), mean=MEAN, std=STD, crop_scale=(1, 1), crop_ratio=(1, 1))
    assert not torch.equal(augment(images, generator(1)), augment(images, generator(2)))
    result = augment(images, generator())
    plain = normalize(images, MEAN, STD)
    same = (result - plain).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (result - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all()
    assert stats.binomtest(int(mirrored.sum()), 400).pvalue > 1e-3


def test_crops_have_the_distribution_of_random_resized_crop():
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision not installed")
    size, scale, ratio, count = (40, 30), (0.3, 1.0), (3 / 4, 4 / 3), 3000
    box = random_crops(count, size, scale, ratio, generator()).double().numpy()
    torch.manual_seed(0)
    image, crop = torch.zeros(3, *size), transforms.RandomResizedCrop(8, scale, ratio)
    params = [crop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    theirs = np.array(params, float)
    for ours_of, theirs_of in zip(box.T, theirs.T, strict=True):
        assert _ks(ours_of, theirs_of) > 1e-3
    assert _ks(box[:, 2] * box[:, 3], theirs[:, 2] * theirs[:, 3]) > 1e-3
    assert _ks(box[:, 3] / box[:, 2], theirs[:, 3] / theirs[:, 2]) > 1e-3


def _ks(first: np.ndarray, second: np.ndarray) -> float:
    """Probability of two samples as different as these from one distribution."""
    return float(np.asarray(stats.ks_2samp(first, second))[1])


@given(
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.floats(0.01, 1),
    st.floats(0.2, 5),
    st.integers(0, 1000),
)
def test_crops_lie_inside_the_image(size, low, ratio, seed):
    top, left, h, w = random_crops(20, size, (low, 1.0), (ratio, ratio * 1.2), generator(seed)).T
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= size[0]).all() and (left + w <= size[1]).all()


def test_impossible_ratio_falls_back_to_the_centre():
    box = random_crops(4, (10, 40), (1.0, 1.0), (1.0, 1.0), generator())
    assert box.tolist() == [[0, 15, 10, 10]] * 4


@given(st.tuples(st.integers(2, 30), st.integers(2, 30)), OUT_SIZES)
def test_normalize_resizes_the_largest_centred_crop(size, out):
    images = random_images(2, *size)
    result = normalize(images, MEAN, STD, out)
    scale = min(size[0] / out[0], size[1] / out[1])
    h, w = max(1, round(out[0] * scale)), max(1, round(out[1] * scale))
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    crop = images[:, top : top + h, left : left + w].permute(0, 3, 1, 2).double()
    want = standardized(F.interpolate(crop, out, mode="bilinear", antialias=True))
    torch.testing.assert_close(result.double(), want, atol=1e-4, rtol=0)
