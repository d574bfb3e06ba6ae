"""`explain`: read an encoder on a data set, measure it beside its floors, write report.html."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsejepa import __version__, version
from sparsejepa.data.catalog import load_dataset
from sparsejepa.data.store import ImageSet
from sparsejepa.encoders.encoder import FITTED, Precision
from sparsejepa.encoders.load import load
from sparsejepa.environment import environment, resolve_device
from sparsejepa.errors import UserError
from sparsejepa.evaluation.features import read_fitting, target
from sparsejepa.explain import measures
from sparsejepa.explain.columns import REFERENCES, RUN, build_columns, short_name
from sparsejepa.explain.groups import MATCHED_IMAGES, gallery, patch_maps, sibling_stability
from sparsejepa.explain.prediction import masked_r2
from sparsejepa.explain.readout import evenly
from sparsejepa.explain.subject import (
    NAMES,
    PostHoc,
    Subject,
    is_public,
    open_subject,
    read_names,
    run_folder,
    write_names,
)
from sparsejepa.explain.verdict import verdict
from sparsejepa.files import save_tensors, write_text
from sparsejepa.report.explain import ExplainPage, MeasureRow, write_explain_page
from sparsejepa.results import read_rows
from sparsejepa.study.page import Picture, sweep_pictures
from sparsejepa.study.sweep import RESULTS
from sparsejepa.study.verdict import summarise, usable
from sparsejepa.training.checkpoint import train_version

REPORT, METRICS, ACTIVATIONS = "report.html", "metrics.json", "activations.safetensors"
PREDICTED_IMAGES = 1_000
LEAST_IMAGES = 16

Targets = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Options:
    """What is read and how; every field is a flag of the command."""

    targets: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    control: str | None = None
    limit: int = 10_000
    test_limit: int = 5_000
    img_size: tuple[int, int] | None = None
    upscale: bool = False
    quick: bool = False
    posthoc: PostHoc = field(default_factory=PostHoc)
    seed: int = 0
    data_root: Path | None = None
    device: str = "auto"
    precision: Precision = "bf16"


def run_explain(
    ref: str | Path,
    data: str,
    *,
    options: Options | None = None,
    out: Path | None = None,
    names: Mapping[int, str] | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure and show what an encoder and its groups have learned.

    Args:
        ref: a run directory or ``timm:NAME``. Without groups of its own it gets fitted ones.
        data: a data set's name or folder; labels, factors and masks are used where there are any.
        out: where report.html and metrics.json go; the run directory if None.
        names: for groups; added to groups.json.
        command: what repeats this, for the page.
        say: is told what is being done.

    Returns what metrics.json holds. Raises UserError, one line, for data, runs and factors that
    cannot be used.
    """
    ref, options = str(ref), options or Options()
    device = resolve_device(options.device)
    home = run_folder(ref)
    out = out or home
    clock = _Clock(say)
    with clock("images"):
        train, test = read_fitting(
            lambda *view: (
                _images(data, "train", options, view),
                _images(data, "test", options, view),
            ),
            data,
            [ref],
            lambda: [load(ref).img_size],
            img_size=options.img_size,
            upscale=options.upscale,
            say=say,
        )
        targets, left_out = _targets(train, test, options)
    for images, flag in ((train, "--limit"), (test, "--test-limit")):
        if len(images) < LEAST_IMAGES:
            asked = options.limit if images is train else options.test_limit
            remedy = (
                f"use at least {LEAST_IMAGES} ({flag})"
                if asked < LEAST_IMAGES
                # A fifth is set aside for testing where the data names no test images.
                else f"add images, {LEAST_IMAGES} of them for testing (about {5 * LEAST_IMAGES} in "
                "all if none are named so)"
            )
            raise UserError(
                f"{data}: {len(images)} {images.split} images are too few to measure anything; "
                f"{remedy}"
            )
    if out != home or out.is_dir() or is_public(ref):  # else there is no such run
        _check_folder(out)
    with clock("encoder and groups"):
        subject = open_subject(
            ref,
            train,
            posthoc=options.posthoc,
            device=device,
            precision=options.precision,
            random_state=options.seed,
            test=None if options.quick else test,
        )
    if names:
        write_names(out, dict(names), len(subject.W))
    given = {g: n for f in (home, out) for g, n in read_names(f, len(subject.W)).items()}
    with clock("reading images"):
        # A control without groups gets fitted ones, as many as the run has.
        fit = replace(options.posthoc, num_groups=len(subject.W))
        columns = build_columns(
            subject,
            train,
            test,
            control=options.control,
            posthoc=None if options.quick and subject.groups is not None else fit,
            random_state=options.seed,
        )
    rows = [*measures.structure_rows(columns)]
    with clock("information"):
        rows += measures.information_rows(columns)
    cells = []
    if subject.groups is not None and subject.config is not None:
        with clock("masked prediction"):
            overall, cells = masked_r2(subject, test.subset(PREDICTED_IMAGES))
            rows += measures.prediction_rows(overall, cells, {})
    rows += measures.prediction_rows(None, [], subject.fitted)
    if targets:
        with clock("disentanglement"):
            factors, nested = _independent(targets)
            left_out += nested
            stacked = (np.stack([pair[i] for pair in factors.values()], 1) for i in (0, 1))
            rows += measures.disentanglement_rows(columns, *stacked, quick=options.quick)
        with clock("groups and factors"):
            rows += measures.factor_rows(columns, targets, random_state=options.seed)
    rows += measures.purity_rows(columns, test)
    if test.masks is not None:
        with clock("objects"):
            rows += measures.object_rows(
                columns,
                test.masks,
                regions=subject.kind == "region",
                random_state=options.seed,
            )
    with clock("groups"):
        run = columns[RUN]
        stability = None if options.quick else sibling_stability(subject, train, test)
        shown = gallery(subject, run, test, targets, names=given, stability=stability)
        rows += shown.rows
    found = verdict(subject, rows, left_out)
    maps = patch_maps(subject, columns[RUN])
    about = environment()
    command = command or shlex.join(["sparsejepa", "explain", ref, "--data", data])
    out.mkdir(parents=True, exist_ok=True)
    metrics = {
        "format": 1,
        "sparsejepa": __version__,
        "train_version": train_version(Path(ref)) or version.TRAIN_VERSION,
        "eval_version": version.EVAL_VERSION,
        "run": ref,
        "data": data,
        "images": {"train": len(train), "test": len(test)},
        "fingerprint": test.fingerprint,
        "groups": {"kind": subject.kind, "post_hoc": subject.groups is None},
        "verdict": found.text,
        "remarks": list(found.remarks),
        "measures": [_json(row) for row in rows],
        "group_list": [_json(view) for view in shown.views],
        "command": command,
        "options": _json({k: v for k, v in asdict(options).items() if k != "data_root"}),
        "environment": about,
        "seconds": clock.seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    save_tensors(
        out / ACTIVATIONS,
        {
            "activations": torch.from_numpy(maps[evenly(len(test), MATCHED_IMAGES)]),
            "block_norms": torch.from_numpy(subject.norms),
        },
        {"fingerprint": test.fingerprint, "data": data},
    )
    if subject.estimator is not None:
        subject.estimator.save(out / FITTED)
    write_text(out / METRICS, json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    write_explain_page(
        out / REPORT,
        ExplainPage(
            title=f"What {short_name(ref)} has learned",
            subtitle=_subtitle(subject, data, train, test),
            verdict=found.text,
            remarks=found.remarks,
            columns=_order(rows, columns),
            measures=rows,
            block_norms=subject.norms,
            images=shown.images,
            image_labels=shown.image_labels,
            activations=shown.activations,
            grid=subject.encoder.grid_size,
            explorer=shown.explorer,
            groups=shown.views,
            curves=read_rows(Path(ref) / "metrics.jsonl"),
            pictures=_sweep_pictures(ref),
            command=command,
            environment=_about(about, metrics),
            settings=_settings(subject, options),
            names_file=str(out / NAMES),
            floors=REFERENCES,
        ),
    )
    return metrics


class _Clock:
    """Says what is being done and keeps how long each part took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.seconds = say, dict[str, float]()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.say(part)
        start = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - start, 2)


def _images(
    data: str, split: str, options: Options, view: tuple[tuple[int, int] | None, bool]
) -> ImageSet:
    """Load a split; `view` is the size that images are read at and whether small ones grow."""
    images = load_dataset(
        data,
        split,
        img_size=view[0],
        data_root=options.data_root,
        upscale=view[1],
        truth=split == "test",
        factors=options.factors,
    )
    return images.subset(options.limit if split == "train" else options.test_limit, options.seed)


def _targets(train: ImageSet, test: ImageSet, options: Options) -> tuple[Targets, list[str]]:
    """Return the labels (train [n], test [n']) by target, and why others are left out."""
    shared = tuple(name for name in train.targets if name in test.targets)
    found: Targets = {}
    left_out = []
    for name in options.targets or shared:
        both = [target(images.targets, name, images.name).values for images in (train, test)]
        levels = [len(np.unique(values)) for values in both]
        if min(levels) < 2:
            left_out.append(f"'{name}' has one value only here, so nothing is measured on it.")
        elif max(levels) > min(map(len, both)) / 2:
            left_out.append(
                f"'{name}' has {max(levels):,} values for {min(map(len, both)):,} images, too many "
                "to measure anything on; use more images or a coarser label."
            )
        else:
            found[name] = both[0], both[1]
    return found, left_out


def _independent(targets: Targets) -> tuple[Targets, list[str]]:
    """Leave out factors that follow from an earlier one: no code could tell them apart."""
    kept: Targets = {}
    left_out = []
    for name, (train, test) in targets.items():
        finer = next((k for k, (other, _) in kept.items() if _follows(train, other)), None)
        if finer is None:
            kept[name] = train, test
        else:
            left_out.append(
                f"'{name}' follows from '{finer}' and is left out of disentanglement, which is for "
                "factors that vary on their own."
            )
    return kept, left_out


def _follows(coarse: np.ndarray, fine: np.ndarray) -> bool:
    pairs = np.unique(np.stack([coarse, fine]), axis=1)
    return pairs.shape[1] == len(np.unique(fine))


def _check_folder(out: Path) -> None:
    """Raise UserError before the work, not after it, if nothing can be written to `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / f".{METRICS}", "")
        (out / f".{METRICS}").unlink()
    except OSError as error:
        raise UserError(
            f"{out}: cannot write a report there ({error.strerror}); name another folder with --out"
        ) from None


def _order(rows: Sequence[MeasureRow], columns: Mapping[str, Any]) -> list[str]:
    """Return the names of all columns that some row fills: models first, then floors."""
    used = {name for row in rows for name in row.values}
    return [name for name in dict.fromkeys([*columns, *REFERENCES]) if name in used]


def _json(value: Any) -> Any:
    """Return a value as JSON knows it; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_json(v) for v in value]
    if isinstance(value, np.generic):
        return _json(value.item())
    if is_dataclass(value) and not isinstance(value, type):
        return _json(asdict(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _subtitle(subject: Subject, data: str, train: ImageSet, test: ImageSet) -> str:
    vit = subject.encoder
    groups = f"{len(subject.W)} {subject.kind} groups"
    if subject.groups is None:
        groups += ", fitted to the frozen encoder after training (it has none of its own)"
    rows, cols = vit.grid_size
    return (
        f"Encoder of {vit.embed_dim} latents and {rows}x{cols} patches, {groups}; read on {data}, "
        f"{len(train):,} training and {len(test):,} test images of "
        f"{test.img_size[0]}x{test.img_size[1]} pixels."
    )


def _about(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    hardware = ", ".join(about["gpus"]) or f"{about['cpu']}, {about['cores']} cores"
    seconds = metrics["seconds"]
    return {
        "commit": about["commit"] or "not a source checkout",
        "versions": ", ".join(f"{k} {about[k]}" for k in ("sparsejepa", "torch", "python")),
        "hardware": hardware,
        "seconds": ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
        + f"; {sum(seconds.values()):.0f} in all",
        "finished": metrics["finished"],
    }


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as TOML knows them: what is not set is left out, paths are text."""
    return {
        k: without_none(v) if isinstance(v, Mapping) else str(v) if isinstance(v, Path) else v
        for k, v in values.items()
        if v is not None
    }


def _settings(subject: Subject, options: Options) -> str:
    """Return what the encoder was trained with, if that is known, and what it was read with."""
    import tomli_w

    found = {"explain": without_none(asdict(options))}
    if subject.config is not None:
        found["pretrain"] = subject.config.replace(data_root=None).to_dict()
    return tomli_w.dumps(found)


def _sweep_pictures(ref: str) -> list[Picture]:
    """Return the Pareto plots of the sweep that a run belongs to, if it belongs to one."""
    found = [] if is_public(ref) else read_rows(Path(ref).resolve().parent / RESULTS)
    rows = [row for row in found if usable(row)]
    if not rows:
        return []
    pictures = sweep_pictures(summarise(rows), {}, None)
    return [picture for picture in pictures if picture.name == "pareto"]
