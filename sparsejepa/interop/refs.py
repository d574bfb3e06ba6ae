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
from sparsejepa.interop.runs import CONFIG, WEIGHTS, load_run
from sparsejepa.interop.timm import RGB, TimmViT, read_timm, scale
from sparsejepa.interop.transformers import read_transformers
from sparsejepa.rng import derive_seed

_IN_FOLDERS = {WEIGHTS, "model.safetensors", "pytorch_model.bin"}
_IJEPA = "CC BY-NC 4.0 (if these are the published weights of I-JEPA)"


def load(
    ref: str | Path, device: torch.device | str = "cpu", precision: Precision = "fp32"
) -> Encoder:
    """Load a frozen encoder.

    Args:
        ref: a run directory; ``timm:NAME`` for a public model with its pretrained weights;
            ``timm:NAME?untrained`` for the same model with random ones;
            ``hub:OWNER/NAME[@REVISION]``; a folder in our format, that of transformers or that of
            timm; or a file of weights of a plain ViT (.pth.tar, .pth, .pt, .safetensors), which is
            read as its folder if that is one of the three.

    Raises UserError, one line with the path and the remedy, if there is no encoder to be had.
    """
    text = str(ref)
    if text.startswith("timm:"):
        encoder = _load_timm(text)
    elif text.startswith("hub:"):
        encoder = _load_hub(text)
    elif text.endswith(ENDINGS) and not Path(ref).is_dir():
        whole = _belongs_to_a_folder(Path(ref))
        encoder = _load_folder(Path(ref).parent) if whole else _load_file(Path(ref))
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
    config = _config(path / CONFIG)
    own = config.get("license")  # what a run's own file has from the encoder that it began with
    license = hub.license_of(path) or (own if isinstance(own, str) else None)
    if "model_type" in config:
        tensors: dict[str, Tensor] = {}
        for file in hub.weights_files(path):
            tensors |= read_weights(file)[0]
        vit, report = read_transformers(tensors, config, str(path))
        mean, std = _normalisation(path / "preprocessor_config.json")
        return Encoder(vit, name="", mean=mean, std=std, license=license, report=report)
    if "architecture" in config:
        model, report = read_timm(path, config)
        model.license = model.license or license
        return Encoder(model, name="", mean=model.mean, std=model.std, report=report)
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
    """Return mean and std of transformers' image processor; ImageNet's if there is none.

    Raises UserError for pixels that it does not bring to [0, 1] first, as all is meant here.
    """
    about = _config(path)
    try:
        factor = float(about.get("rescale_factor", 1 / 255)) if about.get("do_rescale", True) else 1
        if abs(factor * 255 - 1) > 1e-3:
            raise UserError(
                f"{path}: pixels are multiplied by {factor:g} instead of 1/255, which is not known "
                "here; set rescale_factor to 1/255, with image_mean and image_std that go with it"
            )
        if not about.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return scale(about.get("image_mean", IMAGENET[0]), about.get("image_std", IMAGENET[1]))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: image_mean and image_std are no three numbers each ({error})"
        ) from None


def _belongs_to_a_folder(path: Path) -> bool:
    """Return whether the config.json beside a file of weights is about this file."""
    folder = path.parent
    if path.name not in _IN_FOLDERS or not path.is_file() or not (folder / CONFIG).is_file():
        return False
    if path.name == WEIGHTS:
        return True
    config = _config(folder / CONFIG)
    return bool({"model_type", "architecture"} & set(config)) and path in hub.weights_files(folder)


def _load_file(path: Path) -> Encoder:
    """Load a file of weights; a .safetensors may carry what its tensors do not tell, as ours do."""
    tensors, about = read_weights(path)
    try:
        heads, size = about.get("num_heads"), about.get("img_size")
        height, width = size if size else (0, 0)
        shape = (int(height), int(width)) if size else None
        mean, std = scale(about.get("mean", IMAGENET[0]), about.get("std", IMAGENET[1]))
        eps = float(about.get("norm_eps", 1e-6))
        heads = None if heads is None else int(heads)
    except (TypeError, ValueError):
        raise UserError(f"{path}: damaged, what it says of itself is no number") from None
    vit, report = build_vit(tensors, str(path), num_heads=heads, img_size=shape, norm_eps=eps)
    # Nobody else keeps a predictor beside a target encoder.
    ijepa = report.part.startswith("target_encoder.") and any(
        name.startswith("predictor.") for name in tensors
    )
    own = about.get("license")
    license = _IJEPA if ijepa else own if isinstance(own, str) else None
    return Encoder(vit, name="", mean=mean, std=std, license=license, report=report)
