"""The claims ledger: each claim of the paper, what was found, and a verdict made by a rule.

A claim is a list of things that should be seen if it holds (`Judge`). Most are differences between
two arms, judged by their interval, at the scale of two CPU cores and at the paper's scale apart.
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
    CORRELATION,
    DCI,
    FAR,
    GROUPS,
    KEPT,
    PENALISED,
    SPARSE,
    TASKS,
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


@dataclass(frozen=True)
class Claim:
    """A claim in our words. `table` is where its numbers stand, 0 for another page."""

    section: str
    text: str
    judge: Judge
    table: int = 0
    scaled: bool = True
    """Whether it is judged at both scales."""


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
    """Return the CIFAR-100 block of a table at a scale: that with most planned runs."""
    found = [b for b in study.blocks(table) if b.gpu == gpu and b.config.data == "cifar100"]
    return max(found, key=lambda b: sum(map(len, b.planned.values())), default=None)


def differ(
    table: int, *pairs: tuple[str, str], measure: Measure = CIFAR100, sign: int = 1
) -> Judge:
    """Each first arm should lie above (sign 1) or below (-1) the second one."""

    def judge(study: Study, gpu: bool) -> list[Sign]:
        block = block_of(study, table, gpu)
        return [difference(block, a, b, measure, sign) for a, b in pairs] if block else []

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
        known = test_names(study.root / "tests" / "test_theory.py")
        tests = ", ".join(f"`{name}`" for name in names)
        return [Sign(f"{text} Tests: {tests}", verdict if set(names) <= known else UNTESTED)]

    return judge


def test_names(path: Path) -> set[str]:
    """Return the names of the test functions in a file, none if it is not there."""
    tree = ast.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"}


def explained(name: str, floors: Sequence[str], section: str = "") -> Judge:
    """A measure of explained scenes should clearly exceed its floors (intervals do not meet)."""

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
                verdict = PART if below else FAILS if above else UNTESTED
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
        return []
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
            return []
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
    crowded = PART if "one group" in raised else FAILS
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
    alike = interval is not None and outcome(interval) == "no difference shown"
    return [Sign(text, HOLDS if same else FAILS), Sign(sign.text, HOLDS if alike else UNTESTED)]


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


FLOORS = ("untrained", "PCA", "random zeros", "k-means", "places")
NUMBERS = {measure.title: (measure, paper) for measure, paper in TASKS if paper}
ACCURACIES = (
    ("CIFAR-100", "CIFAR-100"),
    ("Places205", "MiniPlaces, 100 scenes at 32x32, for Places205"),
    ("CLEVR/Count", "CLEVR/Count, generated scenes"),
    ("iNaturalist 2018", "iNaturalist 2018"),
)
CLAIMS = (
    *(
        Claim(
            "Accuracy of the linear probe",
            f"{name}: {NUMBERS[title][1][0]:.2f} % for JEPA, {NUMBERS[title][1][1]:.2f} % with "
            "the sparsity penalty",
            gain(*NUMBERS[title]), 1,
        )
        for name, title in ACCURACIES
    ),
    Claim(
        "The two propositions", "Grouping lowers multi-information, strictly so where groups "
        "depend on each other",
        theory(
            PART, "TC(X) = TC(G) + the dependence inside the groups, so TC(G) <= TC(X); strict "
            "where a group depends inside, never by dependence across groups.",
            "test_chain_rule_for_tables", "test_chain_rule_for_gaussians",
            "test_strict_exactly_where_a_group_depends_inside",
            "test_dependence_across_groups_alone_never_makes_it_strict",
        ), scaled=False,
    ),
    Claim(
        "The two propositions", "Groups tell at least as much about a variable as the latents",
        theory(
            PART, "An equality for a partition, which only renames the latents; a map of the "
            "latents, as W is, can lose and never gains.",
            "test_a_partition_is_a_relabelling_and_keeps_the_information",
            "test_a_lossy_map_never_adds_information", "test_where_a_lossy_map_loses_and_where_not",
        ), scaled=False,
    ),
    Claim(
        "Mechanism 1: related features share latents",
        "Patches of one object share groups more often than patches of two",
        explained("same group, gap", FLOORS),
    ),
    Claim(
        "Mechanism 1: related features share latents",
        "Assumption: patches of one object share more information than patches of two",
        explained("I(patch; patch), gap", ()),
    ),
    Claim(
        "Mechanism 1: related features share latents",
        "It breaks without semantic structure: pretrained on noise, transfer falls",
        differ(9, *((f"{arm}+corruption=noise", arm) for arm in (SPARSE, "dense")), sign=-1), 9,
    ),
    Claim(
        "Mechanism 1: related features share latents",
        "The same for images whose patches are shuffled",
        differ(9, *((f"{arm}+corruption=shuffle", arm) for arm in (SPARSE, "dense")), sign=-1), 9,
    ),
    Claim(
        "Mechanism 2: sparse groups lower multi-information",
        "The latents' total correlation is lower than without penalty and than in dense",
        differ(3, (SPARSE, "lam=0"), (SPARSE, "dense"), measure=CORRELATION, sign=-1), 3,
    ),
    Claim(
        "Mechanism 2: sparse groups lower multi-information",
        "Assumption: what groups share comes from latents that they have in common",
        theory(
            PART, "True of independent latents; disjoint groups of correlated latents still share.",
            "test_overlap_of_two_groups", "test_disjoint_groups_of_correlated_latents_still_share",
        ), scaled=False,
    ),
    Claim(
        "Mechanism 2: sparse groups lower multi-information",
        "It is the learned pattern of zeros that counts, not zeros of any kind",
        differ(2, (SPARSE, f"{SPARSE}+pattern=random")), 2,
    ),
    Claim(
        "Mechanism 3: prediction of embeddings, not pixels",
        "Predicting embeddings reads better in a linear probe than predicting pixels",
        differ(10, *((arm, f"{arm}+predict=pixels") for arm in ("dense", SPARSE))), 10,
    ),
    Claim(
        "Mechanism 3: prediction of embeddings, not pixels",
        "Assumption: the backbone is large and trained enough; the gain grows with both", grows, 5,
    ),
    Claim("Trade-offs", "The number of groups G matters for accuracy", group_counts, 6),
    Claim("Trade-offs", "More lambda leaves fewer groups per latent", structure, 3),
    Claim("Trade-offs", "Some lambda between none and too much gains accuracy", best_of(3), 3),
    Claim(
        "Interpretability", "The latents are better disentangled (DCI) than without penalty",
        differ(3, (SPARSE, "lam=0"), (SPARSE, "dense"), measure=DCI), 3,
    ),
    Claim(
        "Interpretability", "As units of code, groups match single factors (MIG)",
        explained("MIG", FLOORS, "Disentanglement, groups"),
    ),
    Claim(
        "Efficiency", "Half of the groups suffice: no loss, and better than as many random latents",
        efficient, 11,
    ),
    Claim("Failure signatures", "Lambda too high: below dense, all latents in one group", too_high, 3),
    Claim("Failure signatures", "Lambda too low: nothing changes", too_low, 3),
    Claim("Failure signatures", "Training is unstable where the EMA does not suit the term", unstable, 6),
    Claim("Failure signatures", "Probes fail on new domains: no better than untrained", new_domains, 7),
    Claim(
        "Suggested experiments", "Lambda on 5,000 images: sparser with lambda, and a gain somewhere",
        lambda study, gpu: [*structure(study, gpu), *best_of(3)(study, gpu)], 3,
    ),
    Claim(
        "Suggested experiments", "Which patches activate a group: a label's, more than by chance",
        explained("I(group; colour)", ("shuffled", "random zeros", "untrained")),
    ),
    Claim("Suggested experiments", "Near and far: the gain is larger near", nearer, 7),
    Claim("Open questions", "Do groups follow objects? (FG-ARI)", explained("FG-ARI", FLOORS)),
    Claim(
        "Open questions", "Do the gains hold for ViT-B and ViT-L on ImageNet?",
        none("ImageNet was not at hand; ViT-Base on CIFAR-100 is in table 5"), 5, scaled=False,
    ),
    Claim(
        "Open questions", "Can interpretability be measured apart from accuracy?",
        measured, scaled=False,
    ),
)  # fmt: skip


def ledger(study: Study) -> tuple[str, dict[str, dict[str, int]]]:
    """Return docs/claims.md and the number of each verdict by scale."""
    counts: dict[str, dict[str, int]] = {}
    parts = [ABOUT]
    for section in dict.fromkeys(claim.section for claim in CLAIMS):
        lines = [f"## {section}", "", "| claim | scale | verdict | evidence |", "|---|---|---|---|"]
        for claim in (c for c in CLAIMS if c.section == section):
            shown = claim.text
            for gpu in (False, True) if claim.scaled else (False,):
                where = ("full" if gpu else "small") if claim.scaled else "any"
                signs = claim.judge(study, gpu)
                verdict = combine(signs)
                tally = counts.setdefault(where, dict.fromkeys(VERDICTS, 0))
                tally[verdict] += 1
                evidence = "<br>".join(sign.text for sign in signs) or "no run planned"
                link = f" ([table {claim.table}](results.md#table-{claim.table}))"
                evidence += link if claim.table and signs else ""
                lines.append(f"| {shown} | {where} | **{verdict}** | {evidence} |")
                shown = ""
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n", counts


ABOUT = f"""# The paper's claims

Made by `python recipes/tables.py` from `results/`; the numbers are those of
[results.md](results.md), which says what the intervals mean. Each claim of the SparseJEPA paper
(arXiv 2504.16140), in our words, is judged at two scales: *small* is what two CPU cores allow (5,000
images, small encoders), *full* the paper's (all of CIFAR-100, ViT-Tiny, on a GPU). What is missing at
the small scale says nothing of the paper's numbers: that is the other line.

How a verdict comes about, by rule and not by hand:

- A claim says that a difference has a sign. **Holds**: the 95 % interval lies on that side of 0, with at
  least {ENOUGH_SEEDS} paired seeds. **Holds in part**: the same with fewer seeds, or one of several such
  differences. **Does not hold**: the interval lies on the other side, or includes 0 with
  {ENOUGH_SEEDS} seeds or more, so that no difference is shown at this scale. **Not tested**: nothing was
  run, or an interval of fewer seeds includes 0 and decides nothing.
- The sparse arm of a pair is `{SPARSE}`, fixed before any run; where the best of several is taken, the
  interval is widened for that (Bonferroni). A gain must show against dense, the paper's own
  comparison, and against `lam=0`, without which it is not the penalty's. Where the dense arm does
  not beat an untrained encoder nothing is judged.
- Measures of explained runs (`results/explain.jsonl`, [explain.md](explain.md)) are judged by whether
  their interval clears those of all floors (holds), of some (in part) or of none. These intervals
  resample images and know nothing of other seeds.
- Propositions are judged by tests; [theory.md](theory.md) has the argument. Without the test there is
  no verdict."""
