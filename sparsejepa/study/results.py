"""Files of results: one JSON object a line, appended when a run is finished."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsejepa import version
from sparsejepa.errors import UserError

ROW = {
    "key": "hash of settings, seed, probes and versions, see `tasks.Task.key`",
    "train_version": "`TRAIN_VERSION` of the run; 1 where a line does not say",
    "eval_version": "`EVAL_VERSION` of its probes and measures; 1 where a line does not say",
    "recipe": "the recipe or search that it belongs to; empty for a sweep",
    "arm": "its name among its twins: dense, lam=0.01, density=0.25+beta=0",
    "seed": "of weights, order, masks and augmentation",
    "data": "the images that it was trained on",
    "failed": "None, or the loss that was not finite or exploded and its step; then no probes",
    "probes": "a `ProbeRow` without its encoder for each data set, target and protocol",
    "jobs": "runs that shared the machine",
    "command": "what repeats it",
    "settings": "as `Config.to_dict`, without data_root",
    "probed": "as `tasks.Probes`",
    "environment": "versions, hardware and commit of the training",
    "finished": "when the line was written, UTC",
}
"""What a line of results holds, by field."""

DONE = {
    "measures": "by name, those of `evaluation.measured` that were asked for",
    "knn": "last accuracy of the online k-NN, None without labels",
    "rankme": "last effective rank of the pooled embedding",
    "density": "share of non-zero (group, latent) columns of W, None for dense; so the next four",
    "groups_per_latent": "mean number of groups that a latent feeds",
    "dead_groups": "groups that no latent feeds",
    "nonzero_elements": "of W",
    "elements": "of W",
    "alarms": "signs of collapse, in the order in which they were raised",
    "steps": "optimiser steps",
    "seconds": "wall time of the training",
    "probe_seconds": "wall time of probes and measures",
    "gpu_seconds": "the sum of both divided by `jobs`; 0 on the CPU",
    "images_per_second": "of the training",
    "encoder": "sha256 of encoder.safetensors, which recipes/run.py keeps in runs/encoders/",
}
"""What a line holds as well unless its run failed."""

RARE = {
    "trial": "in a search: round, rung, candidate and score",
    "final": "in the oldest lines: the run's last metrics, among them knn to dead_groups",
}
"""What only some lines hold."""

_ALWAYS = {"key", "arm", "seed", "probes"}


def versions(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return the train and the eval version of a line."""
    return row.get("train_version", 1), row.get("eval_version", 1)


def is_current(row: Mapping[str, Any]) -> bool:
    """Return whether a line may stand in a table: it is of the versions that are computed now."""
    return versions(row) == (version.TRAIN_VERSION, version.EVAL_VERSION)


def read_rows(path: Path) -> list[Any]:
    """Read a JSON-lines file; a missing one is empty, a line that a kill cut short is left out."""
    rows = []
    for _, line in _lines(path) if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return rows


def read_results(
    path: Path, say: Callable[[str], object] = lambda line: None
) -> list[dict[str, Any]]:
    """Read a file of results; `say` gets a line about each one that a kill cut short.

    Raises UserError for a line that is none, by its number.
    """
    rows = []
    for number, line in _lines(path) if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            say(f"{path}, line {number}: cut short and passed over; its run is done again")
            continue
        missing = _ALWAYS - set(row) if isinstance(row, dict) else _ALWAYS
        if missing:
            raise UserError(
                f"{path}, line {number}: no line of results, it has no '{min(missing)}'; remove it "
                "or name another file"
            )
        rows.append(row)
    return rows


def read_checked(path: Path) -> list[Any]:
    """Read a JSON-lines file of which every line counts.

    Raises UserError, by its number, for a line that is no JSON object, and for a probe whose
    accuracy is no share.
    """
    rows = []
    for number, line in _lines(path):
        try:
            row = dict(json.loads(line))
            shares = [probe["accuracy"] for probe in row.get("probes", [])]
            right = all(0 <= share <= 1 for share in shares)
        except (ValueError, LookupError, TypeError, RecursionError):
            right = False
        if not right:
            raise UserError(
                f"{path}, line {number}: no line of results (cut short, or an accuracy that is no "
                "share from 0 to 1); remove it"
            )
        rows.append(row)
    return rows


def read_beside(path: Path) -> list[dict[str, Any]]:
    """Read the lines of results in the other JSON-lines files of a file's folder."""
    others = sorted(other for other in path.parent.glob("*.jsonl") if other.name != path.name)
    rows = [row for other in others for row in read_rows(other)]
    return [row for row in rows if isinstance(row, dict) and set(row) >= _ALWAYS]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Return the lines of a file with their numbers. Raises UserError if it is no text."""
    try:
        return enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8)") from None


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
