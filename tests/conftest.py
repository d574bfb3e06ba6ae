"""What all tests share: no network, no user's data or cache, no deadlines, a folder of images."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

# Tests run side by side, a process per core: more threads would only wait for each other.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("SPARSEJEPA_DATA", None)
# Kept between calls: entries are keyed on their content, and the built-in scenes take a while.
os.environ["SPARSEJEPA_CACHE"] = str(Path(__file__).parent.parent / ".pytest_cache" / "data")

# A busy machine must not fail a test, and a failure must be the same on every machine.
hypothesis.settings.register_profile("sparsejepa", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sparsejepa")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 + 48 noisy images in two classes that differ in colour."""
    root, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 24)):
        for name, tint in (("red", (90, 0, 0)), ("blue", (0, 0, 90))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (32, 32, 3)) + tint
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root
