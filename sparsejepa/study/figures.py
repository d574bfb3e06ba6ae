"""The pictures of sweeps and masks. Each function returns a matplotlib Figure.

Ink is one colour, which `inline_svg` turns into the page's own text colour, so that a figure is
readable on light and dark pages. Series colours are Okabe and Ito's, told apart by readers with
any colour vision and also by marker and line style.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from sparsejepa.files import atomic_path
from sparsejepa.model.audit import CoverageAudit
from sparsejepa.model.masks import MaskSampler
from sparsejepa.study.verdict import BySeed, Summary, mark, mean_sd

INK = "#1b2127"
COLOURS = ("#3a8fd0", "#e08214", "#00a078", "#cc79a7", "#d55e00", "#8a7fc8", "#b0a000")
SPARSE, DENSE, UNTRAINED, PIXELS = COLOURS[0], COLOURS[2], COLOURS[4], COLOURS[3]
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "grid.color": "#8a8f96",
    "grid.alpha": 0.25,
    "svg.fonttype": "path",
    # Names come from data: a dollar sign in one is no formula, and none of them reaches LaTeX.
    "text.parse_math": False,
    "text.usetex": False,
    "svg.hashsalt": "sparsejepa",  # the same figure gives the same file
}


def accuracy_figure(summary: Summary, measure: str) -> Figure:
    """Accuracy of a measure against lambda: mean and standard deviation over seeds.

    Dense is a horizontal band, the untrained and the raw-pixel floor are dashed lines.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(1)
        ax = axes[0]
        _against_lambda(ax, summary, lambda arm: arm.accuracy.get(measure, {}), scale=100)
        floor = summary.untrained.get(measure, {})
        _floor(ax, mean_sd(floor)[0] if floor else None, "untrained encoder", UNTRAINED, "--")
        _floor(ax, summary.pixels.get(measure), "raw pixels", PIXELS, ":")
        ax.set(title=mark(summary, measure), ylabel="accuracy (%)")
        ax.margins(y=0.12)
        if measure in summary.uninformative:
            _stamp(ax)
        _legend(ax)
    return figure


def pareto_figure(summary: Summary, measure: str) -> Figure:
    """Accuracy against the density of W, one point an arm; dense, which has no W, is a line."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(1)
        ax = axes[0]
        shown = [a for a in summary.arms if a.accuracy.get(measure) and a.structure.get("density")]
        points = [(mean_sd(a.structure["density"]), mean_sd(a.accuracy[measure])) for a in shown]
        ceiling = max((x for (x, _), _ in points), default=0.0)
        for arm, ((x, dx), (y, dy)) in zip(shown, points, strict=True):
            ax.errorbar(
                x, 100 * y, 100 * dy, dx, fmt="o" if arm.sparse else "s",
                color=SPARSE if arm.sparse else COLOURS[1], capsize=3, ms=7,
            )  # fmt: skip
            others = [(abs(u - x), -v) for (u, _), (v, _) in points if (u, v) != (x, y)]
            above = not others or y >= -min(others)[1]  # away from the nearest neighbour's label
            place = (6, 7 if above else -15)
            ax.annotate(arm.name, (x, 100 * y), place, textcoords="offset points", fontsize=10)
        dense = summary.arm("dense")
        if dense and dense.accuracy.get(measure):
            _band(ax, dense.accuracy[measure])
        floor = summary.untrained.get(measure, {})
        _floor(ax, mean_sd(floor)[0] if floor else None, "untrained encoder", UNTRAINED, "--")
        ax.set(
            title=mark(summary, measure),
            xlabel="density: share of (group, latent) columns that are not zero",
            ylabel="accuracy (%)",
            xlim=(0, 1.22 * max(ceiling, 0.1)),  # room for the label of the densest arm
        )
        ax.xaxis.set_major_locator(FixedLocator([t for t in np.arange(0, 1.01, 0.2)]))
        ax.margins(y=0.15)
        if measure in summary.uninformative:
            _stamp(ax)
        _legend(ax)
    return figure


def curves_figure(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Online k-NN accuracy, RankMe and groups per latent against the step, one line an arm.

    `curves` maps an arm to the rows of one run's metrics.jsonl. The loss is left out on purpose: it
    can rise while the features improve.
    """
    panels = (
        ("knn", "k-NN accuracy (%), part of train", 100),
        ("rankme", "RankMe (effective rank)", 1),
        ("groups_per_latent", "groups per latent", 1),
    )
    wanted = [p for p in panels if any(points(rows, p[0]) for rows in curves.values())]
    styles = ("-", "--", "-.", ":")
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(max(1, len(wanted)))
        for ax, (key, label, scale) in zip(axes, wanted, strict=False):
            for i, (arm, rows) in enumerate(curves.items()):
                found = points(rows, key)
                if found:
                    steps, values = np.array(found, float).T
                    ax.plot(
                        steps, scale * values, styles[i % 4], label=arm, lw=1.8,
                        color=_arm_colour(arm, i), marker="o" if len(found) < 25 else "", ms=4,
                    )  # fmt: skip
            ax.set(title=label)
            ax.grid(True)
            ax.margins(y=0.12)
        axes[-1].set_xlabel("step")
        _legend(axes[0])
    return figure


def points(rows: Sequence[Any], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the rows of a metrics.jsonl that have both as drawable numbers."""
    found: list[Any] = [(r.get("step"), r.get(key)) for r in rows if isinstance(r, Mapping)]
    return [(float(x), float(y)) for x, y in found if _drawable(x) and _drawable(y)]


def _drawable(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e100  # NaN is not below it either


def group_map_figure(norms: np.ndarray) -> Figure:
    """Block norms ||W_gj|| [G, D]; latents sorted by their strongest group, exact zeros grey."""
    norms = np.asarray(norms, float)
    order = np.lexsort((-norms.max(0), norms.argmax(0)))
    shown = np.ma.masked_equal(norms[:, order], 0.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        ax = figure.add_subplot()
        palette = matplotlib.colormaps["viridis"].with_extremes(bad="#9aa0a6")
        image = ax.imshow(shown, aspect="auto", cmap=palette, vmin=0, interpolation="none")
        figure.colorbar(image, label="block norm", pad=0.02)
        kept = float((norms > 0).mean())
        ax.set(
            title=f"{100 * kept:.0f} % of the columns are not zero (grey: exactly zero)",
            xlabel="latent dimension, sorted by its strongest group",
            ylabel="group",
        )
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return figure


def samples_figure(
    images: np.ndarray, contexts: Sequence[np.ndarray], targets: Sequence[np.ndarray],
    grid_size: tuple[int, int],
) -> Figure:  # fmt: skip
    """Images [n, H, W, 3] uint8 above what the context encoder sees of them.

    contexts[i] [C] and targets[i] [M, K] are patch indices; target blocks are outlined, a merged
    target patch by patch.
    """
    n, height, width = images.shape[:3]
    patch = (height // grid_size[0], width // grid_size[1])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 5.4 * 2.15 / max(n, 1)), layout="constrained")
        axes = figure.subplots(2, n, squeeze=False)
        for i in range(n):
            seen = _seen(contexts[i], grid_size).repeat(patch[0], 0).repeat(patch[1], 1)
            axes[0, i].imshow(images[i], interpolation="none")
            axes[1, i].imshow(np.where(seen[..., None], images[i], 150), interpolation="none")
            _outline(axes[1, i], targets[i], grid_size[1], patch)
        for ax in axes.flat:
            ax.set_axis_off()
    return figure


def mask_preview_figure(sampler: MaskSampler, count: int = 16, seed: int = 0) -> Figure:
    """`count` masks of steps 0, 1, ...: context filled, target blocks outlined.

    A merged target is outlined patch by patch.
    """
    rows, cols = sampler.grid_size
    across = min(count, 8)
    down = -(-count // across)
    size = (max(1.45 * across, 5.5), (1.35 * rows / cols + 0.35) * down + 0.4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(
            "Filled: what the context encoder sees. Outlined: target blocks.", x=0.01, ha="left"
        )
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        for step, ax in enumerate(axes[:count]):
            context, targets = (part[0].numpy() for part in sampler.sample(1, seed=seed, step=step))
            ax.set_title(f"{len(context)} seen", fontsize=8)
            palette = ListedColormap(["#e9ebee", "#2f6f9f"])
            ax.imshow(_seen(context, (rows, cols)), palette, vmin=0, vmax=1)
            _outline(ax, targets, cols, (1, 1))
    return figure


def mask_audit_figure(audit: CoverageAudit) -> Figure:
    """How often each patch is context and target, how often expected, and the difference."""
    rows, cols = audit.grid_size
    expected = "exact probability" if audit.exact else "Monte-Carlo probability"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 5.6 * rows / cols + 1.8), layout="constrained")
        figure.suptitle(
            f"Mask audit {'passed' if audit.passed else 'FAILED'}: {rows}x{cols} patches, "
            f"{audit.images:,} images",
            x=0.01,
            ha="left",
        )
        axes = figure.subplots(2, 3)
        for line, (name, use) in zip(
            axes, (("context", audit.context), ("target", audit.target)), strict=True
        ):
            top, z = float(max(use.share.max(), use.expected.max())), use.z_given_plans
            for ax, values, label, limits, palette in (
                (line[0], use.share, "share of images", (0, top), "viridis"),
                (line[1], use.expected, expected, (0, top), "viridis"),
                (line[2], z, f"difference, standard errors (worst {abs(z).max():.1f})", (-4, 4),
                 "RdBu_r"),
            ):  # fmt: skip
                image = ax.imshow(
                    values.reshape(rows, cols), palette, vmin=limits[0], vmax=limits[1]
                )
                ax.set(xticks=[], yticks=[], title=f"{name}: {label}")
                figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    return figure


def _seen(context: np.ndarray, grid_size: tuple[int, int]) -> np.ndarray:
    """Return which patches [rows, columns] are among the indices `context` [C]."""
    return np.isin(np.arange(grid_size[0] * grid_size[1]), context).reshape(grid_size)


def _outline(ax: Axes, targets: np.ndarray, across: int, patch: tuple[int, int]) -> None:
    """Outline target blocks [M, K] of patches of `patch` (h, w) pixels, `across` in a row."""
    height, width = patch
    for j, block in enumerate(targets):
        row, col = block // across, block % across
        rows, cols = np.ptp(row) + 1, np.ptp(col) + 1
        whole = rows * cols == len(block)
        corners = [(row.min(), col.min())] if whole else list(zip(row, col, strict=True))
        sides = (rows, cols) if whole else (1, 1)
        inset = 0.06 * (j % 4) * width  # so that no block hides another's outline
        for top, left in corners:
            ax.add_patch(
                Rectangle(
                    (left * width - 0.5 + inset, top * height - 0.5 + inset),
                    sides[1] * width - 2 * inset,
                    sides[0] * height - 2 * inset,
                    fill=False,
                    lw=1.6,
                    ec=COLOURS[(j + 1) % len(COLOURS)],
                )
            )


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
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(INK, "currentColor")
    svg = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)


def _canvas(panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels one above the other: still readable 400 pixels wide."""
    figure = Figure(figsize=(5.4, 3.5 if panels == 1 else 2.6 * panels), layout="constrained")
    return figure, [figure.add_subplot(panels, 1, i + 1) for i in range(panels)]


def _against_lambda(ax: Axes, summary: Summary, values: Any, scale: float = 1) -> None:
    """Draw one point per lambda, a star per steered density, and dense as a band."""
    points = [(a.lam, *mean_sd(values(a))) for a in summary.arms if a.lam is not None and values(a)]
    positive = [lam for lam, _, _ in points if lam > 0]
    smallest = min(positive, default=0.01)
    ax.set_xscale("symlog", linthresh=smallest, linscale=0.6)
    if points:
        x, y, sd = (np.array(column) for column in zip(*points, strict=True))
        ax.errorbar(
            x, scale * y, scale * sd, fmt="o-", color=SPARSE, capsize=4, ms=6, lw=1.8,
            label="with group map",
        )  # fmt: skip
    ticks = [lam for lam, _, _ in points]
    steered = [a for a in summary.arms if a.density is not None and values(a)]
    for i, arm in enumerate(steered):  # a steered arm has no lambda of its own: beside the axis
        mean, sd = mean_sd(values(arm))
        ticks.append(max(positive, default=0.01) * 10 ** (0.7 * (i + 1)))
        ax.errorbar(
            ticks[-1], scale * mean, scale * sd, fmt="D", color=COLOURS[1], capsize=4, ms=6,
            label="steered to a density" if i == 0 else None,
        )  # fmt: skip
    labels = [f"{lam:g}" for lam, _, _ in points] + [f"d={a.density:g}" for a in steered]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels(labels)
    ax.set_xlim(-0.35 * smallest, 1.6 * max(ticks, default=1))
    ax.set_xlabel("lambda (0: no penalty" + ("; d: steered to this density)" if steered else ")"))
    ax.grid(True, axis="y")
    dense = summary.arm("dense")
    if dense and values(dense):
        _band(ax, values(dense), scale)


def _band(ax: Axes, values: BySeed, scale: float = 100) -> None:
    mean, sd = mean_sd(values)
    ax.axhspan(scale * (mean - sd), scale * (mean + sd), color=DENSE, alpha=0.2, lw=0)
    ax.axhline(scale * mean, color=DENSE, lw=1.8, ls="-.", label="dense (no group map)")


def _floor(ax: Axes, value: float | None, label: str, colour: str, style: str) -> None:
    if value is not None:
        ax.axhline(100 * value, color=colour, lw=1.6, ls=style, label=label)


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2, borderaxespad=0)


def _stamp(ax: Axes) -> None:
    """Say on the picture itself that nothing follows from it."""
    ax.text(
        0.5, 0.5, "uninformative", transform=ax.transAxes, ha="center", va="center", fontsize=26,
        alpha=0.28, rotation=14, color=INK,
    )  # fmt: skip


def _arm_colour(arm: str, index: int) -> str:
    fixed = {"dense": DENSE, "lam=0": COLOURS[1]}
    others = (SPARSE, COLOURS[3], COLOURS[5], COLOURS[6], COLOURS[4])
    return fixed.get(arm, others[(index - len(fixed)) % len(others)])
