"""Runs as jobs, by submitit: on a SLURM cluster, or on this machine without waiting for them.

A job is one run. It writes how the run ended to a JSON file of its own; the one process that
submitted collects these files. So nothing is written by two at a time, the jobs go on without that
process, and the same command again picks up what they found meanwhile. Nothing that a job pickled
is read here.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sparsejepa.environment import cores
from sparsejepa.errors import UserError
from sparsejepa.study.workers import unbothered

T = TypeVar("T")

POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""How long after a job's end its file may take to be seen over a network."""
_ATTEMPTS = 1000
"""How often a run may be cut off by its time limit; it goes on from its checkpoint each time."""
_SAVING_SECONDS = 120
"""How long before its time limit a job is told to save."""


@dataclass(frozen=True)
class Cluster:
    """Where jobs run and what each of them gets; `folder` holds their files and logs.

    `gpus` and `cpus` are those of one job, `minutes` its time limit, `more` KEY=VALUE of sbatch.
    """

    kind: Literal["slurm", "local"]
    folder: Path
    minutes: int = 24 * 60
    partition: str | None = None
    gpus: int = 0
    cpus: int | None = None
    more: tuple[str, ...] = ()

    def check(self) -> Cluster:
        """Return this. Raises UserError for what cannot work, or could reach a shell."""
        if self.minutes < 1:
            raise UserError(f"--slurm-time {self.minutes}: must be at least 1 minute")
        if self.gpus not in (0, 1):
            raise UserError(
                f"--slurm-gpus {self.gpus}: a run of a sweep takes one GPU or none; to train one "
                "model on several, start pretrain by srun or torchrun"
            )
        if self.cpus is not None and self.cpus < 1:
            raise UserError(f"--slurm-cpus {self.cpus}: must be at least 1")
        for name, value in (("--slurm-partition", self.partition), ("--out", str(self.folder))):
            # These become lines of a script, which a line break in one of them would end.
            if value is not None and not value.isprintable():
                raise UserError(f"{name}: has characters that cannot be printed; name another")
        for item in self.more:
            if not (re.fullmatch(r"[a-z][a-z0-9-]*=.+", item, re.S) and item.isprintable()):
                raise UserError(
                    f"--slurm-more {item!r}: must be KEY=VALUE of sbatch, such as account=vision"
                )
        return self

    def at_a_time(self, jobs: int | None, gpus: int) -> int | None:
        """Return how many jobs run at a time; None leaves it to the queue.

        `jobs` is what was asked for, `gpus` are those of this machine.
        """
        if self.kind == "slurm":
            return jobs
        return jobs or gpus or min(4, cores())

    def executor(self, at_a_time: int | None) -> Any:
        """Return submitit's executor. Raises UserError without submitit or without SLURM."""
        try:
            import submitit
        except ImportError:
            raise UserError(
                f"--cluster {self.kind}: submitit is not installed; pip install 'sparsejepa[slurm]'"
            ) from None
        # Absolute, since a job need not begin in this folder.
        folder = self.folder.resolve() / "submitit"
        if self.kind == "local":
            executor: Any = submitit.LocalExecutor(folder, max_num_timeout=_ATTEMPTS)
            delay = min(_SAVING_SECONDS, 30 * self.minutes)
            executor.update_parameters(timeout_min=self.minutes, signal_delay_s=delay)
            return executor
        try:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=_ATTEMPTS)
        except RuntimeError:
            raise UserError(
                "--cluster slurm: there is no SLURM here (srun is not found); run it on a login "
                "node, or use --cluster local"
            ) from None
        wanted: dict[str, Any] = {
            "job_name": self.folder.resolve().parent.name,
            "time": self.minutes,
            "signal_delay_s": min(_SAVING_SECONDS, 30 * self.minutes),
            "partition": self.partition,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "array_parallelism": at_a_time,
            "additional_parameters": dict(item.split("=", 1) for item in self.more),
        }
        executor.update_parameters(**{k: v for k, v in wanted.items() if v is not None})
        return executor


@dataclass
class Job:
    """What a job does: `step` of `task`, and `outcome` says how it ended. Called by submitit.

    Told that its time is up or that it must make room, it lets the run save and is queued again.
    """

    step: Callable[[Any], dict[str, Any]]
    task: Any
    outcome: Path

    def __call__(self) -> None:
        """Do the run; Ctrl-C of the terminal that submitted it does not reach it."""
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            os.setpgrp()
        number = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
        queue_again, asked = signal.getsignal(number), []

        def leave(*arguments: Any) -> None:
            asked.append(arguments)
            signal.raise_signal(signal.SIGINT)  # on which a run saves and ends

        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(number, leave)
        try:
            found: dict[str, Any] = {"row": self.step(self.task)}
        except UserError as error:
            found = {"error": str(error)}
        except KeyboardInterrupt:
            if asked and callable(queue_again):
                queue_again(*asked[0])
            raise
        from sparsejepa.files import write_text

        write_text(self.outcome, json.dumps(found))

    def checkpoint(self) -> Any:
        """Return what to do when the job is queued again: the same, which goes on by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass
class _Running:
    """A job at work or in the queue."""

    id: str
    alive: Callable[[], bool]
    slot: int = -1
    """Which of those at a time it is, on this machine."""
    gone: float = 0.0
    """When it was first seen to be no more, 0 before that."""


def outcomes(
    cluster: Cluster,
    tasks: Mapping[str, T],
    step: Callable[[T], dict[str, Any]],
    *,
    at_a_time: int | None,
    gpus: int,
    say: Callable[[str], object],
) -> Generator[tuple[T, dict[str, Any] | UserError] | None, None, None]:
    """Do `step` of each task as a job; yield each with its line or its UserError, as they end.

    None is yielded now and then while there is nothing new. What earlier jobs of the same names
    found is taken, jobs that are still there are waited for, and the others are submitted. When
    this is left, the jobs go on, and `say` gets a line about it.

    Args:
        tasks: by a name that is also a file's; tasks of equal names are the same work.
        gpus: those of this machine, which local jobs share; each gets one.
    """
    cluster.folder.mkdir(parents=True, exist_ok=True)
    executor = cluster.executor(at_a_time)
    running: dict[str, _Running] = {}
    waiting: deque[str] = deque()
    for name in tasks:
        found = _read(cluster.folder / f"{name}.json")
        if found is not None and "row" not in found:
            (cluster.folder / f"{name}.json").unlink()  # it failed: try again
            found = None
        job = None if found is not None else _earlier(cluster, executor, name)
        if job is not None or found is not None:
            running[name] = job or _Running("", bool)
        else:
            waiting.append(name)
    try:
        while waiting or running:
            room = len(waiting)
            if cluster.kind == "local" and at_a_time:
                room = min(room, at_a_time - len(running))
            chosen = {waiting.popleft(): -1 for _ in range(room)}
            if cluster.kind == "local":
                busy = {job.slot for job in running.values()}
                free = (slot for slot in itertools.count() if slot not in busy)
                chosen = dict(zip(chosen, free, strict=False))
            running |= _submit(cluster, executor, tasks, chosen, step, gpus)
            for name, job in list(running.items()):
                outcome = _outcome(cluster, name, job)
                if outcome is not None:
                    yield tasks[name], outcome
                    del running[name]
                    for end in (".json", ".job"):
                        (cluster.folder / f"{name}{end}").unlink(missing_ok=True)
            yield None
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        ids = [job.id for job in running.values() if job.id]
        if ids:
            stop = "scancel" if cluster.kind == "slurm" else "kill"
            left = f", {len(waiting)} runs are not begun" if waiting else ""
            say(
                f"{len(ids)} jobs go on by themselves{left}; the same command again collects them "
                f"and does the rest, and {stop} {' '.join(ids)} would stop them"
            )


def _submit(
    cluster: Cluster,
    executor: Any,
    tasks: Mapping[str, Any],
    chosen: Mapping[str, int],
    step: Callable[[Any], dict[str, Any]],
    gpus: int,
) -> dict[str, _Running]:
    """Submit the chosen tasks, {name: slot}; in SLURM as one array of jobs."""
    from sparsejepa.files import write_text  # which needs torch, as most commands here do not

    folder = cluster.folder.resolve()
    work = {name: Job(step, tasks[name], folder / f"{name}.json") for name in chosen}
    jobs: dict[str, Any] = {}
    try:
        if cluster.kind == "slurm" and work:
            with executor.batch():
                jobs = {name: executor.submit(job) for name, job in work.items()}
        for name, slot in chosen.items() if cluster.kind == "local" else ():
            own = {"gpus_per_node": 1, "visible_gpus": (slot % gpus,)} if gpus else {}
            executor.update_parameters(**own)
            with unbothered():  # by the Ctrl-C of this terminal
                jobs[name] = executor.submit(work[name])
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        what = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise UserError(f"--cluster {cluster.kind}: the jobs were not taken: {what}") from None
    for name, job in jobs.items():
        note = {"kind": cluster.kind, "id": job.job_id, "slot": chosen[name]}
        write_text(folder / f"{name}.job", json.dumps(note))
    return {
        name: _Running(job.job_id, lambda job=job: not job.done(), chosen[name])
        for name, job in jobs.items()
    }


def _earlier(cluster: Cluster, executor: Any, name: str) -> _Running | None:
    """Return the job that an earlier command submitted for a task, if it is still there."""
    note = _read(cluster.folder / f"{name}.job") or {}
    number, slot = str(note.get("id")), note.get("slot", -1)
    form = r"\d+(_\d+)?" if cluster.kind == "slurm" else r"\d+"
    if note.get("kind") != cluster.kind or not re.fullmatch(form, number):
        return None
    if cluster.kind == "slurm":
        job = executor.job_class(executor.folder, number)
        found = _Running(number, lambda: not job.done())
    else:
        found = _Running(number, lambda: _at_work(int(number)), slot)
    return found if found.alive() else None


def _at_work(pid: int) -> bool:
    """Return whether a process is one of submitit's; where nobody tells, whether it is there."""
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        if Path("/proc/self").exists():
            return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _outcome(cluster: Cluster, name: str, job: _Running) -> dict[str, Any] | UserError | None:
    """Return how a job ended, None while it goes on."""
    ended = bool(job.gone) or not job.alive()
    found = _read(cluster.folder / f"{name}.json")
    if found is not None:
        row = found.get("row")
        return row if isinstance(row, dict) else UserError(str(found.get("error")))
    if not ended:
        return None
    job.gone = job.gone or time.monotonic()
    if time.monotonic() - job.gone < GRACE_SECONDS:
        return None
    log = cluster.folder / "submitit" / f"{job.id}_0_log.err"
    return UserError(
        f"job {job.id} of {name} ended without a word (cancelled, killed, or out of memory?): see "
        f"{log}; the same command again goes on from its checkpoint"
    )


def _read(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is none or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
