"""Worker processes that stop cleanly: at Ctrl-C, at an error, and when the parent is killed."""

from __future__ import annotations

import _thread
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from sparsejepa.errors import UserError

_at_work = threading.Lock()
"""Held in a worker while it does a step."""


@contextlib.contextmanager
def workers(count: int) -> Iterator[Callable[..., Future[Any]]]:
    """Give a function ``submit(step, *args, threads=None)`` over `count` fresh processes.

    Ctrl-C reaches this process alone. When the block is left by an exception, every worker at work
    gets one SIGINT and is waited for. `threads` bounds the threads of a step. Raises UserError when
    a worker died.
    """
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start)
    others = set(multiprocessing.active_children())

    def submit(step: Callable[..., Any], *args: Any, threads: int | None = None) -> Future[Any]:
        with _handled(signal.SIGINT, signal.SIG_IGN):  # workers go on ignoring it
            return pool.submit(_work, step, args, threads)

    try:
        # The pool starts a worker when it is given something to do, and watches it from the next
        # thing on: of the last ones, death would go unnoticed for as long as others are at work.
        while len({*multiprocessing.active_children()} - others) < count:
            submit(int)
        yield submit
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory: use fewer --jobs; run the "
            "same command again, it goes on from the checkpoints"
        ) from None
    except BaseException:
        for child in {*multiprocessing.active_children()} - others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid or 0, signal.SIGINT)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def terminable() -> contextlib.AbstractContextManager[None]:
    """Take SIGTERM as Ctrl-C; outside the main thread nothing changes."""
    return _handled(signal.SIGTERM, signal.default_int_handler)


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
    with _at_work, _handled(signal.SIGINT, signal.default_int_handler), threadpool_limits(threads):
        torch.set_num_threads(threads or torch.get_num_threads())
        return step(*args)


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
