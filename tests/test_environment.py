"""The fingerprint of the code: what must change it and what must not."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsejepa
from sparsejepa.environment import code_version, environment

PACKAGE = Path(sparsejepa.__file__).parent

SOURCE = '''
"""A module."""
import math

RATE = 0.5
"""What stands below is a docstring too."""


class Box:
    """A box."""

    side: float = 2.0

    def area(self, *, scale: float = 1.0) -> float:
        """Return the area."""
        if scale < 0:
            raise ValueError(f"scale {scale:g}: below 0")
        return scale * self.side**2


def none():
    return None
'''


def version(folder: Path, source: str, room: str = "model") -> str:
    """The fingerprint of a package with this one module."""
    shutil.rmtree(folder, ignore_errors=True)
    path = folder / room / "box.py"
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    (folder / "rng.py").touch()
    code_version.cache_clear()
    return code_version(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 0.5", "RATE   =  (0.5)  # half"),
        ("A module.", "Another text."),
        ('"""What stands below is a docstring too."""\n', ""),
        ('        """Return the area."""\n', ""),
        ("\n\n\ndef none", "\ndef none"),
        ("return scale * self.side**2", "return (\n            scale * self.side ** 2\n        )"),
        ("import math", "import math  # noqa: F401"),
        ("*, scale: float = 1.0", "*,\n        scale: float = 1.0,\n    "),
    ],
)
def test_layout_and_texts_do_not_count(tmp_path: Path, old: str, new: str) -> None:
    assert old in SOURCE
    changed = SOURCE.replace(old, new)
    assert version(tmp_path / "a", changed) == version(tmp_path / "a", SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 0.5", "RATE = 0.25"),
        ("RATE = 0.5", "RATE = 1 / 2"),
        ("scale < 0", "scale <= 0"),
        ("scale: float = 1.0", "scale: float = 1"),
        ("*, scale", "scale"),
        ("scale * self.side**2", "self.side**2 * scale"),
        ("below 0", "below  0"),
        ("return None", "return"),
        ("return None", "return 0"),
        ("return None", "pass"),
        ("import math", "import math as math"),
        ("if scale < 0:\n    ", "if scale < 0:\n            pass\n"),
        ("class Box:", "class Box(object):"),
        ("def none", "async def none"),
    ],
)  # fmt: skip
def test_code_counts(tmp_path: Path, old: str, new: str) -> None:
    assert old in SOURCE
    changed = SOURCE.replace(old, new)
    assert version(tmp_path / "a", changed) != version(tmp_path / "a", SOURCE)


def test_where_code_stands_counts_where_numbers_depend_on_it(tmp_path: Path) -> None:
    rooms = ("model", "data", "evaluation", "training")
    found = {room: version(tmp_path / "a", SOURCE, room) for room in rooms}
    assert len(set(found.values())) == len(rooms)
    free = {version(tmp_path / "a", text, "report") for text in (SOURCE, SOURCE + "\nx = 1\n")}
    assert len(free) == 1 and free.isdisjoint(found.values())


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda p: p.stem)
def test_real_modules_written_anew_are_the_same_code(tmp_path: Path, path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    bare = ast.unparse(ast.parse(source))  # no comments, another layout
    assert version(tmp_path / "a", bare) == version(tmp_path / "a", source)


def test_an_installed_package_without_git_has_the_same_version(tmp_path: Path) -> None:
    code_version.cache_clear()
    copy = tmp_path / "site" / "sparsejepa"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from sparsejepa.environment import environment as e; print(e()['commit'], e()['code'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["None", code_version()]
    assert re.fullmatch("[0-9a-f]{8}", code_version())


def test_a_run_that_went_on_with_other_code_names_both() -> None:
    code_version.cache_clear()
    now = code_version()
    assert environment()["code"] == now
    assert environment(now)["code"] == now
    assert environment("01234567")["code"] == f"01234567+{now}"
    assert environment(f"01234567+{now}")["code"] == f"01234567+{now}"
