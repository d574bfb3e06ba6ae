"""The verdict: two sentences that follow from the measures, and what a reader must know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsejepa.evaluation.stats import Estimate
from sparsejepa.explain.columns import ALL, DIRECTIONS, FLOORS, RANDOM, RUN
from sparsejepa.explain.groups import SILENCED
from sparsejepa.explain.subject import Subject
from sparsejepa.report.explain import MeasureRow


@dataclass(frozen=True)
class Verdict:
    """Two sentences, and remarks that limit them."""

    text: str
    remarks: tuple[str, ...]


def verdict(subject: Subject, rows: Sequence[MeasureRow], left_out: Sequence[str] = ()) -> Verdict:
    """Say what the groups are worth against their floors.

    The first sentence is about W: how sparse it is and whether its groups know the factors better
    than the best floor. The second is about images: whether patches of one object share a group, or
    where there are no masks, how well the groups predict and whether to silence one matters.
    """
    found = {(row.section, row.name): row.values for row in rows}
    named = {row.name: row.values for row in rows}
    nonzero = subject.norms > 0
    first = (
        f"W keeps {100 * nonzero.mean():.0f} % of the connections between latents and groups "
        f"({nonzero.sum(0).mean():.1f} of {len(nonzero)} groups per latent)"
    )
    section = "Disentanglement, groups as units"
    # MIG, as its interval is over images; DCI's is over the trees of one fit.
    values = found.get((section, "MIG"))
    if values and values[RUN].value is not None:
        first += f", and as units of code its groups {against_floors('have a MIG', values)}"
    else:
        first += "; without labels nothing is known of what the groups stand for"
    second = _second(subject, named)
    remarks = [*left_out]
    if subject.groups is None:
        remarks.append(
            "The groups were fitted to the frozen encoder by masked prediction; the encoder was "
            "not trained with them."
        )
        fitted = subject.fitted
        if fitted and not _above(fitted["learned"], fitted["random"]):
            remarks.append(
                "The learned pattern of zeros predicts hidden patches no better than random "
                "patterns like it: do not read meaning into which latent feeds which group."
            )
    elif not nonzero.all():
        remarks.append(
            "The encoder adapted to its pattern of zeros, whichever it is. Whether the learned one "
            "is worth more than a random one shows beside a run that was trained with --pattern "
            "random and the same density: give it as --control, or to `sparsejepa compare`."
        )
    if nonzero.all():
        remarks.append(
            "No connection is zero: every latent feeds every group, so the groups differ by their "
            "directions only, not by their latents."
        )
    dead = int((~nonzero.any(1)).sum())
    if dead:
        remarks.append(f"{dead} of {len(nonzero)} groups are dead: no latent feeds them.")
    remarks.append(
        "Intervals resample images (those of DCI's disentanglement and completeness the trees of "
        "its forest) and say nothing of other seeds. A difference between columns is called clear "
        "where the 95 % intervals do not meet."
    )
    return Verdict(f"{first}. {second}", tuple(remarks))


def _second(subject: Subject, named: Mapping[str, Mapping[str, Estimate]]) -> str:
    ari = named.get("FG-ARI", {}) if subject.kind != "region" else {}
    if not ari.get(RUN) or ari[RUN].value is None:
        ari = named.get("mBO", {}) if subject.kind != "region" else {}
    if ari.get(RUN) and ari[RUN].value is not None:
        measure = "FG-ARI" if ari is named.get("FG-ARI") else "mBO"
        text = against_floors(f"As segments of objects they reach an {measure}", ari)
    else:
        r2 = named.get("R² of hidden patches") or named.get("held-out R² of fitted groups") or {}
        run = r2.get(RUN)
        if run is not None and run.value is not None and run.value <= 0:
            text = "From the context they predict hidden patches no better than their place does"
        elif value := _percent(run):
            text = f"From the context they predict {value} % of the variance of hidden patches "
            text += "that their place does not tell"
            if chance := _percent(r2.get(RANDOM)):
                text += f", against {chance} % for random patterns"
        else:
            text = "There are no object masks and no prediction to judge the groups of patches by"
    silence = named.get(SILENCED, {})
    cost, chance = silence.get(RUN), silence.get(DIRECTIONS)
    if cost is not None and chance is not None and cost.value is not None:
        text += "; to silence one costs the probe "
        if _above(cost, chance):
            text += f"{_percent(cost, 1)} points on average, random directions of equal rank "
            text += _percent(chance, 1)
        else:
            text += "not clearly more than random directions of equal rank"
    return f"{text}."


def _percent(estimate: Estimate | None, digits: int = 0) -> str:
    if estimate is None or estimate.value is None:
        return ""
    return f"{100 * estimate.value:.{digits}f}"


def against_floors(what: str, values: Mapping[str, Estimate]) -> str:
    """Return "WHAT of 0.31, clearly above every floor (the best, PCA: 0.22)" and the like."""
    run = values[RUN]
    floors = {k: e for k, e in values.items() if k in FLOORS and k != ALL and e.value is not None}
    if not floors:
        return f"{what} of {_number(run.value)}"
    name = max(floors, key=lambda k: floors[k].value)  # type: ignore[arg-type, return-value]
    best = floors[name]
    if all(_above(run, floor) for floor in floors.values()):
        how = "clearly above every floor"
    elif _above(best, run):
        how = "clearly below the best floor"
    else:
        how = "not clearly apart from the best floor"
    return f"{what} of {_number(run.value)}, {how} ({name}: {_number(best.value)})"


def _number(value: float | None) -> str:
    """Two decimals, or two digits where that would hide a small value."""
    assert value is not None
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _above(a: Estimate, b: Estimate) -> bool:
    """Whether a lies above b by more than their intervals."""
    assert a.value is not None and b.value is not None
    return (a.low if a.low is not None else a.value) > (b.high if b.high is not None else b.value)
