"""What installing this package adds: packages and megabytes, from what is installed here.

    python recipes/footprint.py

Counted is what the base (no extra) brings beyond torch, torchvision and timm and what those bring
by themselves. Megabytes are 10^6 bytes of the files as the wheels hold them; the bytecode that pip
compiles beside them is given apart.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import files, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
GIVEN = ("torch", "torchvision", "timm")


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


def megabytes(package: str) -> tuple[float, float]:
    """Return the size of a package's files and of its bytecode."""
    sizes = [0, 0]
    for file in files(package) or []:
        path = Path(str(file.locate()))
        sizes[file.suffix == ".pyc"] += path.stat().st_size if path.exists() else 0
    return sizes[0] / 1e6, sizes[1] / 1e6


def added() -> dict[str, tuple[float, float]]:
    """Return the packages that the base adds, with their sizes, the largest first."""
    names = everything(needs("sparsejepa")) - everything(GIVEN)
    sizes = {name: megabytes(name) for name in names}
    return dict(sorted(sizes.items(), key=lambda item: -item[1][0]))


def main() -> None:
    found = added()
    for name, (size, bytecode) in found.items():
        print(f"{name:20} {size:7.1f} MB {bytecode:6.1f} MB bytecode")
    size, bytecode = (sum(column) for column in zip(*found.values(), strict=True))
    print(f"{len(found)} packages, {size:.0f} MB, and {bytecode:.0f} MB of bytecode")


if __name__ == "__main__":
    main()
