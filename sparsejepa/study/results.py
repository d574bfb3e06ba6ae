"""Lines of results: one JSON object for each run, and the key that says which run a line is of.

Every line has a `key` (see `Task.key`), `train_version` and `eval_version` (1 where it does not
say), `recipe` (or search; empty for a sweep), `arm`, `seed`, `data`, `failed` (None, or the loss
that was not finite or exploded and its step), `probes` (a `ProbeRow` for each data set, target and
protocol), `jobs` (runs that shared the machine), `command`, `settings` (without data_root),
`probed` (as `Probes`), `environment` (of the training), `finished` (UTC), in a search `trial`.
Unless its run failed it has `measures`; the last `knn`, `rankme`, `density`, `groups_per_latent`
and `dead_groups`; the `nonzero_elements` of the `elements` of W; `alarms`, `steps`, `seconds`,
`probe_seconds`, `gpu_seconds` (both together over `jobs`; 0 on the CPU), `images_per_second` and
`encoder`, the sha256 of its weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sparsejepa
from sparsejepa.config import REMOVED, Config
from sparsejepa.errors import UserError

# Settings that change no number.
_FREE = {
    "data_root", "device", "threads", "compile", "checkpoint_every", "log_every", "log", "preset",
}  # fmt: skip
# Settings that were gone before the oldest run of this train version.
_BEFORE_KEYS = {"balance", "w_lr_sum"}


@dataclass(frozen=True)
class Probes:
    """What a run is probed on, see `evaluation.probe.evaluate`.

    `targets` names some of a data set's targets (all if it is not in there), `limit` is the largest
    number of labelled training images. On the first data set come `extra_protocols` as well, and
    the `measures` of `evaluation.measured`.
    """

    data: tuple[str, ...]
    protocols: tuple[str, ...] = ("logistic",)
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limit: int | None = None
    measures: tuple[str, ...] = ()
    extra_protocols: tuple[str, ...] = ()

    def protocols_on(self, data: str) -> tuple[str, ...]:
        """Return the protocols for a data set."""
        return self.protocols + (self.extra_protocols if data == self.data[0] else ())


@dataclass(frozen=True)
class Task:
    """One run and the probes on it; `command` is what repeats it.

    `arm` is the run's name among its twins, by default that of `training.build.arm_name`; `recipe`
    the one that it belongs to, if any; `trial` what a search has to say about it; `jobs` how many
    runs share the machine meanwhile; `encoders` the folder where encoders outlive run directories,
    if any, and `earlier` the line of this run from before `EVAL_VERSION` was raised, if any.
    """

    config: Config
    run_dir: Path
    probes: Probes
    command: str = ""
    arm: str = ""
    recipe: str = ""
    trial: Mapping[str, Any] | None = None
    jobs: int = 1
    encoders: Path | None = None
    earlier: Mapping[str, Any] | None = None

    @functools.cached_property
    def key(self) -> str:
        """Hash of all that the numbers depend on: settings, seed, probes and versions."""
        return hash_of(self.config, asdict(self.probes), sparsejepa.EVAL_VERSION)

    @functools.cached_property
    def run_key(self) -> str:
        """The key but for `EVAL_VERSION`: what a run and its kept encoder are called by."""
        return hash_of(self.config, asdict(self.probes))


def row_key(row: Mapping[str, Any], *, run: bool = False) -> str:
    """Return the key of a line of results; with `run` its `run_key`.

    It is made anew from the line's settings: one that came later has its default there, which must
    be what was done before, and one that is gone the value that every run has now. A line of
    another `TRAIN_VERSION`, or of a run that could not be done again, keeps its written key.
    """
    train, probe = versions(row)
    try:
        if train == sparsejepa.TRAIN_VERSION:
            config = Config.from_dict(row["settings"], "results")
            return hash_of(config, row["probed"], 1 if run else probe)
    except (ValueError, LookupError, TypeError, AttributeError):  # UserError is a ValueError
        pass
    return str(row["key"])


def hash_of(config: Config, probes: Mapping[str, Any], eval_version: int = 1) -> str:
    """Return the hash of a run of this `TRAIN_VERSION` and its probes.

    Settings that there are no more count with the value that every run has now: what was hashed
    when they still were settings keeps its key. Another run whose pattern is taken counts by its
    name, wherever it lies and whatever its key was called.
    """
    gone = {name: now for name, now in REMOVED.items() if name not in _BEFORE_KEYS}
    settings = {k: v for k, v in {**gone, **config.flat()}.items() if k not in _FREE}
    settings["pattern"] = re.sub("-[0-9a-f]{8}$", "", Path(config.groups.pattern).name)
    # What came later counts only where it is used, so that older lines keep their keys.
    later = {"measures", "extra_protocols"}
    used = {k: v for k, v in probes.items() if v or k not in later}
    about = [settings, used, sparsejepa.TRAIN_VERSION, eval_version]
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def versions(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return the train and the eval version of a line."""
    return row.get("train_version", 1), row.get("eval_version", 1)


def is_current(row: Mapping[str, Any]) -> bool:
    """Return whether a line may stand in a table: it is of the versions that are computed now."""
    return versions(row) == (sparsejepa.TRAIN_VERSION, sparsejepa.EVAL_VERSION)


def read_rows(path: Path, *, strict: bool = False) -> list[dict[str, Any]]:
    """Return the JSON objects of a file that has one on each line; a missing file has none.

    Other lines, such as one that a kill cut short, are left out. Raises UserError if the file is no
    text, and with `strict` for such a line by its number.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8)") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif strict:
            raise UserError(f"{path}, line {number}: no JSON object (cut short?); remove it")
    return rows


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the lines of results in a file, which may hold others; see `read_rows`."""
    return [row for row in read_rows(path) if row.keys() >= {"key", "arm", "seed", "probes"}]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one line and make it durable; a torn last line is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            file.write(b"\n" if torn else b"")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
