"""What packages a requirement brings, as the environment of the tests has them installed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def project() -> dict:
    """Return the [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def needs(package: str, extra: str = "") -> list[str]:
    """Return what a package asks for, without an extra or with that extra alone.

    This package's own lists are read from the source, so that an old installation does not hide a
    change. Raises importlib.metadata.PackageNotFoundError for what is not installed.
    """
    if package == "sparsejepa":
        table = project()
        return table["optional-dependencies"][extra] if extra else table["dependencies"]
    found = []
    for line in requires(package) or []:
        marker = Requirement(line).marker
        without = marker is None or marker.evaluate({"extra": ""})
        if without != bool(extra) and (marker is None or marker.evaluate({"extra": extra})):
            found.append(line)
    return found


def everything(roots: Iterable[str]) -> set[str]:
    """Return the names of all packages that the requirements `roots` bring, themselves included."""
    waiting, seen = list(roots), set()
    while waiting:
        wanted = Requirement(waiting.pop())
        for key in [(normal(wanted.name), extra) for extra in ("", *wanted.extras)]:
            if key not in seen:
                seen.add(key)
                waiting += needs(*key)
    return {name for name, _ in seen}


def normal(name: str) -> str:
    """Return a package's name as the registry compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()
