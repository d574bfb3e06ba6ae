"""What several tests of features need: a run directory and its encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsejepa
from sparsejepa.encoders.encoder import Encoder, save_encoder, save_groups
from sparsejepa.model.groups import GroupMap
from sparsejepa.model.vit import ViT

MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: a small encoder with concept groups."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    save_encoder(folder, ViT(16, 4, embed_dim=24, depth=5, num_heads=3), mean=MEAN, std=STD)
    save_groups(folder, GroupMap("concept", 24, (4, 4), 6, 4), torch.arange(6) + 0.5)
    return folder


@pytest.fixture(scope="module")
def encoder(run: Path) -> Encoder:
    return sparsejepa.load(run)
