"""Settings of the smallest runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsejepa.config import Config, preset


def config_of(folder: Path, **settings: Any) -> Config:
    """Return the settings of a run of four steps on the images in `folder`."""
    tiny: dict[str, Any] = {
        "batch_size": 8, "steps": 4, "predictor_dim": 32, "predictor_depth": 1, "num_groups": 4,
        "threads": 1, "device": "cpu",
    }  # fmt: skip
    return preset("nano").replace(data=str(folder), **{**tiny, **settings})
