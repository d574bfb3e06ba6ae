"""What a run shows elsewhere: TensorBoard, Weights & Biases, trackio. metrics.jsonl is the record.

A tracker gets one row per logged step: numbers, alarms and pictures. `Loggers` notes how far each
one has got in the run directory, so that a resumed run goes on in the same log: what is missing is
added from metrics.jsonl and nothing comes twice. A tracker that fails is said so in a line, and
the run goes on without it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import tomli_w

from sparsejepa.config import Config
from sparsejepa.errors import UserError
from sparsejepa.files import write_text

STATE = "loggers.json"
"""In a run directory: the run's id at the trackers, and the last step that each of them was given.
"""
PROJECT = "sparsejepa"
_START_SECONDS, _FINISH_SECONDS = 30, 60

Values = Mapping[str, float | str | np.ndarray]
"""Of one step by name: numbers, text, and pictures [H, W, 3] uint8."""


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run."""

    run_dir: Path
    id: str
    config: Config
    shown: int
    """The last step that this tracker was given earlier, -1 if none."""

    @property
    def name(self) -> str:
        """The run directory's name, under which people look for a run."""
        return self.run_dir.resolve().name

    @property
    def group(self) -> str:
        """The name of its parent, such as that of a sweep."""
        return self.run_dir.resolve().parent.name


class Tracker(Protocol):
    """Somewhere that shows rows. Every method may raise whatever it meets."""

    def show(self, step: int, values: Values) -> None:
        """Add one row; steps rise."""
        ...

    def close(self, complete: bool) -> None:
        """Write what is left; `complete` says whether the run got to its end."""
        ...


class TensorBoard:
    """Event files in RUN_DIR/tensorboard, written at once and without a thread.

    A resumed run begins with a mark that makes readers drop what an earlier part of the run wrote
    after that step.
    """

    def __init__(self, about: About) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        events: Any = event_pb2  # its classes are made when it is imported
        self._event = events.Event
        folder = about.run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if about.shown >= 0:
            mark = events.SessionLog(status=events.SessionLog.START)
            self._write(step=about.shown + 1, session_log=mark)
        else:
            settings = tomli_w.dumps(about.config.to_dict())
            self.show(0, {"settings": "".join(f"    {line}\n" for line in settings.splitlines())})

    def show(self, step: int, values: Values) -> None:
        from torch.utils.tensorboard import summary

        for name, value in values.items():
            if isinstance(value, str):
                made = summary.text(name, value)
            elif isinstance(value, np.ndarray):
                made = summary.image(name, value, dataformats="HWC")
            else:
                made = summary.scalar(name, value)
            self._write(step=step, summary=made)
        self._file.flush()

    def close(self, complete: bool) -> None:
        self._file.close()

    def _write(self, **what: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **what).SerializeToString())


class WandB:
    """A run of Weights & Biases; WANDB_MODE, WANDB_PROJECT and its other variables apply."""

    def __init__(self, about: About) -> None:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True,
            init_timeout=_START_SECONDS, finish_timeout=_FINISH_SECONDS,
        )  # fmt: skip
        mode = os.environ.get("WANDB_MODE", "online")
        if mode in ("online", "run") and not wandb.login(prompt=False, verify=False):
            raise UserError("not logged in; run `wandb login`, or set WANDB_MODE=offline")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(about.run_dir),
            id=about.id,
            name=about.name,
            group=about.group,
            config=about.config.to_dict(),
            resume="allow",
            settings=settings,
        )

    def show(self, step: int, values: Values) -> None:
        pictures = {k: self._wandb.Image(v) for k, v in values.items() if isinstance(v, np.ndarray)}
        self._run.log({**values, **pictures}, step=step)

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class Trackio:
    """A run of trackio, in its local database or where TRACKIO_SPACE_ID says."""

    def __init__(self, about: About) -> None:
        with _quiet():
            import trackio  # pyright: ignore[reportMissingImports]

            self._trackio = trackio
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{about.name}-{about.id}",
                group=about.group,
                config=about.config.to_dict(),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def show(self, step: int, values: Values) -> None:
        pictures = {
            k: self._trackio.Image(v) for k, v in values.items() if isinstance(v, np.ndarray)
        }
        with _quiet():
            self._run.log({**values, **pictures}, step=step)

    def close(self, complete: bool) -> None:
        with _quiet():
            self._trackio.finish()  # the run's own would leave it to be finished again at exit


TRACKERS: dict[str, Callable[[About], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_loggers(names: Iterable[str]) -> None:
    """Raise UserError, naming the extra, for a tracker whose package is not installed."""
    for name in names:
        found = importlib.util.find_spec(name)
        # A folder of that name, such as wandb leaves in a working directory, is no package.
        if found is None or found.origin is None:
            raise UserError(
                f"--log {name}: not installed; pip install 'sparsejepa[{name}]', or leave it out"
            )


class Loggers:
    """The trackers of a run; without any, every call does nothing.

    Args:
        names: which ones; none on processes that do not write.
        rows: those of metrics.jsonl that earlier parts of the run wrote, oldest first.
        say: gets a line about a tracker that failed.
    """

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        config: Config,
        rows: Sequence[Mapping[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self._path, self._say = run_dir / STATE, say
        self._open: dict[str, Tracker] = {}
        self._id, self._shown = self._read() if rows else (secrets.token_hex(4), {})
        for name in dict.fromkeys(names):
            shown = self._shown.get(name, -1)
            about = About(run_dir, self._id, config, shown)

            def begin(name: str = name, about: About = about) -> None:
                self._open[name] = TRACKERS[name](about)

            self._guarded(name, begin)
        for row in _by_step(rows):
            self.show(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, lambda tracker=tracker: tracker.close(error is None))
        self._open.clear()

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a row, {"step": ..., name: number, text or picture}, where it was not shown before.

        What is None, a number that was not finite, is left out.
        """
        step = row["step"]
        values = {k: v for k, v in row.items() if k != "step" and v is not None}
        for name, tracker in list(self._open.items()):
            if step > self._shown.get(name, -1):

                def add(name: str = name, tracker: Tracker = tracker) -> None:
                    tracker.show(step, values)
                    self._shown[name] = step
                    write_text(self._path, json.dumps({"id": self._id, "shown": self._shown}))

                self._guarded(name, add)

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """Do something with a tracker; if it fails, say so and leave it alone from then on.

        Whatever it raises: a full disk, a refused login, a network that is gone, a bug of its own.
        """
        try:
            work()
        except Exception as error:
            self._open.pop(name, None)
            what = " ".join(str(error).split())[:300] or type(error).__name__
            self._say(f"--log {name}: {what}; the run goes on without it")

    def _read(self) -> tuple[str, dict[str, int]]:
        """Return what an earlier part of the run noted; a damaged note counts as none."""
        try:
            state = json.loads(self._path.read_text(encoding="utf-8"))
            return str(state["id"]), {str(k): int(v) for k, v in state["shown"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return secrets.token_hex(4), {}


def _by_step(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put rows of equal steps together."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merge(merged.setdefault(row["step"], {}), row)
    return list(merged.values())


def merge(into: dict[str, Any], row: Mapping[str, Any]) -> None:
    """Add a row to another one of the same step; a second alarm goes below the first."""
    alarms = [r["alarm"] for r in (into, row) if "alarm" in r]
    into.update(row)
    if alarms:
        into["alarm"] = "\n".join(alarms)


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Keep a tracker's own words off standard output, which may be read by a program."""
    return contextlib.redirect_stdout(io.StringIO())
