"""Run directories: the encoder and the groups that pretraining writes, and their way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsejepa import __version__
from sparsejepa.errors import UserError
from sparsejepa.files import load_tensors, save_tensors, write_text
from sparsejepa.interop.encoder import vit_arguments
from sparsejepa.interop.timm import RGB, scale
from sparsejepa.model.encoder import ViT
from sparsejepa.model.groups import GroupMap

FORMAT = 1
WEIGHTS, CONFIG, GROUPS = "encoder.safetensors", "config.json", "groups.safetensors"
FITTED = "fitted-groups"
"""Where in its folder ``explain`` keeps the groups that it fits. A folder of their own: beside the
encoder of a dense run they would pass for those that it was trained with."""
LARGEST_SIDE = 4096
"""Of an image, in pixels; a file that says more would only exhaust memory."""


def save_encoder(
    run_dir: Path, vit: ViT, *, mean: RGB, std: RGB, extra: dict[str, Any] | None = None
) -> None:
    """Write encoder.safetensors, then config.json, to `run_dir`, each whole or not at all."""
    save_tensors(run_dir / WEIGHTS, dict(vit.state_dict()), {})
    config = {
        "format": FORMAT,
        "sparsejepa": __version__,
        "kind": "vit",
        "arch": vit_arguments(vit),
        "mean": list(mean),
        "std": list(std),
        "img_size": list(vit.img_size),
        **(extra or {}),
    }
    write_text(run_dir / CONFIG, json.dumps(config, indent=2) + "\n")


def save_groups(
    run_dir: Path, groups: GroupMap, rms: Tensor | None = None, seen: Tensor | None = None
) -> None:
    """Write groups.safetensors to `run_dir`, whole or not at all.

    `rms` [G] are the units of the groups' activations, as `module.measure_rms` gives them, and
    `seen` [2, D] what `module.measure_seen` gives of whole images.
    """
    about = {
        "kind": groups.kind,
        "num_groups": len(groups.W),
        "sphere": groups.sphere,
        "eps": groups.norm.eps,
    }
    units = {k: v for k, v in (("rms", rms), ("seen", seen)) if v is not None}
    tensors = {
        k: v for k, v in groups.state_dict().items() if k != "mean_gradient"
    }  # for training only
    save_tensors(run_dir / GROUPS, tensors | units, about)


def groups_folder(folder: Path) -> Path:
    """Return where in `folder` groups lie: there, or else where ``explain`` puts fitted ones."""
    fitted = folder / FITTED
    return fitted if (fitted / GROUPS).exists() and not (folder / GROUPS).exists() else folder


def load_groups(run_dir: Path, grid_size: tuple[int, int]) -> GroupMap | None:
    """Return the group map of a run in evaluation mode, None for a dense run.

    Raises UserError if the file is damaged or does not fit the encoder's grid of patches.
    """
    path = run_dir / GROUPS
    if not path.exists():
        return None
    tensors, about = load_tensors(path)
    try:
        if not all(tensor.numel() for tensor in tensors.values()):
            raise ValueError("an empty tensor")  # whose other sides could be of any length
        num_groups, group_dim, embed_dim = tensors["W"].shape
        _, own, hidden = tensors["networks.B"].shape
        groups = GroupMap(
            about["kind"],
            embed_dim,
            grid_size,
            num_groups=num_groups,
            group_dim=group_dim,
            sphere=about.get("sphere", True),
            hidden=hidden,
            out_dim=own * num_groups if about["kind"] == "feature" else own,
        )
        groups.norm.eps = float(about.get("eps", groups.norm.eps))
        units = tensors.pop("rms", torch.ones(num_groups))
        seen = tensors.pop("seen", torch.ones(2, embed_dim))
        if units.shape != (num_groups,) or seen.shape != (2, embed_dim):
            shapes = f"rms {list(units.shape)}, seen {list(seen.shape)}"
            raise ValueError(f"{shapes} for {num_groups} groups of {embed_dim} latents")
        groups.load_state_dict(tensors | {"mean_gradient": groups.mean_gradient})
    except (KeyError, ValueError, RuntimeError, IndexError, TypeError) as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: does not fit {CONFIG} ({detail}); copy the run again") from None
    return groups.eval()


def load_run(path: Path) -> tuple[ViT, RGB, RGB]:
    """Build the encoder that `save_encoder` wrote; UserError says what is wrong with the folder."""
    remedy = "give a directory that `sparsejepa pretrain` wrote, or timm:NAME"
    if not path.is_dir():
        what = "is a file, not a run directory" if path.exists() else "no such run directory"
        raise UserError(f"{path}: {what}; {remedy}")
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            if (path / "checkpoints").is_dir():
                raise UserError(f"{path}: {file} is missing, the run is unfinished; --resume it")
            raise UserError(f"{path}: not a run directory ({file} is missing); {remedy}")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        format_, writer = config["format"], config["sparsejepa"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path / CONFIG}: not an encoder's configuration; {remedy}") from None
    if format_ != FORMAT or config.get("kind") != "vit":
        raise UserError(
            f"{path / CONFIG}: format {format_} of kind {config.get('kind')!r}, this version reads "
            f"format {FORMAT} of kind 'vit'; use sparsejepa {writer}, which wrote it"
        )
    tensors, _ = load_tensors(path / WEIGHTS)
    try:
        tuples = ("img_size", "patch_size")
        arch: dict[str, Any] = {
            k: tuple(v) if k in tuples else v for k, v in config["arch"].items()
        }
        if not (0 < arch["depth"] <= len(tensors) and max(arch["img_size"]) <= LARGEST_SIDE):
            raise ValueError("sizes that no encoder has")
        with torch.device("meta"):  # takes no memory before the sizes are known to fit
            vit = ViT(**arch)
        mean, std = scale(config["mean"], config["std"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as e:
        raise UserError(f"{path / CONFIG}: damaged ({e!r}); train or copy it again") from None
    try:
        vit.load_state_dict(tensors, assign=True)
        vit.float()
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"{path / WEIGHTS}: does not fit {CONFIG} ({detail})") from None
    return vit, mean, std
