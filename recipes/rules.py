"""The rules by which a claim is judged: verdicts from intervals. No number, no verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from layouts import SPARSE
from scipy.stats import norm
from study import Block, Measure, Study

from sparsejepa.study.verdict import ENOUGH_SEEDS, LEVEL, Interval, outcome

HOLDS, PART, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "not tested"
VERDICTS = (HOLDS, PART, FAILS, UNTESTED)


@dataclass(frozen=True)
class Sign:
    """One thing that was looked at: what was found, and the verdict if it were all."""

    text: str
    verdict: str
    needed: bool = False
    """Whether the claim cannot hold even in part while this is open: a gain of sparsity is one over
    lam=0, the same model without the penalty, whatever it is over dense."""


FEW_SEEDS, FEW_ARMS = 3, 8  # the least for a verdict that no sign of a difference gives
MARGIN = 0.01  # accuracies that differ by less than one point count as equal
RANK = 0.9  # from this rank correlation on two measures order the arms alike


def combine(signs: Sequence[Sign]) -> str:
    """Return the verdict on a claim that needs all of these signs: one that fails refutes it."""
    found = {sign.verdict for sign in signs}
    if FAILS in found:
        return FAILS
    if any(sign.needed and sign.verdict == UNTESTED for sign in signs):
        return UNTESTED
    if found == {HOLDS}:
        return HOLDS
    return PART if found & {HOLDS, PART} else UNTESTED


def judged(interval: Interval | None, sign: int = 1) -> str:
    """Return the verdict on "the difference has this sign" by its 95 % interval.

    Clear of 0 on the right side: holds, in part below 5 pairs. On the wrong side: does not hold.
    Around 0: does not hold from 5 pairs on, before that nothing is decided.
    """
    found = outcome(interval) if interval else "one seed"
    if interval is None or found == "one seed":
        return UNTESTED
    enough = interval.n >= ENOUGH_SEEDS
    if found == ("gain" if sign > 0 else "loss"):
        return HOLDS if enough else PART
    return FAILS if enough or found != "no difference shown" else UNTESTED


def alike(interval: Interval | None, high: float = MARGIN) -> str:
    """Return the verdict on "no lower than the margin, and no higher than `high`".

    The whole 95 % interval must lie there (equivalence; not lower alone: non-inferiority): holds,
    in part below 5 pairs. All of it outside, or not all of it inside from 5 pairs on: does not
    hold. One seed shows nothing.
    """
    if interval is None or interval.low is None or interval.high is None:
        return UNTESTED
    enough = interval.n >= ENOUGH_SEEDS
    if interval.low > -MARGIN and interval.high < high:
        return HOLDS if enough else PART
    outside = interval.high < -MARGIN or interval.low > high
    return FAILS if enough or outside else UNTESTED


def block_of(study: Study, table: int, gpu: bool, arms: Sequence[str] = ()) -> Block | None:
    """Return a table's CIFAR-100 block at a scale: one that plans these arms, and has runs."""
    found = [b for b in study.blocks(table) if b.gpu == gpu and b.config.data == "cifar100"]
    return max(
        found,
        key=lambda b: (
            set(arms) <= set(b.planned), bool(b.rows), SPARSE in b.planned, len(b.planned)
        ),
        default=None,
    )  # fmt: skip


def difference(
    block: Block, arm: str, control: str, measure: Measure, sign: int = 1, level: float = LEVEL
) -> Sign:
    """Judge one difference by its interval."""
    interval, needed = block.difference(arm, control, measure, level), control == "lam=0"
    head = f"{measure.title}: {arm} minus {control}"
    if interval is None:
        state = "queued" if {arm, control} <= set(block.planned) else "not planned"
        return Sign(f"{head} {state}", UNTESTED, needed)
    text = f"{head} {measure.difference(interval)}, {seeds_text(interval)}"
    return Sign(text, judged(interval, sign), needed)


def seeds_text(interval: Interval) -> str:
    """Return "3 seeds"."""
    return f"{interval.n} seed{'s'[: interval.n > 1]}"


def rank_interval(rank: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of Spearman's correlation over n > 3 pairs."""
    if abs(rank) > 1 - 1e-9:
        return rank, rank
    z = math.atanh(rank)
    half = float(norm.ppf(0.5 + LEVEL / 2)) * math.sqrt((1 + rank**2 / 2) / (n - 3))
    return math.tanh(z - half), math.tanh(z + half)
