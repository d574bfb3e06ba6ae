"""The paper's claims (claims.toml), judged by rule; docs/claims.md says the rules in words.

For each thing that should be seen if a claim holds there is a `Sign` with a verdict of its own;
`combine` makes one verdict of them.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study import CIFAR100, MEASURES, SPARSE, Block, Row, Study

from sparsejepa.config import load_toml
from sparsejepa.study.verdict import ENOUGH_SEEDS, Interval, compare, outcome

HOLDS, PART, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "not tested"
VERDICTS = (HOLDS, PART, FAILS, UNTESTED)


@dataclass(frozen=True)
class Sign:
    """One thing that was looked at: what was found, and the verdict if it were all.

    While a `needed` sign is open the claim is not tested, whatever the others say: a gain of the
    penalty is one over lam=0, the same model without it, not over dense.
    """

    text: str
    verdict: str
    needed: bool = False


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


def judged(interval: Interval | None, way: int = 1) -> str:
    """Return the verdict on "the difference is positive" (negative for way -1, either for 0).

    Clear of 0 on the right side: holds, in part below 5 pairs. On the wrong side: does not hold.
    Around 0: does not hold from 5 pairs on, before that nothing is decided.
    """
    found = outcome(interval) if interval else "one seed"
    if interval is None or found == "one seed":
        return UNTESTED
    enough = interval.n >= ENOUGH_SEEDS
    if found in {1: ("gain",), -1: ("loss",), 0: ("gain", "loss")}[way]:
        return HOLDS if enough else PART
    return FAILS if enough or found != "no difference shown" else UNTESTED


def inside(interval: Interval | None, low: float, high: float) -> str:
    """Return the verdict on "the difference lies between low and high".

    All of the 95 % interval lies there: holds, in part below 5 pairs. All of it outside, or not
    all of it inside from 5 pairs on: does not hold. One seed shows nothing.
    """
    if interval is None or interval.low is None or interval.high is None:
        return UNTESTED
    enough = interval.n >= ENOUGH_SEEDS
    if low < interval.low and interval.high < high:
        return HOLDS if enough else PART
    return FAILS if enough or interval.high < low or interval.low > high else UNTESTED


def judge(claim: Row, study: Study, gpu: bool) -> list[Sign]:
    """Return the signs of a claim at small or full scale (`gpu`)."""
    if "tests" in claim:
        known = names_of_tests(study.root / "tests" / "test_theory.py")
        named = ", ".join(f"`{name}`" for name in claim["tests"])
        verdict = PART if set(claim["tests"]) <= known else UNTESTED
        return [Sign(f"{claim['found']} Tests: {named}", verdict)]
    if "explained" in claim:
        return [] if gpu else [s for page in study.explain for s in _explained(claim, page)]
    if "grows" in claim:
        return [_grows(study, *recipes) for recipes in claim["grows"]]
    found = [b for b in study.blocks(claim["table"]) if b.gpu == gpu]
    blocks = [b for b in found if b.config.data == "cifar100"]
    if not blocks:
        return []
    # Of several blocks the one that plans the arms, has runs, has the most arms.
    arms = {arm for pair in claim["pairs"] for arm in pair} - {"untrained", "zero"}
    block = max(blocks, key=lambda b: (arms <= set(b.planned), bool(b.rows), len(b.planned)))
    return [_pair(claim, block, *pair) for pair in claim["pairs"]]


def _pair(claim: Row, block: Block, arm: str, control: str) -> Sign:
    """Judge one difference between arms by its interval."""
    measure = MEASURES[claim.get("measure", CIFAR100.title)]
    a, needed = block.values(arm, measure), control == "lam=0"
    floor = block.floor(measure, "untrained")
    b = {"untrained": floor, "zero": dict.fromkeys(a, 0.0)}.get(control)
    interval = compare(a, block.values(control, measure) if b is None else b)
    if interval is None:
        state = "queued" if a or not block.rows else "not run"
        return Sign(f"{measure.title}: {arm} minus {control} {state}", UNTESTED, needed)
    verdict = judged(interval, claim.get("way", 1))
    if "within" in claim:
        verdict = inside(interval, *claim["within"])
    seeds = f"{interval.n} seed{'s'[: interval.n > 1]}"
    text = f"{measure.title}: {arm} minus {control} {measure.difference(interval)}, {seeds}"
    above = compare(block.values("dense", measure), floor)
    if claim.get("informative") and above and above.n > 1 and outcome(above) != "gain":
        text += f"; dense does not clearly beat its untrained floor ({measure.difference(above)})"
        verdict = UNTESTED
    return Sign(text, verdict, needed)


def _explained(claim: Row, page: Row) -> list[Sign]:
    """Judge a measure of an explained run by whether its interval clears those of its floors.

    Clear of all: holds; below one: does not hold; else in part if clear of some. Without a floor
    there is only 0 to be above, which is at most in part. What has no interval says nothing.
    """
    signs = []
    for values in (m["values"] for m in page["measures"] if m["name"] == claim["measure"]):
        values = {name: v for name, v in values.items() if v["low"] is not None}
        ours = values.get("this run")
        if ours is None:
            continue
        others = {floor: values[floor] for floor in claim["explained"] if floor in values}
        below = [name for name, v in others.items() if ours["low"] > v["high"]]
        if len(below) == len(others):
            verdict = (HOLDS if others else PART) if ours["low"] > 0 else FAILS
        elif any(ours["high"] < v["low"] for v in others.values()):
            verdict = FAILS
        else:
            verdict = PART if below else UNTESTED
        against = ", ".join(f"{name} {v['value']:.3g}" for name, v in others.items()) or "0"
        text = f"{ours['value']:.3g} [{ours['low']:.3g}, {ours['high']:.3g}] against {against}"
        signs.append(Sign(f"{claim['measure']} {text} (`{page['run']}`)", verdict))
    return signs


def _grows(study: Study, large: str, small: str) -> Sign:
    """Judge whether the gain of the sparse arm over lam=0 is larger in one recipe than another."""
    gains = {}
    for block in study.blocks(5):
        a, b = block.values(SPARSE, CIFAR100), block.values("lam=0", CIFAR100)
        gains[block.recipe] = {seed: a[seed] - b[seed] for seed in a if seed in b}
    interval = compare(gains.get(large, {}), gains.get(small, {}))
    found = CIFAR100.difference(interval) if interval else "queued"
    return Sign(f"gain in {large} less that in {small}: {found}", judged(interval))


def names_of_tests(path: Path) -> set[str]:
    """Return the names of the test functions in a file, none if it is not there."""
    tree = ast.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"}


def read_claims(root: Path) -> list[dict[str, Any]]:
    """Return the claims of a checkout."""
    return load_toml(root / "recipes" / "claims.toml")["claim"]


def ledger(study: Study) -> tuple[str, dict[str, dict[str, int]]]:
    """Return the tables of docs/claims.md and the number of each verdict by scale."""
    counts: dict[str, dict[str, int]] = {}
    sections: dict[str, list[str]] = {}
    last = ""
    for claim in read_claims(study.root):
        both = ("any",) if "tests" in claim else ("small", "full")
        for scale in (claim["scale"],) if "scale" in claim else both:
            signs = judge(claim, study, scale == "full")
            verdict = combine(signs)
            counts.setdefault(scale, dict.fromkeys(VERDICTS, 0))[verdict] += 1
            evidence = "<br>".join(sign.text for sign in signs) or "no run planned"
            if "table" in claim:
                evidence += f" ([table {claim['table']}](results.md#table-{claim['table']}))"
            text, last = "" if claim["text"] == last else claim["text"], claim["text"]
            line = f"| {text} | {scale} | **{verdict}** | {evidence} |"
            sections.setdefault(claim["section"], []).append(line)
    header = "| claim | scale | verdict | evidence |\n| --- | --- | --- | --- |"
    parts = [f"## {name}\n\n{header}\n" + "\n".join(lines) for name, lines in sections.items()]
    return "\n\n".join(filter(None, [study.left_out, *parts])), counts
