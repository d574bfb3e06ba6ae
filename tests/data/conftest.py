"""Tiny image files for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Save = Callable[..., np.ndarray]


@pytest.fixture
def save() -> Save:
    """Return a function that writes a random image to a path and returns its pixels [H, W, 3]."""
    rng = np.random.default_rng(0)

    def write(path: Path, size: tuple[int, int] = (8, 8)) -> np.ndarray:
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return pixels

    return write
