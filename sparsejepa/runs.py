"""Runs and the probes on them, several at a time, one JSON line each.

A run that is finished is read, one that is not goes on from its newest checkpoint. Runs are
independent, so several go at once in processes of their own: two processes with one thread each get
more done on two cores than one process with two.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejepa.cluster import Cluster, outcomes
from sparsejepa.config import Config
from sparsejepa.environment import cores
from sparsejepa.errors import UserError
from sparsejepa.report.progress import RunsProgress
from sparsejepa.results import append_row, read_results
from sparsejepa.results import read_rows as read_rows
from sparsejepa.workers import terminable, workers

if TYPE_CHECKING:
    from rich.console import Console

    from sparsejepa.interop import Encoder

_MOST = 16  # runs at a time, unless more are asked for
# Settings that change no number.
_FREE = {
    "data_root", "device", "threads", "compile", "checkpoint_every", "log_every", "log", "preset",
}  # fmt: skip


@dataclass(frozen=True)
class Probes:
    """What a run is probed on, see `evaluation.probe.evaluate`.

    `targets` names some of a data set's targets (all if it is not in there), `limit` is the largest
    number of labelled training images. On the first data set come `extra_protocols` as well, and
    the `measures` of `evaluation.measured`.
    """

    data: tuple[str, ...]
    protocols: tuple[str, ...] = ("logistic",)
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limit: int | None = None
    measures: tuple[str, ...] = ()
    extra_protocols: tuple[str, ...] = ()

    def protocols_on(self, data: str) -> tuple[str, ...]:
        """Return the protocols for a data set."""
        return self.protocols + (self.extra_protocols if data == self.data[0] else ())


@dataclass(frozen=True)
class Task:
    """One run and the probes on it; `command` is what repeats it.

    `arm` is the run's name among its twins, by default that of `training.build.arm_name`; `recipe`
    the one that it belongs to, if any; `trial` what a search has to say about it; `jobs` how many
    runs share the machine meanwhile.
    """

    config: Config
    run_dir: Path
    probes: Probes
    command: str = ""
    arm: str = ""
    recipe: str = ""
    trial: Mapping[str, Any] | None = None
    jobs: int = 1

    @functools.cached_property
    def key(self) -> str:
        """Hash of all that the numbers depend on: settings, seed and probes."""
        return _key(self.config, asdict(self.probes))


Outcomes = Generator[tuple[Task, dict[str, Any] | UserError], None, None]


def row_key(row: Mapping[str, Any]) -> str:
    """Return the key of a line of results, made anew from its settings.

    A setting that came later has its default there, which must be what was done before: so a key
    outlives new settings. A line that cannot be read so keeps the key that it was written with.
    """
    if "probed" not in row:
        return str(row["key"])
    try:
        return _key(Config.from_dict(row["settings"], "results"), row["probed"])
    except (ValueError, LookupError, TypeError, AttributeError):  # UserError is a ValueError
        return str(row["key"])


def _key(config: Config, probes: Mapping[str, Any]) -> str:
    settings = {k: v for k, v in config.flat().items() if k not in _FREE}
    # What came later counts only where it is used, so that older lines keep their keys.
    later = {"measures", "extra_protocols"}
    return _hash([settings, {k: v for k, v in probes.items() if v or k not in later}])


def run_tasks(
    tasks: Sequence[Task],
    results: Path,
    *,
    jobs: int | None = None,
    before: Sequence[dict[str, Any]] = (),
    again: Callable[[Mapping[str, Any]], object] = lambda row: False,
    cluster: Cluster | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Train and probe each task that `results` has no line of; return the lines of all, in order.

    Args:
        results: JSON-lines file; one line is appended per finished run, and per run that ended
            because a loss was not finite or exploded: its "failed" says so.
        jobs: runs at a time; if not given one per GPU, on the CPU one per core, four at most. They
            take turns on the GPUs.
        before: lines of other files, which count as those of `results` do.
        again: says of a line whether its run is to be done again, from the start; the second one
            lies in RUN_DIR~2 and the last line counts.
        cluster: where each run is a job; if not given they are processes of this one.
        console: where progress and finished runs are shown; silent if not given.

    Ctrl-C and SIGTERM stop every run after a checkpoint. Raises UserError before any work for data
    or run directories that do not fit, and after the other runs if one of them failed, whatever
    the reason.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    found: dict[str, list[dict[str, Any]]] = {}
    say = console.print if console else lambda line: None
    for row in [*before, *read_results(results, say)]:
        found.setdefault(row_key(row), []).append(row)
    todo = []
    for task in tasks:
        rows = found.setdefault(task.key, [])
        if not rows:
            todo.append(task)
        elif again(rows[-1]):
            beside = task.run_dir.with_name(f"{task.run_dir.name}~{len(rows) + 1}")
            todo.append(replace(task, run_dir=beside))
    failed = []
    found_here = _outcomes if cluster is None else functools.partial(_from_jobs, cluster.check())
    with terminable(), contextlib.closing(found_here(todo, jobs, console, len(tasks))) as ended:
        for task, outcome in ended:
            if isinstance(outcome, UserError):
                failed.append(outcome)
            else:
                found[task.key].append(outcome)
                append_row(results, outcome)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(todo)} runs failed, the others are kept; the first: {failed[0]}"
        )
    return [found[task.key][-1] for task in tasks]


def _attempt(task: Task, console: Console | None = None) -> dict[str, Any]:
    """Return the line of a run, also of one that ended because a loss was not finite or exploded.

    Raises UserError for whatever else ends it, memory that is not enough for instance.
    """
    from sparsejepa.environment import environment
    from sparsejepa.training.build import arm_name
    from sparsejepa.training.loop import code_of

    begun = code_of(task.run_dir)
    try:
        row = {**run_and_probe(task, console), "failed": None}
    except Exception as error:
        if not isinstance(error, UserError):
            what = " ".join(f"{type(error).__name__}: {error}".split())
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{where.filename}, line {where.lineno}"
            raise UserError(f"{task.run_dir}: {what} ({at})") from None
        failure = r"(finetune: loss|(?<=')\w+)'? ((?:is not finite|exploded) at step \d+)"
        found = re.search(failure, str(error))
        if not found:
            raise
        row = {
            "key": task.key,
            "recipe": task.recipe,
            "arm": task.arm or arm_name(task.config),
            "seed": task.config.run.seed,
            "data": task.config.data,
            "failed": f"{found[1]} {found[2]}",
            "probes": [],
            "jobs": task.jobs,
            "command": task.command,
            "settings": task.config.replace(data_root=None).to_dict(),
            "probed": asdict(task.probes),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    row["environment"] = environment(begun)
    if task.trial is not None:
        score = row["probes"][0]["accuracy"] if row["probes"] else None
        row["trial"] = {**task.trial, "score": score}
    return json.loads(json.dumps(row))  # as it will be read back


def run_and_probe(task: Task, console: Console | None = None) -> dict[str, Any]:
    """Train (or go on with, or read) one run, probe it and return its line of results.

    "seconds" and "probe_seconds" are wall time; "gpu_seconds" is their sum divided by "jobs", the
    runs that shared the GPU, and 0 on the CPU.
    """
    from sparsejepa.environment import environment, resolve_device
    from sparsejepa.training.loop import pretrain

    run = pretrain(task.config, out=task.run_dir, resume=True, console=console)
    began = time.perf_counter()
    probes, measures = _probe(task), _measures(task)
    probe_seconds = time.perf_counter() - began
    seconds = run.summary["seconds"]
    on_gpu = resolve_device(task.config.run.device).startswith("cuda")
    final = run.summary["final"]
    w = load_w(task.run_dir)
    row = {
        "key": task.key,
        "recipe": task.recipe,
        "arm": task.arm or run.summary["arm"],
        "seed": run.summary["seed"],
        "data": task.config.data,
        "probes": probes,
        "measures": measures,
        **{name: final.get(name) for name in ("knn", "rankme", "density", "groups_per_latent")},
        "dead_groups": final.get("dead_groups"),
        "nonzero_elements": None if w is None else int((w != 0).sum()),
        "elements": None if w is None else int(w.size),
        "alarms": run.summary["alarms"],
        "steps": run.summary["steps"],
        "seconds": round(seconds, 1),
        "probe_seconds": round(probe_seconds, 1),
        "jobs": task.jobs,
        "gpu_seconds": round((seconds + probe_seconds) / task.jobs, 1) if on_gpu else 0,
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
    from sparsejepa.environment import code_version, resolve_device
    from sparsejepa.evaluation.probe import FLOOR_VERSION
    from sparsejepa.files import write_text
    from sparsejepa.interop import load

    encoder = load(task.run_dir, resolve_device(task.config.run.device))
    rows, seed = _evaluate(task, encoder), task.config.run.seed
    if seed:
        about = [encoder.architecture, encoder.precision, _fingerprints(task)]
        key = _hash([asdict(task.probes), *about, FLOOR_VERSION, code_version()])
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
            protocols=task.probes.protocols_on(data),
            targets=task.probes.targets.get(data),
            floors=floors,
            limit=task.probes.limit,
            holdout=_holdout(task, data),
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


def _holdout(task: Task, data: str) -> int:
    """Return how many training images of `data` the run never saw: it is scored on them."""
    return task.config.images.holdout if data == task.config.data else 0


def _fingerprints(task: Task) -> list[str]:
    """Return the fingerprints of all images that the probes of a task see."""
    from sparsejepa.evaluation.probe import load_splits

    return [
        images.fingerprint
        for data in task.probes.data
        for images in load_splits(data, _holdout(task, data), **_opening(task, data))
    ]


def _measures(task: Task) -> dict[str, Any]:
    """Return the measures that are asked for, on the first data set."""
    from sparsejepa.environment import resolve_device
    from sparsejepa.evaluation.measured import measure
    from sparsejepa.interop import load, load_groups

    encoder, data = load(task.run_dir, resolve_device(task.config.run.device)), task.probes.data[0]
    groups = load_groups(task.run_dir, encoder.grid_size)
    return measure(
        task.probes.measures,
        encoder,
        None if groups is None else groups.W,
        data,
        targets=task.probes.targets.get(data),
        limit=task.probes.limit,
        holdout=_holdout(task, data),
        seed=task.config.run.seed,
        **_opening(task, data),
    )


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


def _check(tasks: Sequence[Task], elsewhere: bool = False) -> tuple[list[int], int]:
    """Return the steps of every run and how many GPUs they share, if data and folders are right.

    Loading the data here also decodes it once, before several processes would do so at a time. What
    runs `elsewhere` has no GPU of this machine.
    """
    import torch

    from sparsejepa.data.catalog import load_dataset
    from sparsejepa.environment import resolve_device
    from sparsejepa.evaluation.measured import check_measures
    from sparsejepa.evaluation.probe import check_protocols
    from sparsejepa.training.build import load_images, total_steps
    from sparsejepa.training.loggers import check_loggers
    from sparsejepa.training.loop import open_run

    for task in tasks:
        check_loggers(task.config.run.log)
        open_run(task.run_dir, task.config.check(), True)
        check_protocols(task.probes.protocols_on(task.probes.data[0]))
        check_measures(task.probes.measures)
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
    device = "cpu" if elsewhere else resolve_device(tasks[0].config.run.device)
    gpus = {"cpu": 0, "cuda": torch.cuda.device_count()}
    return steps, gpus.get(device, 1)


def _outcomes(
    tasks: Sequence[Task], jobs: int | None, console: Console | None, total: int
) -> Outcomes:
    """Yield each task with its line, or with its UserError, as they finish."""
    if not tasks:
        return
    runs = [task.run_dir for task in tasks]
    processes = min(jobs or min(_MOST, cores()), len(tasks))
    if processes == 1:
        steps, _ = _check(tasks)
        with RunsProgress(console, runs, steps, total, 1, bar=False) as progress:
            for task in tasks:
                try:
                    outcome = _attempt(task, console)
                except UserError as error:
                    outcome = error
                progress.finished(task.run_dir, outcome)
                yield task, outcome
        return
    with workers(processes) as submit:
        # Done by a worker, so that this process needs no torch, most of a small run's memory.
        steps, gpus = submit(_check, tasks).result()
        processes = min(processes, jobs or gpus or 4)
        if tasks[0].config.run.threads is None:
            threads = max(1, cores() // processes)
            tasks = [replace(t, config=t.config.replace(threads=threads)) for t in tasks]
        sharing = -(-processes // max(1, gpus))
        tasks = [replace(task, jobs=sharing if gpus else processes) for task in tasks]
        # The raw-pixel floor, which all need, goes first; a run that ends finds it done.
        waiting = deque([(_pixel_floor, tasks[0]), *((_attempt, task) for task in tasks)])
        running: dict[Future[Any], tuple[Any, Task, int]] = {}
        with RunsProgress(console, runs, steps, total, processes, bar=True) as progress:
            while waiting or running:
                # Each worker gets one thing at a time, so that a stop has nothing to recall.
                while waiting and len(running) < processes:
                    step, task = waiting.popleft()
                    busy = {slot for *_, slot in running.values()}
                    slot = next(slot for slot in range(processes) if slot not in busy)
                    if gpus > 1 and task.config.run.device in ("auto", "cuda"):
                        own = task.config.replace(device=f"cuda:{slot % gpus}")
                        task = replace(task, config=own)
                    future = submit(step, task, threads=task.config.run.threads)
                    running[future] = step, task, slot
                done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    step, task, _ = running.pop(future)
                    error = future.exception()
                    if error is not None and not isinstance(error, UserError):
                        raise error
                    if step is _attempt:
                        outcome = error or future.result()
                        progress.finished(task.run_dir, outcome)
                        yield task, outcome
                progress.tick()


def _from_jobs(
    cluster: Cluster, tasks: Sequence[Task], jobs: int | None, console: Console | None, total: int
) -> Outcomes:
    """Yield as `_outcomes` does, each run being a job of a cluster."""
    if not tasks:
        return
    steps, gpus = _check(tasks, cluster.kind == "slurm")
    most = cluster.at_a_time(jobs, gpus)
    if cluster.kind == "local" and most and tasks[0].config.run.threads is None:
        threads = max(1, cores() // most)
        tasks = [replace(t, config=t.config.replace(threads=threads)) for t in tasks]
    named = {f"{task.run_dir.name}.{task.key}": task for task in tasks}
    say = console.print if console else lambda line: None
    found = outcomes(cluster, named, _attempt, at_a_time=most, gpus=gpus, say=say)
    runs, shown = [task.run_dir for task in tasks], min(most or len(tasks), len(tasks))
    with (
        RunsProgress(console, runs, steps, total, shown, bar=True) as progress,
        contextlib.closing(found) as ended,
    ):
        for end in ended:
            if end is not None:
                progress.finished(end[0].run_dir, end[1])
                yield end
            progress.tick()


def _pixel_floor(task: Task) -> None:
    with contextlib.suppress(Exception):  # the runs meet it again, and say so
        _evaluate(task)
