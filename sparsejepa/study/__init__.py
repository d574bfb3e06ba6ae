"""Runs, sweeps of runs, what they say, and how it is shown; here one run by the name of its data.

What is imported here is imported by every run: neither scikit-learn nor matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejepa.config import Config, preset
from sparsejepa.data.catalog import load_images
from sparsejepa.training.loop import Run, train

if TYPE_CHECKING:
    from rich.console import Console


def pretrain(
    data: str | Path | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> Run:
    """Pretrain on a data set by name and return the finished run, see `training.loop.train`.

    `data` names the images (see ``sparsejepa data list``) or is a whole `Config`; `settings` are
    the flat names of `Config` (``lam=0.01, epochs=20, preset="nano"``).
    """
    if isinstance(data, Config):
        config = data.replace(**settings)
    else:
        config = preset(settings.pop("preset", "best")).replace(data=str(data), **settings)
    return train(config, load_images, out=out, resume=resume, console=console)
