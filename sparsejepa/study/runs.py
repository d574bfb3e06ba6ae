"""Runs and the probes on them, several at a time, one JSON line each.

A run that is finished is read, one that is not goes on from its newest checkpoint. Runs are
independent, so several go at once in processes of their own: two processes with one thread each get
more done on two cores than one process with two.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejepa.config import Config, check_pattern, preset
from sparsejepa.environment import cores
from sparsejepa.errors import UserError
from sparsejepa.results import append_row, read_results
from sparsejepa.study.cluster import Cluster, outcomes
from sparsejepa.study.progress import RunsProgress
from sparsejepa.study.tasks import Task, attempt, check_starts, opening, pixel_floor, row_key
from sparsejepa.study.workers import terminable, workers

if TYPE_CHECKING:
    from rich.console import Console

    from sparsejepa.training.loop import Run

_MOST = 16  # runs at a time, unless more are asked for
Outcomes = Generator[tuple[Task, dict[str, Any] | UserError], None, None]


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

    Lines of other versions are none of these, but their encoders may serve: see `run_and_probe`.

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
    check_starts(tasks)
    found: dict[str, list[dict[str, Any]]] = {}
    trained: dict[str, dict[str, Any]] = {}
    say = console.print if console else lambda line: None
    for row in [*before, *read_results(results, say)]:
        found.setdefault(row_key(row), []).append(row)
        if "encoder" in row:
            trained[row_key(row, run=True)] = row
    todo = []
    for task in tasks:
        rows = found.setdefault(task.key, [])
        if not rows:
            todo.append(replace(task, earlier=trained.get(task.run_key)))
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


def _check(tasks: Sequence[Task], elsewhere: bool = False) -> tuple[list[int], int]:
    """Return the steps of every run and how many GPUs they share, if data and folders are right.

    Loading the data here also decodes it once, before several processes would do so at a time. What
    runs `elsewhere` has no GPU of this machine.
    """
    import torch

    from sparsejepa.data.catalog import load_dataset, load_images
    from sparsejepa.environment import resolve_device
    from sparsejepa.evaluation.measured import check_measures
    from sparsejepa.evaluation.probe import check_protocols
    from sparsejepa.training.build import prepare, total_steps
    from sparsejepa.training.checkpoint import open_run
    from sparsejepa.training.monitor import check_trackers

    for task in tasks:
        check_trackers(task.config.run.log)
        if open_run(task.run_dir, task.config.check(), True) is None and not task.earlier:
            check_pattern(task.config)
        check_protocols(task.probes.protocols_on(task.probes.data[0]))
        check_measures(task.probes.measures)
    counts: dict[Any, int] = {}
    for task in tasks:
        images = (task.config.data, task.config.images)
        if images not in counts:
            counts[images] = len(prepare(task.config, load_images, task.run_dir)[2])
        for name in set(task.probes.data) - set(counts):
            train = load_dataset(name, "train", **opening(task, name))
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
                    outcome = attempt(task, console)
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
        waiting = deque([(pixel_floor, tasks[0]), *((attempt, task) for task in tasks)])
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
                    if step is attempt:
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
    found = outcomes(cluster, named, attempt, at_a_time=most, gpus=gpus, say=say)
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


def pretrain(
    data: str | Path | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> Run:
    """Pretrain on a data set by name and return the finished run, see `training.loop.train`.

    `data` names the images (see ``sparsejepa data list``) or is a whole `Config`; `settings` are
    the flat names of `Config` (``lam=0.01, epochs=20, preset="nano"``).
    """
    from sparsejepa.data.catalog import load_images
    from sparsejepa.training.loop import train

    if isinstance(data, Config):
        config = data.replace(**settings)
    else:
        config = preset(settings.pop("preset", "best")).replace(data=str(data), **settings)
    return train(config, load_images, out=out, resume=resume, console=console)
