"""Processes side by side: what is chosen, what is measured, and how mistakes end it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejepa.benchmarks import packing
from sparsejepa.benchmarks.packing import Packing, choose, measure
from sparsejepa.config import Config, preset
from sparsejepa.errors import UserError


def config(images: Path) -> Config:
    return preset("nano").replace(
        data=str(images), patch_size=8, batch_size=16, predictor_depth=1, device="cpu"
    )


@given(st.dictionaries(st.integers(1, 64), st.floats(1, 1e6), min_size=1))
def test_the_smallest_number_near_the_best_is_chosen(rates: dict[int, float]) -> None:
    packings = [Packing(count, 1, rate) for count, rate in rates.items()]
    found = choose(packings)
    assert found in packings
    assert all(found.images_per_second >= 0.97 * rate * (1 - 1e-12) for rate in rates.values())
    assert all(
        rates[count] < 0.97 * max(rates.values()) for count in rates if count < found.processes
    )


def test_processes_share_the_cores(tiny_images: Path) -> None:
    found = measure(config(tiny_images), cores=3, seconds=0.2)
    assert [(p.processes, p.threads) for p in found] == [(1, 3), (2, 1)]
    assert all(0 < p.images_per_second < 1e6 for p in found)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("rates", "free", "tried"),
    [
        ([10, 15, 20, 40], 1e9, [1, 2, 4, 8]),  # 16 would be more than the cores
        ([10, 15, 14, 40], 1e9, [1, 2, 4]),  # slower: no further
        ([10, 15, 20, 40], 35, [1, 2]),  # four of 10 bytes do not fit
    ],
)
def test_how_many_are_tried(
    monkeypatch: pytest.MonkeyPatch, rates: list[float], free: float, tried: list[int]
) -> None:
    left = iter(rates)

    def side_by_side(of: Config, processes: int, threads: int, seconds: float):
        return [{"rate": next(left) / processes, "bytes": 10, "free": free}] + [
            {"rate": rates[tried.index(processes)] / processes, "bytes": 9, "free": free}
        ] * (processes - 1)

    monkeypatch.setattr(packing, "_side_by_side", side_by_side)
    found = measure(Config(), cores=15)
    assert [p.processes for p in found] == tried
    assert [p.threads for p in found] == [15 // count for count in tried]
    assert [p.images_per_second for p in found] == pytest.approx(rates[: len(tried)])


def test_mistakes_reach_the_caller(tiny_images: Path) -> None:
    with pytest.raises(UserError, match="--batch-size 999 is more than the 96 training images"):
        measure(config(tiny_images).replace(batch_size=999), cores=1, seconds=0.1)
    assert not multiprocessing.active_children()


class Dies:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_a_process_that_dies_ends_the_measurement() -> None:
    with pytest.raises(UserError, match="--jobs auto: one of 1 processes ended too early"):
        measure(cast(Config, Dies()), cores=2, seconds=0.1)
    assert not multiprocessing.active_children()
