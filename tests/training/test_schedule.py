"""Schedules against closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejepa.config import preset
from sparsejepa.model.groups import TRAVEL
from sparsejepa.training.schedule import Schedule, linear, scaled_ema, warmup_cosine


def test_learning_rate_at_the_points_that_define_it() -> None:
    args = (1000, 2e-3, 1e-6, 0.1)
    assert warmup_cosine(0, *args) == pytest.approx(2e-3 / 100)
    assert warmup_cosine(99, *args) == pytest.approx(2e-3)
    assert warmup_cosine(100, *args) == pytest.approx(2e-3)
    assert warmup_cosine(550, *args) == pytest.approx((2e-3 + 1e-6) / 2)
    assert warmup_cosine(999, *args) == pytest.approx(1e-6, abs=1e-8)


@given(st.integers(1, 5000), st.floats(0, 0.9))
def test_learning_rate_stays_between_zero_and_its_peak(total: int, warmup: float) -> None:
    values = [warmup_cosine(s, total, 1.0, 0.01, warmup) for s in range(0, total, 37)]
    assert all(0 < v <= 1 for v in values)


def test_ema_runs_linearly_and_scales_with_the_length() -> None:
    assert linear(0, 11, 0.9, 1.0) == 0.9
    assert linear(5, 11, 0.9, 1.0) == pytest.approx(0.95)
    assert linear(10, 11, 0.9, 1.0) == 1.0
    assert scaled_ema(0.992, 29_000) == pytest.approx(0.992)
    assert 1 - scaled_ema(0.9999, 2_900) == pytest.approx(1e-3)
    assert scaled_ema(0.992, 100) == pytest.approx(0.9)  # 1 - decay is at most 0.1


def test_given_ema_rates_are_used_as_they_are() -> None:
    schedule = Schedule(preset("best").replace(ema=0.5, ema_final=0.75), 101)
    assert [schedule.ema(s) for s in (0, 50, 100)] == pytest.approx([0.5, 0.625, 0.75])


@given(st.integers(1, 30_000), st.floats(0, 0.9))
def test_w_travels_as_far_whatever_the_length_and_settles(total: int, debias: float) -> None:
    schedule = Schedule(preset("best").replace(debias=debias, lam=0.1), total)
    count = schedule.penalised_steps
    rates = [schedule.w_rate(s) for s in range(total)]
    assert math.fsum(rates) == pytest.approx(TRAVEL)
    assert len(set(rates[:count])) == 1 and rates == sorted(rates, reverse=True)
    assert rates[-1] > 0 and (count == total or rates[-1] < rates[0])
    assert schedule.lam(0) == 0 <= schedule.lam(count - 1) <= 0.1
    if count > 10:
        assert schedule.lam(count - 1) == 0.1
    steered = Schedule(schedule.config.replace(density=0.5), total)
    freeze = min(count, total - 1)
    for course, there in (
        (schedule, "frozen" if count < total else "penalised"),
        (steered, "freeze"),
    ):
        phases = [course.phase(s) for s in range(total)]
        assert phases == ["penalised"] * freeze + [there] + ["frozen"] * (total - freeze - 1)
    assert count == total or schedule.lam(count) == 0


def test_the_momentum_of_w_is_the_plain_mean_first_and_then_that_of_a_fifth_of_the_run() -> None:
    schedule = Schedule(preset("best"), 1000)
    mean, values = 0.0, [1.0, 5.0, 3.0, 7.0]
    for step, value in enumerate(values):
        momentum = schedule.w_momentum(step)
        mean = momentum * mean + (1 - momentum) * value
    assert mean == pytest.approx(4.0)
    assert schedule.w_momentum(999) == pytest.approx(1 - 1 / 200)


def test_the_lambda_0_arm_is_never_frozen() -> None:
    schedule = Schedule(preset("best").replace(lam=0.0), 100)
    assert {schedule.phase(s) for s in range(100)} == {"penalised"}


def test_wanted_density_goes_from_one_to_the_setting() -> None:
    schedule = Schedule(preset("best").replace(density=0.25, debias=0.0), 1000)
    assert schedule.wanted_density(0) == schedule.wanted_density(100) == 1
    assert schedule.wanted_density(350) == pytest.approx(0.625)
    assert schedule.wanted_density(600) == pytest.approx(0.25)
    assert schedule.wanted_density(999) == pytest.approx(0.25)


def test_a_lambda_that_can_remove_nothing_says_so() -> None:
    def said(**settings: float) -> str:
        return Schedule(preset("best").replace(**settings), 500).too_weak(0.15)

    for lam in (0.0, 1e-3, 1.0):
        assert not said(lam=lam)
    assert not said(lam=1e-9, density=0.5)
    line = said(lam=1e-9)
    assert line.startswith("--lam 1e-09 hardly acts in this run: by itself it takes 0.0")
    assert not said(lam=float(line.removesuffix(" or more").rpartition(" ")[2]))
    line = Schedule(preset("best"), 1).too_weak(0.15)  # over before the penalty acts
    assert line.endswith("over before the penalty begins; use more --steps or less --debias")
