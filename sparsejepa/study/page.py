"""One self-contained HTML page (verdict, table, figures, settings), and the pictures on it.

Ink is one colour, which `inline_svg` turns into the page's own text colour, so that a figure is
readable on light and dark pages. Series colours are Okabe and Ito's, told apart by readers with
any colour vision and also by marker and line style. The page asks nothing of the network.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sparsejepa.files import atomic_path, write_text
from sparsejepa.model.masks import MaskSampler
from sparsejepa.study import render
from sparsejepa.study.verdict import Summary, mark, mean_sd, percent

INK = "#1b2127"
COLOURS = ("#3a8fd0", "#e08214", "#00a078", "#cc79a7", "#d55e00", "#8a7fc8", "#b0a000")
SPARSE, CONTROL, DENSE, PIXELS, UNTRAINED = COLOURS[:5]
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 11.5,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "legend.frameon": False, "legend.fontsize": 10, "grid.color": "#8a8f96",
    "grid.alpha": 0.25, "svg.fonttype": "path",
    # Names come from data: a dollar sign in one is no formula, and none of them reaches LaTeX.
    "text.parse_math": False, "text.usetex": False,
    "svg.hashsalt": "sparsejepa",  # the same figure gives the same file
}  # fmt: skip


# --- the page


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
    from markupsafe import Markup

    svgs = [Markup(inline_svg(p.figure, f"f{i}")) for i, p in enumerate(page.pictures)]
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = list(zip(svgs, page.pictures, strict=True))
    write_text(path, render("page.html", page=page, figures=figures))
    return path


def save_png(figure: Figure, path: Path) -> Path:
    """Write a PNG on white, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as beside:
        figure.savefig(beside, format="png", dpi=144, facecolor="white")
    return path


def inline_svg(figure: Figure, prefix: str) -> str:
    """Return the figure as SVG markup for an HTML page: transparent, ink in the page's text colour.

    `prefix` keeps the identifiers of several figures on one page apart.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    for side in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" ', 1)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)


# --- the figures of a sweep


def sweep_pictures(summary: Summary) -> list[Picture]:
    """Return the figures of a sweep with captions and alternative texts."""
    several = any(len(a.accuracy.get(m, {})) > 1 for a in summary.arms for m in summary.measures)
    spread = " Bars and band: standard deviation over seeds." if several else ""
    pictures = []
    for name in summary.measures:
        weak = f" {_WEAK}" if name in summary.uninformative else ""
        slug = "".join(c if c.isalnum() else "-" for c in name)[-60:].strip("-").replace("--", "-")
        pictures.append(
            Picture(
                f"accuracy-{slug}",
                accuracy_figure(summary, name),
                f"Accuracy on {name}, arm by arm.{spread}{weak}",
                f"Accuracy on {name} in percent. {_levels(summary, name)}{weak}",
            )
        )
    return pictures


_WEAK = (
    "Uninformative: dense or lam=0 does not beat the untrained encoder by more than the interval."
)


def _levels(summary: Summary, name: str) -> str:
    """Return all of an accuracy figure's levels in words."""
    parts = [f"{a.name} {percent(a.accuracy[name])}" for a in summary.arms if a.accuracy.get(name)]
    if summary.untrained.get(name):
        parts.append(f"untrained encoder {percent(summary.untrained[name])}")
    if name in summary.pixels:
        parts.append(f"raw pixels {100 * summary.pixels[name]:.1f}")
    return "; ".join(parts) + "."


def accuracy_figure(summary: Summary, measure: str) -> Figure:
    """Accuracy of each arm: mean and standard deviation over seeds; below it, what is left of W.

    Dense is a horizontal band as well, the untrained and the raw-pixel floor are dashed lines.
    """
    shown = [arm for arm in summary.arms if arm.accuracy.get(measure)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")  # readable 400 pixels wide
        ax, names = figure.add_subplot(), []
        for x, arm in enumerate(shown):
            mean, sd = (100 * value for value in mean_sd(arm.accuracy[measure]))
            colour = SPARSE if arm.sparse else CONTROL if arm.lam is not None else DENSE
            ax.errorbar(x, mean, sd, fmt="o", color=colour, capsize=4, ms=6)
            left = arm.structure.get("density")
            names.append(arm.name.replace("=", "=\n") if len(shown) > 5 else arm.name)
            names[-1] += f"\n{100 * mean_sd(left)[0]:.0f} % of W" if left else ""
        ax.set_xticks(range(len(shown)), names, fontsize=9)
        ax.set_xlim(-0.6, len(shown) - 0.4)
        ax.grid(True, axis="y")
        _levels_of(ax, summary, measure)
    return figure


def _levels_of(ax: Axes, summary: Summary, measure: str) -> None:
    """Draw dense as a band and the floors as lines; say where nothing follows from the picture."""
    dense, floor = summary.arm("dense"), summary.untrained.get(measure)
    if dense and (values := dense.accuracy.get(measure)):
        mean, sd = mean_sd(values)
        ax.axhspan(100 * (mean - sd), 100 * (mean + sd), color=DENSE, alpha=0.2, lw=0)
        ax.axhline(100 * mean, color=DENSE, lw=1.8, ls="-.", label="dense (no group map)")
    if floor:
        label = "untrained encoder"
        ax.axhline(100 * mean_sd(floor)[0], color=UNTRAINED, lw=1.6, ls="--", label=label)
    if measure in summary.pixels:
        ax.axhline(100 * summary.pixels[measure], color=PIXELS, lw=1.6, ls=":", label="raw pixels")
    if measure in summary.uninformative:
        ax.text(
            0.5, 0.5, "uninformative", transform=ax.transAxes, ha="center", va="center",
            fontsize=26, alpha=0.28, rotation=14,
        )  # fmt: skip
    ax.set(title=mark(summary, measure), ylabel="accuracy (%)")
    ax.margins(y=0.15)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.25), ncols=2, borderaxespad=0)


# --- masks


def mask_preview_figure(sampler: MaskSampler, count: int = 16, seed: int = 0) -> Figure:
    """`count` masks of steps 0, 1, ...: context filled, target blocks outlined.

    A merged target, which is no block, is outlined patch by patch.
    """
    (rows, cols), across = sampler.grid_size, min(count, 8)
    down = -(-count // across)
    size = (max(1.45 * across, 5.5), (1.35 * rows / cols + 0.35) * down + 0.4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle("Filled: what the context encoder sees. Outlined: target blocks.")
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        for step, ax in enumerate(axes[:count]):
            context, targets = (part[0].numpy() for part in sampler.sample(1, seed=seed, step=step))
            seen = np.isin(np.arange(rows * cols), context).reshape(rows, cols)
            ax.imshow(seen, ListedColormap(["#e9ebee", "#2f6f9f"]), vmin=0, vmax=1)
            ax.set_title(f"{len(context)} seen", fontsize=8)
            for j, block in enumerate(targets):
                row, col = block // cols, block % cols
                height, width = int(np.ptp(row)) + 1, int(np.ptp(col)) + 1
                corners = [(row.min(), col.min())]
                if height * width != len(block):
                    height, width, corners = 1, 1, list(zip(row, col, strict=True))
                inset = 0.06 * (j % 4)  # so that no block hides another's outline
                for top, left in corners:
                    corner, colour = (left - 0.5 + inset, top - 0.5 + inset), COLOURS[1 + j % 6]
                    sides = width - 2 * inset, height - 2 * inset
                    ax.add_patch(Rectangle(corner, *sides, fill=False, lw=1.6, ec=colour))
    return figure
