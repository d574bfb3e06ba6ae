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
import torch.nn.functional as F
from torch import Tensor

from sparsejepa.distributed import Share

CROP_TRIES = 10
"""Crop shapes drawn per image; the first that fits is taken (torchvision's number of tries)."""

MAGNITUDE_BINS = 31
"""RandAugment's magnitudes run from 0 to 30 (Cubuk et al. 2020)."""


class Augment:
    """Random resized crop, flip, optionally RandAugment, and normalisation.

    The distribution of crops is that of torchvision's `RandomResizedCrop` (Szegedy et al. 2015): a
    share of the area uniform in `crop_scale`, width over height log-uniform in `crop_ratio`, up to
    ten tries until the crop fits into the image, else the largest centred crop with an allowed
    ratio. The tries are drawn at once instead of one after the other, which changes nothing but
    the speed. Resampling is bilinear with antialiasing, from the pixels inside the crop only.

    Arguments:
        img_size: size (h, w) of the result.
        mean, std: per channel, in units of [0, 1].
        crop_scale: smallest and largest share of the image's area.
        crop_ratio: smallest and largest width over height.
        flip: mirror half of the images left to right.
        randaugment: (operations per image, magnitude 0 to 30), or None.
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
        randaugment: tuple[int, int] | None = None,
    ) -> None:
        self.img_size = img_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio
        self.flip, self.randaugment = flip, randaugment

    def __call__(
        self, images: Tensor, generator: torch.Generator, share: Share | None = None
    ) -> Tensor:
        """Map images [B, H, W, 3] uint8 to [B, 3, h, w] float32, normalised.

        All random numbers come from `generator`; when it lives on the images' device nothing here
        waits for the device. They are drawn for the global batch of which the images are a `share`.
        """
        count, height, width, _ = images.shape
        share = share or Share()
        batch = count * share.count
        rows = share.rows(batch)
        box = random_crops(
            batch, (height, width), self.crop_scale, self.crop_ratio, generator, images.device
        )
        flip = _uniform((batch,), generator, images.device)[rows] < 0.5 if self.flip else None
        pixels = crop_and_resize(images, box[rows], self.img_size, flip)
        if self.randaugment is not None:
            num_ops, magnitude = self.randaugment
            pixels = pixels.round_().clamp_(0, 255)
            pixels = rand_augment(pixels, num_ops, magnitude, generator, share)
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

    `start` and `length` are [B], in pixels. Rows sum to one; the filter is the triangle of bilinear
    interpolation, widened by the scale when shrinking (antialiasing, as in Pillow and in
    ``interpolate(antialias=True)``), and sees only pixels inside the interval.
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


def rand_augment(
    pixels: Tensor,
    num_ops: int,
    magnitude: int,
    generator: torch.Generator,
    share: Share | None = None,
) -> Tensor:
    """RandAugment (Cubuk et al. 2020) with its own operations and signs for every image.

    pixels: [B, 3, h, w] float32, whole numbers in [0, 255]; returns the same kind. `num_ops` of
    `OPERATIONS` one after the other, drawn with replacement; magnitude 0 to 30. Drawn for the
    global batch of which the pixels are a `share`.
    """
    share = share or Share()
    batch = len(pixels) * share.count
    draw = _uniform((num_ops, 2, batch), generator, pixels.device)[..., share.rows(batch)]
    for choice, sign in draw.unbind(0):
        operation = (choice * len(OPERATIONS)).long().clamp_(max=len(OPERATIONS) - 1)
        pixels = apply_operations(pixels, operation, magnitude, sign < 0.5)
    return pixels


def apply_operations(pixels: Tensor, operation: Tensor, magnitude: int, negative: Tensor) -> Tensor:
    """Apply one of `OPERATIONS` to each image, with torchvision's ranges and 8-bit rounding.

    pixels: [B, 3, h, w] float32, whole numbers in [0, 255]; operation: [B] int64, index into
    `OPERATIONS`; negative: [B] bool, reverses an operation that has a direction.

    On the CPU each family of operations gets its own images. On a GPU, where picking them would
    make the host wait for the device, each is computed for all images and the result selected.
    """
    level = magnitude / (MAGNITUDE_BINS - 1)
    sign = torch.where(negative, -1.0, 1.0)
    out = pixels.clone()
    for names, family in _FAMILIES:
        first = OPERATIONS.index(names[0])
        mask = (operation >= first) & (operation < first + len(names))
        if pixels.device.type == "cpu":
            rows = mask.nonzero()[:, 0]
            out[rows] = family(pixels[rows], operation[rows], sign[rows], level)
        else:
            changed = family(pixels, operation, sign, level)
            out = torch.where(_per_image(mask), changed, out)
    return out


def _move(pixels: Tensor, operation: Tensor, sign: Tensor, level: float) -> Tensor:
    """Shear about the top left corner, shift, turn about the centre; nearest pixel, black fill."""
    height, width = pixels.shape[2:]
    shear_x = _chosen(operation, "ShearX") * sign * (0.3 * level)
    shear_y = _chosen(operation, "ShearY") * sign * (0.3 * level)
    shift_x = _chosen(operation, "TranslateX") * sign * int(150 / 331 * width * level)
    shift_y = _chosen(operation, "TranslateY") * sign * int(150 / 331 * height * level)
    angle = _chosen(operation, "Rotate") * sign * (math.radians(30) * level)
    # Where each output pixel (x, y), seen from the centre, comes from.
    x = torch.arange(width, device=pixels.device) + 0.5 - width / 2
    y = (torch.arange(height, device=pixels.device) + 0.5 - height / 2)[:, None]
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)
    from_x = cos * x + (shear_x - sin)[:, None, None] * y
    from_x = from_x + (shear_x * (height / 2) - shift_x)[:, None, None]
    from_y = cos * y + (shear_y + sin)[:, None, None] * x
    from_y = from_y + (shear_y * (width / 2) - shift_y)[:, None, None]
    grid = torch.stack((from_x / (width / 2), from_y / (height / 2)), 3)
    return F.grid_sample(pixels, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _blend(pixels: Tensor, operation: Tensor, sign: Tensor, level: float) -> Tensor:
    """Move away from, or towards, black, grey, the mean grey or the smoothed image."""
    red, green, blue = pixels.unbind(1)
    grey = (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]
    mean_grey = grey.mean((1, 2, 3)) * _chosen(operation, "Contrast")
    origin = grey * _per_image(_chosen(operation, "Color")) + _per_image(mean_grey)
    origin = origin + _smooth(pixels) * _per_image(_chosen(operation, "Sharpness"))
    ratio = _per_image(1 + sign * (0.9 * level))
    return torch.lerp(origin, pixels, ratio).clamp_(0, 255).floor_()


def _posterize(pixels: Tensor, operation: Tensor, sign: Tensor, level: float) -> Tensor:
    step = 2 ** round(4 * level)  # 8 to 4 bits
    return torch.floor(pixels / step).mul_(step)


def _solarize(pixels: Tensor, operation: Tensor, sign: Tensor, level: float) -> Tensor:
    return torch.where(pixels >= 255 * (1 - level), 255 - pixels, pixels)


def _auto_contrast(pixels: Tensor, operation: Tensor, sign: Tensor, level: float) -> Tensor:
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    varies = high > low
    spread = torch.where(varies, (high - low) * (1 / 255), 1.0)
    return ((pixels - low * varies) / spread).clamp_(0, 255).floor_()


def _equalize(pixels: Tensor, operation: Tensor, sign: Tensor, level: float) -> Tensor:
    """Pillow's histogram equalisation, per image and channel."""
    flat = pixels.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    top = flat.amax(2, keepdim=True)  # pixels of the brightest value do not count
    step = (flat.shape[2] - counts.gather(2, top)) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255).to(pixels.dtype)
    equalized = table.gather(2, flat).view_as(pixels)
    return torch.where((step > 0)[..., None], equalized, pixels)


_FAMILIES = (
    (("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"), _move),
    (("Brightness", "Color", "Contrast", "Sharpness"), _blend),
    (("Posterize",), _posterize),
    (("Solarize",), _solarize),
    (("AutoContrast",), _auto_contrast),
    (("Equalize",), _equalize),
)
OPERATIONS = ("Identity", *(name for names, _ in _FAMILIES for name in names))
"""RandAugment's operations, in torchvision's order."""


def _chosen(operation: Tensor, name: str) -> Tensor:
    return operation == OPERATIONS.index(name)


def _per_image(value: Tensor) -> Tensor:
    """[B] to [B, 1, 1, 1]."""
    return value[:, None, None, None]


def _smooth(pixels: Tensor) -> Tensor:
    """Pillow's SMOOTH filter, the border left as it is: what Sharpness moves away from."""
    height, width = pixels.shape[2:]
    if min(height, width) <= 2:
        return pixels
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]  # over 3 x 3
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = total.add_(pixels[:, :, 1:-1, 1:-1], alpha=4).div_(13).round_()
    return smooth


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
