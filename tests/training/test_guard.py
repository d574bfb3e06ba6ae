"""What stops a run: terms that are not finite or explode, and nothing that ordinary runs do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparsejepa.config import preset
from sparsejepa.training.guard import Guard
from sparsejepa.training.loop import pretrain
from sparsejepa.training.step import TERMS

ORDINARY = dict.fromkeys(TERMS, 0.5)


def guard_after(*rows: dict[str, Any]) -> Guard:
    guard = Guard(TERMS)
    for row in rows:
        guard.observe(row)
    return guard


def values(**changes: float) -> list[float]:
    return [{**ORDINARY, **changes}[name] for name in TERMS]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_not_finite_is_named_and_not_the_total_that_it_spoils(bad: float) -> None:
    said = Guard(TERMS).check(7, values(total=bad, kl=bad, grad_norm=bad))
    assert said == "'kl' is not finite at step 7"
    said = Guard(TERMS).check(7, values(total=bad, grad_norm=bad))
    assert said == "'total' is not finite at step 7"


def test_an_explosion_is_named_with_what_was_before() -> None:
    guard = guard_after({"prediction": 0.9}, {"prediction": 4.0})
    assert guard.check(3, values(prediction=3999.0)) is None
    said = guard.check(3, values(prediction=-4001.0, total=1e9))
    assert said == "'prediction' exploded at step 3 (-4e+03, 4 at most before)"


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"kl": 1e-3}, {"kl": 40.0}),  # a collapse
        ({"prediction": 1e-6}, {"prediction": 1.0}),  # the way out of one
        ({"penalty": 3045.0}, {"penalty": 3100.0}),  # large because W is
        ({"grad_norm": 1e-3}, {"grad_norm": 1e6, "total": 1e5}),  # a single batch; is clipped
        ({}, {"penalty": 3045.0}),  # the first row
    ],
)
def test_what_ordinary_runs_do_is_let_pass(before: dict[str, float], now: dict[str, float]) -> None:
    assert guard_after(before).check(1, values(**now)) is None


def test_no_row_of_a_run_with_warm_up_fires_and_a_resumed_guard_judges_alike(
    folder: Path, tmp_path: Path
) -> None:
    settings = dict(batch_size=16, steps=24, predictor_dim=32, predictor_depth=1, num_groups=4,
                    threads=1, log_every=1, device="cpu", lr=0.3)  # fmt: skip
    run = pretrain(preset("nano").replace(data=str(folder), **settings), out=tmp_path / "run")
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert len(rows) == 24
    guard = Guard(TERMS)
    for number, row in enumerate(rows):
        numbers = [row.get("loss" if name == "total" else name) for name in TERMS]
        resumed = guard_after(*rows[:number])
        exploded = [1e4 * value + 1e4 for value in numbers]
        assert guard.check(row["step"], numbers) is None
        assert guard.check(row["step"], exploded) == resumed.check(row["step"], exploded)
        guard.observe(row)


def test_a_null_in_the_metrics_is_no_measure() -> None:
    guard = guard_after({"kl": None}, {"kl": 2.0}, {"step": 3, "knn": 0.5})
    assert guard.check(4, values(kl=1999.0)) is None
    assert guard.check(4, values(kl=2001.0)) is not None
