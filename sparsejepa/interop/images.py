"""Images at an encoder's size: the one rule by which data sets, exports and `preprocess` go.

The largest centred part of the encoder's shape is resized to its size (the shorter side is resized,
the rest of the longer one cropped), smoothly; nothing is squashed. `data.decode` does it; here it
is said in the words of other programs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sparsejepa.data.decode import fit, read_image, shown, to_8_bit_rgb
from sparsejepa.errors import UserError

RULE = {
    "resize": "shortest_edge",
    "crop": "center",
    "interpolation": "bicubic",
    "interpolation_from_1.5_times_smaller_on": "hamming",
    "antialias": True,
    "rescale": "1/255",
}
"""What comes before mean and standard deviation, for the metadata of every export."""
_FORMS = "give uint8 [B, H, W, 3], PIL images, files, or a list of them"


def timm_rule(size: tuple[int, int]) -> dict[str, Any]:
    """Return the rule as a pretrained_cfg of timm says it."""
    return {
        "input_size": [3, *size],
        "fixed_input_size": True,
        "interpolation": RULE["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def transformers_rule(size: tuple[int, int]) -> dict[str, Any]:
    """Return the rule as an image processor of transformers says it.

    Of images that are not square it knows no such rule: those are squashed.
    """
    height, width = size
    square = height == width
    crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": height} if square else {"height": height, "width": width},
        "resample": int(Image.Resampling.BICUBIC),
        **(crop if square else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
    }


def at_size(images: Any, size: tuple[int, int]) -> Tensor:
    """Return images as uint8 [B, H, W, 3] of `size` (h, w), by the rule.

    `images`: a file, a PIL image, uint8 [H, W, 3] or [B, H, W, 3] (tensor or array), or a list of
    these. Smaller ones are enlarged. Raises UserError for anything else, and for what cannot be
    read.
    """
    if isinstance(images, list | tuple) and images:
        return torch.cat([at_size(image, size) for image in images])
    if isinstance(images, str | Path):
        found = read_image(str(images), images, size, upscale=True)
        if isinstance(found, str):
            raise UserError(f"{images}: cannot be read ({found}); mend it or leave it out")
        return torch.from_numpy(np.array(found))[None]
    if isinstance(images, Image.Image):
        return _of_pil(images, size)[None]
    if not isinstance(images, Tensor | np.ndarray):
        raise UserError(f"images of type {type(images).__name__}: {_FORMS}")
    pixels = torch.as_tensor(images)
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise UserError(f"images of {pixels.dtype} {list(pixels.shape)}: {_FORMS}")
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if 0 in pixels.shape:
        raise UserError(f"images of shape {list(pixels.shape)}: nothing to see in them; {_FORMS}")
    if tuple(pixels.shape[1:3]) == size:
        return pixels
    return torch.stack([_of_pil(Image.fromarray(x), size) for x in pixels.cpu().numpy()])


def _of_pil(image: Image.Image, size: tuple[int, int]) -> Tensor:
    try:
        upright = ImageOps.exif_transpose(image)
        return torch.from_numpy(np.array(fit(to_8_bit_rgb(upright), size)))
    except Exception as error:  # of a damaged file Pillow's readers raise almost anything
        reason = shown(str(error).split("\n")[0]) or type(error).__name__
        raise UserError(f"a PIL image of mode {image.mode}: {reason}; leave it out") from None
