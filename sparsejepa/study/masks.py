"""Pictures of the masks: a preview, and the audit of their coverage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sparsejepa.model.coverage import CoverageAudit
    from sparsejepa.model.masks import MaskSampler


def mask_audit_figure(
    audit: CoverageAudit, path: Path, *, other: tuple[str, np.ndarray, np.ndarray] | None = None
) -> None:
    """Write a PNG: how often each patch is context and target, expected, and the difference.

    Args:
        audit: what `model.coverage.audit` returned.
        path: the file to write.
        other: name, context shares [N] and target shares [N] of a sampler to show beside it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from sparsejepa.study.figures import STYLE, save_png

    columns = 4 if other else 3
    rows, cols = audit.grid_size
    expected = "exact probability" if audit.exact else "Monte-Carlo probability"
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(3.35 * columns + 0.6, 5.6 * rows / cols + 1.8), layout="constrained"
        )
        figure.suptitle(_headline(audit), x=0.01, ha="left", fontsize=11.5)
        axes = figure.subplots(2, columns)
        for i, (name, use) in enumerate((("context", audit.context), ("target", audit.target))):
            shares = [("share of images", use.share), (expected, use.expected)]
            if other:
                shares.append((other[0], (other[1], other[2])[i]))
            top = max(float(values.max()) for _, values in shares)
            for ax, (label, values) in zip(axes[i], shares, strict=False):
                image = _map(ax, values, audit.grid_size, "viridis", (0.0, top), _share)
                worst = values.min() / values.max()
                ax.set_title(f"{name}: {label}\nleast / most {worst:.3f}")
            figure.colorbar(image, ax=list(axes[i, :-1]), shrink=0.8, pad=0.01)
            ax = axes[i, -1]
            z = use.z_given_plans
            image = _map(ax, z, audit.grid_size, "RdBu_r", (-4, 4), _signed)
            ax.set_title(
                f"{name}: share - probability,\nstandard errors (worst {abs(z).max():.1f})"
            )
            figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    save_png(figure, path)


def _headline(audit: CoverageAudit) -> str:
    rows, cols = audit.grid_size
    checks = {
        "context counts as planned": audit.counts_right,
        "blocks whole": audit.blocks_whole,
        "context apart from targets": audit.disjoint,
        f"alike under {audit.symmetries} symmetries": audit.symmetric,
    }
    lines = ", ".join(name if good else f"NOT {name}" for name, good in checks.items())
    verdict = "passed" if audit.passed else "FAILED"
    images = audit.batch_size * audit.batches
    return f"Mask audit {verdict}: {rows}x{cols} patches, {images:,} images\n{lines}"


def _share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value else "0"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0 makes -0.0 positive


def _map(
    ax: Axes, values: np.ndarray, grid: tuple[int, int], palette: str,
    limits: tuple[float, float], text: Callable[[float], str],
) -> Any:  # fmt: skip
    """Draw one value per patch, with numbers where they fit; return the image for a colour bar."""
    values = values.reshape(grid)
    image = ax.imshow(values, cmap=palette, vmin=limits[0], vmax=limits[1], interpolation="none")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if max(grid) <= 10:
        for (row, col), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            colour = "white" if dark else "black"
            ax.text(col, row, text(value), ha="center", va="center", fontsize=7, color=colour)
    return image


def mask_preview_figure(sampler: MaskSampler, path: Path, count: int = 16, seed: int = 0) -> None:
    """Write a PNG of `count` masks of steps 0, 1, ...: context filled, target blocks outlined.

    Merged targets are outlined patch by patch.
    """
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from sparsejepa.study.figures import COLOURS, STYLE, save_png

    rows, cols = sampler.grid_size
    extent = (0, cols, rows, 0)
    across = min(count, 8)
    down = -(-count // across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(max(1.45 * across, 5.5), (1.35 * rows / cols + 0.35) * down + 0.4),
            layout="constrained",
        )
        figure.suptitle(
            "Filled: what the context encoder sees. Outlined: target blocks.",
            x=0.01,
            ha="left",
            fontsize=10,
        )
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        for step, ax in enumerate(axes[:count]):
            context, targets = (part[0].numpy() for part in sampler.sample(1, seed=seed, step=step))
            plan = sampler.plan(seed=seed, step=step)
            ax.set_title(f"{len(context)} seen, {plan.target[0]}x{plan.target[1]}", fontsize=8)
            seen = np.isin(np.arange(rows * cols), context).reshape(rows, cols)
            ax.imshow(seen, ListedColormap(["#e9ebee", "#2f6f9f"]), vmin=0, vmax=1, extent=extent)
            ax.hlines(range(rows + 1), 0, cols, color="white", lw=0.7, zorder=1)
            ax.vlines(range(cols + 1), 0, rows, color="white", lw=0.7, zorder=1)
            ax.set(xlim=(-0.1, cols + 0.1), ylim=(rows + 0.1, -0.1))
            if sampler.union is None:
                outlined = [(block[0], plan.target) for block in targets]
            else:
                outlined = [(patch, (1, 1)) for patch in targets[0]]
            for i, (patch, (height, width)) in enumerate(outlined):
                inset = 0.08 + 0.12 * (i % 4)  # so that no block hides another's outline
                top, left = patch // cols, patch % cols
                ax.add_patch(
                    Rectangle(
                        (left + inset, top + inset), width - 2 * inset, height - 2 * inset,
                        fill=False, edgecolor=COLOURS[1:][i % (len(COLOURS) - 1)], lw=1.6, zorder=2,
                    )
                )  # fmt: skip
    save_png(figure, path)
