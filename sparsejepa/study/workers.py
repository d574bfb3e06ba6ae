"""Worker processes that stop cleanly: at Ctrl-C, at an error, and when the parent is killed."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from sparsejepa.errors import UserError

_at_work = threading.Lock()
"""Held in a worker while it does a step."""


@contextlib.contextmanager
def workers(count: int) -> Iterator[Callable[..., Future[Any]]]:
    """Give a function ``submit(step, *args, threads=None)`` over `count` fresh processes.

    Ctrl-C reaches this process alone. When the block is left by an exception, every worker at work
    gets one SIGINT and is waited for. `threads` bounds the threads of a step. Raises UserError with
    the cause when a worker died: the signal that killed it, or its exit status.
    """
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start)
    others, crew = set(multiprocessing.active_children()), set[BaseProcess]()

    def submit(step: Callable[..., Any], *args: Any, threads: int | None = None) -> Future[Any]:
        return hand_over(_work, step, args, threads)

    def hand_over(step: Callable[..., Any], *args: Any) -> Future[Any]:
        with unbothered():
            future = pool.submit(step, *args)
        crew.update({*multiprocessing.active_children()} - others)
        return future

    try:
        # The pool starts a worker when it is given something to do, and watches it from the next
        # thing on: of the last ones, death would go unnoticed for as long as others are at work.
        while len(crew) < count:
            hand_over(int)
        yield submit
    except BrokenProcessPool:
        pool.shutdown(wait=True, cancel_futures=True)
        raise UserError(
            f"a worker process {_cause([process.exitcode for process in crew])}; run the same "
            "command again, it goes on from the checkpoints"
        ) from None
    except BaseException:
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid or 0, signal.SIGINT)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cause(codes: Sequence[int | None]) -> str:
    """Return how the first worker to die ended, of the exit codes of all.

    The pool itself ends the others by SIGTERM, on which some save and end with a status.
    """
    ended = -signal.SIGTERM
    code = min((code for code in codes if code not in (None, 0, ended)), default=ended)
    if code > 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", perhaps for want of memory: use fewer --jobs" if code == -signal.SIGKILL else ""
    return f"was killed by {name}{memory}"


def terminable() -> contextlib.AbstractContextManager[None]:
    """Take SIGTERM as Ctrl-C; outside the main thread nothing changes."""
    return _handled(signal.SIGTERM, signal.default_int_handler)


def unbothered() -> contextlib.AbstractContextManager[None]:
    """Ignore Ctrl-C for a moment; processes that are started meanwhile go on ignoring it."""
    return _handled(signal.SIGINT, signal.SIG_IGN)


def _start() -> None:
    """Leave the terminal's process group; when the parent is gone, stop as at Ctrl-C and end."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        _thread.interrupt_main()  # a step at work writes its checkpoint and stops
        with _at_work:
            os._exit(1)  # the main thread waits for work that nobody will hand out

    threading.Thread(target=watch, daemon=True).start()


def _work(step: Callable[..., Any], args: tuple[Any, ...], threads: int | None) -> Any:
    import torch
    from threadpoolctl import threadpool_limits

    with _at_work, _handled(signal.SIGINT, signal.default_int_handler), threadpool_limits(threads):
        torch.set_num_threads(threads or torch.get_num_threads())
        try:
            return step(*args)
        finally:
            _give_memory_back()


def _give_memory_back() -> None:
    """Return freed memory to the system, where the C library can: 100 to 200 MB after a run."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
