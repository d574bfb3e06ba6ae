"""What the runners in this folder share: recipes, the budget of minutes, the command line."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsejepa.config import Config, load_toml, preset
from sparsejepa.errors import UserError, nearest
from sparsejepa.study.tasks import Probes
from sparsejepa.study.workers import terminable

HERE = Path(__file__).resolve().parent
SMOKE = {"limit": 128, "steps": 4, "batch_size": 16, "img_size": 32, "holdout": 128}
"""Settings of a run of seconds that shows that it can be built, trained and probed."""


def smoke_probes(probes: Probes) -> Probes:
    """Return the cheapest of the probes: logistic, on images set aside from the first data set."""
    return Probes(probes.data[:1], targets=probes.targets, limit=SMOKE["limit"])


_ABOUT = {"about", "command", "hardware", "minutes", "expected", "settings"}
_PROBES = {"probe": "data", "probe_limit": "limit"}  # others have the names that Probes gives them


def read_recipe(folder: Path, name: str) -> tuple[Config, Probes]:
    """Return a recipe's settings and probes. Raises UserError naming what is not known."""
    known = sorted(path.stem for path in recipe_files(folder))
    if name not in known:
        raise UserError(f"unknown recipe '{name}'{nearest(name, known)}; there are {known}")
    path = folder / f"{name}.toml"
    recipe = load_toml(path)
    if "settings" not in recipe:
        raise UserError(f"{path}: [settings] is missing")
    settings: dict[str, Any] = dict(recipe["settings"])
    config = preset(settings.pop("preset", "best")).replace(**settings)
    probed: dict[str, Any] = {"data": (config.data,)}
    fields = {*Probes.__dataclass_fields__} - {*_PROBES.values()}
    for key, value in recipe.items():
        if key not in {*_ABOUT, *_PROBES, *fields}:
            hint = nearest(key, {*_ABOUT, *_PROBES, *fields})
            raise UserError(f"{path}: unknown entry '{key}'{hint}")
        if key not in _ABOUT:
            probed[_PROBES.get(key, key)] = tuple(value) if isinstance(value, list) else value
    probed["targets"] = {data: tuple(names) for data, names in recipe.get("targets", {}).items()}
    return config, Probes(**probed)


def recipe_files(folder: Path) -> list[Path]:
    """Return the recipes of a folder: not the queue, no search."""
    return [p for p in folder.glob("*.toml") if p.stem != "queue" and p.stem[:7] != "search-"]


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


def check_entries(
    where: str, values: Any, needed: Mapping[str, type], free: Mapping[str, type] | None = None
) -> None:
    """Raise UserError unless `values` is a table with the entries that are expected."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a table")
    kinds = {**needed, **(free or {})}
    for name, value in values.items():
        if name not in kinds:
            raise UserError(f"{where}: unknown entry '{name}'{nearest(name, kinds)}")
        allowed = (int, float) if kinds[name] is float else kinds[name]
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise UserError(f"{where}: '{name}' must be a {kinds[name].__name__}")
    for name in needed:
        if name not in values:
            raise UserError(f"{where}: '{name}' is missing")


def _jobs(word: str) -> int:
    """Read --jobs."""
    if not (word.isdigit() and int(word)):
        raise argparse.ArgumentTypeError("a number from 1")
    return int(word)


def add_arguments(parser: argparse.ArgumentParser, results: str, runs: str) -> None:
    """Add the flags that the runners share; the texts say where results and runs are kept."""
    parser.add_argument("--budget-minutes", type=float, default=6e4, help="stop then")
    parser.add_argument("--results", type=Path, help=f"default: {results}")
    parser.add_argument(
        "--jobs", type=_jobs, help="runs at a time; default: one per GPU, on the CPU one per core"
    )
    parser.add_argument("--runs", type=Path, help=f"run directories; default: {runs}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    parser.add_argument("--data-root", type=Path, help="local copies of data sets")
    parser.add_argument("--scale", choices=("full", "smoke"), default="full")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs to do")


def here(args: argparse.Namespace, config: Config) -> Config:
    """Return settings as the command line wants them on this machine; they change no number."""
    config = config.replace(device=args.device, data_root=args.data_root)
    return config.replace(compile=True) if args.compile else config


def place(args: argparse.Namespace, runs: str, results: str) -> None:
    """Fill in where runs and results are kept; those of --scale smoke lie apart."""
    smoke = args.scale == "smoke"
    args.runs = args.runs or Path("runs") / (f"{runs}-smoke" if smoke else runs)
    kept = args.runs / "results.jsonl" if smoke else HERE.parent / "results" / results
    args.results = args.results or kept
