"""Peak memory: one process per case, lines over the batch, cases that fail."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from sparsejepa.benchmarks import memory
from sparsejepa.benchmarks.memory import Case, Unmeasured, build, highest, peak, section
from sparsejepa.benchmarks.settings import BenchSettings

TINY = BenchSettings(encoder="nano", batch=4, predictor_dim=32, predictor_depth=1, rounds=1)


def test_a_case_survives_the_way_to_its_process() -> None:
    case = Case(replace(TINY, target_shape=(2, 3)), "fp32", depth=3)
    assert Case.read(json.dumps(asdict(case))) == case


def test_a_process_of_its_own_tells_its_peak() -> None:
    needed = peak(Case(TINY, "fp32"))
    assert 50e6 < needed < 20e9


def test_lines_over_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(case: Case) -> float:
        each = 8e6 if case.reference else 4e6 * (case.depth or 6) / 6
        return 3e8 + each * case.settings.batch

    monkeypatch.setattr(memory, "peak", fake)
    rows = {row["name"]: row for row in section(replace(TINY, batch=32)).rows}
    for row in rows.values():
        assert row["fixed_mb"] == pytest.approx(300) and row["bend_mb"] == pytest.approx(
            0, abs=1e-6
        )
    assert rows["reference, fp32"]["per_image_mb"] == pytest.approx(8)
    assert rows["ours, fp32"]["times_reference"] == pytest.approx(0.5)
    deep = [row for name, row in rows.items() if "depth" in name]
    assert deep[1]["per_image_mb"] == pytest.approx(4 * deep[0]["per_image_mb"])
    assert deep[0]["times_reference"] is None
    assert sum("tokens" in name for name in rows) == 2


def test_a_case_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(case: Case) -> float:
        if case.reference:
            raise Unmeasured("too little memory")
        return 1e9

    monkeypatch.setattr(memory, "peak", fake)
    result = section(replace(TINY, quick=True))
    assert all(row["name"].startswith("ours") for row in result.rows) and result.rows
    assert result.rows[0]["times_reference"] is None
    assert "reference, fp32: not measured (too little memory)" in result.notes


def test_what_a_process_says_when_it_fails_is_kept() -> None:
    with pytest.raises(Unmeasured, match="--precision"):
        peak(Case(TINY, "fp17"))


@pytest.mark.parametrize("reference", [False, True])
def test_cases_take_steps(reference: bool) -> None:
    step = build(Case(TINY, "fp32", reference=reference, depth=None if reference else 2))
    before = highest("cpu")
    step(0)
    assert highest("cpu") >= before > 0
