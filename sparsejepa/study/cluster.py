"""Runs as jobs of a SLURM cluster, by submitit.

A job is one run. It writes how the run ended to a JSON file of its own; the one process that
submitted collects these files. So nothing is written by two at a time, the jobs go on without that
process, and the same command again picks up what they found meanwhile. Nothing that a job pickled
is read here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sparsejepa.errors import UserError
from sparsejepa.files import read_json, write_text

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
    """What each job gets; `folder` holds the files and logs of all.

    `gpus` and `cpus` are those of one job, `minutes` its time limit, `more` KEY=VALUE of sbatch.
    """

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

    def executor(self, at_a_time: int | None) -> Any:
        """Return submitit's executor. Raises UserError without submitit or without SLURM."""
        try:
            import submitit
        except ImportError:
            raise UserError(
                "--cluster slurm: submitit is not installed; pip install 'sparsejepa[slurm]'"
            ) from None
        # Absolute, since a job need not begin in this folder.
        folder = self.folder.resolve()
        try:
            executor = submitit.SlurmExecutor(folder / "submitit", max_num_timeout=_ATTEMPTS)
        except RuntimeError:
            raise UserError(
                "--cluster slurm: there is no SLURM here (srun is not found); run it on a login "
                "node, or leave --cluster out"
            ) from None
        wanted: dict[str, Any] = {
            "job_name": folder.parent.name,
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
        """Do the run."""
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
        write_text(self.outcome, json.dumps(found))

    def checkpoint(self) -> Any:
        """Return what to do when the job is queued again: the same, which goes on by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def outcomes(
    cluster: Cluster,
    tasks: Mapping[str, T],
    step: Callable[[T], dict[str, Any]],
    *,
    at_a_time: int | None,
    say: Callable[[str], object],
) -> Generator[tuple[T, dict[str, Any] | UserError] | None, None, None]:
    """Do `step` of each task as a job; yield each with its line or its UserError, as they end.

    None is yielded now and then while there is nothing new. What earlier jobs of the same names
    found is taken, jobs that are still there are waited for, and the others are submitted as one
    array, `at_a_time` of it at once. When this is left, the jobs go on, and `say` gets a line about
    it. `tasks` are by a name that is also a file's; tasks of equal names are the same work.
    """
    folder = cluster.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    executor = cluster.executor(at_a_time)
    jobs: dict[str, Any] = {}
    for name in tasks:
        note = folder / f"{name}.job"
        number = note.read_text() if note.exists() else ""
        if re.fullmatch(r"\d+(_\d+)?", number):
            jobs[name] = executor.job_class(executor.folder, number)
    new = [n for n, job in jobs.items() if job.done() and not (folder / f"{n}.json").exists()]
    new += [name for name in tasks if name not in jobs]
    jobs |= _submit(
        executor, {name: Job(step, tasks[name], folder / f"{name}.json") for name in new}
    )
    gone: dict[str, float] = {}
    try:
        while jobs:
            for name, job in list(jobs.items()):
                outcome = _outcome(folder, name, job, gone)
                if outcome is not None:
                    yield tasks[name], outcome
                    del jobs[name]
                    for end in (".json", ".job"):
                        (folder / f"{name}{end}").unlink(missing_ok=True)
            yield None
            time.sleep(POLL_SECONDS if jobs else 0)
    finally:
        if jobs:
            say(
                f"{len(jobs)} jobs go on by themselves; the same command again collects them, and "
                f"scancel {' '.join(job.job_id for job in jobs.values())} would stop them"
            )


def _submit(executor: Any, work: Mapping[str, Job]) -> dict[str, Any]:
    """Submit jobs as one array; return them by name, and note their numbers beside the outcomes."""
    if not work:
        return {}
    try:
        with executor.batch():
            jobs = {name: executor.submit(job) for name, job in work.items()}
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        what = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise UserError(f"--cluster slurm: the jobs were not taken: {what}") from None
    for name, job in jobs.items():
        write_text(work[name].outcome.with_suffix(".job"), job.job_id)
    return jobs


def _outcome(
    folder: Path, name: str, job: Any, gone: dict[str, float]
) -> dict[str, Any] | UserError | None:
    """Return how a job ended, None while it goes on; `gone` says since when jobs are no more."""
    ended = job.done()
    if (folder / f"{name}.json").exists():
        found = read_json(folder / f"{name}.json")
        return found["row"] if "row" in found else UserError(str(found["error"]))
    if not ended or time.monotonic() - gone.setdefault(name, time.monotonic()) < GRACE_SECONDS:
        return None
    log = folder / "submitit" / f"{job.job_id}_0_log.err"
    return UserError(
        f"job {job.job_id} of {name} ended without a word (cancelled, killed, or out of memory?): "
        f"see {log}; the same command again goes on from its checkpoint"
    )
