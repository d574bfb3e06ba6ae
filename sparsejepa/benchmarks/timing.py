"""Timing of contenders in turn, so that whatever the machine does meanwhile hits all of them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Contender = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender, one number a round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return spread(self.seconds)[0]

    @property
    def low(self) -> float:
        """Lower quartile."""
        return spread(self.seconds)[1]

    @property
    def high(self) -> float:
        """Upper quartile."""
        return spread(self.seconds)[2]

    def row(self, **measured: Any) -> dict[str, Any]:
        """Return the row of a section: name and seconds, and what else was measured."""
        times = {"median_s": self.median, "low_s": self.low, "high_s": self.high}
        return {"name": self.name, **times, **measured}


def interleave(
    contenders: Mapping[str, Contender],
    *,
    rounds: int,
    device: str = "cpu",
    warmup: int = 2,
    min_seconds: float = 0.05,
) -> dict[str, Timing]:
    """Time contenders round by round, each in turn.

    Their order is drawn anew each round (always the same draw): what one leaves behind, in caches
    and allocator, then does not always hit the same other one.

    Args:
        contenders: by name; each is called with the number of its call, counted from 0.
        rounds: numbers per contender, at least 1.
        device: what the contenders run on; the host waits for it before and after each number.
        warmup: calls before the first round, at least 1. The last of them says how often a
            contender is called in a round.
        min_seconds: time that a contender gets in a round, so that short ones can be told apart.
    """
    calls = dict.fromkeys(contenders, 0)

    def run(name: str, repeats: int) -> float:
        first, call = calls[name], contenders[name]
        calls[name] += repeats
        synchronize(device)
        began = time.perf_counter()
        for number in range(first, first + repeats):
            call(number)
        synchronize(device)
        return (time.perf_counter() - began) / repeats

    once = {name: [run(name, 1) for _ in range(max(1, warmup))][-1] for name in contenders}
    repeats = {name: max(1, math.ceil(min_seconds / max(once[name], 1e-7))) for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order, draw = list(contenders), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            seconds[name].append(run(name, repeats[name]))
    return {name: Timing(name, tuple(values)) for name, values in seconds.items()}


def ratios(base: Timing, other: Timing) -> tuple[float, float, float]:
    """Return how many times faster `other` is than `base`: median and quartiles over the rounds."""
    pairs = zip(base.seconds, other.seconds, strict=True)
    return spread([slow / fast for slow, fast in pairs])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return median, low, high


def synchronize(device: str) -> None:
    """Wait until `device` has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def entries(name: str, values: Sequence[float] | None) -> dict[str, float | None]:
    """Return median and quartiles as three entries of a row; None where there are none."""
    median, low, high = values or (None, None, None)
    return {name: median, f"{name}_low": low, f"{name}_high": high}
