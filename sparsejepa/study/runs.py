"""Runs and the probes on them, several at a time, one line of results each.

A run that is finished is read, one that is not goes on from its newest checkpoint. Runs are
independent, so several go at once in processes of their own: two processes with one thread each get
more done on two cores than one process with two.
"""

from __future__ import annotations

import _thread
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from threadpoolctl import threadpool_limits

import sparsejepa
from sparsejepa.config import check_pattern
from sparsejepa.data.catalog import load_dataset, load_images
from sparsejepa.encoders.encoder import CONFIG, GROUPS, WEIGHTS, load_groups
from sparsejepa.encoders.load import load
from sparsejepa.environment import cores, environment, resolve_device
from sparsejepa.errors import UserError
from sparsejepa.evaluation.measured import check_measures, measure
from sparsejepa.evaluation.probe import check_protocols, evaluate
from sparsejepa.study.cluster import outcomes
from sparsejepa.study.results import Task, append_row, read_results, row_key
from sparsejepa.study.verdict import measure_name
from sparsejepa.training.build import arm_name, prepare, total_steps
from sparsejepa.training.checkpoint import open_run
from sparsejepa.training.loop import Run, train
from sparsejepa.training.monitor import check_trackers

_LINE_SECONDS = 30.0
"""How often progress is said where there is no terminal to show a bar on."""
Outcomes = Generator[tuple[Task, dict[str, Any] | UserError] | None, None, None]


def run_tasks(
    tasks: Sequence[Task],
    results: Path,
    *,
    jobs: int | None = None,
    before: Sequence[dict[str, Any]] = (),
    retry_failed: bool = False,
    slurm: Sequence[str] = (),
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
        retry_failed: do runs that failed again, in RUN_DIR~2; the last line counts.
        slurm: options of sbatch as KEY=VALUE, if each run is to be a job of a SLURM cluster.
        console: where progress and finished runs are shown; silent if not given.

    Ctrl-C and SIGTERM stop every run after a checkpoint. Raises UserError before any work for data
    or run directories that do not fit, and after the other runs if one of them failed, whatever
    the reason.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    console = console or Console(quiet=True)
    found, todo = _left(tasks, [*before, *read_results(results)], retry_failed)
    check_tasks(todo)
    if slurm and todo:
        named = {f"{task.run_dir.name}.{task.key}": task for task in todo}
        ways = outcomes(results.parent / "jobs", slurm, named, attempt, jobs)
    else:
        ways = _outcomes(todo, jobs, console)
    failed, done, said = list[UserError](), 0, time.monotonic()

    def say(*lines: str) -> None:
        nonlocal said
        said = time.monotonic()
        for line in lines:
            console.print(line, highlight=False, markup=False)

    say(f"{len(todo)} of {len(tasks)} runs to do")
    # A single run shows a bar of its own.
    bar = Progress(console=console, disable=len(todo) < 2 or not console.is_terminal)
    with terminable(), contextlib.closing(ways) as ended, bar:
        line = bar.add_task("runs", total=len(todo))
        for end in ended:
            if end is None:
                if bar.disable and time.monotonic() - said > _LINE_SECONDS:
                    say(f"{done} of {len(todo)} runs done")
                continue
            task, outcome = end
            done += 1
            bar.advance(line)
            say(*_told(task, outcome))
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


def _left(
    tasks: Sequence[Task], rows: Sequence[dict[str, Any]], retry_failed: bool
) -> tuple[dict[str, list[dict[str, Any]]], list[Task]]:
    """Return the lines of each key, and the tasks that are to be done."""
    found: dict[str, list[dict[str, Any]]] = {}
    trained: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row_key(row), []).append(row)
        if "encoder" in row:
            trained[row_key(row, run=True)] = row
    todo = []
    for task in tasks:
        old = found.setdefault(task.key, [])
        if not old:
            todo.append(replace(task, earlier=trained.get(task.run_key)))
        elif retry_failed and old[-1].get("failed"):
            beside = task.run_dir.with_name(f"{task.run_dir.name}~{len(old) + 1}")
            todo.append(replace(task, run_dir=beside))
    return found, todo


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
            _, config, loaded = prepare(task.config, load_images)
            total_steps(config, len(loaded))
        for name in set(task.probes.data) - known:
            train = load_dataset(name, "train", **_opening(task, name))
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
    count = min(jobs or gpus or min(4, cores()), len(tasks))
    if count == 1:
        for task in tasks:
            try:
                yield task, attempt(task, console)
            except UserError as error:
                yield task, error
        return
    threads = tasks[0].config.run.threads or max(1, cores() // count)
    sharing = -(-count // gpus) if gpus else count

    def placed(task: Task, slot: int) -> Task:
        own = {"threads": threads}
        if gpus > 1 and task.config.run.device in ("auto", "cuda"):
            own |= {"device": f"cuda:{slot % gpus}"}
        return replace(task, config=task.config.replace(**own), jobs=sharing)

    yield from side_by_side(tasks, attempt, count, placed)


def side_by_side(
    tasks: Sequence[Any],
    step: Callable[[Any], Any],
    count: int,
    placed: Callable[[Any, int], Any] = lambda task, slot: task,
) -> Generator[tuple[Any, Any] | None, None, None]:
    """Do `step` of each task in a process of its own, `count` at a time.

    Yields each task, as `placed` on one of `count` slots, with what came of it or its UserError, as
    they end, and None now and then. When this is left, every process gets one SIGINT, on which a
    run saves, and is waited for; Ctrl-C reaches this process alone.
    """
    waiting, stop = deque(tasks), multiprocessing.get_context("spawn").Event()
    running: dict[int, tuple[Any, Any, Any]] = {}
    try:
        while waiting or running:
            for slot in set(range(count)) - set(running):
                if waiting:
                    task = placed(waiting.popleft(), slot)
                    running[slot] = (task, *_begin(step, task, stop))
            ends = multiprocessing.connection.wait([r[2] for r in running.values()], timeout=1)
            for slot, (task, process, pipe) in list(running.items()):
                if pipe in ends:
                    try:
                        outcome = pipe.recv()
                    except EOFError:
                        outcome = UserError(
                            f"{task}: its process was killed, perhaps for want of memory: use "
                            "fewer --jobs; the same command again goes on from the checkpoint"
                        )
                    process.join()
                    del running[slot]
                    yield task, outcome
            yield None
    finally:
        stop.set()
        for _, process, _ in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        for _, process, _ in running.values():
            process.join()


def _begin(step: Callable[[Any], Any], task: Any, stop: Any) -> tuple[Any, Any]:
    """Start a process that does `step` of a task; return it and the end of its pipe."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(step, task, other, stop))
    with _handled(signal.SIGINT, signal.SIG_IGN):  # as the process does until it can save
        process.start()
    other.close()
    return process, pipe


def _work(step: Callable[[Any], Any], task: Any, pipe: Any, stop: Any) -> None:
    """Do `step` of a task in a process of its own, which stops when the parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # out of reach of the terminal's Ctrl-C

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        _thread.interrupt_main()  # a run at work writes its checkpoint and stops

    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not stop.is_set():
            try:
                outcome = step(task)
            except UserError as error:
                outcome = error
            pipe.send(outcome)


def terminable() -> contextlib.AbstractContextManager[None]:
    """Take SIGTERM as Ctrl-C; outside the main thread nothing changes."""
    return _handled(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Handle a signal by `handler` for a while; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


def _told(task: Task, row: dict[str, Any] | UserError) -> list[str]:
    """Say how a run ended: its line of results, or its error."""
    name = task.run_dir.name
    if isinstance(row, UserError) or row["failed"]:
        how = row if isinstance(row, UserError) else f"{row['failed']} (recorded so)"
        return [f"{name}: failed: {how}"]
    first, spent = row["probes"][0], f"{row['seconds']:.0f} s + {row['probe_seconds']:.0f} s probes"
    text = f"{name}: {measure_name(first)} {100 * first['accuracy']:.1f} %, {spent}"
    return [text, *(f"  alarm: {alarm}" for alarm in row["alarms"])]


# --- one run


def attempt(task: Task, console: Console | None = None) -> dict[str, Any]:
    """Return the line of a run, also of one that ended because a loss was not finite or exploded.

    Raises UserError for whatever else ends it, memory that is not enough for instance.
    """
    try:
        with threadpool_limits(task.config.run.threads):
            row = {**run_and_probe(task, console), "failed": None}
    except Exception as error:
        if not isinstance(error, UserError):
            what = " ".join(f"{type(error).__name__}: {error}".split())
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{where.filename}, line {where.lineno}"
            raise UserError(f"{task.run_dir}: {what} ({at})") from None
        found = re.search(r"'(\w+)' ((?:is not finite|exploded) at step \d+)", str(error))
        if not found:
            raise
        row = {**_about(task), "failed": f"{found[1]} {found[2]}", "probes": []}
    # A run that is only probed again keeps what it was trained with.
    row.setdefault("environment", environment())
    return json.loads(json.dumps(row))  # as it will be read back


def run_and_probe(task: Task, console: Console | None = None) -> dict[str, Any]:
    """Train (or go on with, or read) one run, probe it and return its line, see `results`.

    Where only probes have changed since `task.earlier`, its kept encoder is probed instead.
    """
    kept = task.encoders / task.run_key if task.encoders else task.run_dir
    if task.earlier and _digest(kept) == task.earlier["encoder"]:
        row, task = {**task.earlier}, replace(task, run_dir=kept)
    else:
        run = train(task.config, load_images, out=task.run_dir, resume=True, console=console)
        row = _trained(task, run)
    began = time.perf_counter()
    row |= {**_about(task), **_probed(task)}
    spent = time.perf_counter() - began
    on_gpu = resolve_device(task.config.run.device).startswith("cuda")
    row["probe_seconds"] = round(spent, 1)
    row["gpu_seconds"] = round((row["seconds"] + spent) / task.jobs, 1) if on_gpu else 0
    return row


def _about(task: Task) -> dict[str, Any]:
    """Return what every line of results says of its run, see `results`."""
    return {
        "key": task.key,
        "train_version": sparsejepa.TRAIN_VERSION,
        "eval_version": sparsejepa.EVAL_VERSION,
        "recipe": task.recipe,
        "arm": task.arm or arm_name(task.config),
        "seed": task.config.run.seed,
        "data": task.config.data,
        "jobs": task.jobs,
        "command": task.command,
        "settings": task.config.replace(data_root=None).to_dict(),
        "probed": asdict(task.probes),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"trial": task.trial} if task.trial else {}),
    }


def _trained(task: Task, run: Run) -> dict[str, Any]:
    """Return what a line says of a finished run before it is probed, and keep its encoder."""
    names = ("knn", "rankme", "density", "groups_per_latent", "dead_groups")
    return {
        **{name: run.summary["final"].get(name) for name in names},
        "alarms": run.summary["alarms"],
        "steps": run.summary["steps"],
        "seconds": round(run.summary["seconds"], 1),
        "images_per_second": round(run.summary["images_per_second"], 1),
        "encoder": _keep(task),
    }


def _keep(task: Task) -> str | None:
    """Copy a run's encoder and groups to ENCODERS/RUN_KEY; return the sha256 of the encoder."""
    if task.encoders:
        folder = task.encoders / task.run_key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in (GROUPS, CONFIG, WEIGHTS):  # the weights last: with them it is whole
            if (task.run_dir / name).exists():
                shutil.copy2(task.run_dir / name, folder)
    return _digest(task.run_dir)


def _digest(folder: Path) -> str | None:
    """Return the sha256 of the encoder in a folder, None if there is none."""
    path = folder / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _probed(task: Task) -> dict[str, Any]:
    """Return the probes, a line per data set, target and protocol with its floors, and measures.

    Probes and the raw-pixel floor are seeded alike for all runs; the untrained floor is that of
    another fresh encoder for each seed, so that it pairs with the runs. Floors are kept beside the
    run directories.
    """
    probes, seed = task.probes, task.config.run.seed
    device = resolve_device(task.config.run.device)
    encoder = load(task.run_dir, device)
    groups = load_groups(task.run_dir, encoder.grid_size)
    w = None if groups is None else groups.W.detach()

    def reading(data: str) -> dict[str, Any]:
        own = data == task.config.data  # scored on the training images that the run never saw
        held = task.config.images.holdout if own else 0
        kw = {"targets": probes.targets.get(data), "limit": probes.limit, "holdout": held}
        return {**kw, **_opening(task, data)}

    rows = []
    for data in probes.data:
        kw = {"cache_dir": task.run_dir.parent / "floors", "device": device, **reading(data)}
        protocols = probes.protocols_on(data)
        rows += evaluate(encoder, data, protocols=protocols, untrained_seed=seed, **kw)
    first = probes.data[0]
    return {
        "probes": [{k: v for k, v in row.to_dict().items() if k != "encoder"} for row in rows],
        "measures": measure(probes.measures, encoder, w, first, seed=seed, **reading(first)),
        "nonzero_elements": None if w is None else int((w != 0).sum()),
        "elements": None if w is None else w.numel(),
    }


def _opening(task: Task, data: str) -> dict[str, Any]:
    """Return how to open `data`: the run's own images as in pretraining, others at their size."""
    images = task.config.images
    size = images.img_size if data == task.config.data else ()
    return {
        "img_size": (size[0], size[-1]) if size else None,
        "upscale": images.upscale and data == task.config.data,
        "data_root": images.data_root,
    }
