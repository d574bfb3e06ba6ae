"""How a claim is judged: things that should be seen if it holds, each with a verdict by a rule.

Most are differences between two arms, judged by their interval. No number, no verdict.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from layouts import (
    CIFAR10,
    CIFAR100,
    DCI,
    FAR,
    GROUPS,
    KEPT,
    PENALISED,
    SPARSE,
    alarms,
    curve,
    interaction,
)
from scipy.stats import spearmanr
from study import Block, Measure, Study

from sparsejepa.report.summary import ENOUGH_SEEDS, LEVEL, Interval, compare, mean_sd, outcome

HOLDS, PART, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "not tested"
VERDICTS = (HOLDS, PART, FAILS, UNTESTED)


@dataclass(frozen=True)
class Sign:
    """One thing that was looked at: what was found, and the verdict if it were all."""

    text: str
    verdict: str


Judge = Callable[[Study, bool], list[Sign]]  # the bool: at full scale (GPU)


def combine(signs: Sequence[Sign]) -> str:
    """Return the verdict on several signs: all must hold for "holds"."""
    found = {sign.verdict for sign in signs}
    if found == {HOLDS}:
        return HOLDS
    if found & {HOLDS, PART}:
        return PART
    return FAILS if FAILS in found else UNTESTED


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


def block_of(study: Study, table: int, gpu: bool) -> Block | None:
    """Return a table's CIFAR-100 block at a scale: with the sparse arm, runs and most arms."""
    found = [b for b in study.blocks(table) if b.gpu == gpu and b.config.data == "cifar100"]
    return max(
        found, key=lambda b: (SPARSE in b.planned, bool(b.rows), len(b.planned)), default=None
    )


def differ(
    table: int, *pairs: tuple[str, str], measure: Measure = CIFAR100, sign: int = 1
) -> Judge:
    """Each first arm should lie above (sign 1) or below (-1) the second one."""

    def judge(study: Study, gpu: bool) -> list[Sign]:
        block = block_of(study, table, gpu)
        return [difference(block, a, b, measure, sign) for a, b in pairs] if block else []

    return judge


def spoiled(kind: str, arms: str, measure: Measure, sign: int) -> Judge:
    """Arms pretrained on corrupted images lie above or below the same arms on true ones."""

    def judge(study: Study, gpu: bool) -> list[Sign]:
        if (block := block_of(study, 9, gpu)) is None:
            return []
        pattern = "|".join(f"{arm}+corruption={kind}" for arm in arms.split("|"))
        found = block.matching(pattern)
        return [difference(block, arm, arm.split("+")[0], measure, sign) for arm in found]

    return judge


def difference(
    block: Block, arm: str, control: str, measure: Measure, sign: int = 1, level: float = LEVEL
) -> Sign:
    """Judge one difference by its interval."""
    interval = block.difference(arm, control, measure, level)
    head = f"{measure.title}: {arm} minus {control}"
    if interval is None:
        state = "queued" if {arm, control} <= set(block.planned) else "not planned"
        return Sign(f"{head} {state}", UNTESTED)
    seeds = f"{interval.n} seed{'s'[: interval.n > 1]}"
    return Sign(f"{head} {measure.difference(interval)}, {seeds}", judged(interval, sign))


def gain(measure: Measure, paper: tuple[float, float]) -> Judge:
    """The sparse arm gains over dense and over lam=0, on data where dense beats its floor."""

    def judge(study: Study, gpu: bool) -> list[Sign]:
        block = block_of(study, 1, gpu)
        if block is None:
            return []
        if not measure.asked(block.about):
            return [Sign(f"{measure.title} not run", UNTESTED)]
        signs = [difference(block, SPARSE, c, measure) for c in ("dense", "lam=0")]
        floor = compare(block.values("dense", measure), block.floor(measure, "untrained"))
        if floor and floor.n > 1 and outcome(floor) != "gain":
            text = f"dense does not clearly beat its untrained floor ({measure.difference(floor)})"
            signs = [Sign(sign.text, UNTESTED) for sign in signs] + [Sign(text, UNTESTED)]
        return signs

    return judge


def theory(verdict: str, text: str, *names: str) -> Judge:
    """The evidence is tests; without them there is no verdict."""

    def judge(study: Study, gpu: bool) -> list[Sign]:
        known = names_of_tests(study.root / "tests" / "test_theory.py")
        tests = ", ".join(f"`{name}`" for name in names)
        return [Sign(f"{text} Tests: {tests}", verdict if set(names) <= known else UNTESTED)]

    return judge


def names_of_tests(path: Path) -> set[str]:
    """Return the names of the test functions in a file, none if it is not there."""
    tree = ast.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"}


def explained(name: str, floors: Sequence[str], section: str = "") -> Judge:
    """A measure of explained scenes should clearly exceed its floors (intervals do not meet).

    Clear of all: holds; clearly below one: does not hold; else in part if clear of some.
    """

    def judge(study: Study, gpu: bool) -> list[Sign]:
        signs = []
        for page in study.explain if not gpu else ():
            if page["data"] != "scenes" or "lam=0.03" not in page["run"]:
                continue
            measured = {
                m["name"]: m["values"] for m in page["measures"] if m["section"].startswith(section)
            }
            if name not in measured:
                continue
            found = measured[name]
            ours = found["this run"]
            others = {floor: found[floor] for floor in floors if floor in found}
            below = [f for f, v in others.items() if ours["low"] > v["high"]]
            above = [f for f, v in others.items() if ours["high"] < v["low"]]
            if len(below) == len(others):
                verdict = HOLDS if ours["low"] > 0 else FAILS
            else:
                verdict = FAILS if above else PART if below else UNTESTED
            shown = ", ".join(f"{floor} {v['value']:.3g}" for floor, v in others.items()) or "0"
            text = f"{name} {ours['value']:.3g} [{ours['low']:.3g}, {ours['high']:.3g}]"
            run = f"`{page['run']}`, images resampled, one seed"
            signs.append(Sign(f"{text} against {shown} ({run})", verdict))
        return signs

    return judge


def means(block: Block, pattern: str, measure: Measure = CIFAR100) -> dict[str, float]:
    """Return the mean of a measure over the seeds of each arm that has one."""
    arms = {arm: block.values(arm, measure) for arm in block.matching(pattern)}
    return {arm: mean_sd(values)[0] for arm, values in arms.items() if values}


def structure(study: Study, gpu: bool) -> list[Sign]:
    """More lambda leaves fewer groups per latent."""
    block = block_of(study, 3, gpu)
    found = means(block, "lam=*", GROUPS) if block else {}
    if len(found) < 2:
        return [Sign("queued", UNTESTED)]
    kept = [found[arm] for arm in sorted(found, key=lambda name: float(name[4:]))]
    falls = all(a >= b for a, b in itertools.pairwise(kept)) and kept[0] > kept[-1]
    shown = ", ".join(f"{arm} {value:.1f}" for arm, value in found.items())
    return [Sign(f"groups per latent: {shown}", HOLDS if falls else FAILS)]


def best_of(table: int) -> Judge:
    """Some penalised arm gains over lam=0, its interval widened for the choice."""

    def judge(study: Study, gpu: bool) -> list[Sign]:
        block = block_of(study, table, gpu)
        found = means(block, PENALISED) if block else {}
        if block is None or not found:
            return [Sign("queued", UNTESTED)]
        arm = max(found, key=lambda name: found[name])
        sign = difference(block, arm, "lam=0", CIFAR100, level=1 - (1 - LEVEL) / len(found))
        return [Sign(f"best of {len(found)}, {sign.text}", sign.verdict)]

    return judge


def group_counts(study: Study, gpu: bool) -> list[Sign]:
    """Accuracy depends on the number of groups: the largest difference, widened for all pairs."""
    block = block_of(study, 6, gpu)
    arms = block.matching(f"{SPARSE}|{SPARSE}+num_groups=*") if block else []
    found = (
        {
            arm: mean_sd(block.values(arm, CIFAR100))[0]
            for arm in arms
            if block.values(arm, CIFAR100)
        }
        if block
        else {}
    )
    if block is None or len(found) < 2:
        return [Sign("queued", UNTESTED)] if arms else []
    high, low = max(found, key=lambda arm: found[arm]), min(found, key=lambda arm: found[arm])
    pairs = len(found) * (len(found) - 1) // 2
    sign = difference(block, high, low, CIFAR100, level=1 - (1 - LEVEL) / pairs)
    return [Sign(f"largest of {pairs} differences, {sign.text}", sign.verdict)]


def too_high(study: Study, gpu: bool) -> list[Sign]:
    """The largest lambda: below dense in accuracy, and all latents in one group."""
    if (block := block_of(study, 3, gpu)) is None:
        return []
    arm = max(block.matching("lam=*"), key=lambda name: float(name[4:]))
    sign = difference(block, arm, "dense", CIFAR100, -1)
    raised = alarms(block, arm)
    crowded = HOLDS if "one group" in raised else FAILS
    told = f"alarms of {arm}: {raised or 'none'}"
    return [sign, Sign(told, crowded if block.values(arm, GROUPS) else UNTESTED)]


def too_low(study: Study, gpu: bool) -> list[Sign]:
    """The smallest lambda above 0: no connection lost, accuracy as at lam=0."""
    block = block_of(study, 3, gpu)
    arms = block.matching("lam=0.*") if block else []
    if block is None or not arms:
        return []
    arm = min(arms, key=lambda name: float(name[4:]))
    kept, all_ = block.values(arm, GROUPS), block.values("lam=0", GROUPS)
    sign = difference(block, arm, "lam=0", CIFAR100)
    if not kept or not all_:
        return [Sign(sign.text, UNTESTED)]
    same = all(abs(kept[s] - all_[s]) < 0.01 * all_[s] for s in kept if s in all_)
    text = f"groups per latent {GROUPS.text(kept)} ({arm}), {GROUPS.text(all_)} (lam=0)"
    interval = block.difference(arm, "lam=0", CIFAR100)
    found = outcome(interval) if interval and interval.n >= ENOUGH_SEEDS else ""
    alike = {"no difference shown": HOLDS, "gain": FAILS, "loss": FAILS}.get(found, UNTESTED)
    return [Sign(text, HOLDS if same else FAILS), Sign(sign.text, alike)]


def unstable(study: Study, gpu: bool) -> list[Sign]:
    """Some run of the lambda x EMA grid fails or raises "unstable" or "collapse"."""
    block = block_of(study, 6, gpu)
    arms = block.matching("lam=*+ema=*+*") if block else []
    if block is None or not arms:
        return []
    done = sum(len(block.rows.get(arm, {})) for arm in arms)
    told = {arm: alarms(block, arm) for arm in arms}
    signs = ("unstable", "collapse", "failed")
    bad = {arm: text for arm, text in told.items() if any(sign in text for sign in signs)}
    shown = "; ".join(f"{arm} {told}" for arm, told in bad.items()) or "no alarm, none failed"
    planned = sum(len(block.planned[arm]) for arm in arms)
    text = f"{done} of {planned} runs: {shown}" if done else "queued"
    return [Sign(text, HOLDS if bad else FAILS if done == planned else UNTESTED)]


def new_domains(study: Study, gpu: bool) -> list[Sign]:
    """On the far set the sparse encoder is no better than an untrained one."""
    if (block := block_of(study, 7, gpu)) is None:
        return []
    far = next((m for m in FAR if m.asked(block.about)), FAR[0])
    interval = compare(block.values(SPARSE, far), block.floor(far, "untrained"))
    shown = far.difference(interval) if interval else "queued"
    return [Sign(f"{far.title}: {SPARSE} minus untrained {shown}", judged(interval, -1))]


def nearer(study: Study, gpu: bool) -> list[Sign]:
    """The gain over the control is larger near than far."""
    if (block := block_of(study, 7, gpu)) is None:
        return []
    far = next((m for m in FAR if m.asked(block.about)), FAR[0])
    signs = []
    for control in ("lam=0", "dense"):
        found = interaction(block, SPARSE, control, CIFAR10, far)
        shown = far.difference(found) if found else "queued"
        text = f"({SPARSE} minus {control}) on {CIFAR10.title} less on {far.title}: {shown}"
        signs.append(Sign(text, judged(found)))
    return signs


def grows(study: Study, gpu: bool) -> list[Sign]:
    """The gain over lam=0 is larger for the larger encoder or the longer training."""
    blocks = [b for b in study.blocks(5) if b.gpu == gpu]
    gains = {}
    for block in blocks:
        a, b = block.values(SPARSE, CIFAR100), block.values("lam=0", CIFAR100)
        gains[block.recipe] = {seed: a[seed] - b[seed] for seed in a if seed in b}
    signs = []
    for small, large in GROWTH:
        if small in gains and large in gains:
            found = compare(gains[large], gains[small])
            shown = CIFAR100.difference(found) if found else "queued"
            text = f"gain of {SPARSE} over lam=0, {large} less {small}: {shown}"
            signs.append(Sign(text, judged(found)))
    return signs


GROWTH = (
    ("cifar100-5k-nano-10", "cifar100-5k-tiny"),
    ("cifar100-5k-nano-10", "cifar100-5k-pair"),
    ("cifar100-nano", "cifar100-vit-tiny-60"),
    ("cifar100-vit-tiny-60", "cifar100-vit-base"),
    ("cifar100-vit-tiny-60", "cifar100-vit-tiny"),
)
"""Recipes that differ in the encoder's size or in the length alone: smaller, larger."""


def efficient(study: Study, gpu: bool) -> list[Sign]:
    """About half of the groups kept: better than as many random latents, and not below all."""
    if (block := block_of(study, 11, gpu)) is None:
        return []
    points = curve(block, SPARSE)
    if len(points) < 2:
        return [Sign("queued", UNTESTED)]
    half = min(points, key=lambda level: abs(level - max(points) / 2))
    kept, share = points[half], KEPT["accuracy"]
    random = compare(kept["accuracy"], kept.get("random_latents", {}))
    loss = compare(kept["accuracy"], points[max(points)]["accuracy"])
    head = f"{SPARSE}, {half} of {max(points)} groups"
    head, shown = f"{SPARSE}, {half} of {max(points)} groups", share.difference
    better = Sign(
        f"{head} minus as many random latents: {shown(random) if random else 'queued'}",
        judged(random),
    )
    kept_up = {"loss": FAILS, "gain": HOLDS, "no difference shown": PART}
    verdict = kept_up.get(outcome(loss), UNTESTED) if loss else UNTESTED
    if loss and loss.n < ENOUGH_SEEDS and verdict == PART:
        verdict = UNTESTED
    return [better, Sign(f"{head} minus all groups: {shown(loss) if loss else 'queued'}", verdict)]


def measured(study: Study, gpu: bool) -> list[Sign]:
    """DCI moves where accuracy does not, or the other way round: the two are not one number."""
    block = block_of(study, 3, False)
    dci, found = (means(block, "*", m) if block else {} for m in (DCI, CIFAR100))
    if len(dci) < 3:
        return [Sign("DCI and accuracy by arm: queued", UNTESTED)]
    rank = spearmanr([dci[arm] for arm in dci], [found[arm] for arm in dci])[0]
    text = f"DCI of {len(dci)} arms: its rank correlation with their accuracy is {rank:+.2f}"
    return [Sign(text, HOLDS)]


def none(text: str) -> Judge:
    """Nothing was run."""
    return lambda study, gpu: [Sign(text, UNTESTED)]
