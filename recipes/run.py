"""Work through recipes/queue.toml within a time budget: train, probe, one JSON line per run.

    python recipes/run.py --budget-minutes 60

Runs with a line in --results, or in another *.jsonl beside it, are skipped; one that the budget,
Ctrl-C, SIGTERM or a kill ended goes on from its checkpoint next time. Runs that fit the minutes
left are done, in the queue's order; with --partial others are begun then, to go on next time. A run
whose loss is not finite gets a line that says so and is not tried again, unless --retry-failed is
given. The encoder behind a line is kept in runs/encoders/, beside the run directories: when only
EVAL_VERSION has been raised since, it is probed again and not trained. Several small runs may
share a GPU: --jobs says how many.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
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
    smoke_probes,
    stop_after,
)
from rich.console import Console

from sparsejepa.config import load_toml
from sparsejepa.environment import resolve_device
from sparsejepa.errors import UserError
from sparsejepa.results import is_current, read_beside, read_results
from sparsejepa.study.runs import run_tasks
from sparsejepa.study.sweep import arm_settings
from sparsejepa.study.tasks import Task, row_key

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A [[run]] of the queue: its runs, what one of them takes by estimate, and the tables."""

    tasks: list[Task]
    minutes: float | None
    hardware: str
    tables: Sequence[int]

    @property
    def on_gpu(self) -> bool:
        """Return whether the runs are meant for a GPU."""
        return "gpu" in self.hardware.lower()


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if all went well, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C, SIGTERM."""
    args = parse(argv)
    return guarded("run.py", lambda: work(args))


def work(args: argparse.Namespace) -> int:
    """Run what has no line of results yet, as long as the budget lasts; say what is left."""
    if not (args.hardware or args.dry_run or args.scale == "smoke"):
        args.hardware = "gpu" if resolve_device(args.device).startswith("cuda") else "cpu"
    entries, ledger = read_queue(args), Ledger(args)
    if args.dry_run:
        ledger.show(entries, each=True)
        return 0
    ledger.check_budget(entries)
    console, status, tried = Console(highlight=False), 0, set[str]()
    end = time.monotonic() + 60 * args.budget_minutes

    def proceed(entry: Entry, partial: bool) -> bool:
        """Do those of an entry's runs that fit, or all; return whether there were any."""
        nonlocal status, ledger
        tasks = [task for task in ledger.left(entry) if task.key not in tried]
        try:
            jobs = args.jobs
            if not partial:
                tasks, jobs = ledger.choose(entry, tasks, (end - time.monotonic()) / 60)
            before, again = ledger.elsewhere, ledger.again
            if tasks:
                run_tasks(
                    tasks, args.results, jobs=jobs, before=before, again=again, console=console
                )
        except UserError as error:
            print(f"failed: {error}", flush=True)
            status = 1
        if tasks:
            tried.update(task.key for task in tasks)
            ledger = Ledger(args)
        return bool(tasks)

    with stop_after(args.budget_minutes):
        for partial in (False, True) if args.partial else (False,):
            while any(proceed(entry, partial) for entry in entries):
                pass  # from the top again: what was left may fit, now that more is measured
    Ledger(args).show(entries, each=False)  # read anew: the budget's end is anywhere
    return status


class Ledger:
    """What results say: which runs are done, how they ended and how long they took.

    `elsewhere` are the lines of the files beside --results.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.elsewhere = read_beside(args.results)
        self._rows = [*self.elsewhere, *read_results(args.results)]
        self._last = {row_key(row): row for row in self._rows}

    def again(self, row: Row) -> bool:
        """Return whether a run that has this line is to be done again."""
        return bool(self._args.retry_failed and row.get("failed"))

    def left(self, entry: Entry) -> list[Task]:
        """Return the runs of an entry that are still to do."""
        rows = [(task, self._last.get(task.key)) for task in entry.tasks]
        return [task for task, row in rows if row is None or self.again(row)]

    def minutes(self, entry: Entry, task: Task, jobs: int = 1) -> float | None:
        """Return what a run takes, `jobs` at a time: as measured on a run like it, or estimated.

        Like it are runs of its recipe on its kind of hardware, of its arm or, where arms change
        neither network nor length, of any such arm. Runs that share a GPU are taken to share its
        speed, which is the worst case; on the CPU each has cores of its own.
        """

        def slower(measured: int) -> float:
            return max(1.0, jobs / measured) if entry.on_gpu else 1.0

        like = [
            row
            for row in self._rows
            if row.get("recipe") == task.recipe
            and not row.get("failed")
            and bool(row.get("gpu_seconds")) == entry.on_gpu
        ]
        same = [row for row in like if row["arm"] == task.arm]
        if not same and "+" not in task.arm:
            same = [row for row in like if "+" not in row["arm"]]
        if same:
            taken = ((row, row["seconds"] + row["probe_seconds"]) for row in same)
            return median(s * slower(row.get("jobs", 1)) for row, s in taken) / 60
        return entry.minutes and entry.minutes * slower(1)

    def choose(
        self, entry: Entry, tasks: Sequence[Task], minutes: float
    ) -> tuple[list[Task], int | None]:
        """Return the tasks that should end within `minutes`, and how many to do at a time.

        That is --jobs or, if none would end then, one.
        """
        packed = self._fitting(entry, tasks, minutes, self._args.jobs or 1)
        return (packed, self._args.jobs) if packed else (self._fitting(entry, tasks, minutes, 1), 1)

    def _fitting(
        self, entry: Entry, tasks: Sequence[Task], minutes: float, jobs: int
    ) -> list[Task]:
        """Return the tasks that should end within `minutes`, begun in order, `jobs` at a time."""
        chosen, taken = [], [0.0] * jobs
        for task in tasks:
            first = taken.index(min(taken))
            over = taken[first] + self._cost(entry, task, jobs)
            if over <= minutes:
                chosen.append(task)
                taken[first] = over
        return chosen

    def check_budget(self, entries: Sequence[Entry]) -> None:
        """Raise UserError if no run left fits the budget; with --partial, if it is no minute."""
        pairs = [(entry, task) for entry in entries for task in self.left(entry)]
        costs = [(self._cost(entry, task), _name(task)) for entry, task in pairs]
        shortest, name = min(costs, default=(0.0, ""))
        budget = self._args.budget_minutes
        if budget < (min(shortest, 1.0) if self._args.partial else shortest):
            way = "" if self._args.partial else ", or --partial to begin it"
            raise UserError(
                f"--budget-minutes {budget:g}: the shortest run left, {name}, "
                f"takes {_about(shortest)}; give it at least that{way}"
            )

    def show(self, entries: Sequence[Entry], *, each: bool) -> None:
        """Print what is left, run by run or entry by entry, and what --results keeps apart."""
        word, total = ("to do" if each else "left"), dict[str, float]()
        for entry in entries:
            tasks = self.left(entry)
            costs = [self.minutes(entry, task) for task in tasks]
            known = sum(cost for cost in costs if cost)
            total[entry.hardware] = total.get(entry.hardware, 0.0) + known
            if each:
                tables = f", tables {', '.join(map(str, entry.tables))}" if entry.tables else ""
                for task, cost in zip(tasks, costs, strict=True):
                    where = f"{_about(cost)} on {entry.hardware}{tables}"
                    print(f"{word}: {_name(task)}, {where}")
            elif tasks:
                arms = ", ".join(dict.fromkeys(task.arm for task in tasks))
                count = f"{len(tasks)} of {_runs(len(entry.tasks))} of {tasks[0].recipe} ({arms})"
                cost = _about(None if None in costs else known)
                print(f"{word}: {count}, {cost} on {entry.hardware}")
        count = sum(len(self.left(entry)) for entry in entries)
        parts = [f"{minutes:.0f} on {name}" for name, minutes in total.items() if minutes]
        sums = f", about {sum(total.values()):.0f} minutes ({', '.join(parts)})" if parts else ""
        print(f"{_runs(count)} {word}{sums}; results in {self._args.results}")
        self._show_apart(entries)

    def _show_apart(self, entries: Sequence[Entry]) -> None:
        keys = {task.key for entry in entries for task in entry.tasks}
        rows = [row for key, row in self._last.items() if key in keys]
        failed = sum(bool(row.get("failed")) for row in rows)
        if failed:
            print(f"{_runs(failed)} failed and recorded so; --retry-failed runs them again")
        other = sum(not is_current(row) for row in self._rows)
        if other:
            print(f"{_runs(other)} of other train or eval versions are kept and count for nothing")

    def _cost(self, entry: Entry, task: Task, jobs: int = 1) -> float:
        """Return the minutes to plan with: 0 if not known, or if a run was begun before.

        For that one may be nearly done.
        """
        begun = task.key not in self._last and (task.run_dir / "config.toml").exists()
        return 0.0 if begun else self.minutes(entry, task, jobs) or 0.0


def _name(task: Task) -> str:
    return f"{task.recipe}/{task.arm}-s{task.config.run.seed}"


def _about(minutes: float | None) -> str:
    if minutes is None:
        return "minutes not known"
    return f"about {minutes:.2g} minutes" if minutes < 10 else f"about {minutes:.0f} minutes"


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def read_queue(args: argparse.Namespace) -> list[Entry]:
    """Return the entries of the queue that are asked for.

    Raises UserError for what is not known: recipes, arms, presets, settings; and for no run at all.
    """
    queue = load_toml(args.queue)
    check_entries(str(args.queue), queue, {"run": list})
    entries, folders = [], {}
    for number, run in enumerate(queue["run"], 1):
        try:
            entries.append(_entry(run, args, folders))
        except UserError as error:
            raise UserError(f"{args.queue}, run {number}: {error}") from None
    named = [entry for entry in entries if entry.tasks]
    if not named:
        raise UserError(f"{args.queue}: no run is called {' or '.join(args.only)}")
    wanted = args.hardware if args.hardware in ("cpu", "gpu") else ""
    meant = [entry for entry in named if wanted in entry.hardware.lower()]
    if not meant:
        raise UserError(
            f"{args.queue}: no run called {' or '.join(args.only)} is meant for the {wanted} here; "
            f"they are for {named[0].hardware}; --hardware all takes them all the same"
        )
    return meant


def _entry(run: Row, args: argparse.Namespace, folders: dict[str, str]) -> Entry:
    """Return a [[run]] with those of its runs that --only names.

    `folders` gets the folder of every run by its name. "pattern=RUN" is replaced by that of the
    plain arm of the same seed, which has to come in an entry before, as it must be finished first.
    """
    needed, free = (
        {"recipe": str, "arms": list, "seeds": list},
        {"minutes": float, "hardware": str, "tables": list},
    )
    check_entries("the run", run, needed, free)
    config, probes = read_recipe(args.queue.parent, run["recipe"])
    if args.scale == "smoke":
        config = config.replace(**SMOKE)
        probes = smoke_probes(probes)
    config = here(args, config)
    tasks, before = [], dict(folders)
    for seed in run["seeds"]:
        for arm in run["arms"]:
            name = f"{run['recipe']}/{arm}-s{seed}"
            one = config.replace(**arm_settings(arm), seed=seed)
            if one.groups.pattern == "RUN":
                plain = f"{run['recipe']}/{arm.partition('+')[0]}-s{seed}"
                if plain not in before:
                    raise UserError(f"{name}: {plain} has to come in an entry before it")
                one = one.replace(pattern=before[plain])
            one.check()
            command = shlex.join(["python", "recipes/run.py", "--only", name])
            task = Task(one, args.runs, probes, command, arm, run["recipe"])
            # An edited recipe makes another run, whatever is left of the one before.
            folder = args.runs / f"{name}-{task.run_key[:8]}"
            folders[name] = folder.as_posix()
            if any(fnmatch(name, glob) or fnmatch(name, f"{glob}/*") for glob in args.only):
                tasks.append(replace(task, run_dir=folder, encoders=args.runs.parent / "encoders"))
    hardware = run.get("hardware", "CPU or GPU")
    minutes = None if args.scale == "smoke" else run.get("minutes")
    return Entry(tasks, minutes, hardware, run.get("tables", ()))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queue", type=Path, default=HERE / "queue.toml")
    parser.add_argument(
        "--only", action="append", help="glob over RECIPE/ARM-sSEED; may be repeated"
    )
    parser.add_argument(
        "--hardware",
        choices=("cpu", "gpu", "all"),
        help="only runs meant for it; default: that of --device (all for --dry-run)",
    )
    parser.add_argument(
        "--partial", action="store_true", help="then begin runs that will not end in time"
    )
    parser.add_argument("--retry-failed", action="store_true", help="also runs that failed before")
    add_arguments(parser, "results/queue.jsonl", "runs/queue")
    args = parser.parse_args(argv)
    args.only = args.only or ["*"]
    place(args, "queue", "queue.jsonl")
    return args


if __name__ == "__main__":
    sys.exit(main())
