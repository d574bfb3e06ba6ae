"""Sweeps of runs that start from an encoder (--init), when that encoder is no more what it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsejepa.config import preset
from sparsejepa.encoders.encoder import save_encoder
from sparsejepa.errors import UserError
from sparsejepa.model.vit import ViT
from sparsejepa.study.runs import run_tasks
from sparsejepa.study.tasks import Probes, Task
from sparsejepa.training import loop


def write_encoder(folder: Path, seed: int) -> None:
    """Write a run directory's encoder for images of 16x16 pixels."""
    torch.manual_seed(seed)
    vit = ViT(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    folder.mkdir(exist_ok=True)
    save_encoder(folder, vit, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3))


def settings(data: Path, encoder: Path) -> Any:
    return preset("nano").replace(
        data=str(data), init=str(encoder), batch_size=8, steps=2, predictor_dim=32,
        predictor_depth=1, num_groups=4, threads=1, device="cpu",
    )  # fmt: skip


def test_a_run_goes_on_from_its_checkpoint_without_the_encoder(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tmp_path / "a"
    write_encoder(encoder, 0)
    task = Task(settings(tiny_images, encoder), tmp_path / "run", Probes((str(tiny_images),)))

    def stop(*_: Any) -> None:
        raise UserError("stopped")

    monkeypatch.setattr(loop, "finish", stop)
    with pytest.raises(UserError, match="stopped"):
        run_tasks([task], tmp_path / "results.jsonl", jobs=1)
    monkeypatch.undo()
    shutil.rmtree(encoder)
    (row,) = run_tasks([task], tmp_path / "results.jsonl", jobs=1)
    assert row["failed"] is None and row["steps"] == 2
