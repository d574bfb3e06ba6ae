"""Interleaved timing: the order of the calls, their numbers, and what is made of the seconds."""

from __future__ import annotations

import pytest

from sparsejepa.benchmarks import timing
from sparsejepa.benchmarks.timing import Timing, interleave, ratios


class Clock:
    """A clock that only moves when a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_contenders_take_turns_until_each_has_had_its_time(clock: Clock) -> None:
    calls: list[tuple[str, int]] = []

    def contender(name: str, seconds: float):
        def call(number: int) -> None:
            calls.append((name, number))
            clock.now += seconds

        return call

    found = interleave(
        {"a": contender("a", 1.0), "b": contender("b", 0.4)}, rounds=2, warmup=2, min_seconds=1.0
    )
    warm = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    rounds = [
        ([("a", 2)], [("b", 2), ("b", 3), ("b", 4)]),
        ([("a", 3)], [("b", 5), ("b", 6), ("b", 7)]),
    ]
    assert calls[:4] == warm
    for (a, b), called in zip(rounds, (calls[4:8], calls[8:]), strict=True):
        assert called in (a + b, b + a)
    assert found["a"].seconds == (1.0, 1.0)
    assert found["b"].seconds == pytest.approx((0.4, 0.4))


def test_the_order_changes_from_round_to_round_and_is_the_same_each_time(clock: Clock) -> None:
    def orders() -> list[str]:
        calls: list[str] = []

        def contender(name: str):
            def call(number: int) -> None:
                calls.append(name)
                clock.now += 1

            return call

        interleave({name: contender(name) for name in "abcd"}, rounds=5, warmup=1)
        return ["".join(calls[i : i + 4]) for i in range(4, 24, 4)]

    found = orders()
    assert {"".join(sorted(order)) for order in found} == {"abcd"}
    assert len(set(found)) > 1
    assert orders() == found


def test_median_and_quartiles() -> None:
    found = Timing("a", (5.0, 1.0, 2.0, 3.0, 4.0))
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    row = {"name": "a", "median_s": 3.0, "low_s": 2.0, "high_s": 4.0, "more": 1}
    assert found.row(more=1) == row


def test_ratios_are_of_the_same_round() -> None:
    slow, fast = Timing("a", (2.0, 4.0, 6.0)), Timing("b", (1.0, 2.0, 3.0))
    assert ratios(slow, fast) == (2.0, 2.0, 2.0)
    assert ratios(fast, slow) == (0.5, 0.5, 0.5)
