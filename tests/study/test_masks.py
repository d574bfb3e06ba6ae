"""The mask pictures are written, whole and at the size of their grid."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from sparsejepa.model.coverage import audit
from sparsejepa.model.masks import MaskSampler
from sparsejepa.study.masks import (
    _headline,
    _share,
    _signed,
    mask_audit_figure,
    mask_preview_figure,
)


@pytest.mark.parametrize("grid", [(4, 8), (12, 12)])
def test_figures_are_written(grid: tuple[int, int], tmp_path: Path) -> None:
    sampler = MaskSampler(grid, num_targets=2)
    found = audit(sampler, batch_size=8, batches=4)
    mask_audit_figure(found, tmp_path / "audit.png")
    rng = np.random.default_rng(0)
    other = ("another sampler", rng.random(grid[0] * grid[1]), np.zeros(grid[0] * grid[1]) + 0.1)
    mask_audit_figure(found, tmp_path / "both.png", other=other)
    mask_preview_figure(sampler, tmp_path / "preview.png", count=11, seed=2)
    audit_image, both = imread(tmp_path / "audit.png"), imread(tmp_path / "both.png")
    assert both.shape[0] == audit_image.shape[0] and both.shape[1] > audit_image.shape[1]
    preview = imread(tmp_path / "preview.png")[..., :3].reshape(-1, 3)
    mask_preview_figure(MaskSampler(grid, num_targets=2, merge=True), tmp_path / "merged.png", 2)
    filled = np.abs(preview - np.array([0x2F, 0x6F, 0x9F]) / 255).max(1) < 0.02
    assert filled.mean() > 0.05  # the context is there to see


def test_headline_says_what_failed() -> None:
    found = audit(MaskSampler((8, 8)), batch_size=16, batches=4)
    assert _headline(found).startswith("Mask audit passed: 8x8 patches, 64 images")
    broken = dataclasses.replace(found, disjoint=False)
    assert "FAILED" in _headline(broken)
    assert "NOT context apart from targets" in _headline(broken)


def test_numbers_in_cells() -> None:
    assert [_share(v) for v in (0.0, 0.123, 1.0)] == ["0", ".12", "1.00"]
    assert [_signed(v) for v in (-0.01, 2.34, -1.0)] == ["+0.0", "+2.3", "-1.0"]


def test_import_stays_light() -> None:
    code = "import sys, sparsejepa.study.masks as m; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
