"""The data path: crops and flips, masks, files, and what share of a step's time they take.

Opponents do the same thing the usual way: one image after another with Pillow in a DataLoader, and
masks drawn per image in Python. Images are made on the spot.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsejepa.benchmarks import settings as bench
from sparsejepa.benchmarks.peers import installed, lightly_collator, unchanged
from sparsejepa.benchmarks.reference import MaskCollator
from sparsejepa.benchmarks.settings import BenchSettings, Section
from sparsejepa.benchmarks.steps import our_step
from sparsejepa.benchmarks.timing import Contender, entries, interleave, ratios, spread
from sparsejepa.data.augment import CROP_TRIES, Augment
from sparsejepa.data.decode import decode
from sparsejepa.data.store import DeviceImages, ImageSet
from sparsejepa.model.masks import MaskSampler
from sparsejepa.rng import generator

CROP_SCALE, CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
MASK_BATCH = 256
MASK_GRIDS = {(8, 8): (3, 4), (14, 14): (6, 6)}
"""Grids on which masks are timed, with the shape of a target block."""
PHOTO, PHOTO_SIZE = (256, 320), (224, 224)
"""Height and width of the JPEG files, and of what they are decoded to."""

Box = tuple[int, int, int, int]


def section(settings: BenchSettings) -> Section:
    """Time each part of the data path beside the usual way, and its share of a step."""
    result = Section("data", "Data path")
    _augmentation(settings, result)
    _masks(settings, result)
    _files(settings, result)
    _share(settings, result)
    return result


class PillowCrops(Dataset):
    """Random resized crop, flip and normalisation of one image at a time with Pillow.

    The distribution is that of `Augment`: torchvision's RandomResizedCrop, bilinear, and a flip.

    Args:
        images: [H, W, 3] uint8 each, or encoded.
        img_size: height and width of the result.
        transform: from a Pillow image to the result, instead of what is written here, which is
            faster than torchvision's.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray | bytes],
        img_size: tuple[int, int],
        transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        self.images, self.img_size, self.transform = images, img_size, transform
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (bench.MEAN, bench.STD))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        source = self.images[index]
        if isinstance(source, bytes):
            image = Image.open(io.BytesIO(source)).convert("RGB")
        else:
            image = Image.fromarray(source)
        if self.transform is not None:
            return self.transform(image)
        image = pillow_crop(image, draw_box(image.height, image.width), self.img_size)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        return x.sub_(self.mean).div_(self.std)


def draw_box(height: int, width: int) -> Box:
    """Draw a crop as torchvision does: top, left, height, width."""
    log_ratio = [math.log(r) for r in CROP_RATIO]
    for _ in range(CROP_TRIES):
        area = height * width * random.uniform(*CROP_SCALE)
        aspect = math.exp(random.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    aspect = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def pillow_crop(image: Image.Image, box: Box, img_size: tuple[int, int]) -> Image.Image:
    """Cut out a box (top, left, height, width) and resize it to `img_size` (h, w), bilinear."""
    top, left, height, width = box
    image = image.crop((left, top, left + width, top + height))
    return image.resize((img_size[1], img_size[0]), Image.Resampling.BILINEAR)


def _augmentation(settings: BenchSettings, result: Section) -> None:
    """Time one pass over a set of images that lie in memory."""
    side, batch, device = settings.img_size, settings.batch, settings.device
    count = batch * (2 if settings.quick else max(2, 4096 // batch))
    images = smooth_images(count, side, side)
    store, augment = _store(images, settings), bench.augmentation(settings)

    def ours(number: int) -> None:
        order = torch.randperm(count, generator=generator(0, number, "order"))
        for i, index in enumerate(order.split(batch)):
            augment(store.take(index), generator(number, i, "augment", device))

    def usual(workers: int, transform: Any = None) -> Contender:
        # Workers stay between passes and have nothing to do once a pass is over.
        loader = DataLoader(
            PillowCrops(list(images), (side, side), transform),
            batch,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.startswith("cuda"),
        )

        def call(number: int) -> None:
            for x in loader:
                x.to(device, non_blocking=True)

        return call

    contenders: dict[str, Contender] = {"crops, ours": ours}
    for workers in (0, 2):
        contenders[f"crops, Pillow + DataLoader, {workers} workers"] = usual(workers)
        if installed("torchvision"):
            contenders[f"crops, torchvision on Pillow + DataLoader, {workers} workers"] = usual(
                workers, _torchvision_transform(side)
            )
    _add(result, contenders, count, settings)


def _torchvision_transform(side: int) -> Any:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(side, CROP_SCALE, CROP_RATIO),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(bench.MEAN, bench.STD),
        ]
    )


def _masks(settings: BenchSettings, result: Section) -> None:
    """Time the masks of a batch."""
    images = [torch.zeros(1)] * MASK_BATCH
    for (rows, cols), shape in MASK_GRIDS.items():
        patches = rows * cols
        share, aspect = math.prod(shape) / patches, shape[0] / shape[1]
        context = patches * 3 // 16
        sampler = MaskSampler(
            (rows, cols),
            target_scale=(share, share),
            target_aspect_ratio=(aspect, aspect),
            context_counts=(context,),
        )
        collate = MaskCollator((rows, cols), shape, context)

        def ours(number: int, sampler: MaskSampler = sampler) -> None:
            sampler.sample(MASK_BATCH, seed=0, step=number, device=settings.device)

        def usual(number: int, collate: MaskCollator = collate) -> None:
            for masks in collate(MASK_BATCH):
                for mask in masks:
                    mask.to(settings.device, non_blocking=True)

        title = f"masks on {rows}x{cols}"
        contenders: dict[str, Contender] = {f"{title}, ours": ours, f"{title}, per image": usual}
        if installed("lightly"):
            with suppress(Exception), unchanged():  # the section of the peers says what is wrong
                collator = lightly_collator((rows, cols), shape)
                collator(images)
                contenders[f"{title}, lightly"] = lambda number, c=collator: c(images)
        _add(result, contenders, MASK_BATCH, settings)


def _files(settings: BenchSettings, result: Section) -> None:
    """Time JPEG files: ours are decoded once, then cropped from memory in every epoch."""
    count = 8 if settings.quick else 64
    files = [_jpeg(image) for image in smooth_images(count, *PHOTO)]
    items = list(zip(map(str, range(count)), files, strict=True))
    dataset = PillowCrops(files, PHOTO_SIZE)
    once = np.concatenate(
        [block.images for block in decode(items, PHOTO_SIZE, upscale=False, origin="files")]
    )
    store = _store(once, settings)
    augment = Augment(PHOTO_SIZE, mean=bench.MEAN, std=bench.STD)
    order = torch.arange(count)

    def decode_once(number: int) -> None:
        for _ in decode(items, PHOTO_SIZE, upscale=False, origin="files"):
            pass

    def crops(number: int) -> None:
        augment(store.take(order), generator(0, number, "augment", settings.device))

    def usual(number: int) -> None:
        for i in range(count):
            dataset[i]

    height, width = PHOTO
    contenders: dict[str, Contender] = {
        f"JPEG {height}x{width}, ours, crops once decoded": crops,
        f"JPEG {height}x{width}, ours, decoded once per data set": decode_once,
        f"JPEG {height}x{width}, Pillow, decode and crop, one thread": usual,
    }
    _add(result, contenders, count, settings)


def _share(settings: BenchSettings, result: Section) -> None:
    """Time taking, cropping and masking a batch beside the whole step."""
    step, _ = our_step(settings, result.notes.append)
    sampler = bench.model(settings, bench.config(settings)).sampler
    augment, device = bench.augmentation(settings), settings.device
    store = _store(bench.images(settings).cpu().numpy(), settings)
    order = torch.arange(settings.batch)

    def data(number: int) -> None:
        augment(store.take(order), generator(0, number, "augment", device))
        sampler.sample(settings.batch, seed=0, step=number, device=device)

    whole, part = "the whole step, ours", "data, crops and masks of it"
    timings = interleave(
        {whole: step, part: data}, rounds=settings.rounds, device=device, warmup=_warmup(settings)
    )
    for timing in timings.values():
        rates = spread([settings.batch / s for s in timing.seconds])
        row = timing.row(**entries("images_per_second", rates))
        row |= entries("share_of_step", ratios(timing, timings[whole]))
        result.rows.append(row)
    share = result.rows[-1]
    result.notes.append(
        "data, crops and masks take {share_of_step:.2%} of a step ({share_of_step_low:.2%} to "
        "{share_of_step_high:.2%})".format(**share)
    )


def _add(
    result: Section, contenders: Mapping[str, Contender], images: int, settings: BenchSettings
) -> None:
    """Time contenders that treat `images` images per call; the first is ours."""
    timings = interleave(
        contenders, rounds=settings.rounds, device=settings.device, warmup=_warmup(settings)
    )
    ours = next(iter(timings.values()))
    for timing in timings.values():
        rates = spread([images / s for s in timing.seconds])
        row = timing.row(**entries("images_per_second", rates))
        result.rows.append(row | entries("x_ours_faster", ratios(timing, ours)))


def _warmup(settings: BenchSettings) -> int:
    return 1 if settings.quick else 2


def _store(images: np.ndarray, settings: BenchSettings) -> DeviceImages:
    image_set = ImageSet("bench", "train", images, {}, bench.MEAN, bench.STD)
    return DeviceImages(image_set, settings.device)


def smooth_images(count: int, height: int, width: int) -> np.ndarray:
    """Return images [count, height, width, 3] uint8 with the large shapes that photographs have."""
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.uniform(0, 255, (count, 3, 8, 8)))
    large = F.interpolate(small, (height, width), mode="bicubic")
    noise = torch.from_numpy(rng.normal(0, 4, large.shape))
    return (large + noise).clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def _jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()
