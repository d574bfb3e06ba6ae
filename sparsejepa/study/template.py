"""What all pages share: templates with everything escaped, and one style. Draws nothing."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


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
