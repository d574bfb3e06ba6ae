"""Saves that fail or are killed at any moment leave what was there before."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsejepa.errors import UserError
from sparsejepa.training.checkpoint import Checkpoints

from .saving import (
    Net,
    Tensors,
    equal,
    names,
    optimizer_of,
    restored,
    tensors_of,
    train,
)


class Faults:
    """Counts the moments of a save at which the system is asked for something, and can act there.

    Such a moment is every open, write, sync, rename, mkdir and removal.
    """

    def __init__(self, act: Callable[[int, str], None]) -> None:
        self.count, self._act = 0, act

    def _moment(self, name: str) -> None:
        self.count += 1
        self._act(self.count, name)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Faults]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
                patch.setattr(os, name, self._before(name, getattr(os, name)))
            patch.setattr(io, "open", self._opened(io.open))
            yield self

    def _before(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self._moment(name)
            return call(*args, **options)

        return wrapped

    def _opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if "r" in mode:
                return call(path, mode, *args, **options)
            self._moment("open")
            file = call(path, mode, *args, **options)
            return _Writing(file, self._moment)

        return wrapped


class _Writing:
    """A file of which one write in two halves is seen, as by a disk that fills up in between."""

    def __init__(self, file: Any, moment: Callable[[str], None]) -> None:
        self._file, self._moment = file, moment

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._moment("write")
        return half + self._file.write(data[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def moments() -> int:
    """Return how many moments a third save with two checkpoints kept has."""
    with tempfile.TemporaryDirectory() as folder:
        net, optimizer, checkpoints, _ = two_saved(Path(folder))
        with Faults(lambda number, name: None)() as faults:
            checkpoints.save(net, optimizer, {"step": 3})
        return faults.count


def two_saved(run: Path) -> tuple[Net, torch.optim.Optimizer, Checkpoints, dict[int, Tensors]]:
    """Save steps 1 and 2; return what step 3 is to be saved with, and all states by step."""
    net = Net(0)
    optimizer, checkpoints, kept = optimizer_of(net), Checkpoints(run), {}
    for step in (1, 2, 3):
        train(net, optimizer, step)
        kept[step] = tensors_of(net, optimizer)
        if step < 3:
            checkpoints.save(net, optimizer, {"step": step})
    return net, optimizer, checkpoints, kept


@pytest.mark.parametrize(("code", "lasting"), [(errno.ENOSPC, False), (errno.EROFS, True)])
def test_a_save_that_fails_at_any_moment_leaves_the_state_before_and_says_so(
    tmp_path: Path, code: int, lasting: bool
) -> None:
    """At each moment of a save once; `lasting`: nothing at all can be written from then on."""
    total = moments()
    assert total > 15
    failed = 0
    for moment in range(1, total + 1):
        run = tmp_path / str(moment)
        net, optimizer, checkpoints, kept = two_saved(run)

        def act(number: int, name: str, moment: int = moment) -> None:
            if number == moment or (lasting and number > moment):
                raise OSError(code, os.strerror(code))

        with Faults(act)():
            try:
                checkpoints.save(net, optimizer, {"step": 3})
            except UserError as error:
                failed += 1
                assert re.fullmatch(
                    rf"{run}/checkpoints: the checkpoint of step 3 could not be written "
                    rf"\({os.strerror(code)}\), the last good one is step-000000002; "
                    "make room there or make it writable, then go on with --resume",
                    str(error),
                )
        progress, tensors = restored(run)
        assert progress is not None and equal(tensors, kept[progress["step"]])
        assert progress["step"] in (2, 3), moment
        assert not [name for name in names(run) if name.startswith(".")]
        checkpoints.save(net, optimizer, {"step": 3})
        assert equal(restored(run)[1], kept[3])
        assert names(run) == ["step-000000002", "step-000000003"]
    # Nothing is lost any more once the new one has its name and only old ones are removed.
    assert failed >= total - 8


def test_a_kill_at_any_moment_of_a_save_loses_nothing_saved(tmp_path: Path) -> None:
    """SIGKILL at each moment once, in a child of this process."""
    found = []
    for moment in range(1, moments() + 1):
        run = tmp_path / str(moment)
        net, optimizer, checkpoints, kept = two_saved(run)

        def act(number: int, name: str, moment: int = moment) -> None:
            if number == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            with Faults(act)():
                checkpoints.save(net, optimizer, {"step": 3})
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        progress, tensors = restored(run)
        assert progress is not None and equal(tensors, kept[progress["step"]])
        assert not [name for name in names(run) if name.startswith(".")]
        found.append(progress["step"])
    assert found == sorted(found) and set(found) == {2, 3}
