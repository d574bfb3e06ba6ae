"""One job at a time in a folder, also after kills and forks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparsejepa.errors import UserError
from sparsejepa.files import LOCK, run_lock

HOLDER = """
import os, sys, time
from pathlib import Path
from sparsejepa.files import run_lock
with run_lock(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.write(1, b"%d\\n" % os.getpid())  # one write, or the lines of the two may mix
        time.sleep(60)
        os._exit(0)
    os.write(1, b"held\\n")
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, how: str = "plain") -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Another process that holds the lock until its input ends; and what it said so far."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), how],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    try:
        yield process, [process.stdout.readline() for _ in range(2 if how == "fork" else 1)]
    finally:
        process.kill()
        process.communicate()


def test_a_second_job_is_told_pid_and_host_of_the_first(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        name = f"process {process.pid} on {os.uname().nodename}"
        with pytest.raises(UserError, match=rf"is in use by {name}; .* --out"), run_lock(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
        process.communicate()
    assert not (tmp_path / LOCK).exists(), "it is removed at a regular end"
    with run_lock(tmp_path):
        pass


def test_a_killed_holder_and_what_it_forked_block_nobody(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as (process, said):
        child = next(int(word) for word in said if word.strip().isdigit())
        try:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert (tmp_path / LOCK).exists()
            os.kill(child, 0)  # at work still, as a worker process would be
            with run_lock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_the_lock_is_free_after_an_error_and_other_folders_always(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    with pytest.raises(KeyError), run_lock(one), run_lock(other):
        raise KeyError
    with run_lock(one):
        pass


def test_a_lock_file_that_goes_away_between_opening_and_locking_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder before ends just then: a lock on its removed file would lock nothing."""
    flock = fcntl.lockf

    def late(handle: int, operation: int) -> None:
        flock(handle, operation)
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(handle)

    calls: list[int] = []
    monkeypatch.setattr(fcntl, "lockf", late)
    with run_lock(tmp_path):
        assert len(calls) == 2 and str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_a_file_system_without_locks_is_said_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="cannot lock"), run_lock(tmp_path):
        pass
