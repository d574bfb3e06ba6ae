"""The study: what is planned, what was found, and what may be averaged together.

Rows are averaged and paired only within a batch: rows of one recipe, computed on the same kind of
device, with one torch version (major.minor), and with the same settings but for those that the arm
and the seed set. Rows of other train or eval versions than the current ones are counted, no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsejepa import version
from sparsejepa.config import Config, load_toml, preset
from sparsejepa.errors import UserError
from sparsejepa.results import is_current, read_checked, versions
from sparsejepa.study.sweep import arm_settings
from sparsejepa.study.tasks import row_key
from sparsejepa.study.verdict import LEVEL, BySeed, Interval, compare, mean_sd

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A number that a run may have, and its floors.

    `read` takes a row and which number is wanted (value, untrained or pixels) and returns None
    where it is not there. `asked` says whether a recipe (its TOML file) asks for it. Shown times
    `factor`: accuracies, shares in the rows, are shown in percent and their differences in points.
    """

    title: str
    read: Callable[[Row, str], float | None]
    asked: Callable[[Row], bool] = lambda _: True
    factor: float = 1
    digits: int = 1

    def text(self, values: BySeed) -> str:
        """Return mean ± sample standard deviation, no spread for one seed."""
        mean, sd = (self.factor * x for x in mean_sd(values))
        text = f"{mean:,.{self.digits}f}"
        return f"{text} ± {sd:,.{self.digits}f}" if len(values) > 1 else text

    def difference(self, interval: Interval) -> str:
        """Return the mean difference with its t interval [ ] and its bootstrap interval ( )."""
        text = self.signed(interval.mean)
        if interval.low is None or interval.high is None or interval.bootstrap is None:
            return text
        ends = (interval.low, interval.high, *interval.bootstrap)
        a, b, c, d = (self.signed(x) for x in ends)
        return f"{text} [{a}, {b}] ({c}, {d})"

    def signed(self, value: float) -> str:
        """Return a difference with its sign; what rounds to nothing is +0."""
        return f"{round(self.factor * value, self.digits) + 0.0:+,.{self.digits}f}"


def accuracy(title: str, data: str, target: str = "", protocol: str = "logistic") -> Measure:
    """Return the accuracy of a probe on a data set; any target will do if none is given."""

    def read(row: Row, which: str) -> float | None:
        for probe in row.get("probes") or ():
            found = Path(probe["data"]).name, probe["protocol"]
            if found == (data, protocol) and target in ("", probe["target"]):
                return probe["accuracy" if which == "value" else which]
        return None

    def asked(recipe: Row) -> bool:
        names = [Path(name).name for name in recipe.get("probe", ())]
        how = ["logistic", *recipe.get("protocols", ()), *recipe.get("extra_protocols", ())]
        targets = recipe.get("targets", {}).get(data, [target])
        return data in names and protocol in how and (not target or target in targets)

    return Measure(title, read, asked, factor=100)


def number(title: str, path: str, untrained: str = "", digits: int = 2) -> Measure:
    """Return the number at a dotted path of a row, `untrained` the path of its floor."""

    def read(row: Row, which: str) -> float | None:
        value: Any = row
        for name in {"value": path, "untrained": untrained}.get(which, "").split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    parts = path.split(".")
    group = parts[1] if parts[0] == "measures" else ""
    return Measure(
        title, read, lambda recipe: group in ("", *recipe.get("measures", ())), digits=digits
    )


@dataclass(frozen=True)
class Block:
    """The runs of one recipe for one table: what is planned, and one batch of what was found."""

    recipe: str
    about: Row
    """The recipe's TOML file."""
    hardware: str
    minutes: float
    """Estimate for all planned runs."""
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

    @property
    def made_on(self) -> str:
        """Device of the rows, see `batch`; empty without rows."""
        return next((device_of(row) for row in self.all_rows), "")

    @cached_property
    def all_rows(self) -> list[Row]:
        """Every row, arm by arm."""
        return [row for rows in self.rows.values() for row in rows.values()]

    def values(self, arm: str, measure: Measure, which: str = "value") -> dict[int, float]:
        """Return a measure of an arm by seed, of the runs that did not fail."""
        found = {
            seed: measure.read(row, which)
            for seed, row in self.rows.get(arm, {}).items()
            if not row.get("failed")
        }
        return {seed: value for seed, value in sorted(found.items()) if value is not None}

    def floor(self, measure: Measure, which: str) -> dict[int, float]:
        """Return the untrained or the raw-pixel floor by seed; arms share it."""
        found: dict[int, float] = {}
        for arm in self.planned:
            found = {**self.values(arm, measure, which), **found}
        return found

    def difference(
        self, arm: str, control: str, measure: Measure, level: float = LEVEL
    ) -> Interval | None:
        """Return the interval of arm - control, paired by seed; None without a pair."""
        return compare(self.values(arm, measure), self.values(control, measure), level)

    def failed(self, arm: str) -> int:
        """Return how many runs of an arm ended in numbers that are not finite."""
        return sum(bool(row.get("failed")) for row in self.rows.get(arm, {}).values())

    def done(self, arm: str, measure: Measure | None = None) -> str:
        """Return "seeds done / planned", and how many failed."""
        seeds, failed = self.planned[arm], self.failed(arm)
        count = len(self.values(arm, measure)) if measure else len(self.rows.get(arm, {})) - failed
        text = f"{count} / {len(seeds)}"
        return f"{text}, {failed} of {len(seeds)} failed" if failed else text

    def cell(self, arm: str, measure: Measure, *, count: bool = False) -> str:
        """Return mean ± sd, or queued, failed or not run; with `count` the seeds behind it."""
        values = self.values(arm, measure)
        if values:
            text = measure.text(values)
            short = len(values) < len(self.rows[arm]) - self.failed(arm)
            return f"{text} ({self.done(arm, measure)})" if count or short else text
        if not measure.asked(self.about):
            return "not run"
        if len(self.rows.get(arm, {})) > self.failed(arm):
            return "–"
        if self.failed(arm) == len(self.planned[arm]):
            return "failed"
        return "queued"

    def versus(self, arm: str, control: str, measure: Measure) -> str:
        """Return arm - control with its intervals; empty for the control and without a pair."""
        twin = self.twin(arm, control)
        interval = self.difference(arm, twin, measure) if twin else None
        if interval is None:
            return ""
        named = "" if twin == control else f" vs {twin}"
        return measure.difference(interval) + named

    def twin(self, arm: str, control: str) -> str:
        """Return the arm that differs in the first part only, or plain `control`; "" if neither.

        So density=0.25+beta=0 is compared with lam=0+beta=0, and dense+vicreg=... with dense.
        """
        more = arm.partition("+")[2]
        names = [f"{control}+{more}", control] if more else [control]
        return next((n for n in names if n in self.planned and n != arm), "")

    def matching(self, pattern: str) -> list[str]:
        """Return the planned arms that a pattern stands for, see `matches`."""
        return [arm for arm in self.planned if matches(arm, pattern)]


def matches(arm: str, pattern: str) -> bool:
    """Return whether an arm is one of a pattern's alternatives (``|``), each with wildcards.

    ``dense`` is dense without additions, ``lam=*+beta=0`` any lambda with that addition alone, and
    ``dense+vicreg=*+*`` dense with VICReg and whatever else.
    """
    first, *more = arm.split("+")
    for option in pattern.split("|"):
        start, *wanted = option.split("+")
        if (
            fnmatchcase(first, start)
            and all(any(fnmatchcase(item, want) for want in wanted) for item in more)
            and all(want == "*" or any(fnmatchcase(item, want) for item in more) for want in wanted)
        ):
            return True
    return False


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
    bench: Sequence[Row] = ()
    others: Sequence[Row] = ()
    """Lines of other versions, which are in none of the above."""

    @property
    def left_out(self) -> str:
        """Say how many lines are of other versions; empty if none is."""
        counts = Counter(map(versions, self.others))
        now = f"the present ones are {version.TRAIN_VERSION} and {version.EVAL_VERSION}"
        return " ".join(
            f"{count} lines of train version {train} and eval version {probe} are kept in "
            f"`results/` and shown nowhere: {now}."
            for (train, probe), count in counts.items()
        )

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
        minutes = 0.0
        for run in (run for run in self.queue if run["recipe"] == recipe):
            for arm in run["arms"]:
                if run in entries or arm in plain - named:
                    planned.setdefault(arm, set()).update(run["seeds"])
                    minutes += run.get("minutes", 0) * len(run["seeds"])
        about = self.recipes[recipe]
        mine = [
            row
            for row in self.rows
            if row["recipe"] == recipe and row["seed"] in planned.get(row["arm"], ())
        ]
        rows, apart = choose(mine, about)
        seeds = {arm: frozenset(found) for arm, found in planned.items()}
        return Block(recipe, about, entries[0].get("hardware", "?"), minutes, seeds, rows, apart)


def choose(rows: Iterable[Row], recipe: Row) -> tuple[dict[str, dict[int, Row]], str]:
    """Return one batch by arm and seed, and what was kept apart in words.

    The batch is the one that covers most (arm, seed) pairs, of equals the newest; of two rows of
    one pair the newer counts.
    """
    batches: dict[tuple[str, str], dict[tuple[str, int], Row]] = {}
    rows = sorted(rows, key=lambda row: row.get("finished", ""))
    for row in rows:
        batches.setdefault(batch(row, recipe), {})[row["arm"], row["seed"]] = row
    if not batches:
        return {}, ""
    best = max(batches, key=lambda key: (len(batches[key]), _newest(batches[key].values())))
    chosen: dict[str, dict[int, Row]] = {}
    for (arm, seed), row in sorted(batches[best].items()):
        chosen.setdefault(arm, {})[seed] = row
    parts = []
    for key, found in batches.items():
        if key != best:
            named = (f"on {key[0]}", "with other settings")
            reason = ", ".join(n for n, a, b in zip(named, key, best, strict=True) if a != b)
            commits = ", ".join(sorted({str(r["environment"]["commit"]) for r in found.values()}))
            parts.append(f"{len(found)} run{'s'[: len(found) > 1]} {reason} (commit {commits})")
    repeats = len(rows) - sum(len(found) for found in batches.values())
    parts += [f"{repeats} earlier repeat{'s'[: repeats > 1]}"] * (repeats > 0)
    return chosen, f"Kept apart, never averaged with these: {'; '.join(parts)}." if parts else ""


def device_of(row: Row) -> str:
    """Return the kind of device and torch's major.minor, as "cuda with torch 2.8"."""
    about = row["environment"]
    asked = row["settings"].get("run", {}).get("device", "auto")
    kind = "cuda" if about.get("gpus") and asked != "cpu" else "cpu"
    version = ".".join(about.get("torch", "?").partition("+")[0].split(".")[:2])
    return f"{kind} with torch {version}"


def batch(row: Row, recipe: Row) -> tuple[str, str]:
    """Return device and settings (all but arm and seed) that a row must share with others."""
    try:
        base = recipe_config(recipe).flat()
        own = {name: base[name] for name in arm_settings(row["arm"])}
        settings = Config.from_dict(row["settings"], "results").replace(**own, seed=0).to_dict()
    except UserError:  # a setting that is no more
        return device_of(row), row["key"]
    limit = (row.get("probed") or {}).get("limit")
    return device_of(row), row_key({"key": "", "settings": settings, "probed": {"limit": limit}})


def recipe_config(recipe: Row) -> Config:
    """Return the settings of a recipe's TOML file."""
    settings = dict(recipe["settings"])
    return preset(settings.pop("preset", "best")).replace(**settings)


def _newest(rows: Iterable[Row]) -> str:
    return max(row.get("finished", "") for row in rows)


def read_study(root: Path) -> Study:
    """Read queue, recipes and results. Raises UserError naming a missing or damaged file."""
    recipes = {
        path.stem: load_toml(path)
        for path in sorted((root / "recipes").glob("*.toml"))
        if "settings" in load_toml(path)
    }
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
        found = [row for row in read_checked(path) if {"arm", "seed", "environment"} <= set(row)]
        if path.stem.startswith("search"):
            trials |= {path.name: kept} if (kept := current(found)) else {}
        else:
            rows += [{**row, "recipe": row.get("recipe") or path.stem} for row in current(found)]
    more = [root / "results" / f"{name}.jsonl" for name in ("explain", "bench")]
    explain, bench = (read_checked(path) if path.exists() else [] for path in more)
    explain = current(explain)
    return Study(root, queue, recipes, rows, trials, explain, bench, others)
