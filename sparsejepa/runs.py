"""Runs and the probes on them, several at a time, one JSON line each.

A run that is finished is read, one that is not goes on from its newest checkpoint. Runs are
independent, so several go at once in processes of their own: two processes with one thread each get
more done on two cores than one process with two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejepa.config import Config
from sparsejepa.errors import UserError, nearest
from sparsejepa.workers import workers

if TYPE_CHECKING:
    from rich.console import Console

    from sparsejepa.interop import Encoder

# Settings that change no number.
_FREE = {"data_root", "device", "threads", "compile", "checkpoint_every", "log_every", "preset"}


@dataclass(frozen=True)
class Probes:
    """What a run is probed on, see `evaluation.probe.evaluate`.

    `targets` names some of a data set's targets (all if it is not in there), `limit` is the largest
    number of labelled training images.
    """

    data: tuple[str, ...]
    protocols: tuple[str, ...] = ("logistic",)
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limit: int | None = None


@dataclass(frozen=True)
class Task:
    """One run and the probes on it; `command` is what repeats it.

    `arm` is the run's name among its twins, by default that of `training.build.arm_name`; `recipe`
    the one that it belongs to, if any.
    """

    config: Config
    run_dir: Path
    probes: Probes
    command: str = ""
    arm: str = ""
    recipe: str = ""

    @property
    def key(self) -> str:
        """Hash of all that the numbers depend on: settings, seed and probes."""
        return _key(self.config, asdict(self.probes))


def row_key(row: Mapping[str, Any]) -> str:
    """Return the key of a line of results, made anew from its settings.

    A setting that came later has its default there, which must be what was done before: so a key
    outlives new settings. A line that cannot be read so keeps the key that it was written with.
    """
    if "probed" not in row:
        return row["key"]
    try:
        return _key(Config.from_dict(row["settings"], "results"), row["probed"])
    except UserError:
        return row["key"]


def _key(config: Config, probes: Mapping[str, Any]) -> str:
    settings = {k: v for k, v in config.flat().items() if k not in _FREE}
    return _hash([settings, probes])


def run_tasks(
    tasks: Sequence[Task],
    results: Path,
    *,
    jobs: int | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Train and probe each task that `results` has no line of; return the lines of all, in order.

    Args:
        results: JSON-lines file; one line is appended per finished run.
        jobs: runs at a time; on the CPU one per core, four at most, on a GPU one if not given.
        console: where progress and finished runs are shown; silent if not given.

    Ctrl-C stops every run after a checkpoint. Raises UserError before any work for data or run
    directories that do not fit, and after the other runs if one of them failed.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    found = {row_key(row): row for row in read_rows(results)}
    todo = [task for task in tasks if task.key not in found]
    failed = []
    with contextlib.closing(_outcomes(todo, jobs, console, len(tasks))) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, UserError):
                failed.append(outcome)
            else:
                found[task.key] = outcome
                append_row(results, outcome)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(todo)} runs failed, the others are kept; the first: {failed[0]}"
        )
    return [found[task.key] for task in tasks]


def run_and_probe(task: Task, console: Console | None = None) -> dict[str, Any]:
    """Train (or go on with, or read) one run, probe it and return its line of results."""
    from sparsejepa.environment import environment
    from sparsejepa.training.loop import pretrain

    run = pretrain(task.config, out=task.run_dir, resume=True, console=console)
    began = time.perf_counter()
    probes = _probe(task)
    final = run.summary["final"]
    w = load_w(task.run_dir)
    row = {
        "key": task.key,
        "recipe": task.recipe,
        "arm": task.arm or run.summary["arm"],
        "seed": run.summary["seed"],
        "data": task.config.data,
        "probes": probes,
        **{name: final.get(name) for name in ("knn", "rankme", "density", "groups_per_latent")},
        "dead_groups": final.get("dead_groups"),
        "nonzero_elements": None if w is None else int((w != 0).sum()),
        "elements": None if w is None else int(w.size),
        "alarms": run.summary["alarms"],
        "steps": run.summary["steps"],
        "seconds": round(run.summary["seconds"], 1),
        "probe_seconds": round(time.perf_counter() - began, 1),
        "images_per_second": round(run.summary["images_per_second"], 1),
        "command": task.command,
        "settings": task.config.replace(data_root=None).to_dict(),
        "probed": asdict(task.probes),
        "environment": environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.loads(json.dumps(row))  # as it will be read back


def _probe(task: Task) -> list[dict[str, Any]]:
    """Return a line per data set, target and protocol, with the floors.

    Probes and the raw-pixel floor are seeded alike for all runs; the untrained floor is that of
    another fresh encoder for each seed, so that it pairs with the runs. Floors are kept beside the
    run directories.
    """
    from sparsejepa.environment import resolve_device
    from sparsejepa.files import write_text
    from sparsejepa.interop import load

    encoder = load(task.run_dir, resolve_device(task.config.run.device))
    rows, seed = _evaluate(task, encoder), task.config.run.seed
    if seed:
        key = _hash([asdict(task.probes), encoder.architecture, _fingerprints(task)])
        path = _floors(task) / f"untrained-s{seed}-{key}.json"
        if not path.exists():
            twin = _evaluate(task, encoder.untrained(seed), floors=False)
            write_text(path, json.dumps(twin))
        for row, twin in zip(rows, json.loads(path.read_text()), strict=True):
            row["untrained"], row["untrained_interval"] = twin["accuracy"], twin["interval"]
    return rows


def _evaluate(task: Task, *encoders: Encoder, floors: bool = True) -> list[dict[str, Any]]:
    """Probe `encoders`; without any, only the raw-pixel floor is computed and kept."""
    from sparsejepa.environment import resolve_device
    from sparsejepa.evaluation.probe import evaluate

    return [
        {key: value for key, value in row.to_dict().items() if key != "encoder"}
        for data in task.probes.data
        for row in evaluate(
            encoders,
            data,
            protocols=task.probes.protocols,
            targets=task.probes.targets.get(data),
            floors=floors,
            limit=task.probes.limit,
            **_opening(task, data),
            cache_dir=_floors(task),
            device=resolve_device(task.config.run.device),
        )
    ]


def _opening(task: Task, data: str) -> dict[str, Any]:
    """Return how to open `data`: the run's own images as in pretraining, others at their size."""
    images = task.config.images
    size = images.img_size if data == task.config.data else ()
    return {
        "img_size": (size[0], size[-1]) if size else None,
        "upscale": images.upscale and data == task.config.data,
        "data_root": images.data_root,
    }


def _fingerprints(task: Task) -> list[str]:
    """Return the fingerprints of all images that the probes of a task see."""
    from sparsejepa.data.catalog import load_dataset

    return [
        load_dataset(data, split, **_opening(task, data)).fingerprint
        for data in task.probes.data
        for split in ("train", "test")
    ]


def _floors(task: Task) -> Path:
    return task.run_dir.parent / "floors"


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def load_w(run_dir: Path) -> Any:
    """Return W of a run as an array [G, P, D], None for a dense run."""
    from sparsejepa.files import load_tensors

    path = run_dir / "groups.safetensors"
    return load_tensors(path)[0]["W"].numpy() if path.exists() else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a missing one is empty, a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one line and make it durable; a torn last line is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            file.write(b"\n" if torn else b"")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _check(tasks: Sequence[Task]) -> tuple[list[int], bool]:
    """Return the steps of every run and whether they go on the CPU, if data and folders are right.

    Loading the data here also decodes it once, before several processes would do so at a time.
    """
    from sparsejepa.data.catalog import load_dataset
    from sparsejepa.environment import resolve_device
    from sparsejepa.evaluation.probe import PROTOCOLS
    from sparsejepa.training.build import load_images, total_steps
    from sparsejepa.training.loop import open_run

    for task in tasks:
        open_run(task.run_dir, task.config.check(), True)
        for protocol in task.probes.protocols:
            if protocol not in PROTOCOLS:
                hint = nearest(protocol, PROTOCOLS)
                raise UserError(f"--protocol {protocol}: there are {', '.join(PROTOCOLS)}{hint}")
    counts: dict[Any, int] = {}
    for task in tasks:
        images = (task.config.data, task.config.images)
        if images not in counts:
            counts[images] = len(load_images(task.config))
        for name in set(task.probes.data) - set(counts):
            train = load_dataset(name, "train", **_opening(task, name))
            if not any(len(target.names) > 1 for target in train.targets.values()):
                raise UserError(
                    f"{name}: has no labels of two classes or more to probe on; name labelled data "
                    "with --data-eval"
                )
            counts[name] = len(train)
    steps = [
        total_steps(task.config, counts[task.config.data, task.config.images]) for task in tasks
    ]
    return steps, resolve_device(tasks[0].config.run.device) == "cpu"


def _outcomes(
    tasks: Sequence[Task], jobs: int | None, console: Console | None, total: int
) -> Generator[tuple[Task, dict[str, Any] | UserError], None, None]:
    """Yield each task with its line, or with its UserError, as they finish."""
    if not tasks:
        return
    cores = _cores()
    processes = min(jobs or min(4, cores), len(tasks))
    if processes == 1:
        steps, _ = _check(tasks)
        with _Progress(console, tasks, steps, total, 1, bar=False) as progress:
            for task in tasks:
                try:
                    outcome = run_and_probe(task, console)
                except UserError as error:
                    outcome = error
                progress.finished(task, outcome)
                yield task, outcome
        return
    with workers(processes) as submit:
        # Done by a worker, so that this process needs no torch, most of a small run's memory.
        steps, on_cpu = submit(_check, tasks).result()
        processes = processes if on_cpu or jobs else 1
        if on_cpu and tasks[0].config.run.threads is None:
            threads = max(1, cores // processes)
            tasks = [replace(t, config=t.config.replace(threads=threads)) for t in tasks]
        # The raw-pixel floor, which all need, goes first; a run that ends finds it done.
        waiting = deque([(_pixel_floor, tasks[0]), *((run_and_probe, task) for task in tasks)])
        running: dict[Future[Any], tuple[Any, Task]] = {}
        with _Progress(console, tasks, steps, total, processes, bar=True) as progress:
            while waiting or running:
                # Each worker gets one thing at a time, so that a stop has nothing to recall.
                while waiting and len(running) < processes:
                    step, task = waiting.popleft()
                    future = submit(step, task, threads=task.config.run.threads)
                    running[future] = step, task
                done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    step, task = running.pop(future)
                    error = future.exception()
                    if error is not None and not isinstance(error, UserError):
                        raise error
                    if step is run_and_probe:
                        outcome = error or future.result()
                        progress.finished(task, outcome)
                        yield task, outcome
                progress.tick()


def _pixel_floor(task: Task) -> None:
    _evaluate(task)


class _Progress:
    """A line per finished run and, on a terminal, one bar over all runs."""

    def __init__(
        self,
        console: Console | None,
        tasks: Sequence[Task],
        steps: Sequence[int],
        total: int,
        jobs: int,
        *,
        bar: bool,
    ) -> None:
        self._console, self._tasks, self._steps = console, tasks, steps
        self._done, self._bar = 0, None
        if bar and console is not None and console.is_terminal:
            from rich.progress import Progress

            self._bar = Progress(console=console)
            self._line = self._bar.add_task("", total=sum(steps))
        self._say(f"{len(tasks)} of {total} runs to do, {jobs} at a time")

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def tick(self) -> None:
        if self._bar:
            pairs = zip(self._tasks, self._steps, strict=True)
            steps = sum(min(_last_step(task.run_dir), most) for task, most in pairs)
            text = f"{self._done} of {len(self._tasks)} runs"
            self._bar.update(self._line, completed=steps, description=text)

    def finished(self, task: Task, row: dict[str, Any] | UserError) -> None:
        from sparsejepa.report.summary import measure_name

        self._done += 1
        if isinstance(row, UserError):
            self._say(f"{task.run_dir.name}: failed: {row}")
            return
        first = row["probes"][0]
        text = f"{task.run_dir.name}: {measure_name(first)} {100 * first['accuracy']:.1f} %"
        if row["groups_per_latent"] is not None:
            text += f", {row['groups_per_latent']:.1f} groups per latent"
        self._say(f"{text}, {row['seconds']:.0f} s + {row['probe_seconds']:.0f} s probes")
        for alarm in row["alarms"]:
            self._say(f"  alarm: {alarm}")

    def _say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False)


def _last_step(run_dir: Path) -> int:
    """Return the steps that a run has done so far, by the end of its metrics.jsonl."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()[1:]
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError):
            return json.loads(line)["step"] + 1
    return 0


def _cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
