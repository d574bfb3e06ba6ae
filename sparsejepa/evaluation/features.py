"""From images to one vector each: a frozen encoder's pooled tokens, or the pixels themselves."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsejepa.data.catalog import load_dataset
from sparsejepa.data.store import DeviceImages, ImageSet, Target
from sparsejepa.distributed import current, gather_rows, own_rows
from sparsejepa.errors import UserError, nearest
from sparsejepa.evaluation.sizes import read_fitting
from sparsejepa.files import load_tensors, save_tensors
from sparsejepa.interop import Encoder

Pool = Literal["mean", "concat4"]
POOLS = ("mean", "concat4")
MAX_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Tokens of one batch. On the CPU what fits the cache is 1.7 times as fast as large batches."""
PIXEL_SIDE = 32
"""Height and width that pixel features are area-averaged down to, where images are larger."""


@dataclass(frozen=True)
class Features:
    """One vector per image: x [n, D'] float32, with the images' targets."""

    x: np.ndarray
    targets: dict[str, Target]
    name: str
    seconds: float
    """Time that it took to compute x; near 0 when it came from a cache."""

    @property
    def y(self) -> np.ndarray:
        """Values [n] of the primary target. Raises UserError if the images are unlabelled."""
        return target(self.targets, None, self.name).values


def target(targets: dict[str, Target], name: str | None, source: str) -> Target:
    """Return a target by name, the primary one for None; `source` says whose, in an error."""
    if not targets:
        raise UserError(
            f"{source}: has no labels; add class folders or a factors.csv, or use another data set"
        )
    if name is None:
        return next(iter(targets.values()))
    if name not in targets:
        known = ", ".join(targets)
        raise UserError(f"{source}: no target '{name}'{nearest(name, targets)}; it has {known}")
    return targets[name]


def batch_rows(encoder: Encoder, most: int = 512) -> int:
    """Return how many images an encoder takes at once."""
    tokens = MAX_TOKENS.get(encoder.device.type, MAX_TOKENS["cuda"])
    return max(1, min(most, tokens // math.prod(encoder.grid_size)))


def pooled(encoder: Encoder, images: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Return the pooled vectors [B, D'] of uint8 images [B, H, W, 3], and tokens [B, N, D]."""
    layers = [encoder.tokens(images)] if pool == "mean" else encoder.layers(images, 4)
    return torch.cat([x.mean(1) for x in layers], dim=1), layers[-1]


def embed(
    encoder: Encoder,
    images: ImageSet | str,
    split: Literal["train", "test"] = "train",
    *,
    pool: Pool = "mean",
    batch_size: int = 512,
    cache_dir: Path | str | None = None,
    data_root: Path | None = None,
    img_size: tuple[int, int] | None = None,
    upscale: bool = False,
) -> Features:
    """Return the pooled patch tokens of every image.

    Of several processes that are `joined`, each embeds its share; all get the whole.

    Args:
        encoder: sees the images at its own size.
        images: a loaded image set, or a data set's name, of which `split` is loaded.
        pool: mean, the average of the last layer's tokens (D' = D), or concat4, those averages of
            the last four layers side by side (D' = 4 D), in the order of depth.
        batch_size: at most; smaller for encoders with many patches.
        cache_dir: keep the result there and use it again for the same weights, images and pooling.
        data_root: as for `load_dataset`.
        img_size: height and width that named images are read at; by default their own, or the
            encoder's if they have several.
        upscale: enlarge named images that are smaller than that instead of refusing them.

    Raises UserError for an unknown pooling, or if the encoder gives NaN or infinity.
    """
    if pool not in POOLS:
        raise UserError(f"pool '{pool}' is not one of {', '.join(POOLS)}{nearest(pool, POOLS)}")
    if isinstance(images, str):
        name = images

        def read(size: tuple[int, int] | None, upscale: bool) -> ImageSet:
            return load_dataset(name, split, img_size=size, upscale=upscale, data_root=data_root)

        sizes = partial(list, [encoder.img_size])
        images = read_fitting(read, name, [encoder], sizes, img_size=img_size, upscale=upscale)
    start = time.perf_counter()

    def compute() -> Tensor:
        source = DeviceImages(images, encoder.device)
        batch = batch_rows(encoder, batch_size)
        index = torch.from_numpy(own_rows(np.arange(len(images)), current()))
        parts = (pooled(encoder, source.take(part), pool)[0] for part in index.split(batch))
        own = torch.cat([x.cpu() for x in parts])
        return gather_rows(own, len(images))

    if cache_dir is None or current().size > 1:  # some might find it there and others not
        x = compute()
    else:
        parts = (encoder.fingerprint(), images.fingerprint, images.split, str(len(images)), pool)
        key = hashlib.blake2b("/".join(parts).encode(), digest_size=16).hexdigest()
        x = _cached(Path(cache_dir) / f"{key}.safetensors", compute)
    if not x.isfinite().all():
        raise UserError(f"{encoder.name}: gives NaN or infinity on {images.name}; train it again")
    return Features(x.numpy(), images.targets, images.name, time.perf_counter() - start)


def pixel_features(images: ImageSet) -> Features:
    """Return the raw pixels in [0, 1] as vectors [n, h * w * 3], the floor that costs no training.

    Images larger than 32 pixels on a side are averaged over areas down to 32 on that side.
    """
    start = time.perf_counter()
    source = DeviceImages(images, "cpu")
    size = tuple(min(side, PIXEL_SIDE) for side in images.img_size)
    parts = []
    for index in torch.arange(len(images)).split(1024):
        pixels = source.take(index).permute(0, 3, 1, 2).float() / 255
        if size != images.img_size:
            pixels = F.interpolate(pixels, size, mode="area")
        parts.append(pixels.permute(0, 2, 3, 1).flatten(1))
    x = torch.cat(parts).numpy()
    return Features(x, images.targets, images.name, time.perf_counter() - start)


def _cached(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """Read a cached tensor; compute and keep it if it is not there or damaged."""
    try:
        return load_tensors(path)[0]["x"]
    except (UserError, KeyError):
        x = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"x": x}, {})
    except OSError as error:
        raise UserError(f"{path.parent}: cannot keep features there ({error.strerror})") from None
    return x
