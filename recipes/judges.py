"""How a claim is judged: the things that should all be seen if it holds, each with a verdict.

Most are differences between two arms, judged by their interval (`rules`).
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from layouts import (
    CIFAR10,
    CIFAR100,
    DCI,
    FAR,
    GROUPS,
    KEPT,
    SPARSE,
    alarms,
    curve,
    interaction,
    pick,
)
from rules import (
    FAILS,
    FEW_ARMS,
    FEW_SEEDS,
    HOLDS,
    PART,
    RANK,
    UNTESTED,
    Sign,
    alike,
    block_of,
    difference,
    judged,
    rank_interval,
    seeds_text,
)
from scipy.stats import rankdata
from study import Block, Measure, Row, Study

from sparsejepa.study.verdict import ENOUGH_SEEDS, LEVEL, choose, compare, mean_sd, outcome

Judge = Callable[[Study, bool], list[Sign]]  # the bool: at full scale (GPU)


def differ(
    table: int, *pairs: tuple[str, str], measure: Measure = CIFAR100, sign: int = 1
) -> Judge:
    """Each first arm should lie above (sign 1) or below (-1) the second one."""

    def judge(study: Study, gpu: bool) -> list[Sign]:
        block = block_of(study, table, gpu, sorted({arm for pair in pairs for arm in pair}))
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


def gain(measure: Measure, paper: tuple[float, float]) -> Judge:
    """The sparse arm gains over dense and over lam=0, on data where dense beats its floor."""

    def judge(study: Study, gpu: bool) -> list[Sign]:
        block = block_of(study, 1, gpu, (SPARSE, "dense", "lam=0"))
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

    Clear of all: holds; clearly below one: does not hold; else in part if clear of some. Without
    a floor there is only 0 to be above, which is at most in part.
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
                verdict = (HOLDS if others else PART) if ours["low"] > 0 else FAILS
            else:
                verdict = FAILS if above else PART if below else UNTESTED
            shown = ", ".join(f"{floor} {v['value']:.3g}" for floor, v in others.items()) or "0"
            text = f"{name} {ours['value']:.3g} [{ours['low']:.3g}, {ours['high']:.3g}]"
            run = f"`{page['run']}`, images resampled, one seed"
            signs.append(Sign(f"{text} against {shown} ({run})", verdict))
        return signs

    return judge


def structure(study: Study, gpu: bool) -> list[Sign]:
    """More lambda leaves fewer groups per latent."""
    return fewer_groups(block_of(study, 3, gpu))


def fewer_groups(block: Block | None) -> list[Sign]:
    """The groups per latent fall with every planned lambda, over the seeds that all of them have.

    They may stay, at all groups or at one, but the last lambda must leave clearly fewer than none.
    """
    arms = sorted(block.matching("lam=*"), key=lambda arm: float(arm[4:])) if block else []
    if block is None or len(arms) < 2:
        return []
    values = {arm: block.values(arm, GROUPS) for arm in arms}
    shown = ", ".join(f"{a} {GROUPS.text(v) if v else 'queued'}" for a, v in values.items())
    shared = set.intersection(*(set(v) for v in values.values()))
    falls = [{seed: values[arm][seed] for seed in sorted(shared)} for arm in arms]
    found = compare(falls[-1], falls[0])
    if found is None:
        return [Sign(f"groups per latent: {shown}", UNTESTED)]
    verdict = judged(found, -1)
    steps = [mean_sd(values)[0] for values in falls]
    if verdict != UNTESTED and any(a < b for a, b in itertools.pairwise(steps)):
        verdict = FAILS
    last = f"{arms[-1]} minus {arms[0]} {GROUPS.difference(found)}, {seeds_text(found)}"
    return [Sign(f"groups per latent: {shown}; {last}", verdict)]


def best_of(table: int) -> Judge:
    """Some penalised arm gains over lam=0, its interval widened for the choice."""
    return lambda study, gpu: best_gain(block_of(study, table, gpu))


def best_gain(block: Block | None) -> list[Sign]:
    """The penalised arm with the highest mean, of those with the most seeds, against lam=0."""
    arm, count = pick(block) if block else ("", 0)
    if block is None or not arm:
        return [Sign("queued", UNTESTED, needed=True)]
    sign = difference(block, arm, "lam=0", CIFAR100, level=1 - (1 - LEVEL) / count)
    return [replace(sign, text=f"best of {count}, {sign.text}")]


def lambdas(study: Study, gpu: bool) -> list[Sign]:
    """The paper's lambdas on 5,000 images: fewer groups with lambda, and a gain of one of them."""
    found = [
        b for b in study.blocks(3)
        if b.gpu == gpu and b.config.images.limit == 5000 and set(LAMBDAS) <= set(b.planned)
    ]  # fmt: skip
    block = max(found, key=lambda b: len(b.all_rows), default=None)
    return [*fewer_groups(block), *best_gain(block)] if block else []


LAMBDAS = ("lam=0", "lam=0.001", "lam=0.01", "lam=0.1")
"""The lambdas of the paper's first suggested experiment."""


def group_counts(study: Study, gpu: bool) -> list[Sign]:
    """Accuracy depends on the number of groups: the largest difference, widened for all pairs."""
    block = block_of(study, 6, gpu)
    pattern = f"{SPARSE}|{SPARSE}+num_groups=*"
    arms = block.matching(pattern) if block else []
    values = {arm: block.values(arm, CIFAR100) for arm in arms} if block else {}
    values = {arm: found for arm, found in values.items() if found}
    if block is None or len(values) < 2:
        return [Sign("queued", UNTESTED)] if arms else []
    rivals = choose(values)[1]
    shared = set.intersection(*(set(values[arm]) for arm in rivals))
    found = {arm: mean_sd({s: values[arm][s] for s in shared})[0] for arm in rivals if shared}
    if len(found) < 2:
        return [Sign("too few arms have the most seeds", UNTESTED)]
    high, low = max(found, key=lambda arm: found[arm]), min(found, key=lambda arm: found[arm])
    pairs = len(found) * (len(found) - 1) // 2
    sign = difference(block, high, low, CIFAR100, level=1 - (1 - LEVEL) / pairs)
    return [Sign(f"largest of {pairs} differences, {sign.text}", sign.verdict)]


def too_high(study: Study, gpu: bool) -> list[Sign]:
    """The largest lambda: below dense in accuracy, and all latents in one group."""
    block = block_of(study, 3, gpu)
    arms = block.matching("lam=*") if block else []
    if block is None or not arms:
        return []
    arm = max(arms, key=lambda name: float(name[4:]))
    raised = alarms(block, arm)
    told = (raised or "none") if block.rows.get(arm) else "queued"
    crowded = HOLDS if "one group" in raised else FAILS
    return [
        difference(block, arm, "dense", CIFAR100, -1),
        Sign(f"alarms of {arm}: {told}", crowded if block.values(arm, GROUPS) else UNTESTED),
    ]


def too_low(study: Study, gpu: bool) -> list[Sign]:
    """The smallest lambda above 0: no connection lost, accuracy within the margin of lam=0."""
    block = block_of(study, 3, gpu)
    arms = block.matching("lam=0.*") if block else []
    if block is None or not arms:
        return []
    arm = min(arms, key=lambda name: float(name[4:]))
    kept, all_ = block.values(arm, GROUPS), block.values("lam=0", GROUPS)
    shared = sorted(set(kept) & set(all_))
    interval = block.difference(arm, "lam=0", CIFAR100)
    text = difference(block, arm, "lam=0", CIFAR100).text
    verdict = alike(interval) if interval and interval.n >= FEW_SEEDS else UNTESTED
    signs = [Sign(f"{text} (alike: within 1 point)", verdict)]
    if shared:
        same = all(abs(kept[seed] - all_[seed]) < 0.01 * all_[seed] for seed in shared)
        found = (HOLDS if len(shared) >= ENOUGH_SEEDS else PART) if same else FAILS
        text = f"groups per latent {GROUPS.text(kept)} ({arm}), {GROUPS.text(all_)} (lam=0)"
        signs.append(Sign(text, found if len(shared) >= FEW_SEEDS else UNTESTED))
    return signs


def unstable(study: Study, gpu: bool) -> list[Sign]:
    """Some penalised run of the lambda x EMA grid fails or raises "unstable" or "collapse".

    It counts where lam=0 with the same EMA and seed does not: else it is not the penalty's doing.
    """
    block = block_of(study, 6, gpu)
    pairs = {}
    for arm in block.matching("lam=0.*+ema=*+*") if block else ():
        twin = f"lam=0+{arm.partition('+')[2]}"
        if block and twin in block.planned:
            pairs[arm] = twin
    if block is None or not pairs:
        return []
    planned = sum(len(block.planned[arm]) for arm in pairs)
    compared = {arm: set(block.rows.get(arm, {})) & set(block.rows.get(pairs[arm], {}))
                for arm in pairs}  # fmt: skip
    done = sum(map(len, compared.values()))
    if not done:
        return [Sign("queued", UNTESTED)]
    bad = {
        arm: {s for s in seeds if went_wrong(block.rows[arm][s])}
        - {s for s, row in block.rows.get(pairs[arm], {}).items() if went_wrong(row)}
        for arm, seeds in compared.items()
    }
    most = max(map(len, bad.values()))
    least = min(map(len, compared.values()))
    shown = "; ".join(f"{arm} {alarms(block, arm)}" for arm, found in bad.items() if found)
    text = f"{done} of {planned} penalised runs with their lam=0: "
    if most:
        verdict = HOLDS if most >= ENOUGH_SEEDS else PART
        return [Sign(f"{text}{shown}, lam=0 with the same EMA not", verdict)]
    few = "" if least >= ENOUGH_SEEDS else f"; {least} seeds an arm decide nothing"
    return [Sign(f"{text}none went wrong where lam=0 did not{few}", UNTESTED if few else FAILS)]


def went_wrong(row: Row) -> bool:
    """Return whether a run failed, or raised the alarm of instability or collapse."""
    told = {text.split(":")[0] for text in row.get("alarms") or ()}
    return bool(row.get("failed")) or bool(told & {"unstable", "collapse"})


def new_domains(study: Study, gpu: bool) -> list[Sign]:
    """On the far set the sparse encoder is no better than an untrained one.

    A gain refutes it, a loss shows it; no difference over 5 seeds or more shows it in part.
    """
    if (block := block_of(study, 7, gpu, (SPARSE,))) is None:
        return []
    far = next((m for m in FAR if m.asked(block.about)), FAR[0])
    interval = compare(block.values(SPARSE, far), block.floor(far, "untrained"))
    verdict = judged(interval, -1)
    if interval and verdict == FAILS and outcome(interval) != "gain":
        verdict = PART
    shown = f"{far.difference(interval)}, {seeds_text(interval)}" if interval else "queued"
    return [Sign(f"{far.title}: {SPARSE} minus untrained {shown}", verdict)]


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
        signs.append(Sign(text, judged(found), needed=control == "lam=0"))
    return signs


def grows(study: Study, gpu: bool) -> list[Sign]:
    """The gain over lam=0 is larger for the larger encoder or the longer training."""
    blocks = {block.recipe: block for block in study.blocks(5) if block.gpu == gpu}
    gains = {}
    for name, block in blocks.items():
        a, b = block.values(SPARSE, CIFAR100), block.values("lam=0", CIFAR100)
        gains[name] = {seed: a[seed] - b[seed] for seed in a if seed in b}
    signs = []
    for small, large in GROWTH:
        if small in gains and large in gains:
            text = f"gain of {SPARSE} over lam=0, {large} less {small}"
            found = compare(gains[large], gains[small])
            one, other = blocks[small].made_on, blocks[large].made_on
            if found is None:
                signs.append(Sign(f"{text}: queued", UNTESTED))
            elif one != other:
                signs.append(Sign(f"{text}: not on one device ({other} against {one})", UNTESTED))
            else:
                shown = f"{CIFAR100.difference(found)}, {seeds_text(found)}"
                signs.append(Sign(f"{text}: {shown}", judged(found)))
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
    """About half of the groups kept: better than as many random latents, and no loss on all."""
    if (block := block_of(study, 11, gpu, (SPARSE,))) is None:
        return []
    points = curve(block, SPARSE)
    if len(points) < 2:
        return [Sign("queued", UNTESTED)]
    half = min(points, key=lambda level: abs(level - max(points) / 2))
    kept, shown = points[half], KEPT["accuracy"].difference
    random = compare(kept["accuracy"], kept.get("random_latents", {}))
    loss = compare(kept["accuracy"], points[max(points)]["accuracy"])
    head = f"{SPARSE}, {half} of {max(points)} groups"
    more = f"minus as many random latents: {shown(random) if random else 'queued'}"
    none = f"minus all groups: {shown(loss) if loss else 'queued'} (no loss: less than 1 point)"
    return [
        Sign(f"{head} {more}", judged(random)),
        Sign(f"{head} {none}", alike(loss, high=math.inf)),
    ]


def measured(study: Study, gpu: bool) -> list[Sign]:
    """DCI does not merely order the arms as accuracy does: the two are not one number.

    Spearman's rank correlation over the arms with its 95 % interval (Fisher's z with the variance
    of Bonett and Wright 2000).
    """
    if (block := block_of(study, 3, gpu)) is None:
        return []
    pairs = []
    for arm in block.planned:
        dci, found = (block.values(arm, measure) for measure in (DCI, CIFAR100))
        if len(seeds := set(dci) & set(found)) >= FEW_SEEDS:
            pairs.append([mean_sd({s: v[s] for s in seeds})[0] for v in (dci, found)])
    text = f"DCI and accuracy of {len(pairs)} arms with {FEW_SEEDS} seeds or more"
    if len(pairs) < FEW_ARMS:
        return [Sign(f"{text}: {FEW_ARMS} are needed", UNTESTED)]
    if np.ptp(pairs, axis=0).min() == 0:
        return [Sign(f"{text}: one of the two is the same in all arms", UNTESTED)]
    rank = float(np.corrcoef(rankdata(pairs, axis=0).T)[0, 1])
    low, high = rank_interval(rank, len(pairs))
    verdict = UNTESTED
    if abs(rank) >= RANK:
        verdict = FAILS
    elif low > -RANK and high < RANK:
        verdict = HOLDS
    return [Sign(f"{text}: rank correlation {rank:+.2f} [{low:+.2f}, {high:+.2f}]", verdict)]


def none(text: str) -> Judge:
    """Nothing was run."""
    return lambda study, gpu: [Sign(text, UNTESTED)]
