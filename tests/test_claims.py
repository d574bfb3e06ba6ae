"""Verdicts by rule: from intervals, and from made-up rows where a claim holds, fails or is open."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from claims import (
    FAILS,
    HOLDS,
    PART,
    UNTESTED,
    VERDICTS,
    Sign,
    combine,
    inside,
    judge,
    judged,
    ledger,
    names_of_tests,
    read_claims,
)
from hypothesis import given
from hypothesis import strategies as st
from study import MEASURES, SPARSE

from sparsejepa.study.verdict import Interval
from tests.test_tables import PAIR, SMALL, make_row, make_study, planned

ROOT = Path(__file__).parents[1]
TINY = "cifar100-5k-tiny"
CLAIMS = {claim["text"]: claim for claim in read_claims(ROOT)}
GAIN = CLAIMS["CIFAR-100: 40.01 % for JEPA, 45.40 % with the penalty"]
NOISE = np.random.default_rng(0).normal(0, 0.0005, (9, 10))
NOISE -= NOISE[:, :5].mean(1, keepdims=True)


def interval(mean: float, half: float, n: int) -> Interval:
    return Interval(mean, mean - half, mean + half, n)


# --- the rules


@given(st.floats(-1, 1), st.floats(0, 1), st.integers(2, 12), st.sampled_from([1, -1, 0]))
def test_a_verdict_follows_from_the_interval(mean: float, half: float, n: int, way: int) -> None:
    verdict = judged(interval(mean, half, n), way)
    clear = 1 if mean - half > 0 else -1 if mean + half < 0 else 0
    if clear and way in (clear, 0):
        assert verdict == (HOLDS if n >= 5 else PART)
    elif clear:
        assert verdict == FAILS
    else:
        assert verdict == (FAILS if n >= 5 else UNTESTED)


@pytest.mark.parametrize(
    ("mean", "half", "n", "both", "no_loss"),
    [
        (0.0, 0.005, 5, HOLDS, HOLDS),
        (0.0, 0.005, 4, PART, PART),
        (-0.004, 0.003, 5, HOLDS, HOLDS),  # a clear loss, but of less than a point
        (0.0, 0.02, 3, UNTESTED, UNTESTED),  # no difference shown is not "no loss"
        (0.0, 0.02, 5, FAILS, FAILS),
        (0.03, 0.01, 3, FAILS, PART),
        (-0.03, 0.01, 3, FAILS, FAILS),
    ],
)
def test_equality_needs_an_interval_inside_the_margin(
    mean: float, half: float, n: int, both: str, no_loss: str
) -> None:
    assert inside(interval(mean, half, n), -0.01, 0.01) == both
    assert inside(interval(mean, half, n), -0.01, 1) == no_loss


def test_nothing_and_one_seed_are_not_tested() -> None:
    for one in (None, Interval(0.5, None, None, 1)):
        assert judged(one) == inside(one, -1, 1) == UNTESTED


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        ([], UNTESTED), ([HOLDS, HOLDS], HOLDS), ([HOLDS, FAILS], FAILS), ([HOLDS, UNTESTED], PART),
        ([PART, PART], PART), ([PART, FAILS], FAILS), ([FAILS, UNTESTED], FAILS),
        ([UNTESTED, UNTESTED], UNTESTED),
    ],
)  # fmt: skip
def test_signs_together(verdicts: list[str], together: str) -> None:
    assert combine([Sign("", verdict) for verdict in verdicts]) == together


# --- claims on rows


def runs(arms: Mapping[str, float], seeds: int, name: str = SMALL, **more: Any) -> list[Any]:
    """Runs of arms with these mean accuracies."""
    return [
        make_row(name, arm, s, mean + NOISE[i, s], **more)
        for i, (arm, mean) in enumerate(arms.items())
        for s in range(seeds)
    ]


@pytest.mark.parametrize(
    ("dense", "none", "seeds", "want"),
    [
        (0.2, 0.2, 5, HOLDS),
        (0.2, 0.25, 5, FAILS),  # above dense, clearly below lam=0
        (0.25, 0.2, 3, FAILS),
        (0.2, 0.23, 5, FAILS),  # no more than without the penalty
        (0.2, 0.2, 3, PART),
        (0.102, 0.102, 5, UNTESTED),  # dense is no better than untrained
    ],
)
def test_a_gain_needs_both_controls(dense: float, none: float, seeds: int, want: str) -> None:
    study = make_study(runs({"dense": dense, "lam=0": none, SPARSE: 0.23}, seeds, PAIR))
    signs = judge(GAIN, study, False)
    assert len(signs) == 2 and combine(signs) == want
    assert combine(judge(GAIN, study, True)) == UNTESTED  # says nothing of the full scale


def test_a_gain_over_dense_alone_shows_nothing_of_the_penalty() -> None:
    rows = runs({"dense": 0.2, SPARSE: 0.23}, 5, PAIR) + runs({"lam=0": 0.2}, 1, PAIR)
    signs = judge(GAIN, make_study(rows), False)
    assert {sign.verdict for sign in signs} == {HOLDS, UNTESTED} and combine(signs) == UNTESTED


def test_growth_compares_the_gains_of_two_recipes() -> None:
    rows = runs({"lam=0": 0.2, SPARSE: 0.2}, 3) + runs({"lam=0": 0.2, SPARSE: 0.25}, 3, TINY)
    signs = judge(next(c for c in read_claims(ROOT) if "grows" in c), make_study(rows), False)
    assert [sign.verdict for sign in signs] == [PART, UNTESTED]


def test_explained_measures_are_judged_by_their_floors() -> None:
    values: dict[str, dict[str, float | None]] = {
        "this run": {"value": 0.2, "low": 0.1, "high": 0.3},
        "PCA": {"value": 0.0, "low": -0.1, "high": 0.05},
        "places": {"value": 0.5, "low": 0.4, "high": 0.6},
    }
    page = {"run": "a", "measures": [{"name": "gap", "values": values}]}
    study = make_study([], explain=[page])
    values["narrow"] = {"value": 0.1, "low": None, "high": None}  # no interval: says nothing
    for floors, want in ([], PART), (["PCA"], HOLDS), (["PCA", "narrow", "places"], FAILS):
        claim = {"measure": "gap", "explained": floors}
        assert combine(judge(claim, study, False)) == want
        assert judge(claim, study, True) == []


# --- the ledger


def test_every_claim_names_what_there_is() -> None:
    arms = {(t, arm) for run in planned().queue for t in run["tables"] for arm in run["arms"]}
    recipes = {run["recipe"] for run in planned().queue}
    for claim in read_claims(ROOT):
        rules = {"pairs", "tests", "explained", "grows"} & set(claim)
        assert len(rules) == 1, claim["text"]
        for pair in claim.get("pairs", ()):
            assert claim.get("measure", "CIFAR-100") in MEASURES
            assert all((claim["table"], arm) in arms for arm in {*pair} - STAND_INS), claim["text"]
        assert {name for pair in claim.get("grows", ()) for name in pair} <= recipes
        assert set(claim.get("tests", ())) <= names_of_tests(ROOT / "tests" / "test_theory.py")


STAND_INS = {"untrained", "zero"}


def test_without_numbers_and_tests_nothing_is_judged(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    page, counts = ledger(dataclasses.replace(make_study([]), root=tmp_path))
    for found in counts.values():
        assert set(found) == set(VERDICTS) and sum(found.values()) == found[UNTESTED] > 0
    assert all(claim["text"] in page for claim in read_claims(ROOT))
    assert set(re.findall(r"^## (.+)$", page, re.M)) == {c["section"] for c in read_claims(ROOT)}
