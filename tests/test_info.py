"""`sparsejepa info` and the presets that it shows."""

from __future__ import annotations

import json
import math

import pytest

from sparsejepa import cli
from sparsejepa.config import PRESETS, preset
from sparsejepa.model.groups import partition_cells
from sparsejepa.model.masks import MaskSampler


def test_presets_say_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["presets"]
    assert set(found) == set(PRESETS)
    for name, about in found.items():
        assert about["about"]
        assert name in about["command"] or name in ("best", "demo")
        preset(name).check()
    for name in ("vit-b16", "vit-l16", "vit-h14"):
        config = preset(name).check().check_image((224, 224))
        optim = config.optim
        assert optim.ema is not None and optim.ema < 1 and (optim.ema_final or 1) < 1


@pytest.mark.parametrize("grid", [(14, 14), (16, 16)])
def test_grids_of_the_large_presets_have_sensible_masks_and_regions(grid: tuple[int, int]) -> None:
    patches = math.prod(grid)
    sampler = MaskSampler(grid)
    assert all(0.15 <= h * w / patches <= 0.2 for h, w in sampler.target_shapes)
    assert [round(n / patches, 2) for n in sampler.context_counts] == [0.25, 0.31, 0.38]
    cells = partition_cells(grid, 16).bincount()
    assert len(cells) == 16 and cells.max() <= 2 * cells.min()
