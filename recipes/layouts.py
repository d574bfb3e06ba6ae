"""How the study's tables are laid out: measures, and functions from blocks of runs to tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from study import Block, Measure, Row, accuracy, number

from sparsejepa.study.verdict import LEVEL, Interval, choose, compare, outcome

SPARSE = "density=0.25"  # the sparse arm of every pair, fixed before any run
PENALISED = "lam=0.*|density=0.*"

CIFAR100 = accuracy("CIFAR-100", "cifar100", "fine_label")
CIFAR10 = accuracy("CIFAR-10", "cifar10")
FAR = (accuracy("SVHN", "svhn"), accuracy("GTSRB (43 traffic signs)", "gtsrb32"))
GROUPS = number("groups per latent", "groups_per_latent", digits=1)
DEAD = number("dead groups", "dead_groups", digits=1)
CORRELATION = number(
    "total correlation (nats)", "measures.information.total_correlation",
    "measures.information.untrained_total_correlation", 1,
)  # fmt: skip
DCI = number(
    "DCI disentanglement", "measures.factors.dci_disentanglement",
    "measures.factors.untrained_dci_disentanglement", 3,
)  # fmt: skip
GROUP_DCI = number("DCI, groups as units", "measures.factors.groups_dci_disentanglement", digits=3)
SHARES = (
    accuracy("linear probe, all labels", "cifar100", "fine_label"),
    accuracy("linear probe, 10 % of the labels", "cifar100", "fine_label", "logistic:10%"),
    accuracy("linear probe, 1 % of the labels", "cifar100", "fine_label", "logistic:1%"),
    accuracy("fine-tuning", "cifar100", "fine_label", "finetune"),
)
TASKS = (
    (CIFAR100, (40.01, 45.4)),
    (accuracy("Places205", "places205"), (21.24, 23.36)),
    (accuracy("Places365 for Places205", "places365"), (21.24, 23.36)),
    (accuracy("MiniPlaces, 100 scenes at 32x32, for Places205", "miniplaces32"), (21.24, 23.36)),
    (accuracy("CLEVR/Count, generated scenes", "scenes", "count"), (59.13, 62.33)),
    (accuracy("CLEVR/Count, 267 genuine images", "clevr267", "count"), (59.13, 62.33)),
    (accuracy("iNaturalist 2018", "inaturalist2018"), (16.52, 19.63)),
    (CIFAR10, None),
    *((measure, None) for measure in FAR),
)
"""Table I of the paper: our measure, and JEPA and SparseJEPA there (top-1 in percent, one run)."""
ALWAYS = {"CIFAR-100", "iNaturalist 2018"}


@dataclass(frozen=True)
class Report:
    """A table as text, what stands above it and the lines below it."""

    above: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Sequence[str] = ()


@dataclass(frozen=True)
class Spec:
    """A table of the study. Its runs are those that the queue marks with its number.

    `labels` says in words what an arm (a pattern of `study.matches`) is and gives the order.
    `paired` columns, the first ones, get a difference to each of `controls`; the control "" is the
    same arm without its additions.
    """

    number: int
    title: str
    question: str
    build: Callable[[Spec, Sequence[Block]], list[Report]]
    columns: Sequence[Measure] = ()
    controls: Sequence[str] = ("lam=0",)
    paired: int = 1
    labels: Sequence[tuple[str, str]] = ()
    alarms: bool = False
    notes: Sequence[Callable[[Block], str]] = ()
    """What is said under each of its tables."""
    below: str = ""
    """What is said once, under all of them."""


def queued(block: Block) -> Report:
    """Return what is planned of a block that has no run yet."""
    arms = [f"`{arm}` ({block.done(arm)})" for arm in block.planned]
    return Report(scale(block), (), (), [f"Queued: {', '.join(arms)}."])


def by_arm(spec: Spec, blocks: Sequence[Block]) -> list[Report]:
    """One table per block, an arm a line, floors last."""
    return [_by_arm(spec, block) for block in blocks]


def _by_arm(spec: Spec, block: Block) -> Report:
    asked = [m for m in spec.columns if m.asked(block.about)]
    paired = [m for m in spec.columns[: spec.paired] if m in asked]
    names = [f"minus {c}" if c else "minus the plain arm" for c in spec.controls]
    header = ["arm"]
    for measure in asked:
        header += [measure.title, *(names if measure in paired else ())]
    header += ["alarms"] * spec.alarms + ["seeds"]
    rows = []
    for label, arm in ordered(spec, block):
        line = [f"{label} (`{arm}`)" if label else f"`{arm}`"]
        for measure in asked:
            line.append(block.cell(arm, measure))
            if measure in paired:
                line += [block.versus(arm, c or arm.split("+")[0], measure) for c in spec.controls]
        rows.append([*line, *[alarms(block, arm)] * spec.alarms, block.done(arm)])
    for which, name in (("untrained", "untrained encoder"), ("pixels", "raw pixels")):
        line = [f"*{name}*"]
        for measure in asked:
            floor = block.floor(measure, which)
            line += [floor_text(measure, floor, which), *[""] * len(names) * (measure in paired)]
        if any(line[1:]):
            rows.append(line + [""] * (len(header) - len(line)))
    left = [m.title for m in spec.columns if m not in asked]
    below = [f"Not run at this scale: {', '.join(left)}."] * bool(left)
    return Report(
        scale(block), header, rows, [*below, *(note(block) for note in spec.notes), block.apart]
    )


def by_measure(spec: Spec, blocks: Sequence[Block]) -> list[Report]:
    """One table per block, a task a line; for table 1 with the paper's numbers beside ours."""
    return [_by_measure(spec, block) for block in blocks]


def _by_measure(spec: Spec, block: Block) -> Report:
    paper = dict(TASKS) if spec.number == 1 else {}
    arms = [arm for _, arm in ordered(spec, block)]
    sparse = [arm for arm in arms if arm not in ("dense", "lam=0")]
    controls = ("lam=0", "dense") if len(sparse) == 1 else ("lam=0",)
    pairs = [(arm, c) for arm in sparse for c in controls if block.rows]
    header = ["task", *["paper: JEPA", "paper: SparseJEPA"][: len(paper)], *arms]
    header += [f"{arm} minus {control}" for arm, control in pairs]
    floored = ["untrained", "pixels"] if block.rows else []
    header += [f"*{name}*" for name in floored]
    rows = []
    for measure in spec.columns:
        named = paper and measure.title in ALWAYS and block.config.data == "cifar100"
        if not (measure.asked(block.about) or named):
            continue
        numbers = paper.get(measure)
        line = [f"{x:.2f}" for x in numbers] if numbers else ["", ""][: len(paper)]
        line += [block.cell(arm, measure) for arm in arms]
        line += [block.versus(arm, control, measure) for arm, control in pairs]
        line += [floor_text(measure, block.floor(measure, w), w) for w in floored]
        rows.append([measure.title + labelled(block, measure) * (spec.number == 8), *line])
    seeds = ["*seeds*", *["", ""][: len(paper)], *(block.done(arm) for arm in arms)]
    rows.append(seeds + [""] * (len(header) - len(seeds)))
    return Report(scale(block), header, rows, [best(block), block.apart])


def labelled(block: Block, measure: Measure) -> str:
    """Return how many labelled images a probe learned from, as " (100 images, one a class)"."""
    found = {
        (count, classes)
        for row in block.all_rows
        if (count := measure.read(row, "n_train")) and (classes := measure.read(row, "n_classes"))
    }
    if not found:
        return ""
    count, classes = max(found)
    each = "one" if count == classes else f"{count / classes:.3g}"
    return f" ({count:,} images, {each} a class)"


def by_size(spec: Spec, blocks: Sequence[Block]) -> list[Report]:
    """A recipe a line: does the gain of the sparse arm change with encoder and length?"""
    header = ["recipe", "encoder", "steps", "dense", "lam=0", SPARSE]
    header += [f"{SPARSE} minus lam=0", f"{SPARSE} minus dense", "*untrained*", "*pixels*"]
    reports = []
    for gpu in (False, True):
        rows, above, below = [], [], []
        for block in (b for b in blocks if b.gpu == gpu):
            config = block.config
            steps = {row["steps"] for row in block.all_rows if row.get("steps")}
            length = " or ".join(f"{n:,}" for n in sorted(steps)) or f"{config.optim.epochs} epochs"
            line = [f"`{block.recipe}`", encoder(block), length]
            line += [
                f"{block.cell(arm, CIFAR100)} ({block.done(arm)})" if arm in block.planned else ""
                for arm in ("dense", "lam=0", SPARSE)
            ]
            line += [block.versus(SPARSE, control, CIFAR100) for control in ("lam=0", "dense")]
            floors = [(block.floor(CIFAR100, w), w) for w in ("untrained", "pixels")]
            rows.append([*line, *(floor_text(CIFAR100, f, w) for f, w in floors)])
            above.append(scale(block))
            below += [f"`{block.recipe}`: {block.apart}"] * bool(block.apart)
        reports += [Report("\n\n".join(above), header, rows, below)] * bool(rows)
    return reports


def near_far(spec: Spec, blocks: Sequence[Block]) -> list[Report]:
    """(sparse - control on the near set) - (sparse - control on the far set), paired by seed."""
    reports = []
    for block in blocks:
        far = next((m for m in FAR if m.asked(block.about)), FAR[0])
        header = ["pair", f"near: {CIFAR10.title}", f"far: {far.title}", "near minus far", "seeds"]
        rows = [
            [f"{SPARSE} minus {c}", block.versus(SPARSE, c, CIFAR10) or block.cell(c, CIFAR10),
             block.versus(SPARSE, c, far) or block.cell(c, far),
             "" if (gap := interaction(block, SPARSE, c, CIFAR10, far)) is None
             else CIFAR10.difference(gap), block.done(SPARSE)]
            for c in ("lam=0", "dense")
        ]  # fmt: skip
        for arm in ("dense", "lam=0", SPARSE):
            line = [block.cell(arm, m) for m in (CIFAR10, far)]
            rows.append([f"*{arm}, accuracy*", *line, "", block.done(arm)])
        for which in ("untrained", "pixels"):
            line = [floor_text(m, block.floor(m, which), which) for m in (CIFAR10, far)]
            rows.append([f"*{which}*", *line, "", ""])
        reports.append(Report(scale(block), header, rows, [block.apart]))
    return reports


def interaction(
    block: Block, arm: str, control: str, near: Measure, far: Measure
) -> Interval | None:
    """Return the interval of (arm - control) on `near` less the same on `far`, paired by seed."""
    gains = []
    for measure in (near, far):
        a, b = block.values(arm, measure), block.values(control, measure)
        gains.append({seed: a[seed] - b[seed] for seed in a if seed in b})
    return compare(*gains)


def curve(block: Block, arm: str) -> dict[int, dict[str, dict[int, float]]]:
    """Return {kept groups (latents for an arm without groups): {name: by seed}}, falling."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    for seed, row in block.rows.get(arm, {}).items():
        kept = (row.get("measures") or {}).get("kept") or {}
        for point in kept.get("curve", ()):
            level = point.get("groups") or point["latents"]
            for name, value in point.items():
                if value is not None:
                    found.setdefault(level, {}).setdefault(name, {})[seed] = value
    return dict(sorted(found.items(), reverse=True))


KEPT = {
    "accuracy": Measure("kept", lambda *_: None, factor=100),
    "random_latents": Measure("as many random latents", lambda *_: None, factor=100),
    "pca": Measure("as many principal components", lambda *_: None, factor=100),
    "latents": Measure("latents", lambda *_: None),
    "feature_bytes": Measure("bytes per image", lambda *_: None, digits=0),
    "map_flops": Measure("FLOPs of the map", lambda *_: None, digits=0),
}


def efficiency(spec: Spec, blocks: Sequence[Block]) -> list[Report]:
    """Accuracy against kept groups and latents, bytes and operations of the kept part."""
    header = ["arm", "groups kept", *(m.title for m in KEPT.values()), "kept minus random", "seeds"]
    reports = []
    for block in blocks:
        rows = []
        for arm in block.planned:
            points = curve(block, arm)
            for level, point in points.items():
                line = [f"`{arm}`", f"{level}" if point.get("groups") else "–"]
                line += [m.text(point[n]) if n in point else "–" for n, m in KEPT.items()]
                gap = compare(point["accuracy"], point.get("random_latents", {}))
                line.append(KEPT["accuracy"].difference(gap) if gap else "")
                rows.append([*line, f"{len(point['accuracy'])} / {len(block.planned[arm])}"])
            if not points:
                empty = [""] * (len(header) - 4)
                rows.append([f"`{arm}`", "", "queued", *empty, f"0 / {len(block.planned[arm])}"])
        for which in ("untrained", "pixels"):
            floor = floor_text(CIFAR100, block.floor(CIFAR100, which), which)
            rows += [[f"*{which}, all*", "", floor, *[""] * (len(header) - 3)]] * bool(floor)
        reports.append(Report(scale(block), header, rows, [block.apart]))
    return reports


def ordered(spec: Spec, block: Block) -> list[tuple[str, str]]:
    """Return (label, arm) of a block in the order of the labels, then as planned."""
    found = {
        arm: label
        for label, pattern in spec.labels
        for arm in sorted(block.matching(pattern), key=_strength)
    }
    return [(label, arm) for arm, label in found.items()] + [
        ("", arm) for arm in block.planned if arm not in found
    ]


def _strength(arm: str) -> float:
    """Rising lambda, falling density; the order of the plan where neither differs."""
    name, _, value = arm.split("+")[0].partition("=")
    return {"lam": 1, "density": -1}.get(name, 0) * float(value or 0)


def floor_text(measure: Measure, floor: dict[int, float], which: str) -> str:
    """Return a floor as text; the raw pixels do not depend on the seed."""
    return (
        measure.text(floor if which == "untrained" else dict([*floor.items()][:1])) if floor else ""
    )


def alarms(block: Block, arm: str) -> str:
    """Return how many runs of an arm failed or raised which alarm."""
    found: dict[str, int] = {}
    for row in block.rows.get(arm, {}).values():
        failed = ["failed"] if row.get("failed") else []
        for alarm in [*failed, *(text.split(":")[0] for text in row.get("alarms") or ())]:
            found[alarm] = found.get(alarm, 0) + 1
    return ", ".join(f"{name}: {count}" for name, count in found.items())


def pick(block: Block) -> tuple[str, int]:
    """Return the penalised arm that `choose` takes and among how many; "" if none."""
    found = {arm: block.values(arm, CIFAR100) for arm in block.matching(PENALISED)}
    found = {arm: values for arm, values in found.items() if values}
    arm, rivals = choose(found) if found else ("", [])
    return arm, len(rivals)


def best(block: Block) -> str:
    """Say what the best penalised arm gains, its intervals widened for k arms x 2 controls."""
    arm, count = pick(block)
    if not arm or len(block.values(arm, CIFAR100)) < 2:
        return ""
    parts = []
    for control in ("lam=0", "dense"):
        interval = block.difference(arm, control, CIFAR100, 1 - (1 - LEVEL) / (2 * count))
        if interval is not None:
            parts.append(f"{CIFAR100.difference(interval)} against {control}: {outcome(interval)}")
    chosen = f"The best of {count} penalised arms is `{arm}`" if count > 1 else f"`{arm}`"
    widened = f"intervals widened for {2 * count} comparisons"
    return f"{chosen}, CIFAR-100, {widened}: {'; '.join(parts)}."


def collapse(block: Block) -> str:
    """Say which penalised arms lie clearly below lam=0, all intervals widened for their number."""
    arms = [arm for arm in block.matching(PENALISED) if block.difference(arm, "lam=0", CIFAR100)]
    level = 1 - (1 - LEVEL) / max(1, len(arms))
    found = [(arm, block.difference(arm, "lam=0", CIFAR100, level)) for arm in arms]
    if not any(interval and interval.n > 1 for _, interval in found):
        return ""
    low = [arm for arm, interval in found if interval and outcome(interval) == "loss"]
    if not low:
        return f"Of {len(arms)} penalised arms none lies clearly below lam=0: no collapse shown."
    return f"Clearly below lam=0: {', '.join(f'`{arm}`' for arm in low)} (of {len(arms)})."


def scale(block: Block) -> str:
    """Return recipe, images, encoder, length, hardware and work of a block."""
    config = block.config
    images = f"{config.images.limit:,}" if config.images.limit else "all"
    head = f"**{'GPU' if block.gpu else 'CPU'} scale**, `{block.recipe}`: {images} training images "
    head += f"of {config.data}, {encoder(block)}, "
    planned = sum(map(len, block.planned.values()))
    rows = block.all_rows
    steps = sorted({row["steps"] for row in rows if row.get("steps")})
    if not steps:
        length = (
            f"{config.optim.steps:,} steps"
            if config.optim.steps
            else f"{config.optim.epochs} epochs"
        )
        hours = block.minutes / 60
        return f"{head}{length}. {planned} runs queued, about {hours:.1f} h on {block.hardware}."
    seconds = sum(row.get("seconds", 0) + row.get("probe_seconds", 0) for row in rows)
    machines = sorted({_machine(row) for row in rows})
    head += f"{' or '.join(f'{n:,}' for n in steps)} steps of {config.optim.batch_size} images. "
    head += f"{len(rows)} of {planned} runs done, {seconds / 3600:.1f} h of work (training and "
    commits = sorted({row["environment"].get("commit") or "unknown" for row in rows})
    head += f"probes, summed over runs) on {'; '.join(machines)}, commit "
    return f"{head}{', '.join(commits)}."


def _machine(row: Row) -> str:
    about = row["environment"]
    return ", ".join(about.get("gpus") or ()) or f"{about['cores']} cores of {about['cpu']}"


def encoder(block: Block) -> str:
    """Return a recipe's encoder as "ViT-Nano/8"."""
    model = block.config.model
    return f"ViT-{model.encoder.capitalize()}/{model.patch_size}"


def render(reports: Sequence[Report]) -> str:
    """Return tables as Markdown; numbers stay with their spread when a cell is broken."""
    parts = []
    for report in reports:
        lines = [list(report.header), ["---"] * len(report.header), *map(list, report.rows)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines if line)
        table = re.sub(r" (?=±)|(?<=±) |(?<=\d,) (?=[+-])", "\N{NO-BREAK SPACE}", table)
        parts += [report.above, table, *report.below]
    return "\n\n".join(part for part in parts if part)
