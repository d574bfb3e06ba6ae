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
    "density": "density",
    "dead_groups": "dead groups",
}
"""Measures of structure in a row, and how tables and figures call them."""


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences with its t interval and, beside it, a bootstrap interval.

    low, high and bootstrap are None for a single pair: one difference has no spread.
    """

    mean: float
    low: float | None
    high: float | None
    bootstrap: tuple[float, float] | None
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


@dataclass(frozen=True)
class Verdict:
    """The outcome against each control, in words, and what a reader must know to weigh it."""

    arm: str | None
    measure: str | None
    outcomes: Mapping[str, str]
    text: str
    remarks: tuple[str, ...]


def paired_interval(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    level: float = LEVEL,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean of a - b, paired by position, with its Student t interval.

    The bootstrap is the percentile interval of the mean of resampled differences; it is too narrow
    below about ten pairs, which is why the t interval is the one that decides.
    """
    difference = np.asarray(a, float) - np.asarray(b, float)
    n, mean = len(difference), float(difference.mean())
    if n < 2:
        return Interval(mean, None, None, None, n)
    from scipy.stats import t

    half = float(t.ppf(0.5 + level / 2, n - 1) * difference.std(ddof=1) / math.sqrt(n))
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
    tails = [50 * (1 - level), 50 * (1 + level)]
    low, high = np.percentile(difference[draws].mean(1), tails)
    return Interval(mean, mean - half, mean + half, (float(low), float(high)), n)


def compare(a: BySeed, b: BySeed, level: float = LEVEL) -> Interval | None:
    """Return the paired interval of a - b over the seeds that both have, None if there is none."""
    seeds = sorted(set(a) & set(b))
    if not seeds:
        return None
    return paired_interval([a[s] for s in seeds], [b[s] for s in seeds], level=level)


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
    accuracy: dict[str, dict[str, dict[int, float]]] = {}
    structure: dict[str, dict[str, dict[int, float]]] = {}
    levels: dict[str, tuple[float | None, float | None]] = {}
    untrained: dict[str, dict[int, float]] = {}
    pixels: dict[str, float] = {}
    images: dict[str, int] = {}
    for row in rows:
        arm, seed = row["arm"], row["seed"]
        groups = row["settings"]["groups"]
        dense, density = groups["groups"] == "none", groups.get("density")
        levels[arm] = (
            None if dense or density is not None else groups["lam"],
            None if dense else density,
        )
        for probe in row["probes"]:
            name = measure_name(probe)
            accuracy.setdefault(arm, {}).setdefault(name, {})[seed] = probe["accuracy"]
            images[name] = probe["n_test"]
            if probe.get("untrained") is not None:
                untrained.setdefault(name, {})[seed] = probe["untrained"]
            if probe.get("pixels") is not None:
                pixels[name] = probe["pixels"]
        for name in STRUCTURE:
            if row.get(name) is not None:
                structure.setdefault(arm, {}).setdefault(name, {})[seed] = row[name]
    arms = tuple(
        Arm(name, *levels[name], accuracy.get(name, {}), structure.get(name, {}))
        for name in sorted(levels, key=lambda name: _order(levels[name]))
    )

    def above(arm: Arm, name: str, floor: BySeed) -> bool:
        return beats(arm.accuracy.get(name, {}), floor, images[name])

    controls = [arm for arm in arms if not arm.sparse]
    weak = [m for m in images if not all(above(a, m, untrained.get(m, {})) for a in controls)]
    low = [
        name
        for name, floor in pixels.items()
        if not any(above(a, name, dict.fromkeys(a.accuracy.get(name, {}), floor)) for a in arms)
    ]
    return Summary(arms, tuple(images), untrained, pixels, frozenset(weak), frozenset(low))


def table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Return header and cells (text) of the sweep's table, the floors as its last two rows.

    Differences to lam=0 have columns of their own if there are seeds enough for an interval.
    """
    control = summary.arm("lam=0")
    paired = any(len(values) > 1 for arm in summary.arms for values in arm.accuracy.values())
    shown = [key for key in STRUCTURE if key != "density"]

    def cells(name: str, values: dict[str, str], differences: dict[str, str]) -> list[str]:
        line = [name]
        for measure in summary.measures:
            line.append(values.get(measure, "–"))
            line += [differences.get(measure, "")] if paired else []
        return line

    header = cells(
        "arm",
        {measure: mark(summary, measure) for measure in summary.measures},
        dict.fromkeys(summary.measures, "minus lam=0"),
    )
    lines = []
    for arm in summary.arms:
        values = {measure: percent(found) for measure, found in arm.accuracy.items()}
        differences = {}
        if control is not None and arm is not control:
            for measure, found in arm.accuracy.items():
                interval = compare(found, control.accuracy.get(measure, {}))
                differences[measure] = difference(interval)
        line = cells(arm.name, values, differences)
        for key in shown:
            found = arm.structure.get(key, {})
            line.append(_number(mean_sd(found)[0]) if found else "–")
        lines.append(line)
    floors = {
        "untrained floor": {m: percent(found) for m, found in summary.untrained.items()},
        "raw-pixel floor": {m: percent({0: found}) for m, found in summary.pixels.items()},
    }
    lines += [cells(name, values, {}) + [""] * len(shown) for name, values in floors.items()]
    return header + [STRUCTURE[key] for key in shown], lines


def verdict(summary: Summary) -> Verdict:
    """Say what the best sparse arm did against lam=0 and against dense.

    The measure is the first one on which the controls beat their untrained floor. The arm is the
    one that `choose` takes, and because it was chosen among k its interval is widened to level
    1 - 0.05/k (Bonferroni).
    """
    remarks = _floor_remarks(summary)
    measure = next((m for m in summary.measures if m not in summary.uninformative), None)
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
    if not probed:
        return none(f"no arm with a penalty was probed on {measure}.")
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
    for control in (c for c in (summary.arm("lam=0"), summary.arm("dense")) if c is not None):
        values = control.accuracy.get(measure, {})
        interval = compare(best.accuracy[measure], values, 1 - (1 - LEVEL) / count)
        if interval is None:
            continue
        found = outcomes[control.name] = outcome(interval)
        detail = f"{percent(values)} %, {difference(interval)} points"
        said = f"{found} against" if interval.n > 1 else "against"
        clauses.append(f"{said} {control.name} ({detail})")
    subject = f"the best of {count} sparse arms, {best.name}," if count > 1 else best.name
    reached = percent(best.accuracy[measure])
    text = f"On {measure}, {subject} reaches {reached} %: {' and '.join(clauses)}."
    kept, groups = best.structure.get("density"), best.structure.get("groups_per_latent")
    if kept and groups:
        text += (
            f" It keeps {100 * mean_sd(kept)[0]:.0f} % of the connections between latents and "
            f"groups, {mean_sd(groups)[0]:.1f} groups per latent."
        )
    return outcomes, text


def choose(values: Mapping[str, BySeed]) -> tuple[str, list[str]]:
    """Return the arm with the highest mean and the arms that it was chosen among.

    Only arms with the most seeds compete, on the seeds that they share: a mean of fewer seeds wins
    by luck. The first is "" if they share none.

    Raises ValueError if there is no arm.
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


def _order(level: tuple[float | None, float | None]) -> tuple[int, float]:
    lam, density = level
    if lam is not None:
        return 1, lam
    return (2, density) if density is not None else (0, 0.0)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"
