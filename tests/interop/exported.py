"""What the tests of exports share: small run directories of every kind."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparsejepa.interop import load, save_encoder, save_groups
from sparsejepa.interop.export import open_export
from sparsejepa.interop.module import SparseJEPAEncoder
from sparsejepa.model.encoder import ViT
from sparsejepa.model.groups import GroupMap

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SHAPES: dict[str, dict] = {
    "square": {},
    "wide": {"img_size": (16, 24), "patch_size": (4, 8), "mlp_ratio": 2.5},
    "token": {"class_token": True, "pos_embed": "learned"},
}


def write_run(path: Path, kind: str | None = None, shape: str = "square") -> Path:
    """Write a run directory with random weights; every fourth group is dead."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    vit = ViT(**{**sizes, **SHAPES[shape]})
    with torch.no_grad():  # as trained: no tensor keeps its first value
        for parameter in vit.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    path.mkdir(parents=True, exist_ok=True)
    save_encoder(path, vit, mean=MEAN, std=STD, extra={"data": "scenes", "arm": "x", "seed": 3})
    if kind is not None:
        groups = GroupMap(kind, 24, vit.grid_size, 4, 5, hidden=8)  # type: ignore[arg-type]
        groups.norm.running_mean = torch.randn(24)
        groups.norm.running_var = torch.rand(24) + 0.5
        rms = torch.rand(4) + 0.5
        with torch.no_grad():
            groups.W[3], rms[3] = 0.0, 0.0
        save_groups(path, groups, rms, torch.rand(2, groups.W.shape[2]) + 0.5)
    return path


def open_run(path: Path) -> SparseJEPAEncoder:
    """Return the module of a run directory."""
    return open_export(str(path), load(path))


def pixels_for(module: SparseJEPAEncoder, batch: int = 3) -> Tensor:
    """Return normalised noise [batch, 3, H, W]."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, *module.encoder.img_size, generator=generator)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare outputs, to 1e-5."""
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
