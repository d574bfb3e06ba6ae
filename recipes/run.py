"""Work through recipes/queue.toml within a time budget: train, probe, one JSON line per run.

    python recipes/run.py --budget-minutes 60

Runs with a line in --results are skipped; one that the budget, Ctrl-C or a kill ended goes on from
its checkpoint next time.
"""

from __future__ import annotations

import _thread
import argparse
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsejepa.config import Config, load_toml, preset
from sparsejepa.errors import UserError, nearest
from sparsejepa.runs import Probes, Task, read_rows, row_key, run_tasks
from sparsejepa.sweep import arm_settings

HERE = Path(__file__).resolve().parent
# A run of seconds that shows that everything works.
SMOKE = {"limit": 256, "steps": 4, "batch_size": 32, "img_size": 32}
Entry = tuple[list[Task], str]  # a [[run]] of the queue: its runs, and what one of them takes


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if all went well, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C."""
    args = parse(argv)
    try:
        entries = list(read_queue(args))
        if args.dry_run:
            return report(entries, args, "to do")
        return work(entries, args)
    except UserError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run.py: interrupted; the same command goes on from there", file=sys.stderr)
        return 130


def work(entries: Sequence[Entry], args: argparse.Namespace) -> int:
    """Run the entries in order until the budget ends."""
    over, console = threading.Event(), Console(highlight=False)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A script's background job ignores interrupts, and the budget's end is one.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop() -> None:
        over.set()
        _thread.interrupt_main()  # like Ctrl-C: the run at work writes a checkpoint

    timer, status = threading.Timer(60 * args.budget_minutes, stop), 0
    timer.daemon = True
    try:
        timer.start()
        for tasks, _ in entries:
            try:
                run_tasks(tasks, args.results, jobs=args.jobs, console=console)
            except UserError as error:
                print(f"failed: {error}", flush=True)
                status = 1
    except KeyboardInterrupt:
        if not over.is_set():
            raise
        print(f"the budget of {args.budget_minutes:g} minutes is used up")
    finally:
        timer.cancel()
    report(entries, args, "left")
    return status


def read_queue(args: argparse.Namespace) -> Iterator[Entry]:
    """Yield the queue's entries. Raises UserError for unknown recipes, arms, presets, settings."""
    for number, run in enumerate(load_toml(args.queue).get("run", []), 1):
        where = f"{args.queue}, run {number}"
        missing = {"recipe", "arms", "seeds"} - set(run)
        if missing:
            raise UserError(f"{where}: '{min(missing)}' is missing")
        try:
            config, probes = read_recipe(args.queue.parent, run["recipe"])
            if args.scale == "smoke":
                config = config.replace(**SMOKE)
            config = config.replace(device=args.device, data_root=args.data_root)
            tasks = []
            for seed in run["seeds"]:
                for arm in run["arms"]:
                    name = f"{run['recipe']}/{arm}-s{seed}"
                    one = config.replace(**arm_settings(arm), seed=seed).check()
                    if fnmatch(name, args.only) or fnmatch(name, f"{args.only}/*"):
                        command = shlex.join(["python", "recipes/run.py", "--only", name])
                        tasks.append(
                            Task(one, args.runs / name, probes, command, arm, run["recipe"])
                        )
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if tasks:
            yield tasks, f"about {run.get('minutes', '?')} minutes on {run.get('hardware', '?')}"


def read_recipe(folder: Path, name: str) -> tuple[Config, Probes]:
    """Return a recipe's settings and probes."""
    known = sorted(p.stem for p in folder.glob("*.toml") if p.stem != "queue")
    if name not in known:
        raise UserError(f"unknown recipe '{name}'{nearest(name, known)}; there are {known}")
    recipe = load_toml(folder / f"{name}.toml")
    settings: dict[str, Any] = dict(recipe["settings"])
    config = preset(settings.pop("preset", "best")).replace(**settings)
    targets = {data: tuple(names) for data, names in recipe.get("targets", {}).items()}
    data = tuple(recipe.get("probe", (config.data,)))
    return config, Probes(data, targets=targets, limit=recipe.get("probe_limit"))


def report(entries: Sequence[Entry], args: argparse.Namespace, word: str) -> int:
    """Print the runs that --results has no line of, with their estimated minutes."""
    done = {row_key(row) for row in read_rows(args.results)}
    left = [(t, cost) for tasks, cost in entries for t in tasks if t.key not in done]
    for task, cost in left:
        print(f"{word}: {task.run_dir.relative_to(args.runs)}, {cost}")
    print(f"{len(left)} runs {word}; results in {args.results}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget-minutes", type=float, default=6e4, help="stop then")
    parser.add_argument("--queue", type=Path, default=HERE / "queue.toml")
    parser.add_argument("--results", type=Path, help="default: results/queue.jsonl")
    parser.add_argument("--runs", type=Path, help="run directories; default: runs/queue")
    parser.add_argument("--only", default="*", help="glob over RECIPE/ARM-sSEED")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--data-root", type=Path, help="local copies of data sets")
    parser.add_argument("--jobs", type=int, help="runs at a time")
    parser.add_argument("--scale", choices=("full", "smoke"), default="full")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs to do")
    args = parser.parse_args(argv)
    smoke = args.scale == "smoke"
    args.runs = args.runs or Path("runs/queue-smoke" if smoke else "runs/queue")
    kept = args.runs / "results.jsonl" if smoke else HERE.parent / "results" / "queue.jsonl"
    args.results = args.results or kept
    return args


if __name__ == "__main__":
    sys.exit(main())
