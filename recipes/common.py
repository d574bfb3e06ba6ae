"""What the runners in this folder share: recipes, the budget of minutes, the command line."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import functools
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsejepa.benchmarks.packing import Packing, choose, measure
from sparsejepa.config import Config, load_toml, preset
from sparsejepa.environment import cores, environment, resolve_device
from sparsejepa.errors import UserError, nearest
from sparsejepa.tasks import Probes, Task
from sparsejepa.workers import terminable

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


def jobs_for(args: argparse.Namespace, tasks: Sequence[Task]) -> int | None:
    """Return how many runs to do at a time; with --jobs auto see `measured_rates`."""
    if args.jobs != "auto":
        return args.jobs
    if len(tasks) < 2:
        return 1
    rates = measured_rates(args, tasks[0].config)
    return choose([Packing(count, 1, rate) for count, rate in rates.items()]).processes


def kept_rates(args: argparse.Namespace, config: Config) -> dict[int, float]:
    """Return images/s of 1, 2, 4, ... runs at a time, together; empty if never measured here.

    They are kept beside the runs, for each encoder, batch size, data set and device.
    """
    path = args.runs / "packing.json"
    if not path.exists():
        return {}
    from sparsejepa.files import read_json  # here, as it brings torch

    rates = read_json(path).get(_alike(args, config), {})
    return {int(count): rate for count, rate in rates.items()}


def measured_rates(args: argparse.Namespace, config: Config) -> dict[int, float]:
    """Return `kept_rates`, which are measured if there are none yet."""
    rates = kept_rates(args, config)
    if rates:
        return rates
    from sparsejepa.files import read_json, write_text

    found = measure(config, cores())
    rates = {packing.processes: round(packing.images_per_second, 1) for packing in found}
    path, name = args.runs / "packing.json", _alike(args, config)
    kept = read_json(path) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**kept, name: rates}, indent=1))
    said = ", ".join(f"{rate:.0f} images/s with --jobs {count}" for count, rate in rates.items())
    print(f"{name}: {said}", flush=True)
    return rates


def _alike(args: argparse.Namespace, config: Config) -> str:
    """Return what runs have in common that are packed alike."""
    model, compiled = config.model, ", compiled" * config.run.compile
    network = f"{config.data}, {model.encoder}/{model.patch_size}{compiled}"
    return f"{network}, batch {config.optim.batch_size} on {_hardware(args.device)}"


@functools.cache
def _hardware(device: str) -> str:
    here, (kind, _, index) = environment(), resolve_device(device).partition(":")
    return here["gpus"][int(index or 0)] if kind == "cuda" else f"{cores()} x {here['cpu']}"


def _jobs(word: str) -> int | str:
    """Read --jobs."""
    if word != "auto" and not (word.isdigit() and int(word)):
        raise argparse.ArgumentTypeError("auto or a number from 1")
    return word if word == "auto" else int(word)


def add_arguments(parser: argparse.ArgumentParser, results: str, runs: str) -> None:
    """Add the flags that the runners share; the texts say where results and runs are kept."""
    parser.add_argument("--budget-minutes", type=float, default=6e4, help="stop then")
    parser.add_argument("--results", type=Path, help=f"default: {results}")
    parser.add_argument(
        "--jobs", type=_jobs, help="runs at a time; auto (not for --scale smoke) measures"
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
    args.jobs = args.jobs or (None if smoke else "auto")
    args.runs = args.runs or Path("runs") / (f"{runs}-smoke" if smoke else runs)
    kept = args.runs / "results.jsonl" if smoke else HERE.parent / "results" / results
    args.results = args.results or kept
