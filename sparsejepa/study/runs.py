"""Runs and the probes on them, several at a time, one JSON line each.

A run that is finished is read, one that is not goes on from its newest checkpoint. Runs are
independent, so several go at once in processes of their own: two processes with one thread each get
more done on two cores than one process with two.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from sparsejepa.config import check_pattern
from sparsejepa.data.catalog import load_dataset, load_images
from sparsejepa.environment import cores, resolve_device
from sparsejepa.errors import UserError
from sparsejepa.evaluation.measured import check_measures
from sparsejepa.evaluation.probe import check_protocols
from sparsejepa.study.cluster import Cluster, outcomes
from sparsejepa.study.results import append_row, read_results
from sparsejepa.study.tasks import Task, attempt, opening, row_key
from sparsejepa.study.verdict import measure_name
from sparsejepa.study.workers import terminable, workers
from sparsejepa.training.build import prepare, total_steps
from sparsejepa.training.checkpoint import open_run
from sparsejepa.training.monitor import check_trackers

_MOST = 16  # runs at a time, unless more are asked for
_LINE_SECONDS = 30.0
"""How often progress is said where there is no terminal to show a bar on."""
Outcomes = Generator[tuple[Task, dict[str, Any] | UserError] | None, None, None]


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
    console = console or Console(quiet=True)
    found: dict[str, list[dict[str, Any]]] = {}
    trained: dict[str, dict[str, Any]] = {}
    for row in [*before, *read_results(results, console.print)]:
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
    check_tasks(todo)
    failed = []
    ways = _from_jobs(cluster, todo, jobs, console) if cluster else _outcomes(todo, jobs, console)
    with terminable(), contextlib.closing(ways) as ended, _Progress(console, todo, tasks) as shown:
        for end in ended:
            shown.tick()
            if end is None:
                continue
            task, outcome = end
            shown.finished(task.run_dir, outcome)
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


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise UserError for settings, data or run directories of tasks that do not fit.

    Loading the data here also decodes it once, before several processes would do so at a time.
    """
    known: set[Any] = set()
    for task in tasks:
        check_trackers(task.config.run.log)
        if open_run(task.run_dir, task.config.check(), True) is None and not task.earlier:
            check_pattern(task.config)
        check_protocols(task.probes.protocols_on(task.probes.data[0]))
        check_measures(task.probes.measures)
        images = (task.config.data, task.config.images)
        if images not in known:
            _, config, loaded = prepare(task.config, load_images, task.run_dir)
            total_steps(config, len(loaded))
        for name in set(task.probes.data) - known:
            train = load_dataset(name, "train", **opening(task, name))
            if not any(len(target.names) > 1 for target in train.targets.values()):
                raise UserError(
                    f"{name}: has no labels of two classes or more to probe on; name labelled data "
                    "with --data-eval"
                )
        known |= {images, *task.probes.data}


def _outcomes(tasks: Sequence[Task], jobs: int | None, console: Console) -> Outcomes:
    """Yield each task with its line, or with its UserError, as they finish; None meanwhile."""
    if not tasks:
        return
    on_cuda = resolve_device(tasks[0].config.run.device).startswith("cuda")
    gpus = torch.cuda.device_count() if on_cuda else 0
    processes = min(jobs or gpus or min(4, cores()), _MOST if jobs is None else jobs, len(tasks))
    if processes == 1:
        for task in tasks:
            try:
                yield task, attempt(task, console)
            except UserError as error:
                yield task, error
        return
    if tasks[0].config.run.threads is None:
        threads = max(1, cores() // processes)
        tasks = [replace(t, config=t.config.replace(threads=threads)) for t in tasks]
    sharing = -(-processes // gpus) if gpus else processes
    waiting = deque(replace(task, jobs=sharing) for task in tasks)
    running: dict[Future[Any], tuple[Task, int]] = {}
    with workers(processes) as submit:
        while waiting or running:
            # Each worker gets one thing at a time, so that a stop has nothing to recall.
            while waiting and len(running) < processes:
                task = waiting.popleft()
                slot = min({*range(processes)} - {slot for _, slot in running.values()})
                if gpus > 1 and task.config.run.device in ("auto", "cuda"):
                    own = task.config.replace(device=f"cuda:{slot % gpus}")
                    task = replace(task, config=own)
                running[submit(attempt, task, threads=task.config.run.threads)] = task, slot
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                task, _ = running.pop(future)
                error = future.exception()
                if error is not None and not isinstance(error, UserError):
                    raise error
                yield task, error or future.result()
            yield None


def _from_jobs(
    cluster: Cluster, tasks: Sequence[Task], jobs: int | None, console: Console
) -> Outcomes:
    """Yield as `_outcomes` does, each run being a job of a cluster."""
    named = {f"{task.run_dir.name}.{task.key}": task for task in tasks}
    yield from outcomes(cluster, named, attempt, at_a_time=jobs, say=console.print)


class _Progress:
    """A line per finished run, and between them a bar on a terminal or a line now and then."""

    def __init__(self, console: Console, todo: Sequence[Task], tasks: Sequence[Task]) -> None:
        self._console, self._todo, self._done = console, len(todo), 0
        # A single run shows a bar of its own.
        self._bar = Progress(console=console, disable=len(todo) < 2 or not console.is_terminal)
        self._line, self._said = self._bar.add_task("runs", total=len(todo)), time.monotonic()
        self._say(f"{len(todo)} of {len(tasks)} runs to do")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def tick(self) -> None:
        """Say how far things are where there is no bar and nothing was said for a while."""
        if self._bar.disable and time.monotonic() - self._said > _LINE_SECONDS:
            self._say(f"{self._done} of {self._todo} runs done")

    def finished(self, run_dir: Path, row: dict[str, Any] | UserError) -> None:
        """Say how a run ended: its line of results, or its error."""
        self._done += 1
        self._bar.update(self._line, completed=self._done)
        if isinstance(row, UserError):
            self._say(f"{run_dir.name}: failed: {row}")
        elif row["failed"]:
            self._say(f"{run_dir.name}: failed and recorded so: {row['failed']}")
        else:
            first = row["probes"][0]
            text = f"{run_dir.name}: {measure_name(first)} {100 * first['accuracy']:.1f} %"
            if row["groups_per_latent"] is not None:
                text += f", {row['groups_per_latent']:.1f} groups per latent"
            self._say(f"{text}, {row['seconds']:.0f} s + {row['probe_seconds']:.0f} s probes")
            for alarm in row["alarms"]:
                self._say(f"  alarm: {alarm}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)
        self._said = time.monotonic()
