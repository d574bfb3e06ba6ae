"""The statistics of a sweep against scipy, closed forms and simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparsejepa.study.verdict import (
    Interval,
    beats,
    choose,
    compare,
    outcome,
    summarise,
    table,
    verdict,
)


def make_row(
    arm: str, seed: int, accuracy: float, *, untrained: float = 0.1, images: int = 10_000,
    target: str = "fine", density: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    groups: dict[str, Any] = {"groups": "none" if arm == "dense" else "region", "lam": 0.0}
    name, _, value = arm.partition("=")
    if arm != "dense":
        groups[name] = float(value)
    probe = {
        "data": "cifar100", "target": target, "protocol": "logistic", "accuracy": accuracy,
        "untrained": untrained, "pixels": 0.12, "n_test": images,
    }  # fmt: skip
    structure = {} if density is None else {"density": density, "groups_per_latent": 16 * density}
    return {
        "arm": arm,
        "seed": seed,
        "settings": {"groups": groups},
        "probes": [probe],
        **structure,
    }


shares = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(st.tuples(shares, shares), min_size=2, max_size=12), st.sampled_from([0.9, 0.95]))
def test_compare_is_scipys_paired_t_interval(
    pairs: list[tuple[float, float]], level: float
) -> None:
    a, b = np.array(pairs).T
    got = compare(dict(enumerate(a)), dict(enumerate(b)), level)
    assert got is not None and got.low is not None and got.high is not None
    if np.ptp(a - b) < 1e-9:  # scipy gives NaN without spread
        assert got.low == pytest.approx(got.mean, abs=1e-8)
        return
    want = stats.ttest_rel(a, b).confidence_interval(level)
    assert got.mean == pytest.approx(float(np.mean(a - b)), abs=1e-12)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)


def test_one_seed_has_no_interval() -> None:
    got = compare({3: 0.4}, {3: 0.3})
    assert got is not None
    assert got == Interval(0.4 - 0.3, None, None, 1) and outcome(got) == "one seed"


def test_compare_uses_only_common_seeds() -> None:
    got = compare({0: 0.4, 1: 0.5, 7: 0.9}, {1: 0.3, 0: 0.1, 2: 0.0})
    assert got is not None and got.n == 2 and got.mean == pytest.approx(0.25)
    assert compare({0: 1.0}, {1: 1.0}) is None


def test_beats_with_many_seeds_is_the_paired_t_interval() -> None:
    noisy = {0: 0.30, 1: 0.20, 2: 0.25}
    steady = {0: 0.26, 1: 0.25, 2: 0.27}
    floor = dict.fromkeys(range(3), 0.2)
    for values in (noisy, steady):
        p = stats.ttest_rel(list(values.values()), list(floor.values())).pvalue
        assert beats(values, floor, images=10) == (p < 0.05)
    assert beats(steady, floor, images=10) and not beats(noisy, floor, images=10**9)
    assert not beats(steady, {}, images=10)


def rows_of(levels: dict[str, list[float]], **kw: Any) -> list[dict[str, Any]]:
    return [
        make_row(arm, seed, value, density=None if arm == "dense" else 0.5, **kw)
        for arm, values in levels.items()
        for seed, value in enumerate(values)
    ]


def test_arms_are_in_order_and_floors_are_found() -> None:
    arms = ["lam=0.1", "density=0.25", "lam=0.01", "dense", "lam=0"]
    summary = summarise([make_row(arm, 0, 0.4) for arm in arms])
    assert [a.name for a in summary.arms] == [
        "dense",
        "lam=0",
        "lam=0.01",
        "lam=0.1",
        "density=0.25",
    ]
    assert [a.sparse for a in summary.arms] == [False, False, True, True, True]
    assert summary.untrained == {"cifar100: fine": {0: 0.1}}
    assert summary.pixels == {"cifar100: fine": 0.12}
    assert not summary.uninformative
    header, lines = table(summary)
    assert all(len(line) == len(header) for line in lines)
    assert [line[0] for line in lines[-2:]] == ["untrained floor", "raw-pixel floor"]
    assert lines[-2][1] == "10.0" and lines[-1][1] == "12.0"


GOOD = [0.40, 0.41, 0.42, 0.40, 0.41]


@pytest.mark.parametrize(
    ("shift", "word"), [(0.05, "gain"), (-0.05, "loss"), (0.0, "no difference shown")]
)
def test_verdict_of_a_clear_case(shift: float, word: str) -> None:
    wobble = [0.002, -0.001, 0.0, 0.001, -0.002]
    sparse = [g + shift + w for g, w in zip(GOOD, wobble, strict=True)]
    found = verdict(summarise(rows_of({"dense": GOOD, "lam=0": GOOD, "lam=0.01": sparse})))
    assert found.outcomes == {"lam=0": word, "dense": word}
    assert found.arm == "lam=0.01" and word in found.text and "lam=0.01" in found.text
    assert not found.remarks  # five seeds, one sparse arm: nothing to excuse


def test_the_best_of_many_needs_a_wider_interval() -> None:
    # p = 0.03 in a single comparison: a gain alone, not one as the best of three.
    wobble = np.array([1.0, -0.4, 0.3, 1.5, 0.6])
    t = wobble.mean() / (wobble.std(ddof=1) / math.sqrt(5))
    scale, offset = 0.01, stats.t.ppf(1 - 0.03 / 2, 4) / t
    shift = (wobble - wobble.mean() + wobble.mean() * offset) * scale
    best = [g + s for g, s in zip(GOOD, shift, strict=True)]
    worse = [g - 0.05 for g in GOOD]
    alone = {"dense": GOOD, "lam=0": GOOD, "lam=0.01": best}
    assert verdict(summarise(rows_of(alone))).outcomes["lam=0"] == "gain"
    found = verdict(summarise(rows_of({**alone, "lam=0.1": worse, "lam=1": worse})))
    assert found.outcomes["lam=0"] == "no difference shown"
    assert "best of 3" in found.text
    assert any("widened" in remark for remark in found.remarks)


def test_a_single_lucky_seed_is_not_the_best_arm() -> None:
    lucky = {"dense": GOOD, "lam=0": GOOD, "lam=0.01": GOOD, "lam=0.1": GOOD[:1]}
    rows = rows_of(lucky)
    rows[-1]["probes"][0]["accuracy"] = 0.9
    found = verdict(summarise(rows))
    assert found.arm == "lam=0.01" and "best of" not in found.text
    said = "Left out of the choice, as they have fewer than 5 seeds: lam=0.1 (1)."
    assert said in found.remarks


def test_arms_are_compared_on_the_seeds_that_they_share() -> None:
    # Seed 9 is easy, and only the second arm ran it.
    values = {"a": {0: 0.41, 1: 0.41, 2: 0.41}, "b": {1: 0.40, 2: 0.40, 9: 0.9}, "c": {1: 0.9}}
    assert choose(values) == ("a", ["a", "b"])
    assert choose({"a": {0: 0.1}, "b": {1: 0.9}}) == ("", ["a", "b"])
    rows = rows_of({"dense": GOOD, "lam=0": GOOD, "lam=0.01": GOOD, "lam=0.1": GOOD})
    mine = {("lam=0.01", 0), ("lam=0.1", 1)}
    few = [r for r in rows if "lam=0." not in r["arm"] or (r["arm"], r["seed"]) in mine]
    found = verdict(summarise(few))
    assert found.arm is None and "share no seed" in found.text


def test_few_seeds_are_said() -> None:
    levels = {"dense": GOOD, "lam=0": GOOD, "lam=0.01": GOOD}
    three = verdict(summarise(rows_of({k: v[:3] for k, v in levels.items()})))
    assert any("Only 3 seeds" in remark for remark in three.remarks)
    one = verdict(summarise(rows_of({k: v[:1] for k, v in levels.items()})))
    assert one.outcomes == {"lam=0": "one seed", "dense": "one seed"}
    assert "[" not in one.text and any("One seed" in remark for remark in one.remarks)


def test_no_verdict_below_the_floor() -> None:
    low = {"dense": GOOD, "lam=0": [0.1] * 5, "lam=0.01": [0.6] * 5}
    summary = summarise(rows_of(low))
    assert summary.uninformative == {"cifar100: fine"}
    found = verdict(summary)
    assert found.arm is None and found.text.startswith("No verdict")
    assert any("uninformative" in name for name in table(summary)[0])
    # With a second, informative target the verdict is about that one, and the first is excused.
    more = rows_of({"dense": GOOD, "lam=0": GOOD, "lam=0.01": GOOD}, target="coarse")
    rows = [
        {**a, "probes": a["probes"] + b["probes"]} for a, b in zip(rows_of(low), more, strict=True)
    ]
    found = verdict(summarise(rows))
    assert found.measure == "cifar100: coarse"
    assert any(remark.startswith("Uninformative here: cifar100: fine.") for remark in found.remarks)


def test_arms_that_do_not_beat_the_pixels_are_said() -> None:
    def found(level: float) -> tuple[frozenset[str], tuple[str, ...]]:
        values = [level - 0.001, level, level + 0.001, level, level]
        rows = rows_of({"dense": GOOD, "lam=0": GOOD, "lam=0.01": values})
        for row in rows:
            row["probes"][0]["pixels"] = 0.42
        summary = summarise(rows)
        return summary.below_pixels, verdict(summary).remarks

    assert found(0.5) == (frozenset(), ())
    below, remarks = found(0.42)
    assert below == {"cifar100: fine"} and "raw pixels" in remarks[0]


def test_without_controls_or_penalty_there_is_little_to_say() -> None:
    found = verdict(summarise(rows_of({"dense": GOOD, "lam=0": GOOD})))
    assert found.arm is None and "no arm with a penalty" in found.text
    # Both controls failed.
    found = verdict(summarise(rows_of({"lam=0.01": GOOD})))
    assert found.outcomes == {} and "no control of these seeds" in found.text


def test_beats_with_few_seeds_is_the_test_images_interval() -> None:
    needed = math.ceil(1.96**2 * (0.3 * 0.7 + 0.2 * 0.8) / 0.1**2)
    assert beats({0: 0.3}, {0: 0.2}, images=needed + 1)
    assert not beats({0: 0.3}, {0: 0.2}, images=needed - 1)
