"""One run and the probes on it: trained, gone on with or read, and as a line of results."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejepa import version
from sparsejepa.config import REMOVED, Config
from sparsejepa.data.catalog import load_images
from sparsejepa.encoders.encoder import CONFIG, GROUPS, WEIGHTS, Encoder, load_groups
from sparsejepa.encoders.load import load
from sparsejepa.environment import environment, resolve_device
from sparsejepa.errors import UserError
from sparsejepa.evaluation.measured import measure
from sparsejepa.evaluation.probe import evaluate, load_splits
from sparsejepa.files import load_tensors, write_text
from sparsejepa.study.results import versions
from sparsejepa.training.build import arm_name
from sparsejepa.training.loop import Run, train

if TYPE_CHECKING:
    from rich.console import Console

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
        return _key(self.config, asdict(self.probes), version.TRAIN_VERSION, version.EVAL_VERSION)

    @functools.cached_property
    def run_key(self) -> str:
        """The key but for `EVAL_VERSION`: what a run and its kept encoder are called by."""
        return _key(self.config, asdict(self.probes), version.TRAIN_VERSION, 1)


def row_key(row: Mapping[str, Any], *, run: bool = False) -> str:
    """Return the key of a line of results, made anew from its settings; with `run` its `run_key`.

    A setting that came later has its default there, which must be what was done before, and one
    that is gone the value that every run has now: so a key outlives new and removed settings. A
    line that cannot be read so, of a run that could not be done again, keeps the key that it was
    written with.
    """
    if "probed" not in row:
        return str(row["key"])
    train, probe = versions(row)
    try:
        config = Config.from_dict(row["settings"], "results")
        return _key(config, row["probed"], train, 1 if run else probe)
    except (ValueError, LookupError, TypeError, AttributeError):  # UserError is a ValueError
        return str(row["key"])


def _key(config: Config, probes: Mapping[str, Any], train: int, probe: int) -> str:
    """Return the hash of a run and its probes.

    Settings that there are no more count with the value that every run has now: what was hashed
    when they still were settings keeps its key.
    """
    gone = {name: now for name, (now, _) in REMOVED.items() if name not in _BEFORE_KEYS}
    settings = {k: v for k, v in {**gone, **config.flat()}.items() if k not in _FREE}
    settings["pattern"] = Path(config.groups.pattern).name  # wherever a run that it names lies
    # What came later counts only where it is used, so that older lines keep their keys.
    later = {"measures", "extra_protocols"}
    about: list[Any] = [settings, {k: v for k, v in probes.items() if v or k not in later}]
    return _hash([*about, *([train, probe] if (train, probe) != (1, 1) else [])])


def attempt(task: Task, console: Console | None = None) -> dict[str, Any]:
    """Return the line of a run, also of one that ended because a loss was not finite or exploded.

    Raises UserError for whatever else ends it, memory that is not enough for instance.
    """
    try:
        row = {**run_and_probe(task, console), "failed": None}
    except Exception as error:
        if not isinstance(error, UserError):
            what = " ".join(f"{type(error).__name__}: {error}".split())
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{where.filename}, line {where.lineno}"
            raise UserError(f"{task.run_dir}: {what} ({at})") from None
        failure = r"(finetune: loss|(?<=')\w+)'? ((?:is not finite|exploded) at step \d+)"
        found = re.search(failure, str(error))
        if not found:
            raise
        row = {**_about(task), "failed": f"{found[1]} {found[2]}", "probes": []}
    # A run that is only probed again keeps what it was trained with.
    row.setdefault("environment", environment())
    if task.trial is not None:
        score = row["probes"][0]["accuracy"] if row["probes"] else None
        row["trial"] = {**task.trial, "score": score}
    return json.loads(json.dumps(row))  # as it will be read back


def run_and_probe(task: Task, console: Console | None = None) -> dict[str, Any]:
    """Train (or go on with, or read) one run, probe it and return its line, see `results.ROW`.

    Where only probes have changed since `task.earlier`, its kept encoder is probed instead.
    """
    if task.earlier and _kept(task) == task.earlier["encoder"] and task.encoders:
        row, task = {**task.earlier}, replace(task, run_dir=task.encoders / task.run_key)
    else:
        run = train(task.config, load_images, out=task.run_dir, resume=True, console=console)
        row = _trained(task, run)
    began = time.perf_counter()
    row |= {**_about(task), "probes": _probe(task), "measures": _measures(task)}
    spent = time.perf_counter() - began
    on_gpu = resolve_device(task.config.run.device).startswith("cuda")
    row["probe_seconds"] = round(spent, 1)
    row["gpu_seconds"] = round((row["seconds"] + spent) / task.jobs, 1) if on_gpu else 0
    return json.loads(json.dumps(row))  # as it will be read back


def _about(task: Task) -> dict[str, Any]:
    """Return what every line of results says of its run, see `results.ROW`."""
    return {
        "key": task.key,
        "train_version": version.TRAIN_VERSION,
        "eval_version": version.EVAL_VERSION,
        "recipe": task.recipe,
        "arm": task.arm or arm_name(task.config),
        "seed": task.config.run.seed,
        "data": task.config.data,
        "jobs": task.jobs,
        "command": task.command,
        "settings": task.config.replace(data_root=None).to_dict(),
        "probed": asdict(task.probes),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _trained(task: Task, run: Run) -> dict[str, Any]:
    """Return what a line says of a finished run before it is probed, and keep its encoder."""
    final, w = run.summary["final"], load_w(task.run_dir)
    names = ("knn", "rankme", "density", "groups_per_latent", "dead_groups")
    return {
        **{name: final.get(name) for name in names},
        "nonzero_elements": None if w is None else int((w != 0).sum()),
        "elements": None if w is None else int(w.size),
        "alarms": run.summary["alarms"],
        "steps": run.summary["steps"],
        "seconds": round(run.summary["seconds"], 1),
        "images_per_second": round(run.summary["images_per_second"], 1),
        "encoder": _keep(task),
    }


def _keep(task: Task) -> str:
    """Copy a run's encoder and groups to ENCODERS/RUN_KEY; return the sha256 of the encoder."""
    found = hashlib.sha256((task.run_dir / WEIGHTS).read_bytes()).hexdigest()
    if task.encoders and _kept(task) != found:
        folder = task.encoders / task.run_key
        beside = folder.with_name(f".{folder.name}.tmp")
        for leftover in (beside, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
        for name in (WEIGHTS, CONFIG, GROUPS):
            if (task.run_dir / name).exists():
                shutil.copy2(task.run_dir / name, beside)
        beside.rename(folder)
    return found


def _kept(task: Task) -> str | None:
    """Return the sha256 of the encoder that is kept of a run, None if there is none."""
    path = task.encoders / task.run_key / WEIGHTS if task.encoders else None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.exists() else None


def _probe(task: Task) -> list[dict[str, Any]]:
    """Return a line per data set, target and protocol, with the floors.

    Probes and the raw-pixel floor are seeded alike for all runs; the untrained floor is that of
    another fresh encoder for each seed, so that it pairs with the runs. Floors are kept beside the
    run directories.
    """
    encoder = load(task.run_dir, resolve_device(task.config.run.device))
    rows, seed = _evaluate(task, encoder), task.config.run.seed
    if seed:
        about = [encoder.architecture, encoder.precision, _fingerprints(task)]
        key = _hash([asdict(task.probes), *about, version.TRAIN_VERSION, version.EVAL_VERSION])
        path = _floors(task) / f"untrained-s{seed}-{key}.json"
        if not path.exists():
            twin = _evaluate(task, encoder.untrained(seed), floors=False)
            write_text(path, json.dumps(twin))
        for row, twin in zip(rows, json.loads(path.read_text()), strict=True):
            row["untrained"], row["untrained_interval"] = twin["accuracy"], twin["interval"]
    return rows


def _evaluate(task: Task, encoder: Encoder, floors: bool = True) -> list[dict[str, Any]]:
    """Return the rows of an encoder, with the floors if they are wanted."""
    return [
        {key: value for key, value in row.to_dict().items() if key != "encoder"}
        for data in task.probes.data
        for row in evaluate(
            encoder,
            data,
            protocols=task.probes.protocols_on(data),
            targets=task.probes.targets.get(data),
            floors=floors,
            limit=task.probes.limit,
            holdout=_holdout(task, data),
            **opening(task, data),
            cache_dir=_floors(task),
            device=resolve_device(task.config.run.device),
        )
    ]


def opening(task: Task, data: str) -> dict[str, Any]:
    """Return how to open `data`: the run's own images as in pretraining, others at their size."""
    images = task.config.images
    size = images.img_size if data == task.config.data else ()
    return {
        "img_size": (size[0], size[-1]) if size else None,
        "upscale": images.upscale and data == task.config.data,
        "data_root": images.data_root,
    }


def _holdout(task: Task, data: str) -> int:
    """Return how many training images of `data` the run never saw: it is scored on them."""
    return task.config.images.holdout if data == task.config.data else 0


def _fingerprints(task: Task) -> list[str]:
    """Return the fingerprints of all images that the probes of a task see."""
    return [
        images.fingerprint
        for data in task.probes.data
        for images in load_splits(data, _holdout(task, data), **opening(task, data))
    ]


def _measures(task: Task) -> dict[str, Any]:
    """Return the measures that are asked for, on the first data set."""
    encoder, data = load(task.run_dir, resolve_device(task.config.run.device)), task.probes.data[0]
    groups = load_groups(task.run_dir, encoder.grid_size)
    return measure(
        task.probes.measures,
        encoder,
        None if groups is None else groups.W,
        data,
        targets=task.probes.targets.get(data),
        limit=task.probes.limit,
        holdout=_holdout(task, data),
        seed=task.config.run.seed,
        **opening(task, data),
    )


def _floors(task: Task) -> Path:
    return task.run_dir.parent / "floors"


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def load_w(run_dir: Path) -> Any:
    """Return W of a run as an array [G, P, D], None for a dense run."""
    path = run_dir / GROUPS
    return load_tensors(path)[0]["W"].numpy() if path.exists() else None
