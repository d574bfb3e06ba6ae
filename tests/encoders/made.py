"""What the tests of encoders share: small encoders and run directories of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsejepa.encoders.encoder import save_encoder, save_groups
from sparsejepa.encoders.export import Export
from sparsejepa.encoders.load import load
from sparsejepa.model.groups import GroupMap
from sparsejepa.model.vit import ViT

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
KINDS = ("region", "concept", "feature")
SHAPES: dict[str, dict[str, Any]] = {
    "square": {},
    "wide": {"img_size": (16, 24), "patch_size": (4, 8), "mlp_ratio": 2.5},
    "token": {"class_token": True, "pos_embed": "learned"},
}


def small_vit(seed: int = 0, **changes: Any) -> ViT:
    """Return a ViT as if trained: no tensor has its first value, none is zero or one."""
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    vit = ViT(**{**sizes, **changes})
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vit.eval()


def random_map(kind: str, grid: tuple[int, int] = (4, 4)) -> GroupMap:
    """Return a map of 4 groups with statistics that are not their first ones."""
    torch.manual_seed(0)
    groups = GroupMap(kind, 24, grid, 4, 5, hidden=8)  # type: ignore[arg-type]
    groups.norm.running_mean = torch.randn(24)
    groups.norm.running_var = torch.rand(24) + 0.5
    return groups.eval()


def write_run(path: Path, kind: str | None = None, shape: str = "square") -> Path:
    """Write a run directory with random weights; the last of its four groups is dead."""
    vit = small_vit(**SHAPES[shape])
    path.mkdir(parents=True, exist_ok=True)
    save_encoder(path, vit, mean=MEAN, std=STD, extra={"data": "scenes", "arm": "x", "seed": 3})
    if kind is not None:
        groups, rms = random_map(kind, vit.grid_size), torch.rand(4) + 0.5
        with torch.no_grad():
            groups.W[3], rms[3] = 0.0, 0.0
        save_groups(path, groups, rms, torch.rand(2, 24) + 0.5)
    return path


def open_run(path: Path) -> Export:
    """Return what exports of a run directory start from."""
    return Export(str(path), load(path))


def noise(size: tuple[int, int], batch: int = 3) -> Tensor:
    """Return normalised pixels [batch, 3, H, W]."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def uint8(*shape: int) -> Tensor:
    """Return random images."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
