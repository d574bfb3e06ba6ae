"""The benchmark of reading and decoding files: it runs, and counts what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsejepa.benchmarks import loading


def test_every_contender_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "CASES", ((40, 48, 16),))
    out = tmp_path / "loading.json"
    found = loading.main(["--quick", "--rounds", "1", "--workers", "1", "--json", str(out)])
    names = [row["name"] for row in found["loading"]]
    assert names[:3] == [
        f"48x40 to 16, {name}"
        for name in ("ours", "ours, cropped and normalised as well", "decoder alone")
    ]
    rates = {row["name"]: row["images_per_second"] for row in found["loading"]}
    for row in found["loading"]:
        assert row["x_ours_faster"] == pytest.approx(rates[names[0]] / row["images_per_second"])
    assert json.loads(out.read_text()) == found
