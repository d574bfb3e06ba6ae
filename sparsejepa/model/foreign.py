"""Encoders from other programs' checkpoints: the `.pth.tar` files of I-JEPA and files like them.

Such a file is a pickle, which could hold any code. It is read with ``weights_only=True``, the one
exception to the rule that nothing is unpickled: torch then rebuilds tensors and plain values and
refuses everything else.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsejepa.config import ENCODER_SIZES
from sparsejepa.errors import UserError
from sparsejepa.model.encoder import ViT

ENDINGS = (".pth.tar", ".pth")
# I-JEPA keeps several models in one file; the EMA target encoder is the one that is used.
_PARTS = ("target_encoder", "encoder", "state_dict", "model")
# A state dict does not tell the heads; widths of the standard ViTs and of I-JEPA's giant do.
_HEADS = {width: heads for width, _, heads in ENCODER_SIZES.values()} | {1408: 16}


def read_checkpoint(path: Path) -> ViT:
    """Return the encoder of a checkpoint whose keys are those of timm's and I-JEPA's ViT.

    Width, depth, patches and (square) image size are read from the shapes. Raises UserError: no
    such file, one with anything but tensors and plain values in it, or another model's.
    """
    try:
        # Mapped: what is not used, such as the optimiser's state, is never read.
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # damaged archives and the refusals raise almost anything
        refused = type(error).__name__ == "UnpicklingError"
        reason = "it holds more than weights" if refused else "damaged, or not torch.save's"
        raise UserError(
            f"{path}: not a checkpoint of weights ({reason}); get another copy"
        ) from None
    found = found if isinstance(found, dict) else {}
    state = next((found[part] for part in _PARTS if isinstance(found.get(part), dict)), found)
    weights = {
        str(name).removeprefix("module."): value.detach()
        for name, value in state.items()
        if isinstance(value, Tensor) and not str(name).removeprefix("module.").startswith("head.")
    }
    try:
        with torch.device("meta"):  # takes no memory before the shapes are known to fit
            vit = ViT(**_arguments(weights))
        for name, value in weights.items():
            if value.untyped_storage().nbytes() < value.nbytes:
                raise RuntimeError(f"{name} is larger than what the file holds of it")
        vit.load_state_dict({k: v.clone() for k, v in weights.items()}, assign=True)
    except KeyError as error:
        raise UserError(f"{path}: no encoder in it ({error.args[0]} is missing)") from None
    except (RuntimeError, ValueError, ArithmeticError) as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: not the encoder of a plain ViT ({detail})") from None
    return vit.float()


def _arguments(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `ViT` that give these shapes. Raises KeyError for what is missing."""
    width, channels, *patch = weights["patch_embed.proj.weight"].shape
    prefix = int("cls_token" in weights)
    patches = weights["pos_embed"].shape[1] - prefix
    side, hidden = math.isqrt(patches), len(weights["blocks.0.mlp.fc1.weight"])
    if width not in _HEADS or channels != 3 or len(patch) != 2:
        known = ", ".join(map(str, sorted(_HEADS)))
        raise ValueError(f"patches {channels}x{patch} of width {width}; known widths are {known}")
    if side**2 != patches:
        raise ValueError(f"{patches} patches, no square")
    return {
        "img_size": (side * patch[0], side * patch[1]),
        "patch_size": tuple(patch),
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": _HEADS[width],
        "mlp_ratio": math.nextafter(hidden / width, math.inf),
        "class_token": bool(prefix),
        "pos_embed": "learned" if prefix else "sincos",
    }
