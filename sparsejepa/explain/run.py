"""`explain`: read an encoder on a data set, measure it beside its floors, write report.html."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

import sparsejepa
from sparsejepa import __version__
from sparsejepa.data.catalog import load_dataset
from sparsejepa.data.images import ImageSet
from sparsejepa.encoders.encoder import FITTED
from sparsejepa.encoders.load import load
from sparsejepa.environment import environment, resolve_device
from sparsejepa.errors import UserError
from sparsejepa.evaluation.features import read_fitting
from sparsejepa.evaluation.stats import Estimate
from sparsejepa.explain.concepts import Gallery, make_gallery, patch_maps
from sparsejepa.explain.measures import (
    FITTED_R2,
    GROUP_UNITS,
    HIDDEN,
    SECTIONS,
    SILENCED,
    Labels,
    Reading,
    Row,
    Values,
    independent,
)
from sparsejepa.explain.options import Options
from sparsejepa.explain.page import ExplainPage, write_explain_page
from sparsejepa.explain.readout import (
    DIRECTIONS,
    FLOORS,
    RANDOM,
    RUN,
    Subject,
    build_columns,
    evenly,
    open_subject,
    short_name,
)
from sparsejepa.files import save_tensors, write_text
from sparsejepa.training.checkpoint import train_version

REPORT, METRICS, ACTIVATIONS = "report.html", "metrics.json", "activations.safetensors"
LEAST_IMAGES = 16
MATCHED_IMAGES = 500
"""Test images whose activations are kept, for `compare`."""


def run_explain(
    ref: str | Path,
    data: str,
    *,
    options: Options | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure and show what an encoder and its groups have learned.

    Args:
        ref: a run directory or ``timm:NAME``. Without groups of its own it gets fitted ones.
        data: a data set's name or folder; labels, factors and masks are used where there are any.
        command: what repeats this, for the page.
        say: is told what is being done.

    Returns what metrics.json holds. Raises UserError, one line, for data, runs and factors that
    cannot be used.
    """
    ref, options = str(ref), options or Options()
    options.check()
    out, device = options.out or run_folder(ref), resolve_device(options.device)
    seconds: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        say(name)
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 2)

    with part("images"):
        train, test = _images(ref, data, options, say)
        labels, remarks = _labels(train, test)
        remarks += independent(labels)[1]
    if options.out or out.is_dir() or is_public(ref):  # else there is no such run
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):  # better before the work than after it
            raise UserError(f"{out}: cannot write a report there; name another folder with --out")
    with part("encoder and groups"):
        subject = open_subject(ref, train, options, device)
    with part("reading images"):
        columns = build_columns(subject, train, test, options)
        reading = Reading(subject, options, train, test, labels, columns)
    rows: list[Row] = []
    for name, section in SECTIONS.items():
        with part(name):
            rows += section(reading)
    with part("groups"):
        gallery = make_gallery(subject, columns[RUN], test, labels, reading.silenced)
    text, more = verdict(subject, rows)
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    metrics = {
        "format": 1,
        "sparsejepa": __version__,
        "train_version": train_version(Path(ref)) or sparsejepa.TRAIN_VERSION,
        "eval_version": sparsejepa.EVAL_VERSION,
        "run": ref,
        "data": data,
        "images": {"train": len(train), "test": len(test)},
        "fingerprint": test.fingerprint,
        "groups": {"kind": subject.kind, "post_hoc": subject.groups is None},
        "verdict": text,
        "remarks": remarks + more,
        "measures": rows,
        "group_list": gallery.cards,
        "command": command or shlex.join(["sparsejepa", "explain", ref, "--data", data]),
        "options": {k: v for k, v in given.items() if v is not None and k != "data_root"},
        "environment": environment(),
        "seconds": seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return _write(out, reading, rows, gallery, metrics)


def _write(
    out: Path, x: Reading, rows: list[Row], gallery: Gallery, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Write all files of a report, and return the metrics as they are read again."""
    subject, test = x.subject, x.test
    maps = patch_maps(subject, x.columns[RUN])[evenly(len(test), MATCHED_IMAGES)]
    tensors = {
        "activations": torch.from_numpy(maps),
        "block_norms": torch.from_numpy(subject.norms),
    }
    save_tensors(out / ACTIVATIONS, tensors, {"fingerprint": test.fingerprint})
    if subject.estimator is not None:
        subject.estimator.save(out / FITTED)
    text = json.dumps(metrics, indent=1, allow_nan=False, default=_plain)
    write_text(out / METRICS, text + "\n")
    found = json.loads(text)
    trained = {} if subject.config is None else subject.config.replace(data_root=None).to_dict()
    about = found["environment"]
    page = ExplainPage(
        title=f"What {short_name(subject.ref)} has learned",
        subtitle=_subtitle(subject, found["data"], x.train, test),
        verdict=found["verdict"],
        remarks=found["remarks"],
        rows=rows,
        block_norms=subject.norms,
        images={i: np.asarray(test.images[i]) for i in gallery.shown},
        image_labels={i: _label(test, i) for i in gallery.shown},
        grid=subject.encoder.grid_size,
        gallery=gallery,
        command=found["command"],
        about={
            "commit": about["commit"] or "not a source checkout",
            "versions": ", ".join(f"{k} {about[k]}" for k in ("sparsejepa", "torch", "python")),
            "hardware": ", ".join(about["gpus"]) or f"{about['cpu']}, {about['cores']} cores",
            "seconds": f"{sum(found['seconds'].values()):.0f}",
            "finished": found["finished"],
        },
        settings=tomli_w.dumps({"explain": found["options"], "pretrain": trained}),
    )
    write_explain_page(out / REPORT, page)
    return found


def _plain(value: Any) -> Any:
    """Return as JSON what it does not know: dataclasses, paths, numbers of numpy's."""
    if dataclasses.is_dataclass(value):
        return vars(value)
    return str(value) if isinstance(value, Path) else value.item()


def run_folder(ref: str) -> Path:
    """Return where the report of an encoder goes if no folder is named: the run directory."""
    if not is_public(ref) and not Path(ref).is_file():
        return Path(ref)
    name = ref.partition(":")[2] if is_public(ref) else Path(ref).name
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return Path("runs") / f"explain-{name}"


def is_public(ref: str) -> bool:
    """Whether an encoder is named by where it is published, not by a path."""
    return ref.startswith(("timm:", "hub:"))


def _images(
    ref: str, data: str, options: Options, say: Callable[[str], None]
) -> tuple[ImageSet, ImageSet]:
    """Load both splits at the size that suits the encoder.

    Raises UserError for data that cannot be read or are too few.
    """

    def both(size: tuple[int, int] | None, upscale: bool) -> list[ImageSet]:
        return [
            load_dataset(
                data,
                split,
                img_size=size,
                data_root=options.data_root,
                upscale=upscale,
                truth=split == "test",
                factors=options.factor_names,
            ).subset(most, options.seed)
            for split, most in (("train", options.limit), ("test", options.test_limit))
        ]

    size, upscale = options.size, options.upscale
    own = lambda: [load(ref).img_size]  # noqa: E731
    train, test = read_fitting(both, data, [ref], own, img_size=size, upscale=upscale, say=say)
    for images, flag in ((train, "--limit"), (test, "--test-limit")):
        if len(images) < LEAST_IMAGES:
            raise UserError(
                f"{data}: {len(images)} {images.split} images are too few to measure anything; "
                f"use at least {LEAST_IMAGES} ({flag}), or about {5 * LEAST_IMAGES} in all if none "
                "are named for testing"
            )
    return train, test


def _labels(train: ImageSet, test: ImageSet) -> tuple[Labels, list[str]]:
    """Return the labels (train [n], test [n']) by target, and why others are left out."""
    found: Labels = {}
    left_out = []
    least = min(len(train), len(test))
    for name in [name for name in train.targets if name in test.targets]:
        both = train.targets[name].values, test.targets[name].values
        levels = [len(np.unique(values)) for values in both]
        if min(levels) < 2:
            left_out.append(f"'{name}' has one value only here, so nothing is measured on it.")
        elif max(levels) > least / 2:
            left_out.append(
                f"'{name}' has {max(levels):,} values for {least:,} images, too many to measure "
                "anything on; use more images or a coarser label."
            )
        else:
            found[name] = both
    return found, left_out


def _label(test: ImageSet, image: int) -> str:
    """Return the file and the labels of an image, as the page shows them."""
    parts = [test.files[image]] if test.files else [f"test image {image}"]
    parts += [f"{k} {t.names[int(t.values[image])]}" for k, t in list(test.targets.items())[:4]]
    return ", ".join(parts)


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


# ---- the verdict ---------------------------------------------------------------------------------


def verdict(subject: Subject, rows: Sequence[Row]) -> tuple[str, list[str]]:
    """Say in two sentences what the groups are worth against their floors, and what limits that.

    The first is about W: how sparse it is and whether its groups know the factors better than the
    best floor. The second is about images: whether patches of one object share a group, or where
    there are no masks, how well the groups predict; and whether to silence one matters.
    """
    on = subject.norms > 0
    first = (
        f"W keeps {100 * on.mean():.0f} % of the connections between latents and groups "
        f"({on.sum(0).mean():.1f} of {len(on)} groups per latent)"
    )
    # MIG, as its interval is over images; DCI's is over the trees of one fit.
    mig = next((r.values for r in rows if (r.section, r.name) == (GROUP_UNITS, "MIG")), {})
    if mig and mig[RUN].value is not None:
        first += f", and as units of code its groups {against_floors('have a MIG', mig)}"
    else:
        first += "; without labels nothing is known of what the groups stand for"
    named = {row.name: row.values for row in rows if RUN in row.values}
    return f"{first}. {_on_images(subject, named)}.", _remarks(subject, named)


def _on_images(subject: Subject, named: Mapping[str, Values]) -> str:
    text = "There are no object masks and no prediction to judge the groups of patches by"
    r2 = named.get(HIDDEN) or named.get(FITTED_R2) or {}
    defined = (m for m in ("FG-ARI", "mBO") if m in named and named[m][RUN].value is not None)
    measure = next(defined, None)
    if measure and subject.kind != "region":
        text = against_floors(f"As segments of objects they reach an {measure}", named[measure])
    elif r2 and (value := r2[RUN].value) is not None:
        text = "From the context they predict hidden patches no better than their place does"
        if value > 0:
            text = f"From the context they predict {100 * value:.0f} % of the variance of hidden "
            text += "patches that their place does not tell"
    if SILENCED in named and (cost := named[SILENCED][RUN]).value is not None:
        chance = named[SILENCED][DIRECTIONS]
        text += "; to silence one costs the probe "
        if _above(cost, chance):
            text += f"{100 * cost.value:.1f} points on average, random directions of equal rank "
            text += f"{100 * (chance.value or 0):.1f}"
        else:
            text += "not clearly more than random directions of equal rank"
    return text


def _remarks(subject: Subject, named: Mapping[str, Values]) -> list[str]:
    remarks = []
    if subject.groups is None:
        remarks.append(
            "The groups were fitted to the frozen encoder by masked prediction; the encoder was "
            "not trained with them."
        )
        fitted = named.get(FITTED_R2)
        if fitted and not _above(fitted[RUN], fitted[RANDOM]):
            remarks.append(
                "The learned pattern of zeros predicts hidden patches no better than random "
                "patterns like it: do not read meaning into which latent feeds which group."
            )
    elif not subject.norms.all():
        remarks.append(
            "The encoder adapted to its pattern of zeros, whichever it is. Whether the learned one "
            "is worth more than a random one shows beside a run that was trained with --pattern "
            "random and the same density: set them side by side with `sparsejepa compare`."
        )
    remarks.append(
        "Intervals resample images (those of DCI's disentanglement and completeness the trees of "
        "its forest) and say nothing of other seeds. A difference between columns is called clear "
        "where the 95 % intervals do not meet."
    )
    return remarks


def against_floors(what: str, values: Values) -> str:
    """Return "WHAT of 0.31, clearly above every floor (the best, PCA: 0.22)" and the like."""
    run = values[RUN]
    floors = {k: e for k, e in values.items() if k in FLOORS and e.value is not None}
    if not floors:
        return f"{what} of {_number(run)}"
    name = max(floors, key=lambda k: floors[k].value or 0.0)
    if all(_above(run, floor) for floor in floors.values()):
        how = "clearly above every floor"
    elif _above(floors[name], run):
        how = "clearly below the best floor"
    else:
        how = "not clearly apart from the best floor"
    return f"{what} of {_number(run)}, {how} ({name}: {_number(floors[name])})"


def _number(estimate: Estimate) -> str:
    """Two decimals, or two digits where that would hide a small value."""
    value = estimate.value or 0.0
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _above(a: Estimate, b: Estimate) -> bool:
    """Whether a lies above b by more than their intervals."""
    assert a.value is not None and b.value is not None
    return (a.low if a.low is not None else a.value) > (b.high if b.high is not None else b.value)
