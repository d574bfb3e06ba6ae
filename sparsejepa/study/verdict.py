"""What a sweep's rows say: means, paired differences, floors, and a verdict in plain words.

Pure functions of the rows of results.jsonl; no files, no models. Accuracies are shares (0 to 1),
differences and texts are in points (hundredths).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
ENOUGH_SEEDS = 5  # a claim needs at least this many paired seeds (METHOD section 6)

BySeed = Mapping[int, float]

STRUCTURE = {
    "groups_per_latent": "groups per latent",
    "nonzero_elements": "non-zero elements",
    "dead_groups": "dead groups",
}
"""Measures of structure in a row, beside the density, and what the table calls them."""


@dataclass(frozen=True)
class Interval:
    """Mean of n paired differences with its Student t interval; a single one has no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Arm:
    """One arm of a sweep, over its seeds: accuracy per measure and the measures of structure."""

    name: str
    lam: float | None
    density: float | None
    accuracy: Mapping[str, BySeed]
    structure: Mapping[str, BySeed]

    @property
    def sparse(self) -> bool:
        """Whether the arm's W is penalised."""
        return bool(self.lam) or self.density is not None


@dataclass(frozen=True)
class Summary:
    """All arms in order (dense, lam=0, rising lam, rising density) with their floors.

    A measure is "data: target", with the protocol behind it unless it is the logistic probe.
    `uninformative` holds the measures on which a control does not beat its untrained floor,
    `below_pixels` those on which no arm beats the raw pixels.
    """

    arms: tuple[Arm, ...]
    measures: tuple[str, ...]
    untrained: Mapping[str, BySeed]
    pixels: Mapping[str, float]
    uninformative: frozenset[str]
    below_pixels: frozenset[str]

    def arm(self, name: str) -> Arm | None:
        """Return the arm of that name, or None."""
        return next((a for a in self.arms if a.name == name), None)

    @property
    def first(self) -> str | None:
        """The first measure from which something follows: that of the verdict."""
        return next((m for m in self.measures if m not in self.uninformative), None)


@dataclass(frozen=True)
class Verdict:
    """The outcome against each control, in words, and what a reader must know to weigh it."""

    arm: str | None
    measure: str | None
    outcomes: Mapping[str, str]
    text: str
    remarks: tuple[str, ...]


def compare(a: BySeed, b: BySeed, level: float = LEVEL) -> Interval | None:
    """Return the interval of a - b over the seeds that both have, None if there is none."""
    difference = np.array([a[seed] - b[seed] for seed in sorted(set(a) & set(b))], float)
    n = len(difference)
    if not n:
        return None
    mean = float(difference.mean())
    if n == 1:
        return Interval(mean, None, None, n)
    from scipy.stats import t

    half = float(t.ppf(0.5 + level / 2, n - 1) * difference.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def beats(values: BySeed, floor: BySeed, images: int) -> bool:
    """Return whether `values` lie above `floor` by more than the interval.

    From three seeds on this is the paired t interval over seeds. Below, it is the sampling interval
    of the test images, for which the two probes count as independent (cautious: they share images).
    """
    interval = compare(values, floor)
    if interval is None:
        return False
    if interval.n >= 3 and interval.low is not None:
        return interval.low > 0
    seeds = sorted(set(values) & set(floor))
    p, q = (float(np.mean([x[s] for s in seeds])) for x in (values, floor))
    return interval.mean > 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / images)


def mean_sd(values: BySeed) -> tuple[float, float]:
    """Return mean and sample standard deviation (0 for one seed) over the seeds."""
    x = np.array(list(values.values()), float)
    return float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else 0.0


def measure_name(probe: Mapping[str, Any]) -> str:
    """Return the name under which a probe's row appears in tables and figures."""
    name = f"{probe['data']}: {probe['target']}"
    return name if probe["protocol"] == "logistic" else f"{name}, {probe['protocol']}"


def summarise(rows: Sequence[Mapping[str, Any]]) -> Summary:
    """Gather the rows of results.jsonl (one per run) by arm, measure and seed."""
    arms: dict[str, Arm] = {}
    untrained: dict[str, dict[int, float]] = {}
    pixels: dict[str, float] = {}
    images: dict[str, int] = {}
    for row in rows:
        groups, seed = row["settings"]["groups"], row["seed"]
        dense, density = groups["groups"] == "none", groups.get("density")
        lam = None if dense or density is not None else groups["lam"]
        new = Arm(row["arm"], lam, None if dense else density, {}, {})
        arm = arms.setdefault(row["arm"], new)
        for probe in row["probes"]:
            name = measure_name(probe)
            _note(arm.accuracy, name, seed, probe["accuracy"])
            images[name] = probe["n_test"]
            if probe.get("untrained") is not None:
                _note(untrained, name, seed, probe["untrained"])
            if probe.get("pixels") is not None:
                pixels[name] = probe["pixels"]
        for name in ("density", *STRUCTURE):
            if row.get(name) is not None:
                _note(arm.structure, name, seed, row[name])
    ordered = sorted(arms.values(), key=lambda a: (a.density or -1, -1 if a.lam is None else a.lam))

    def above(arm: Arm, name: str, floor: BySeed) -> bool:
        return beats(arm.accuracy.get(name, {}), floor, images[name])

    weak = {
        name
        for name in images
        if not all(above(arm, name, untrained.get(name, {})) for arm in ordered if not arm.sparse)
    }
    low = {
        name
        for name, floor in pixels.items()
        if not any(above(a, name, dict.fromkeys(a.accuracy.get(name, {}), floor)) for a in ordered)
    }
    return Summary(
        tuple(ordered), tuple(images), untrained, pixels, frozenset(weak), frozenset(low)
    )


def _note(where: Any, name: str, seed: int, value: float) -> None:
    where.setdefault(name, {})[seed] = value


def table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Return header and cells (text) of the sweep's table, the floors as its last two rows.

    Differences to lam=0 have columns of their own if there are seeds enough for an interval.
    """
    control = summary.arm("lam=0")
    paired = any(len(values) > 1 for arm in summary.arms for values in arm.accuracy.values())
    header, columns = ["arm"], [[arm.name for arm in summary.arms]]
    columns[0] += ["untrained floor", "raw-pixel floor"]
    for measure in summary.measures:
        pixels = {0: summary.pixels[measure]} if measure in summary.pixels else {}
        found = [arm.accuracy.get(measure, {}) for arm in summary.arms]
        header.append(mark(summary, measure))
        columns.append([percent(x) for x in (*found, summary.untrained.get(measure, {}), pixels)])
        if paired:
            base = control.accuracy.get(measure, {}) if control else {}
            header.append("minus lam=0")
            columns.append(["" if x is base else difference(compare(x, base)) for x in found])
    for name, title in STRUCTURE.items():
        header.append(title)
        columns.append([_number(arm.structure.get(name, {})) for arm in summary.arms])
    lines = len(columns[0])
    whole = [column + [""] * (lines - len(column)) for column in columns]
    return header, [list(line) for line in zip(*whole, strict=True)]


def verdict(summary: Summary) -> Verdict:
    """Say what the best sparse arm did against lam=0 and against dense.

    The measure is the first one on which the controls beat their untrained floor. The arm is the
    one that `choose` takes, and because it was chosen among k its interval is widened to level
    1 - 0.05/k (Bonferroni).
    """
    remarks, measure = _floor_remarks(summary), summary.first
    sparse = [arm for arm in summary.arms if arm.sparse and arm.accuracy]

    def none(reason: str) -> Verdict:
        return Verdict(None, measure, {}, f"No verdict: {reason}", tuple(remarks))

    if not sparse:
        return none("there is no arm with a penalty, only the controls dense and lam=0.")
    if measure is None:
        return none(
            "on every target the controls dense and lam=0 do not beat the untrained encoder by "
            "more than the interval. Train longer, or probe another target."
        )
    probed = {arm.name: arm.accuracy[measure] for arm in sparse if arm.accuracy.get(measure)}
    chosen, rivals = choose(probed)
    seeds, count = len(probed[rivals[0]]), len(rivals)
    if left_out := [f"{name} ({len(probed[name])})" for name in probed if name not in rivals]:
        remarks.append(
            f"Left out of the choice, as they have fewer than {seeds} seeds: {', '.join(left_out)}."
        )
    if not chosen:
        return none(
            f"{' and '.join(rivals)} share no seed on {measure}, so none of them can be called the "
            "best. Run the missing seeds."
        )
    if seeds == 1:
        remarks.append("One seed: no interval over seeds, so no difference can be claimed.")
    elif seeds < ENOUGH_SEEDS:
        remarks.append(f"Only {seeds} seeds: a claim needs at least {ENOUGH_SEEDS} paired seeds.")
    if count > 1 and seeds > 1:
        remarks.append(
            f"The arm was chosen among {count} by its mean, so the interval in the verdict is "
            "widened for that choice (Bonferroni); those in the table are not."
        )
    outcomes, text = _against_controls(summary, chosen, measure, count)
    return Verdict(chosen, measure, outcomes, text, tuple(remarks))


def _floor_remarks(summary: Summary) -> list[str]:
    """Return what must be said of measures on which a floor is not beaten."""
    weak = [name for name in summary.measures if name in summary.uninformative]
    low = [name for name in summary.measures if name in summary.below_pixels]
    remarks = []
    if weak:
        remarks.append(
            f"Uninformative here: {'; '.join(weak)}. Dense or lam=0 does not beat the untrained "
            "encoder by more than the interval, so nothing follows from these figures."
        )
    if low:
        remarks.append(
            f"No arm beats the raw pixels by more than the interval on: {'; '.join(low)}."
        )
    return remarks


def _against_controls(
    summary: Summary, chosen: str, measure: str, count: int
) -> tuple[dict[str, str], str]:
    """Return the outcome of an arm, chosen among `count`, against each control, and in words."""
    best = next(arm for arm in summary.arms if arm.name == chosen)
    outcomes, clauses = dict[str, str](), list[str]()
    for name in ("lam=0", "dense"):
        control = summary.arm(name)
        values = control.accuracy.get(measure, {}) if control else {}
        interval = compare(best.accuracy[measure], values, 1 - (1 - LEVEL) / count)
        if interval is not None:
            outcomes[name] = outcome(interval)
            said = f"{outcomes[name]} against" if interval.n > 1 else "against"
            clauses.append(f"{said} {name} ({percent(values)} %, {difference(interval)} points)")
    subject = f"the best of {count} sparse arms, {best.name}," if count > 1 else best.name
    text = f"On {measure}, {subject} reaches {percent(best.accuracy[measure])} %: "
    text += " and ".join(clauses) or "there is no control of these seeds to compare it with"
    kept, groups = best.structure.get("density"), best.structure.get("groups_per_latent")
    if kept and groups:
        text += (
            f". It keeps {100 * mean_sd(kept)[0]:.0f} % of the connections between latents and "
            f"groups, {mean_sd(groups)[0]:.1f} groups per latent"
        )
    return outcomes, f"{text}."


def choose(values: Mapping[str, BySeed]) -> tuple[str, list[str]]:
    """Return the arm with the highest mean and the arms that it was chosen among.

    Only arms with the most seeds compete, on the seeds that they share: a mean of fewer seeds wins
    by luck. The first is "" if they share none. Raises ValueError if there is no arm.
    """
    most = max(map(len, values.values()))
    rivals = [arm for arm, found in values.items() if len(found) == most]
    shared = set.intersection(*(set(values[arm]) for arm in rivals))
    if not shared:
        return "", rivals
    return max(rivals, key=lambda arm: sum(values[arm][seed] for seed in shared)), rivals


def outcome(interval: Interval) -> str:
    """Return "gain", "loss", "no difference shown", or "one seed" when there is no interval."""
    if interval.low is None or interval.high is None:
        return "one seed"
    if interval.low > 0:
        return "gain"
    return "loss" if interval.high < 0 else "no difference shown"


def percent(values: BySeed) -> str:
    """Return accuracies as "41.2 ± 0.3" (percent; no spread for one seed)."""
    if not values:
        return "–"
    mean, sd = mean_sd(values)
    return f"{100 * mean:.1f} ± {100 * sd:.1f}" if len(values) > 1 else f"{100 * mean:.1f}"


def difference(interval: Interval | None) -> str:
    """Return a difference in points as "+1.1 [-0.4, +2.6]"."""
    if interval is None:
        return ""
    text = f"{100 * interval.mean:+.1f}"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def mark(summary: Summary, measure: str) -> str:
    """Return the measure's name, marked when it is uninformative."""
    return f"{measure} (uninformative)" if measure in summary.uninformative else measure


def _number(values: BySeed) -> str:
    if not values:
        return "–"
    value = mean_sd(values)[0]
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"
