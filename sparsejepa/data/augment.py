"""Per-image augmentation of a whole batch on the device, and the plain path for evaluation.

Crop, flip and resize are one separable resampling: two batched matrix products with a pair of
small weight matrices per image, so that every image of the batch has its own crop without a loop
and without waiting for the device. Letters: B images, H x W pixels in, h x w pixels out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sparsejepa.distributed import Share

CROP_TRIES = 10
"""Crop shapes drawn per image; the first that fits is taken (torchvision's number of tries)."""


class Augment:
    """Random resized crop, flip and normalisation.

    The distribution of crops is that of torchvision's `RandomResizedCrop` (Szegedy et al. 2015):
    width over height is log-uniform, and the first of ten tries that fits into the image is taken,
    else the largest centred crop with an allowed ratio. Resampling is bilinear with antialiasing,
    from the pixels inside the crop only.

    Arguments:
        img_size: size (h, w) of the result.
        mean, std: per channel, in units of [0, 1].
        crop_scale: smallest and largest share of the image's area.
        crop_ratio: smallest and largest width over height.
        flip: mirror half of the images left to right.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        crop_scale: tuple[float, float] = (0.5, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
    ) -> None:
        self.img_size, self.mean, self.std = img_size, tuple(mean), tuple(std)
        self.crop_scale, self.crop_ratio, self.flip = crop_scale, crop_ratio, flip

    def __call__(
        self, images: Tensor, generator: torch.Generator, share: Share | None = None
    ) -> Tensor:
        """Map images [B, H, W, 3] uint8 to [B, 3, h, w] float32, normalised.

        All random numbers come from `generator`; when it lives on the images' device nothing here
        waits for the device. They are drawn for the global batch of which the images are a `share`.
        """
        count, height, width, _ = images.shape
        share, size, device = share or Share(), (height, width), images.device
        batch = count * share.count
        rows = share.rows(batch)
        box = random_crops(batch, size, self.crop_scale, self.crop_ratio, generator, device)
        flip = _uniform((batch,), generator, device)[rows] < 0.5 if self.flip else None
        pixels = crop_and_resize(images, box[rows], self.img_size, flip)
        return _standardize(pixels, self.mean, self.std)


def normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    img_size: tuple[int, int] | None = None,
) -> Tensor:
    """Map images [B, H, W, 3] uint8 to [B, 3, h, w] float32, normalised, without randomness.

    With an `img_size` other than the images' own, the largest centred crop of its shape is resized
    (bilinear, antialiased).
    """
    batch, height, width, _ = images.shape
    if img_size is None or img_size == (height, width):
        return _standardize(images.permute(0, 3, 1, 2).float().contiguous(), mean, std)
    scale = min(height / img_size[0], width / img_size[1])
    h, w = max(1, round(img_size[0] * scale)), max(1, round(img_size[1] * scale))
    box = torch.tensor([(height - h) // 2, (width - w) // 2, h, w], device=images.device)
    return _standardize(crop_and_resize(images, box.expand(batch, 4), img_size), mean, std)


def random_crops(
    batch: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one crop per image: [B, 4] int64 of top, left, height, width in pixels."""
    height, width = size
    draw = _uniform((3, batch, CROP_TRIES), generator, device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draw[0])
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(log_low + (log_high - log_low) * draw[1])
    w = torch.round(torch.sqrt(area * aspect)).long()
    h = torch.round(torch.sqrt(area / aspect)).long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    any_fits = fits.any(1)
    # None fits: the largest centred crop with an allowed ratio.
    clamped = min(max(width / height, ratio[0]), ratio[1])
    h_full = min(height, max(1, round(width / clamped)))
    w_full = min(width, max(1, round(height * clamped)))
    h = torch.where(any_fits, h.gather(1, first)[:, 0], h_full)
    w = torch.where(any_fits, w.gather(1, first)[:, 0], w_full)
    # Positions are uniform and inclusive: the last row and column are reached like the first.
    top = (draw[2, :, 0] * (height - h + 1)).long().clamp_(max=height - 1)
    left = (draw[2, :, 1] * (width - w + 1)).long().clamp_(max=width - 1)
    top = torch.where(any_fits, torch.minimum(top, height - h), (height - h) // 2)
    left = torch.where(any_fits, torch.minimum(left, width - w), (width - w) // 2)
    return torch.stack((top, left, h, w), 1)


def resize_weights(start: Tensor, length: Tensor, in_size: int, out_size: int) -> Tensor:
    """Weights [B, out_size, in_size] that resample [start, start + length) to `out_size` pixels.

    `start` and `length` are [B], in pixels. The filter is the triangle of bilinear interpolation,
    widened when shrinking (as ``interpolate(antialias=True)``), and sees only the interval.
    """
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / out_size
    out = torch.arange(out_size, device=start.device)[None, :, None] + 0.5
    pixel = torch.arange(in_size, device=start.device)[None, None, :] + 0.5
    distance = (pixel - start - out * scale).abs_().div_(scale.clamp(min=1))
    inside = (pixel > start) & (pixel < start + length)
    weights = distance.neg_().add_(1).clamp_(min=0).mul_(inside)
    return weights.div_(weights.sum(2, keepdim=True))


def crop_and_resize(
    images: Tensor, box: Tensor, img_size: tuple[int, int], flip: Tensor | None = None
) -> Tensor:
    """Resample each image's own box to one size.

    images: [B, H, W, 3] uint8; box: [B, 4] top, left, height, width; flip: [B] bool.
    Returns [B, 3, h, w] float32 in [0, 255].
    """
    batch, height, width, channels = images.shape
    rows = resize_weights(box[:, 0], box[:, 2], height, img_size[0])  # [B, h, H]
    columns = resize_weights(box[:, 1], box[:, 3], width, img_size[1])  # [B, w, W]
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    pixels = torch.bmm(rows, images.reshape(batch, height, width * channels).float())
    pixels = pixels.view(batch, img_size[0], width, channels).permute(0, 3, 1, 2)  # [B, 3, h, W]
    pixels = torch.bmm(pixels.reshape(batch, -1, width), columns.transpose(1, 2))
    return pixels.view(batch, channels, *img_size)


def _standardize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std per channel of [B, 3, h, w], in one pass."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), pixels.device)
    return torch.addcmul(shift, pixels, scale)


@lru_cache(maxsize=64)  # a copy from the host to the device makes the host wait: once, not per step
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale[:, None, None], shift[:, None, None]


def _uniform(
    shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """Uniform numbers in [0, 1) from the generator's own device, moved to `device`."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device)
