"""One job at a time in a folder: a run, or the parts of features."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from sparsejepa.distributed import World
from sparsejepa.errors import UserError

LOCK = ".lock"
"""The file's name; it holds pid and host of the job at work and is gone when no job is."""


@contextlib.contextmanager
def run_lock(folder: Path, world: World = World()) -> Iterator[None]:  # noqa: B008  (frozen)
    """Keep `folder`, made if it is not there, for this job while the context lasts.

    The first process locks for all; after `init_process_group` all fail together. The lock lies on
    the open file, not in its content: the system frees it when the process ends, however it ends.

    On NFS flock holds between machines where the server's lock service runs. Where it does not, and
    on a system without flock, nothing is locked; a warning says so.

    Raises UserError that names the holder's pid and host.
    """
    taken: int | None = None
    failure: str | None = None
    if world.main:
        try:
            taken = _take(folder / LOCK)
        except UserError as error:
            failure = str(error)
    if world.size > 1 and dist.is_initialized():
        told = [failure]
        dist.broadcast_object_list(told, src=0)
        failure = told[0]
    if failure:
        raise UserError(failure)
    try:
        yield
    finally:
        if taken is not None:
            # Removed while it is still locked: whoever has it open sees that it is gone.
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
            _held.discard(taken)
            os.close(taken)


def _take(path: Path) -> int | None:
    """Return the open, locked file, None where the system cannot lock."""
    try:
        import fcntl
    except ImportError:
        warnings.warn(f"{path}: this system has no file locks; start no second job", stacklevel=3)
        return None
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the holder before has just removed the folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{path.parent} is in use by {holder}; wait until it has ended, stop it, or "
                    "name another place with --out"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            warnings.warn(
                f"{path}: this file system cannot lock ({error.strerror}); start no second job",
                stacklevel=3,
            )
            return None
        if _is(handle, path):
            with contextlib.suppress(OSError):  # a full disk: only the message is poorer then
                os.ftruncate(handle, 0)
                about = {"pid": os.getpid(), "host": socket.gethostname()}
                os.write(handle, json.dumps(about).encode())
            _held.add(handle)
            return handle
        os.close(handle)  # the holder before removed it meanwhile


def _holder(handle: int) -> str:
    try:
        about = json.loads(os.pread(handle, 1000, 0))
        return f"process {int(about['pid'])} on {about['host']}"
    except (OSError, ValueError, LookupError, TypeError):  # it is just writing that
        return "another process"


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


_held: set[int] = set()


def _let_go() -> None:
    """In a forked child: what it inherits must not keep the lock when the job is killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
