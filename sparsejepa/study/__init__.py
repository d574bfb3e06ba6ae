"""Runs, sweeps of runs, what they say and how it is shown; here one run, and what pages share.

What is imported here is imported by every run: neither scikit-learn nor matplotlib.
"""

from __future__ import annotations

from importlib.resources import files
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


def render(template: str, *, package: str = "sparsejepa.study", **values: Any) -> str:
    """Return a template of `package` with `values`, all escaped, and the pages' style."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    shared = PackageLoader("sparsejepa.study", ".")  # what templates import
    return (
        Environment(loader=shared, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        .from_string(resource(template, package))
        .render(style=resource("style.css"), **values)
    )


def resource(name: str, package: str = "sparsejepa.study") -> Any:
    """Return a file of a package as markup, which is trusted as the code is."""
    from markupsafe import Markup

    return Markup(files(package).joinpath(name).read_text(encoding="utf-8"))
