"""What the tests of training share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEJEPA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 40 images of 16x16 pixels that differ in brightness."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, shift in (("dark", 0), ("light", 100)):
        (root / label).mkdir()
        for i in range(40):
            pixels = rng.integers(0, 120, (16, 16, 3)) + shift
            Image.fromarray(pixels.astype(np.uint8)).save(root / label / f"{i}.png")
    return root
