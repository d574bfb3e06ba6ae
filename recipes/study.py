"""The study: its recipes and queue, the rows of results/, and which of them may be averaged.

Rows are averaged and paired only within a batch: rows of one recipe, made on the same kind of
device, with one torch version (major.minor), and with the same settings but for those that arm and
seed set. Rows of other train or eval versions than the present ones are counted and not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsejepa.config import Config, load_toml, preset
from sparsejepa.errors import UserError, nearest
from sparsejepa.study.results import Probes, hash_of, is_current, read_rows
from sparsejepa.study.sweep import arm_settings
from sparsejepa.study.verdict import BySeed, Interval, compare, mean_sd

Row = Mapping[str, Any]

_ABOUT = {"about", "command", "hardware", "minutes", "expected", "settings"}
_PROBES = {"probe": "data", "probe_limit": "limit"}  # others have the names that Probes gives them


def read_recipe(folder: Path, name: str) -> tuple[Config, Probes]:
    """Return a recipe's settings and probes. Raises UserError naming what is not known."""
    names = sorted(path.stem for path in recipe_files(folder))
    if name not in names:
        raise UserError(f"unknown recipe '{name}'{nearest(name, names)}; there are {names}")
    path = folder / f"{name}.toml"
    recipe = load_toml(path)
    known = {*_PROBES, *Probes.__dataclass_fields__} - {*_PROBES.values()}
    check_entries(str(path), recipe, {"settings"}, _ABOUT | known)
    config, probed = recipe_config(recipe), dict[str, Any]()
    for key in known & set(recipe):
        value = recipe[key]
        probed[_PROBES.get(key, key)] = tuple(value) if isinstance(value, list) else value
    probed["targets"] = {data: tuple(names) for data, names in recipe.get("targets", {}).items()}
    return config, Probes(**{"data": (config.data,), **probed})


def recipe_files(folder: Path) -> list[Path]:
    """Return the recipes of a folder: not the queue, the claims or a search."""
    others = ("queue", "claims", "search-")
    return [p for p in folder.glob("*.toml") if not p.stem.startswith(others)]


def recipe_config(recipe: Row) -> Config:
    """Return the settings of a recipe's TOML file."""
    settings = dict(recipe["settings"])
    return preset(settings.pop("preset", "best")).replace(**settings)


def check_entries(where: str, values: Any, needed: set[str], free: Iterable[str] = ()) -> None:
    """Raise UserError unless `values` is a table with the entries that are expected."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a table")
    known = needed | {*free}
    for name in values:
        if name not in known:
            raise UserError(f"{where}: unknown entry '{name}'{nearest(name, known)}")
    if missing := sorted(needed - set(values)):
        raise UserError(f"{where}: '{missing[0]}' is missing")


# --- measures


@dataclass(frozen=True)
class Measure:
    """A number that a run may have, and its floors.

    `read` takes a row and which number is wanted (value, untrained or pixels) and returns None
    where it is not there. Shown times `factor`: accuracies, which are shares in the rows, are shown
    in percent, and their differences in points.
    """

    title: str
    read: Callable[[Row, str], float | None]
    factor: float = 1
    digits: int = 1
    of_failed: bool = False
    """Whether runs that failed have it as well."""

    def text(self, values: BySeed) -> str:
        """Return mean ± sample standard deviation, no spread for one seed, "" for none."""
        if not values:
            return ""
        mean, sd = (self.factor * x for x in mean_sd(values))
        text = f"{mean:,.{self.digits}f}"
        return f"{text} ± {sd:,.{self.digits}f}" if len(values) > 1 else text

    def difference(self, interval: Interval) -> str:
        """Return a mean difference with its 95 % t interval in brackets, each with its sign."""
        found = (x for x in (interval.mean, interval.low, interval.high) if x is not None)
        # What rounds to nothing is +0.
        shown = [f"{round(self.factor * x, self.digits) + 0.0:+,.{self.digits}f}" for x in found]
        return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else shown[0]


def accuracy(title: str, data: str, target: str = "", protocol: str = "logistic") -> Measure:
    """Return the accuracy of a probe on a data set; any target will do if none is given."""

    def read(row: Row, which: str) -> float | None:
        for probe in row.get("probes") or ():
            found = Path(probe["data"]).name, probe["protocol"]
            if found == (data, protocol) and target in ("", probe["target"]):
                return probe["accuracy" if which == "value" else which]
        return None

    return Measure(title, read, factor=100)


def number(title: str, path: str, digits: int = 1) -> Measure:
    """Return the number at a dotted path of a row; "untrained_" before its name is its floor."""
    head, _, name = path.rpartition(".")
    paths = {"value": path, "untrained": f"{head}.untrained_{name}"}

    def read(row: Row, which: str) -> float | None:
        value: Any = row
        for key in paths.get(which, "").split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return Measure(title, read, digits=digits)


def minus(title: str, a: Measure, b: Measure) -> Measure:
    """Return the difference of two accuracies of the same run."""

    def read(row: Row, which: str) -> float | None:
        one, other = a.read(row, which), b.read(row, which)
        return None if one is None or other is None else one - other

    return Measure(title, read, factor=100)


def kept(title: str, name: str, share: float) -> Measure:
    """Return the accuracy that is left with a share of the groups, or of what stands for them."""

    def read(row: Row, which: str) -> float | None:
        points = ((row.get("measures") or {}).get("kept") or {}).get("curve") or ()
        levels = {point.get("groups") or point["latents"]: point for point in points}
        if not levels or which != "value":
            return None
        near = min(levels, key=lambda level: abs(level - share * max(levels)))
        return levels[near].get(name)

    return Measure(title, read, factor=100)


def _went_wrong(row: Row, which: str) -> float | None:
    """Return 1 for a run that failed or raised the alarm of instability or collapse, else 0."""
    told = {text.split(":")[0] for text in row.get("alarms") or ()} & {"unstable", "collapse"}
    return float(bool(told or row.get("failed"))) if which == "value" else None


SPARSE = "density=0.25"  # the sparse arm of every pair, fixed before any run

CIFAR100 = accuracy("CIFAR-100", "cifar100", "fine_label")
CIFAR10 = accuracy("CIFAR-10", "cifar10")
FAR = accuracy("GTSRB (43 traffic signs)", "gtsrb32")
NEARER = minus("CIFAR-10 less GTSRB", CIFAR10, FAR)
GROUPS = number("groups per latent", "groups_per_latent")
DEAD = number("dead groups", "dead_groups")
CORRELATION = number("total correlation (nats)", "measures.information.total_correlation")
DCI = number("DCI disentanglement", "measures.factors.dci_disentanglement", 3)
WRONG = Measure("went wrong", _went_wrong, of_failed=True)
SHARES = (
    accuracy("linear probe, all labels", "cifar100", "fine_label"),
    accuracy("linear probe, 10 % of the labels", "cifar100", "fine_label", "logistic:10%"),
    accuracy("linear probe, 1 % of the labels", "cifar100", "fine_label", "logistic:1%"),
)
ALL, HALF = kept("all groups", "accuracy", 1), kept("half of the groups", "accuracy", 0.5)
RANDOM = kept("as many random latents", "random_latents", 0.5)
KEPT = (
    ALL, HALF, RANDOM, kept("as many principal components", "pca", 0.5),
    minus("half less all groups", HALF, ALL), minus("half less random latents", HALF, RANDOM),
)  # fmt: skip
TASKS = {
    CIFAR100: (40.01, 45.4),
    accuracy("MiniPlaces, for Places205", "miniplaces32"): (21.24, 23.36),
    accuracy("CLEVR/Count, generated scenes", "scenes", "count"): (59.13, 62.33),
    accuracy("CLEVR/Count, 267 genuine images", "clevr267", "count"): (59.13, 62.33),
    accuracy("iNaturalist 2018", "inaturalist2018"): (16.52, 19.63),
    CIFAR10: (),
    FAR: (),
}
"""Table I of the paper: our measure, and JEPA and SparseJEPA there (top-1 in percent, one run)."""
MEASURES = {m.title: m for m in (*TASKS, *KEPT, NEARER, GROUPS, DEAD, CORRELATION, DCI, WRONG)}


# --- what was planned and found


@dataclass(frozen=True)
class Block:
    """The runs of one recipe for one table: what is planned, and one batch of what was found."""

    recipe: str
    about: Row
    """The recipe's TOML file."""
    hardware: str
    planned: Mapping[str, frozenset[int]]
    """Seeds by arm."""
    rows: Mapping[str, Mapping[int, Row]]
    """By arm and seed, failed runs among them."""
    apart: str = ""
    """What else was found and why it is not averaged with these rows; empty if nothing."""

    @cached_property
    def config(self) -> Config:
        """The recipe's settings."""
        return recipe_config(self.about)

    @property
    def gpu(self) -> bool:
        """Whether it is planned for a GPU: the full scale."""
        return "GPU" in self.hardware

    @cached_property
    def all_rows(self) -> list[Row]:
        """Every row, arm by arm."""
        return [row for rows in self.rows.values() for row in rows.values()]

    def values(self, arm: str, measure: Measure, which: str = "value") -> dict[int, float]:
        """Return a measure of an arm by seed, of the runs that did not fail."""
        found = {
            seed: measure.read(row, which)
            for seed, row in self.rows.get(arm, {}).items()
            if measure.of_failed or not row.get("failed")
        }
        return {seed: value for seed, value in sorted(found.items()) if value is not None}

    def floor(self, measure: Measure, which: str) -> dict[int, float]:
        """Return the untrained or the raw-pixel floor by seed, which all arms share.

        Raw pixels do not depend on the seed: only one value is returned.
        """
        found: dict[int, float] = {}
        for arm in self.planned:
            found = {**self.values(arm, measure, which), **found}
        return found if which == "untrained" else dict([*found.items()][:1])

    def difference(self, arm: str, control: str, measure: Measure) -> Interval | None:
        """Return the interval of arm - control, paired by seed; None without a pair."""
        return compare(self.values(arm, measure), self.values(control, measure))

    def done(self, arm: str) -> str:
        """Return "seeds done / planned", and how many failed."""
        rows = self.rows.get(arm, {}).values()
        failed = sum(bool(row.get("failed")) for row in rows)
        text = f"{len(rows) - failed} / {len(self.planned[arm])}"
        return f"{text}, {failed} failed" if failed else text

    def cell(self, arm: str, measure: Measure) -> str:
        """Return mean ± sd, or in a word why there is none."""
        values, rows = self.values(arm, measure), self.rows.get(arm, {})
        if values:
            return measure.text(values)
        if not rows:
            return "queued"
        return "failed" if all(row.get("failed") for row in rows.values()) else "–"

    def versus(self, arm: str, control: str, measure: Measure) -> str:
        """Return arm - control with its interval; empty for the control and without a pair."""
        twin = self.twin(arm, control)
        interval = self.difference(arm, twin, measure) if twin else None
        if interval is None:
            return ""
        return measure.difference(interval) + f" vs {twin}" * (twin != control)

    def twin(self, arm: str, control: str) -> str:
        """Return the arm that differs in the first part only, or plain `control`; "" if neither.

        So density=0.25+beta=0 is compared with lam=0+beta=0, and dense+beta=0 with dense.
        """
        more = arm.partition("+")[2]
        names = [f"{control}+{more}", control] if more else [control]
        return next((n for n in names if n in self.planned and n != arm), "")


@dataclass(frozen=True)
class Study:
    """All that the tables are made of. `root` is the checkout that it was read from."""

    root: Path
    queue: Sequence[Row]
    recipes: Mapping[str, Row]
    rows: Sequence[Row]
    trials: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    """Rows of a search, by file."""
    explain: Sequence[Row] = ()
    others: Sequence[Row] = ()
    """Lines of other versions, which are in none of the above."""

    @property
    def left_out(self) -> str:
        """Say how many lines are of other versions; empty if none is."""
        text = (
            f"{len(self.others)} lines of `results/` are of other versions; no table counts them."
        )
        return text * bool(self.others)

    def blocks(self, table: int) -> list[Block]:
        """Return the blocks of a table: the CPU's first, CIFAR-100 first, then as queued."""
        return self._tables.get(table, [])

    @cached_property
    def _tables(self) -> dict[int, list[Block]]:
        runs: dict[int, dict[str, list[Row]]] = {}
        for run in self.queue:
            for table in run.get("tables", ()):
                runs.setdefault(table, {}).setdefault(run["recipe"], []).append(run)
        return {
            table: sorted(
                (self._block(recipe, entries) for recipe, entries in found.items()),
                key=lambda b: (b.gpu, b.config.data != "cifar100"),
            )
            for table, found in runs.items()
        }

    def _block(self, recipe: str, entries: Sequence[Row]) -> Block:
        """Return a block of these entries, and of the plain twins (dense of dense+beta=0)."""
        named = {arm for run in entries for arm in run["arms"]}
        plain = {arm.split("+")[0] for arm in named}
        planned: dict[str, set[int]] = {}
        for run in (run for run in self.queue if run["recipe"] == recipe):
            for arm in run["arms"]:
                if run in entries or arm in plain - named:
                    planned.setdefault(arm, set()).update(run["seeds"])
        about = self.recipes[recipe]
        mine = [
            row
            for row in self.rows
            if row["recipe"] == recipe and row["seed"] in planned.get(row["arm"], ())
        ]
        rows, apart = one_batch(mine, about)
        seeds = {arm: frozenset(found) for arm, found in planned.items()}
        return Block(recipe, about, entries[0]["hardware"], seeds, rows, apart)


def one_batch(rows: Iterable[Row], recipe: Row) -> tuple[dict[str, dict[int, Row]], str]:
    """Return one batch by arm and seed, and what was kept apart in words.

    The batch is the one that covers most (arm, seed) pairs, of equals the newest; of two rows of
    one pair the newer counts.
    """
    batches: dict[tuple[str, str], dict[tuple[str, int], Row]] = {}
    for row in sorted(rows, key=lambda row: row.get("finished", "")):
        # A batch moves to the end with each row: of equals the last one is the newest.
        found = batches.pop(key := _batch(row, recipe), {})
        batches[key] = {**found, (row["arm"], row["seed"]): row}
    if not batches:
        return {}, ""
    best = max(reversed(batches), key=lambda key: len(batches[key]))
    chosen: dict[str, dict[int, Row]] = {}
    for (arm, seed), row in sorted(batches[best].items()):
        chosen.setdefault(arm, {})[seed] = row
    parts = []
    for key, found in batches.items():
        if key != best:
            reason = f"on {key[0]}" if key[0] != best[0] else "with other settings"
            parts.append(f"{len(found)} run{'s'[: len(found) > 1]} {reason}")
    return chosen, f"Kept apart, never averaged with these: {'; '.join(parts)}." if parts else ""


def _batch(row: Row, recipe: Row) -> tuple[str, str]:
    """Return what a row must share with others: device with torch's major.minor, and settings."""
    about = row["environment"]
    asked = row["settings"].get("run", {}).get("device", "auto")
    kind = "cuda" if about.get("gpus") and asked != "cpu" else "cpu"
    torch = ".".join(about.get("torch", "?").partition("+")[0].split(".")[:2])
    device = f"{kind} with torch {torch}"
    try:
        base = recipe_config(recipe).flat()
        own = {name: base[name] for name in arm_settings(row["arm"])}
        config = Config.from_dict(row["settings"], "results").replace(**own, seed=0)
    except UserError:  # a setting that is no more
        return device, row["key"]
    limit = (row.get("probed") or {}).get("limit")
    return device, hash_of(config, {"limit": limit})


def read_study(root: Path) -> Study:
    """Read queue, recipes and results. Raises UserError naming a missing or damaged file."""
    recipes = {path.stem: load_toml(path) for path in sorted(recipe_files(root / "recipes"))}
    queue = load_toml(root / "recipes" / "queue.toml").get("run", [])
    for run in queue:
        if run.get("recipe") not in recipes:
            raise UserError(f"recipes/queue.toml: unknown recipe '{run.get('recipe')}'")
    others: list[Row] = []

    def current(found: Sequence[Row]) -> list[Row]:
        others.extend(row for row in found if not is_current(row))
        return [row for row in found if is_current(row)]

    rows: list[Row] = []
    trials: dict[str, Sequence[Row]] = {}
    for path in sorted((root / "results").glob("*.jsonl")):
        found = [
            row
            for row in read_rows(path, strict=True)
            if {"arm", "seed", "environment"} <= set(row)
        ]
        if path.stem.startswith("search"):
            trials |= {path.name: kept} if (kept := current(found)) else {}
        else:
            rows += [{**row, "recipe": row.get("recipe") or path.stem} for row in current(found)]
    explained = root / "results" / "explain.jsonl"
    explain = current(read_rows(explained, strict=True))
    return Study(root, queue, recipes, rows, trials, explain, others)
