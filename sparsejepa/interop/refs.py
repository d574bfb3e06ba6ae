"""From a name to a frozen encoder: run directories, timm, the hub, folders and files of weights."""

from __future__ import annotations

import functools
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsejepa.errors import UserError
from sparsejepa.interop import hub
from sparsejepa.interop.encoder import IMAGENET, Encoder, Precision
from sparsejepa.interop.foreign import ENDINGS, build_vit, read_weights
from sparsejepa.interop.runs import CONFIG, load_run
from sparsejepa.interop.timm import RGB, TimmViT, read_timm, rgb
from sparsejepa.interop.transformers import read_transformers
from sparsejepa.rng import derive_seed

_IJEPA = "CC BY-NC 4.0 (if these are the published weights of I-JEPA)"


def load(
    ref: str | Path, device: torch.device | str = "cpu", precision: Precision = "fp32"
) -> Encoder:
    """Load a frozen encoder.

    Args:
        ref: a run directory; ``timm:NAME`` for a public model with its pretrained weights;
            ``timm:NAME?untrained`` for the same model with random ones;
            ``hub:OWNER/NAME[@REVISION]``; a folder in our format, that of transformers or that of
            timm; or a file of weights of a plain ViT (.pth.tar, .pth, .pt, .safetensors).

    Raises UserError, one line with the path and the remedy, if there is no encoder to be had.
    """
    text = str(ref)
    if text.startswith("timm:"):
        encoder = _load_timm(text)
    elif text.startswith("hub:"):
        encoder = _load_hub(text)
    elif text.endswith(ENDINGS) and not Path(ref).is_dir():
        encoder = _load_file(Path(ref))
    else:
        encoder = _load_folder(Path(ref))
    encoder.name, encoder.precision = text, precision
    if encoder.license and "nc" in re.split(r"[^a-z0-9]+", encoder.license.lower()):
        _say_license(text, encoder.license)
    return encoder.to(device)


def folder_of(ref: str | Path) -> Path | None:
    """Return the folder that an encoder of this name lies in, None for timm's and for a file."""
    text = str(ref)
    if text.startswith("hub:"):
        return hub.fetch(text)
    return Path(ref) if Path(ref).is_dir() else None


@functools.cache
def _say_license(ref: str, license: str) -> None:
    logging.getLogger(__name__).warning("%s: weights under %s: no commercial use", ref, license)


def _load_timm(ref: str) -> Encoder:
    name, _, query = ref.removeprefix("timm:").partition("?")
    if query not in ("", "untrained"):
        raise UserError(f"{ref}: '?{query}' is not known; only '?untrained' is")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(0, 0, "untrained"))
        model = TimmViT(name, pretrained=not query)
    return Encoder(model, name=ref, mean=model.mean, std=model.std)


def _load_hub(ref: str) -> Encoder:
    folder = hub.fetch(ref)
    try:
        return _load_folder(folder)
    except UserError as error:
        copy = folder.parents[1]
        raise UserError(f"{ref}: {error}; to fetch it anew, remove {copy}") from None


def _load_folder(path: Path) -> Encoder:
    """Load a folder by what its config.json says; what is unknown is read as a run directory."""
    config, license = _config(path / CONFIG), hub.license_of(path)
    if "model_type" in config:
        tensors: dict[str, Tensor] = {}
        for file in hub.weights_files(path):
            tensors |= read_weights(file)[0]
        vit, report = read_transformers(tensors, config, str(path))
        mean, std = _normalisation(path / "preprocessor_config.json")
        return Encoder(vit, name="", mean=mean, std=std, license=license, report=report)
    if "architecture" in config:
        model, report = read_timm(path, config)
        own = model.license or license
        return Encoder(model, name="", mean=model.mean, std=model.std, license=own, report=report)
    vit, mean, std = load_run(path)
    return Encoder(vit, name="", mean=mean, std=std, license=license)


def _config(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one if there is none, which others complain of."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _normalisation(path: Path) -> tuple[RGB, RGB]:
    """Return mean and std of transformers' image processor; ImageNet's if there is none."""
    about = _config(path)
    try:
        return rgb(about.get("image_mean", IMAGENET[0])), rgb(about.get("image_std", IMAGENET[1]))
    except (TypeError, ValueError):
        raise UserError(f"{path}: image_mean and image_std are no three numbers") from None


def _load_file(path: Path) -> Encoder:
    """Load a file of weights; a .safetensors may carry what its tensors do not tell, as ours do."""
    tensors, about = read_weights(path)
    try:
        heads, size = about.get("num_heads"), about.get("img_size")
        height, width = size if size else (0, 0)
        shape = (int(height), int(width)) if size else None
        mean, std = rgb(about.get("mean", IMAGENET[0])), rgb(about.get("std", IMAGENET[1]))
        eps = float(about.get("norm_eps", 1e-6))
        heads = None if heads is None else int(heads)
    except (TypeError, ValueError):
        raise UserError(f"{path}: damaged, what it says of itself is no number") from None
    vit, report = build_vit(tensors, str(path), num_heads=heads, img_size=shape, norm_eps=eps)
    # Nobody else keeps a predictor beside a target encoder.
    ijepa = report.part.startswith("target_encoder.") and any(
        name.startswith("predictor.") for name in tensors
    )
    license = _IJEPA if ijepa else None
    return Encoder(vit, name="", mean=mean, std=std, license=license, report=report)
