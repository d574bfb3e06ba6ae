"""One self-contained HTML page: verdict, table, figures, settings. No outside request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sparsejepa.files import write_text
from sparsejepa.model.masks import Masks
from sparsejepa.study.figures import (
    accuracy_figure,
    curves_figure,
    group_map_figure,
    inline_svg,
    pareto_figure,
    samples_figure,
)
from sparsejepa.study.template import render
from sparsejepa.study.verdict import Summary, percent


@dataclass(frozen=True)
class Picture:
    """A figure, its file name and caption, and in `alt` what it shows, for who cannot see it."""

    name: str
    figure: Figure
    caption: str
    alt: str


@dataclass(frozen=True)
class Table:
    """Cells as text; a row whose first cell ends in "floor" is set apart."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Page:
    """What the page shows, top to bottom. Every text is escaped; settings is TOML."""

    title: str
    subtitle: str
    verdict: str
    remarks: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    command: str
    environment: Mapping[str, Any]
    settings: str


def write_page(path: Path, page: Page) -> Path:
    """Render `page` to one HTML file, atomically, and return its path."""
    html = render("page.html", page=page, figures=drawn(page.pictures, "f"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    return path


def drawn(pictures: Sequence[Picture], prefix: str) -> list[dict[str, Any]]:
    """Return svg, caption and alt of each picture; `prefix` keeps their identifiers apart."""
    from markupsafe import Markup

    return [
        {
            "svg": Markup(inline_svg(picture.figure, f"{prefix}{i}")),
            "caption": picture.caption,
            "alt": picture.alt,
        }
        for i, picture in enumerate(pictures)
    ]


def sweep_pictures(
    summary: Summary,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    group_map: tuple[str, np.ndarray] | None,
) -> list[Picture]:
    """Return the figures of a sweep with captions and alternative texts.

    `curves`: metrics of one seed's run per arm; `group_map`: an arm's name and its block norms
    [G, D].
    """
    pictures = []
    several = any(len(a.accuracy.get(m, {})) > 1 for a in summary.arms for m in summary.measures)
    spread = "Bars and band: standard deviation over seeds. " if several else ""
    for name in summary.measures:
        weak = name in summary.uninformative
        note = f"{_WEAK} " if weak else ""
        pictures.append(
            Picture(
                f"accuracy-{_slug(name)}",
                accuracy_figure(summary, name),
                f"Accuracy on {name} against lambda. {spread}{note}".strip(),
                f"Accuracy on {name} against lambda, in percent. {_levels(summary, name)} {note}",
            )
        )
    name = next((m for m in summary.measures if m not in summary.uninformative), None)
    if name is not None and any(arm.structure.get("density") for arm in summary.arms):
        pictures.append(
            Picture(
                "pareto",
                pareto_figure(summary, name),
                f"Accuracy on {name} against the share of connections that is left: up and to the "
                "left is better.",
                f"Accuracy on {name} against the density of W, one point per arm, dense as a line. "
                f"{_levels(summary, name)}",
            )
        )
    if any(curves.values()):
        pictures.append(
            Picture(
                "training",
                curves_figure(curves),
                "While training (first seed). k-NN and RankMe are taken on training images; the "
                "loss is not shown because it can rise while the features improve.",
                f"Curves over training steps for {', '.join(curves)}: k-NN accuracy, RankMe and "
                "groups per latent.",
            )
        )
    if group_map is not None:
        arm, norms = group_map
        pictures.append(
            Picture(
                "group-map",
                group_map_figure(norms),
                f"Which latents feed which group in {arm} (first seed).",
                f"Heat map of {norms.shape[0]} groups by {norms.shape[1]} latent dimensions for "
                f"{arm}; {100 * float((norms > 0).mean()):.0f} percent of the cells are not zero.",
            )
        )
    return pictures


def samples_picture(images: np.ndarray, masks: Masks, grid_size: tuple[int, int]) -> Picture:
    """Return images [n, H, W, 3] with their masks as a picture."""
    contexts, targets = masks.context.numpy(), masks.targets.numpy()
    return Picture(
        "samples",
        samples_figure(images, list(contexts), list(targets), grid_size),
        "Training images, and below each what the context encoder sees of it at one step; the "
        "outlined patches are predicted.",
        f"{len(images)} training images above their masked versions: {contexts.shape[1]} of "
        f"{grid_size[0] * grid_size[1]} patches are visible, those that are predicted are "
        "outlined.",
    )


_WEAK = (
    "Uninformative: dense or lam=0 does not beat the untrained encoder by more than the interval."
)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)[-60:].strip("-").replace("--", "-")


def _levels(summary: Summary, name: str) -> str:
    """Return all of an accuracy figure's levels in words."""
    parts = [f"{a.name} {percent(a.accuracy[name])}" for a in summary.arms if a.accuracy.get(name)]
    if summary.untrained.get(name):
        parts.append(f"untrained encoder {percent(summary.untrained[name])}")
    if name in summary.pixels:
        parts.append(f"raw pixels {100 * summary.pixels[name]:.1f}")
    return "; ".join(parts) + "."
