"""The script that shows the whole method: it runs, it is short, and its W obeys lambda."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "minimal.py"


def test_the_script_is_at_most_150_lines() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 150


@pytest.mark.parametrize(("lam", "groups"), [("0", 16.0), ("1", 1.0)])
def test_the_script_trains_probes_and_sparsifies(lam: str, groups: float) -> None:
    words = [sys.executable, str(SCRIPT), "--steps", "6", "--images", "400", "--lam", lam]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *steps, last = done.stdout.splitlines()
    losses = [float(x) for line in steps for x in re.findall(r"loss ([\d.]+)", line)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert f"groups per latent {groups} of 16" in steps[-1]
    found = re.search(r"8 classes: (0\.\d+), untrained (0\.\d+)", last)
    assert found and all(0.05 < float(x) < 0.5 for x in found.groups())
