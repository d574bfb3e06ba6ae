"""Fitted groups as files: groups.safetensors, as run directories have it, and the rest of the fit.

Letters: N patches, D latents, G groups.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsejepa.encoders.encoder import GROUPS, load_groups, save_groups
from sparsejepa.errors import UserError
from sparsejepa.files import load_tensors, read_json, save_tensors, write_text
from sparsejepa.model.groups import GroupMap

ABOUT, STATE = "posthoc.json", "posthoc.safetensors"


@dataclass(frozen=True)
class Fit:
    """What `PostHocGroups` is made of once it is fitted."""

    params: dict[str, Any]
    grid_size: tuple[int, int]
    n_features: int
    groups: GroupMap
    tensors: dict[str, Tensor]
    """unit, rms, scale [G], [G], [D]; mean, patch_scale [D]; patch_mean [N, D]; loss_curve."""


def write_fit(folder: Path, fit: Fit) -> None:
    """Write a fit to a folder, which is made if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    save_groups(folder, fit.groups, fit.tensors["unit"])
    save_tensors(folder / STATE, fit.tensors, {})
    about = {"params": fit.params, "grid_size": fit.grid_size, "n_features": fit.n_features}
    # A search may have set numbers of numpy's.
    text = json.dumps(about, indent=1, default=lambda number: number.item())
    write_text(folder / ABOUT, text + "\n")


def read_fit(folder: Path) -> Fit:
    """Return what `write_fit` wrote. Raises UserError if it is missing, damaged or of two fits."""
    about, (tensors, _) = read_json(folder / ABOUT), load_tensors(folder / STATE)
    try:
        params: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in about["params"].items()
        }
        rows, cols = about["grid_size"]
        latents, count = len(tensors["mean"]), int(params["num_groups"])
        shapes = {
            "mean": (latents,),
            "scale": (latents,),
            "patch_scale": (latents,),
            "patch_mean": (rows * cols, latents),  # checked before a map of that grid is made
            "unit": (count,),
            "rms": (count,),
        }
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} of shape {list(tensors[name].shape)}, not {list(shape)}")
        groups = load_groups(folder, (rows, cols))
        if groups is None or groups.W.shape[::2] != (count, latents):
            raise ValueError(f"{GROUPS} is missing or that of another fit")
        features = int(about["n_features"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / ABOUT}: damaged ({error}); fit the groups again") from None
    return Fit(params, (rows, cols), features, groups.requires_grad_(False), tensors)
