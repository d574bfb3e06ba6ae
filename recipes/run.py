"""Work through recipes/queue.toml within a time budget: train, probe, one JSON line per run.

    python recipes/run.py --budget-minutes 60

Runs with a line in --results, or in another *.jsonl beside it, are skipped; one that was ended goes
on from its checkpoint. Runs that fit the minutes left, by the queue's estimate, are done in its
order. The encoder behind a line is kept in runs/encoders/: when only EVAL_VERSION has been raised
since, it is probed again and not trained.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from study import Row, check_entries, read_recipe

from sparsejepa.config import load_toml
from sparsejepa.environment import resolve_device
from sparsejepa.errors import UserError
from sparsejepa.study.results import Task, read_results, row_key
from sparsejepa.study.runs import run_tasks, terminable
from sparsejepa.study.sweep import arm_settings

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Entry:
    """A [[run]] of the queue: its runs, and what one of them takes by estimate."""

    tasks: list[Task]
    minutes: float
    hardware: str


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if all went well, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C, SIGTERM."""
    args = parse(argv)
    return guarded("run.py", lambda: work(args))


def work(args: argparse.Namespace) -> int:
    """Run what has no line of results yet, as long as the budget lasts; say what is left."""
    on = args.hardware
    if on is None and not args.dry_run:
        on = "gpu" if resolve_device(args.device).startswith("cuda") else "cpu"
    entries = [e for e in read_queue(args) if on in (None, "all") or on in e.hardware.lower()]
    if not entries:
        raise UserError(f"{args.queue}: no run called {' or '.join(args.only)} for --hardware {on}")
    status, end = 0, time.monotonic() + 60 * args.budget_minutes
    with stop_after(args.budget_minutes):
        for entry in entries if not args.dry_run else ():
            elsewhere, last = read_ledger(args)
            count = int((end - time.monotonic()) / 60 // entry.minutes) * (args.jobs or 1)
            try:
                run_tasks(
                    left(entry, last, args)[:count], args.results, jobs=args.jobs, before=elsewhere,
                    retry_failed=args.retry_failed, console=Console(highlight=False),
                )  # fmt: skip
            except UserError as error:
                print(f"failed: {error}", flush=True)
                status = 1
    show(entries, read_ledger(args)[1], args)  # read anew: the budget's end is anywhere
    return status


def read_ledger(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Row]]:
    """Return the lines of results in the files beside --results, and the last line of each key."""
    others = sorted(p for p in args.results.parent.glob("*.jsonl") if p.name != args.results.name)
    elsewhere = [row for path in others for row in read_results(path)]
    return elsewhere, {row_key(row): row for row in [*elsewhere, *read_results(args.results)]}


def left(entry: Entry, last: Mapping[str, Row], args: argparse.Namespace) -> list[Task]:
    """Return the runs of an entry that are still to do."""
    rows = [(task, last.get(task.key)) for task in entry.tasks]
    return [t for t, row in rows if row is None or (args.retry_failed and row.get("failed"))]


def show(entries: Sequence[Entry], last: Mapping[str, Row], args: argparse.Namespace) -> None:
    """Print what is left, entry by entry, and how many runs failed."""
    count, total = 0, 0.0
    for entry in entries:
        tasks = left(entry, last, args)
        minutes = len(tasks) * entry.minutes
        count, total = count + len(tasks), total + minutes
        if tasks:
            arms = ", ".join(dict.fromkeys(task.arm for task in tasks))
            what = f"{len(tasks)} of {_runs(len(entry.tasks))} of {tasks[0].recipe} ({arms})"
            print(f"left: {what}, about {minutes:.3g} minutes on {entry.hardware}")
    print(f"{_runs(count)} left, about {total:.3g} minutes; results in {args.results}")
    keys = {task.key for entry in entries for task in entry.tasks}
    if failed := sum(bool(row.get("failed")) for key, row in last.items() if key in keys):
        print(f"{_runs(failed)} failed and recorded so; --retry-failed runs them again")


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def read_queue(args: argparse.Namespace) -> list[Entry]:
    """Return the entries of the queue with the runs that --only names.

    Raises UserError for what is not known: recipes, arms, presets, settings; and for no run at all.
    """
    queue = load_toml(args.queue)
    check_entries(str(args.queue), queue, {"run"})
    entries, folders = [], dict[str, str]()
    for number, run in enumerate(queue["run"], 1):
        try:
            entries.append(_entry(run, args, folders))
        except UserError as error:
            raise UserError(f"{args.queue}, run {number}: {error}") from None
    if not any(entry.tasks for entry in entries):
        raise UserError(f"{args.queue}: no run is called {' or '.join(args.only)}")
    return [entry for entry in entries if entry.tasks]


def _entry(run: Row, args: argparse.Namespace, folders: dict[str, str]) -> Entry:
    """Return a [[run]] with those of its runs that --only names.

    `folders` gets the folder of every run by its name. "pattern=RUN" is replaced by that of the
    plain arm of the same seed, which has to come in an entry before, as it must be finished first.
    """
    check_entries("the run", run, {"recipe", "arms", "seeds", "minutes", "hardware"}, {"tables"})
    config, probes = read_recipe(args.queue.parent, run["recipe"])
    config = config.replace(device=args.device, data_root=args.data_root)
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
    return Entry(tasks, run["minutes"], run["hardware"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queue", type=Path, default=HERE / "queue.toml")
    parser.add_argument("--only", action="append", help="glob over RECIPE/ARM-sSEED, repeatable")
    parser.add_argument(
        "--hardware", choices=("cpu", "gpu", "all"),
        help="only runs meant for it; default: that of --device (all for --dry-run)",
    )  # fmt: skip
    parser.add_argument("--retry-failed", action="store_true", help="also runs that failed before")
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.only = args.only or ["*"]
    args.runs = args.runs or Path("runs/queue")
    args.results = args.results or HERE.parent / "results" / "queue.jsonl"
    return args


# --- shared with search.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that the runners share."""
    parser.add_argument("--budget-minutes", type=float, default=6e4, help="stop then")
    parser.add_argument("--results", type=Path, help="JSON lines; default: a file in results/")
    parser.add_argument("--runs", type=Path, help="run directories; default: a folder in runs/")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one per GPU or core")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--data-root", type=Path, help="local copies of data sets")
    parser.add_argument("--dry-run", action="store_true", help="only say what there is to do")


@contextlib.contextmanager
def stop_after(minutes: float) -> Iterator[None]:
    """End the block as Ctrl-C would when the minutes are over, and say so."""
    over = threading.Event()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A script's background job ignores interrupts, and the budget's end is one.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop() -> None:
        over.set()
        _thread.interrupt_main()  # like Ctrl-C: the run at work writes a checkpoint

    timer = threading.Timer(60 * minutes, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        if not over.is_set():
            raise
        print(f"the budget of {minutes:g} minutes is used up")
    finally:
        timer.cancel()


def guarded(program: str, work: Callable[[], int]) -> int:
    """Return the status of `work`; 2 and one line for a mistake, 130 for Ctrl-C and SIGTERM."""
    try:
        with terminable():
            return work()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
