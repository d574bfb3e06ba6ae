"""Search for settings by successive halving, every arm with the same budget, scored on a holdout.

    python recipes/search.py NAME --budget-minutes 60

recipes/search-NAME.toml says what is tried. A round's candidates are settings on top of those that
won before, and the winner so far takes part, wins ties and is compared at every rung. A rung gives
each candidate some steps and seeds, and the best go on to the next, whose runs are new ones: a
schedule depends on the length. Scores are accuracies on training images that were set aside. Every
trial is a line of --results, from which alone the search goes on.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from run import HERE, add_arguments, guarded, stop_after
from study import check_entries, read_recipe

from sparsejepa.config import Config, load_toml
from sparsejepa.errors import UserError
from sparsejepa.study.results import Probes, Task, is_current, read_results, row_key
from sparsejepa.study.runs import run_tasks
from sparsejepa.study.sweep import arm_settings

Settings = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if all went well, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("search", help="NAME of recipes/search-NAME.toml, or a file.toml")
    add_arguments(parser)
    args = parser.parse_args(argv)
    file = args.search if args.search.endswith(".toml") else HERE / f"search-{args.search}.toml"
    args.search = Path(file)
    args.runs = args.runs or Path("runs") / args.search.stem
    args.results = args.results or HERE.parent / "results" / f"{args.search.stem}.jsonl"
    return guarded("search.py", lambda: work(args))


def work(args: argparse.Namespace) -> int:
    """Run what is missing, rung by rung, and print what was found."""
    search, status = read_search(args.search), 0
    config = search.config.replace(device=args.device, data_root=args.data_root)
    search = replace(search, runs=args.runs, config=config)
    state = replay(read_results(args.results), search)
    with stop_after(args.budget_minutes):
        while state.todo and not status and not args.dry_run:
            try:
                run_tasks(
                    state.todo, args.results, jobs=args.jobs, console=Console(highlight=False)
                )
            except UserError as error:
                print(f"failed: {error}")
                status = 1
            state = replay(read_results(args.results), search)
    print("\n".join(show(replay(read_results(args.results), search))))
    return status


@dataclass(frozen=True)
class Rung:
    """Runs of `steps` with `seeds` seeds for each candidate; the best `keep` (0 to 1) go on."""

    steps: int
    seeds: int
    keep: float = 0.5


@dataclass(frozen=True)
class Search:
    """What recipes/search-NAME.toml says; `recipe` is the name that its lines of results have.

    `rounds` are names with candidates: settings on top of the winner so far.
    """

    recipe: str
    config: Config
    probes: Probes
    arms: tuple[str, ...]
    rounds: Mapping[str, Sequence[Settings]]
    rungs: tuple[Rung, ...]
    runs: Path = Path("runs")

    def task(self, arm: str, settings: Settings, steps: int, seed: int, trial: Settings) -> Task:
        """Return one trial of an arm. Raises UserError for settings that do not go together."""
        try:
            config = self.config.replace(**arm_settings(arm) | dict(settings))
            config = config.replace(steps=steps, seed=seed).check()
        except UserError as error:
            raise UserError(f"{self.recipe}, {arm} with {text(settings)}: {error}") from None
        command = f"python recipes/search.py {self.recipe.removeprefix('search-')}"
        task = Task(config, self.runs, self.probes, command, arm, self.recipe, trial)
        return replace(task, run_dir=self.runs / f"{arm}-{steps}-s{seed}-{task.run_key[:8]}")


@dataclass(frozen=True)
class Line:
    """A candidate at a rung, both counted from 1, with the scores (0 to 1) of its trials.

    `kept`: it went on, or won at the last rung; None while trials of the rung are missing.
    """

    round: int
    name: str
    rung: int
    arm: str
    candidate: Settings
    steps: int
    scores: tuple[float, ...]
    failed: int
    kept: bool | None

    @property
    def score(self) -> str:
        """Mean ± sample standard deviation in percent, and how many trials failed."""
        said = f"{100 * fmean(self.scores):.1f}" if self.scores else "–"
        said += f" ± {100 * stdev(self.scores):.1f}" if len(self.scores) > 1 else ""
        return f"{said}, {self.failed} failed" if self.failed else said


@dataclass(frozen=True)
class State:
    """How far a search has come: its trace, what to run next, and each arm's best settings."""

    lines: list[Line]
    todo: list[Task]
    winners: dict[str, Settings]


def replay(rows: Sequence[Settings], search: Search) -> State:
    """Follow the search through the lines of results, up to the first trials that are missing."""
    rows = [row for row in rows if row.get("recipe") == search.recipe]
    done = {row_key(row): row for row in rows if is_current(row)}
    state = State([], [], {})
    for arm in search.arms:
        state.winners[arm] = _follow(arm, search, done, state)
    state.lines.sort(key=lambda line: (line.round, line.rung))  # stable: arms in order
    return state


def _follow(arm: str, search: Search, done: Mapping[str, Settings], state: State) -> Settings:
    """Add an arm's part to `state`; return its best settings so far."""
    best: Settings = {}
    for number, (name, candidates) in enumerate(search.rounds.items(), 1):
        # The winner so far comes first, so that it wins ties; its equals are left out.
        equals: dict[Config, Settings] = {}
        for candidate in ({}, *candidates):
            same = search.task(arm, {**best, **candidate}, 1, 0, {}).config
            equals.setdefault(same, candidate)
        alive = list(equals.values())
        for step, rung in enumerate(search.rungs, 1):
            found, missing = [], []
            for candidate in alive:
                about = {"round": number, "rung": step, "candidate": candidate}
                tasks = [
                    search.task(arm, {**best, **candidate}, rung.steps, seed, about)
                    for seed in range(rung.seeds)
                ]
                rows = [done[task.key] for task in tasks if task.key in done]
                missing += [task for task in tasks if task.key not in done]
                scores = tuple(_score(row, search) for row in rows if not row.get("failed"))
                failed = len(rows) - len(scores)
                line = Line(number, name, step, arm, candidate, rung.steps, scores, failed, None)
                found.append(line)
            if missing:
                state.lines.extend(line for line in found if line.scores or line.failed)
                state.todo.extend(missing)
                return best
            last = step == len(search.rungs)
            kept = _keep(found, 0.0 if last else rung.keep)
            state.lines.extend(replace(line, kept=line in kept) for line in found)
            alive = [line.candidate for line in kept]
        best = {**best, **alive[0]}
    return best


def _keep(lines: Sequence[Line], share: float) -> list[Line]:
    """Return what goes on: the first, and `share` of the others (at least one); the winner if 0."""
    ranked = sorted(lines, key=lambda line: (line.failed, -fmean(line.scores or (0.0,))))
    if not share:
        return ranked[:1]
    count = max(1, math.ceil(share * (len(lines) - 1) - 1e-9))
    ahead = [line for line in ranked if line is not lines[0]][:count]
    return [line for line in lines if line is lines[0] or line in ahead]


def _score(row: Settings, search: Search) -> float:
    probe = row["probes"][0]
    if probe["settings"].get("scored_on") != "holdout":
        raise UserError(f"{search.recipe}: the line with key {row['key']} was scored on test")
    return probe["accuracy"]


def show(state: State) -> list[str]:
    """Return the trace as text, and the winner of each arm."""
    lines = []
    for line in state.lines:
        mark = {True: "kept", False: "", None: "unfinished"}[line.kept]
        where = f"{line.name}, rung {line.rung}, {line.arm}, {line.steps} steps"
        lines.append(f"{where}: {text(line.candidate)}: {line.score} {mark}".rstrip())
    over = f" so far ({len(state.todo)} trials come next)" if state.todo else ""
    return [*lines, *(f"{arm}{over}: {text(best)}" for arm, best in state.winners.items())]


def text(settings: Settings) -> str:
    """Return settings as they are shown."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "as before"


def read_search(path: Path) -> Search:
    """Read a search. Raises UserError for a file that is none, in one line that says why."""
    spec = load_toml(path)
    try:
        return _parse(path, spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parse(path: Path, spec: Settings) -> Search:
    needed = {"recipe", "holdout", "arms", "rungs", "round"}
    check_entries("the search", spec, needed, {"about", "settings", "target", "probe_limit"})
    if spec["holdout"] < 1:
        raise UserError("holdout = 0: set training images aside, a search must not look at test")
    config, probes = read_recipe(path.parent, spec["recipe"])
    config = config.replace(**spec.get("settings", {}), holdout=spec["holdout"])
    targets = {config.data: (spec["target"],)} if "target" in spec else probes.targets
    limit = spec.get("probe_limit", probes.limit)
    for rung in spec["rungs"]:
        check_entries("a rung", rung, {"steps", "seeds"}, {"keep"})
    rounds = dict(_round(number, each) for number, each in enumerate(spec["round"], 1))
    search = Search(
        path.stem, config, Probes((config.data,), targets=targets, limit=limit),
        tuple(spec["arms"]), rounds, tuple(Rung(**rung) for rung in spec["rungs"]),
    )  # fmt: skip
    for arm, candidates in itertools.product(search.arms, rounds.values()):
        for candidate in candidates:
            search.task(arm, candidate, 1, 0, {})
    return search


def _round(number: int, values: Settings) -> tuple[str, list[Settings]]:
    """Return a round's name and candidates: a list of alternatives, or the product of a grid."""
    where = f"round {number}"
    check_entries(where, values, set(), {"name", "grid", "alternatives"})
    grid = values.get("grid", {})
    products = [dict(zip(grid, each, strict=True)) for each in itertools.product(*grid.values())]
    candidates = values.get("alternatives") or products
    if ("grid" in values) == ("alternatives" in values) or not all(candidates):
        raise UserError(f"{where}: give it a grid or alternatives, each with settings to try")
    return str(values.get("name", where)), list(candidates)


if __name__ == "__main__":
    sys.exit(main())
