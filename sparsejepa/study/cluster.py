"""Runs as jobs of a SLURM cluster, by submitit.

A job is one run. It writes how the run ended to a JSON file of its own, and the one process that
submitted collects these files: nothing that a job pickled is read here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sparsejepa.errors import UserError
from sparsejepa.files import read_json, write_text

T = TypeVar("T")

POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""How long after a job's end its file may take to be seen over a network."""


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

        for stop in (signal.SIGINT, signal.SIGTERM):  # the second when it is cancelled
            signal.signal(stop, signal.default_int_handler)
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
    folder: Path,
    options: Sequence[str],
    tasks: Mapping[str, T],
    step: Callable[[T], dict[str, Any]],
    at_a_time: int | None,
) -> Generator[tuple[T, dict[str, Any] | UserError] | None, None, None]:
    """Do `step` of each task as a job; yield each with its line or its UserError, as they end.

    `tasks` are by a name that is also a file's; files and logs of all lie in `folder`. All are
    submitted as one array, `at_a_time` of it at once, with `options` of sbatch as KEY=VALUE; None
    is yielded now and then. When this is left, jobs that are still there are cancelled, on which
    their runs save. Raises UserError without submitit or SLURM, and for options that could reach a
    shell.
    """
    folder = folder.resolve()  # a job need not begin in this folder
    executor, jobs = _executor(folder, options, at_a_time), dict[str, Any]()
    try:
        with executor.batch():
            for name, task in tasks.items():
                (folder / f"{name}.json").unlink(missing_ok=True)
                jobs[name] = executor.submit(Job(step, task, folder / f"{name}.json"))
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        what = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise UserError(f"--slurm: the jobs were not taken: {what}") from None
    try:
        while jobs:
            for name in [name for name, job in jobs.items() if job.done()]:
                yield tasks[name], _outcome(folder / f"{name}.json", jobs.pop(name).job_id)
            yield None
            time.sleep(POLL_SECONDS if jobs else 0)
    finally:
        for job in jobs.values():
            job.cancel(check=False)


def _executor(folder: Path, options: Sequence[str], at_a_time: int | None) -> Any:
    """Return submitit's executor, whose options become lines of a script: none may break a line."""
    for item in (*options, f"out={folder}"):
        if not (re.fullmatch(r"[a-z][a-z0-9-]*=.+", item, re.S) and item.isprintable()):
            raise UserError(f"--slurm {item!r}: must be KEY=VALUE of sbatch, such as time=240")
    try:
        import submitit

        # A run that its time limit cuts off goes on from its checkpoint, again and again.
        executor = submitit.SlurmExecutor(folder / "submitit", max_num_timeout=1000)
    except ImportError:
        raise UserError(
            "--slurm: submitit is not installed; pip install 'sparsejepa[slurm]'"
        ) from None
    except RuntimeError:
        raise UserError(
            "--slurm: there is no SLURM here (srun is not found); run it on a login node, or leave "
            "--slurm out"
        ) from None
    executor.update_parameters(
        job_name=folder.parent.name,
        signal_delay_s=120,  # before its time limit a job is told to save
        additional_parameters=dict(item.split("=", 1) for item in options),
        **({"array_parallelism": at_a_time} if at_a_time else {}),
    )
    return executor


def _outcome(path: Path, number: str) -> dict[str, Any] | UserError:
    """Return how a job ended that is no more."""
    until = time.monotonic() + GRACE_SECONDS
    while not path.exists() and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    if path.exists():
        found = read_json(path)
        path.unlink()
        return found["row"] if "row" in found else UserError(str(found["error"]))
    log = path.parent / "submitit" / f"{number}_0_log.err"
    return UserError(
        f"job {number} of {path.stem} ended without a word (cancelled, killed, or out of memory?): "
        f"see {log}; the same command again goes on from its checkpoint"
    )
