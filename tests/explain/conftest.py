"""A small folder of images with factors and masks, and two tiny runs on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsejepa.config import preset
from sparsejepa.data.scenes import Scenes
from sparsejepa.study import pretrain

COUNTS = {"train": 120, "test": 60}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/, masks/ and factors.csv: 120 + 60 scenes of 3 to 10 objects, 32 x 32 pixels."""
    root = tmp_path_factory.mktemp("explained")
    scenes = Scenes().render(np.arange(sum(COUNTS.values())))
    rows = ["file,count,shape,split"]
    for name in ("images", "masks"):
        (root / name).mkdir()
    for i, (image, mask) in enumerate(zip(scenes.images, scenes.masks, strict=True)):
        # A name that would be a tag if the page did not escape it.
        name = f"<b>{i:03}.png"
        Image.fromarray(image).save(root / "images" / name)
        Image.fromarray(mask).save(root / "masks" / name)
        split = "train" if i < COUNTS["train"] else "test"
        rows.append(f"{name},{scenes.factors[i, 0]},{scenes.factors[i, 1]},{split}")
    (root / "factors.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of a few steps: concept groups with two seeds, regions, and dense."""
    out = tmp_path_factory.mktemp("runs")
    settings = preset("nano").replace(
        data=str(folder), steps=6, warmup=0.2, batch_size=32, predictor_depth=1, device="cpu",
        threads=1, patch_size=8, num_groups=6,
    )  # fmt: skip
    arms = {
        "concept": {"groups": "concept", "lam": 0.5},
        "concept-s1": {"groups": "concept", "lam": 0.5, "seed": 1},
        "region": {"groups": "region"},
        "dense": {"groups": "none"},
    }
    for name, arm in arms.items():
        pretrain(settings.replace(**arm), out=out / name)
    return {name: out / name for name in arms}
