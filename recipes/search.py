"""Search for settings by successive halving, every arm with the same budget, scored on a holdout.

    python recipes/search.py NAME --budget-minutes 60

recipes/search-NAME.toml says what is tried. Rounds come one after the other; a round's candidates
are settings on top of those that won before, and the winner so far takes part as well. A rung gives
each candidate of a round some steps and seeds, the same for all, and the best go on to the next
rung, whose runs are new ones: a schedule depends on the length. The winner so far is compared at
every rung and wins ties. Scores are the probe's accuracy on training images that were set aside;
test is never looked at. Each arm is searched on its own.

Every trial is a line of --results, and what was tried and kept is computed from those lines alone:
the same command goes on where it was stopped.
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

from common import (
    HERE,
    SMOKE,
    add_arguments,
    check_entries,
    guarded,
    here,
    place,
    read_recipe,
    stop_after,
)
from rich.console import Console

from sparsejepa.config import Config, load_toml
from sparsejepa.errors import UserError
from sparsejepa.results import is_current, read_results
from sparsejepa.study.runs import run_tasks
from sparsejepa.study.sweep import arm_settings
from sparsejepa.study.tasks import Probes, Task, row_key

Settings = Mapping[str, Any]
# What arms, rungs and seeds set.
TAKEN = {"data", "holdout", "groups", "lam", "density", "steps", "epochs", "seed"}


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if all went well, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C."""
    args = parse(argv)
    return guarded("search.py", lambda: work(args))


def work(args: argparse.Namespace) -> int:
    """Run what is missing, rung by rung, and print what was found."""
    search = replace(read_search(args.search, smoke=args.scale == "smoke"), runs=args.runs)
    search = replace(search, config=here(args, search.config))
    console, status = Console(highlight=False), 0
    state = replay(read_results(args.results), search)
    if args.dry_run:
        print("\n".join(plan(search)))
    else:
        with stop_after(args.budget_minutes):
            while (todo := state.todo) and not status:
                try:
                    run_tasks(todo, args.results, jobs=args.jobs, console=console)
                except UserError as error:
                    print(f"failed: {error}")
                    status = 1
                state = replay(read_results(args.results), search)
    state = replay(read_results(args.results), search)
    print("\n".join(show(state)))
    return status


def plan(search: Search) -> list[str]:
    """Return how much there is to do at most, which is the same for each arm."""
    lines, trials, steps = [], 0, 0
    for number, stage in enumerate(search.rounds, 1):
        count, parts = len(stage.candidates), []
        for rung in stage.rungs:
            runs = (count + 1) * rung.seeds
            trials, steps = trials + runs, steps + runs * rung.steps
            seeds = f"{rung.seeds} seed{'s' * (rung.seeds > 1)}"
            parts.append(f"{count + 1} x {seeds} x {rung.steps} steps")
            count = survivors(rung.keep, count)
        lines.append(f"round {number}, {stage.name}: {', '.join(parts)}")
    return [*lines, f"each of {len(search.arms)} arms: {trials} trials at most, {steps:,} steps"]


def show(state: State) -> list[str]:
    """Return the trace as text, and the winner of each arm."""
    lines, before = [], None
    for line in state.lines:
        here = line["round"], line["rung"], line["arm"]
        if here != before:
            lines.append(f"round {here[0]} ({line['name']}), rung {here[1]}, {here[2]}:")
            before = here
        score = "no score" if line["mean"] is None else f"{100 * line['mean']:.2f} %"
        score += "" if line["sd"] is None else f" ± {100 * line['sd']:.2f}"
        score += f", {line['failed']} failed" if line["failed"] else ""
        mark = {True: "kept", False: "", None: "unfinished"}[line["kept"]]
        seeds = f"{line['steps']} steps, {line['seeds']} seed{'s' * (line['seeds'] > 1)}"
        lines.append(f"  {line['candidate']:40} {seeds:20} {score:18} {mark}".rstrip())
    over = "" if not state.todo else f" so far ({len(state.todo)} trials come next)"
    if state.others:
        lines.append(f"{state.others} trials of other train or eval versions do not count")
    return [*lines, *(f"{arm}{over}: {text(best)}" for arm, best in state.winners.items())]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("search", help="NAME of recipes/search-NAME.toml, or a file.toml")
    add_arguments(parser, "results/search-NAME.jsonl", "runs/search-NAME")
    args = parser.parse_args(argv)
    named = not args.search.endswith(".toml")
    args.search = HERE / f"search-{args.search}.toml" if named else Path(args.search)
    place(args, args.search.stem, f"{args.search.stem}.jsonl")
    return args


@dataclass(frozen=True)
class Rung:
    """Runs of `steps` with `seeds` seeds for each candidate; the best `keep` (0 to 1) go on."""

    steps: int
    seeds: int
    keep: float


@dataclass(frozen=True)
class Round:
    """Candidates: settings on top of the winner so far."""

    name: str
    candidates: tuple[Settings, ...]
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Search:
    """What recipes/search-NAME.toml says; `recipe` is the name that its lines of results have."""

    recipe: str
    config: Config
    probes: Probes
    arms: tuple[str, ...]
    rounds: tuple[Round, ...]
    runs: Path = Path("runs")

    def task(self, arm: str, settings: Settings, steps: int, seed: int, trial: Settings) -> Task:
        """Return one trial of an arm. Raises UserError for settings that do not go together."""
        try:
            config = self.config.replace(**arm_settings(arm) | dict(settings))
            config = config.replace(steps=steps, seed=seed).check()
        except UserError as error:
            raise UserError(f"{self.recipe}, {arm} with {text(settings)}: {error}") from None
        command = f"python recipes/search.py {self.recipe.removeprefix('search-')}"
        return Task(config, self.runs, self.probes, command, arm, self.recipe, trial)

    def placed(self, task: Task) -> Task:
        """Return a trial with a run directory of its own."""
        optim, seed = task.config.optim, task.config.run.seed
        name = f"{task.arm}-{optim.steps}-s{seed}-{task.run_key[:8]}"
        return replace(task, run_dir=self.runs / name)


@dataclass(frozen=True)
class State:
    """How far a search has come: its trace, what to run next, and each arm's best settings."""

    lines: list[dict[str, Any]]
    todo: list[Task]
    winners: dict[str, Settings]
    others: int = 0
    """Trials of other versions, which are left out."""


def trace(rows: Sequence[Settings], search: Search) -> list[dict[str, Any]]:
    """Return what was tried, in order, from lines of results alone.

    One dictionary per round, rung, arm and candidate: round and rung (counted from 1), name (of the
    round), arm, candidate (text), steps, seeds (number of finished trials, failed ones counted),
    mean and sd (of the score, 0 to 1, over the trials that did not fail; None where there are too
    few), failed (number of trials that went non-finite), kept (went on, or at the last rung won;
    None while trials of the rung are missing).
    """
    return replay(rows, search).lines


def replay(rows: Sequence[Settings], search: Search) -> State:
    """Follow the search through the lines of results, up to the first trials that are missing."""
    rows = [row for row in rows if row.get("recipe") == search.recipe]
    done = {row_key(row): row for row in rows if is_current(row)}
    state = State([], [], {}, sum(not is_current(row) for row in rows))
    for arm in search.arms:
        state.winners[arm] = _follow(arm, search, done, state)
    state.lines.sort(key=lambda line: (line["round"], line["rung"]))  # stable: arms in order
    return state


def _follow(arm: str, search: Search, done: Mapping[str, Settings], state: State) -> Settings:
    """Add an arm's part to `state`; return its best settings so far."""
    best: Settings = {}
    for number, stage in enumerate(search.rounds, 1):
        # The winner so far comes first, so that it wins ties; its equals are left out.
        alive: dict[Config, Settings] = {}
        for candidate in ({}, *stage.candidates):
            same = search.task(arm, {**best, **candidate}, 1, 0, {}).config
            alive.setdefault(same, candidate)
        for step, rung in enumerate(stage.rungs, 1):
            results: list[tuple[Settings, list[Settings]]] = []
            missing: list[Task] = []
            for candidate in alive.values():
                about = {"round": number, "rung": step, "candidate": candidate}
                tasks = [
                    search.task(arm, {**best, **candidate}, rung.steps, seed, about)
                    for seed in range(rung.seeds)
                ]
                results.append((candidate, [done[t.key] for t in tasks if t.key in done]))
                missing += [task for task in tasks if task.key not in done]
            last = step == len(stage.rungs)
            kept = None if missing else _keep(results, 0.0 if last else rung.keep)
            for candidate, rows in results:
                if not rows:
                    continue
                scores = [_score(row, search) for row in rows if not row.get("failed")]
                state.lines.append(
                    {
                        "round": number,
                        "name": stage.name,
                        "rung": step,
                        "arm": arm,
                        "candidate": text(candidate),
                        "steps": rung.steps,
                        "seeds": len(rows),
                        "mean": fmean(scores) if scores else None,
                        "sd": stdev(scores) if len(scores) > 1 else None,
                        "failed": len(rows) - len(scores),
                        "kept": None if kept is None else candidate in kept,
                    }
                )
            if kept is None:
                state.todo.extend(map(search.placed, missing))
                return best
            alive = {config: c for config, c in alive.items() if c in kept}
            if last:
                best = {**best, **kept[0]}
    return best


def _keep(results: Sequence[tuple[Settings, list[Settings]]], share: float) -> list[Settings]:
    """Return the candidates that go on: the first, and `share` of the others; the winner if 0."""

    def rank(result: tuple[Settings, list[Settings]]) -> tuple[int, float]:
        scores = [row["probes"][0]["accuracy"] for row in result[1] if not row.get("failed")]
        return len(result[1]) - len(scores), -fmean(scores or [0.0])

    if not share:
        return [min(results, key=rank)[0]]
    count = survivors(share, len(results) - 1)
    return [results[0][0], *(candidate for candidate, _ in sorted(results[1:], key=rank)[:count])]


def survivors(share: float, count: int) -> int:
    """Return how many of `count` candidates go on, at least one."""
    return max(1, math.ceil(share * count - 1e-9))


def _score(row: Settings, search: Search) -> float:
    probe = row["probes"][0]
    if probe["settings"].get("scored_on") != "holdout":
        raise UserError(f"{search.recipe}: the line with key {row['key']} was scored on test")
    return probe["accuracy"]


def text(settings: Settings) -> str:
    """Return settings as they are shown."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "as before"


def read_search(path: Path, *, smoke: bool = False) -> Search:
    """Read a search. Raises UserError for a file that is none, in one line that says why."""
    spec = load_toml(path)
    try:
        return _parse(path, spec, smoke=smoke)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parse(path: Path, spec: Settings, *, smoke: bool) -> Search:
    needed = {"recipe": str, "holdout": int, "arms": list, "rungs": list, "round": list}
    free = {"about": str, "settings": dict, "target": str, "probe_limit": int}
    check_entries("the search", spec, needed, free)
    if spec["holdout"] < 1:
        raise UserError("holdout = 0: set training images aside, a search must not look at test")
    config, probes = read_recipe(path.parent, spec["recipe"])
    config = config.replace(**spec.get("settings", {}), holdout=spec["holdout"])
    targets = {config.data: (spec["target"],)} if "target" in spec else probes.targets
    limit = spec.get("probe_limit", probes.limit)
    if smoke:
        config, limit = config.replace(**SMOKE), SMOKE["limit"]
    rounds = tuple(_round(number, spec, each) for number, each in enumerate(spec["round"], 1))
    if smoke:
        short = [Rung(SMOKE["steps"] + i, 1, rung.keep) for i, rung in enumerate(rounds[0].rungs)]
        rounds = tuple(replace(each, rungs=tuple(short)) for each in rounds)
    search = Search(
        path.stem, config, Probes((config.data,), targets=targets, limit=limit),
        tuple(spec["arms"]), rounds,
    )  # fmt: skip
    for arm, stage in itertools.product(search.arms, search.rounds):
        for candidate in stage.candidates:
            search.task(arm, candidate, 1, 0, {})
    return search


def _round(number: int, spec: Settings, values: Settings) -> Round:
    where = f"round {number}"
    check_entries(
        where, values, {}, {"name": str, "grid": dict, "alternatives": list, "rungs": list}
    )
    if ("grid" in values) == ("alternatives" in values):
        raise UserError(f"{where}: give it either a grid or alternatives")
    grid, candidates = values.get("grid", {}), values.get("alternatives", [])
    for name, options in grid.items():
        if not isinstance(options, list) or not options:
            raise UserError(f"{where}: grid.{name} must be a list of values")
    if grid:
        combined = itertools.product(*grid.values())
        candidates = [dict(zip(grid, each, strict=True)) for each in combined]
    if not candidates or not all(isinstance(each, dict) and each for each in candidates):
        raise UserError(f"{where}: there is nothing to try, or a candidate without settings")
    for name in {name for candidate in candidates for name in candidate} & TAKEN:
        raise UserError(f"{where}: '{name}' is no candidate's to set; arms and rungs do")
    rungs = []
    for each in values.get("rungs", spec["rungs"]):
        check_entries(f"a rung of {where}", each, {"steps": int, "seeds": int}, {"keep": float})
        rung = Rung(each["steps"], each["seeds"], each.get("keep", 0.5))
        if rung.steps < 1 or rung.seeds < 1 or not 0 < rung.keep <= 1:
            raise UserError(f"a rung of {where}: steps and seeds from 1, keep above 0 and up to 1")
        rungs.append(rung)
    if not rungs:
        raise UserError(f"{where}: there are no rungs")
    return Round(values.get("name", text(grid)), tuple(candidates), tuple(rungs))


if __name__ == "__main__":
    sys.exit(main())
