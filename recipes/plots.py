"""The figures of docs/results.md; a figure without runs to show is not drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
from layouts import CIFAR100, GROUPS, KEPT, PENALISED, SPARSE, curve
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import Block, Study

from sparsejepa.study.figures import COLOURS, DENSE, PIXELS, STYLE, UNTRAINED
from sparsejepa.study.figures import SPARSE as BLUE
from sparsejepa.study.verdict import mean_sd


def lambda_figure(blocks: Sequence[Block]) -> Figure:
    """Accuracy over the share of connections that is left, a column per block."""
    figure, columns = _canvas(len(blocks), 3.6)
    for ax, block in zip(columns, blocks, strict=True):
        for pattern, marker, colour, label in (
            ("lam=0", "s", COLOURS[1], "no penalty (lam=0)"),
            ("lam=0.*", "o", BLUE, "fixed lambda"),
            ("density=*", "D", COLOURS[5], "steered density"),
        ):
            for arm in block.matching(pattern):
                groups, found = block.values(arm, GROUPS), block.values(arm, CIFAR100)
                if groups and found:
                    (x, _), (y, sd) = mean_sd(groups), mean_sd(found)
                    ax.errorbar(
                        x, 100 * y, 100 * sd, fmt=marker, color=colour, capsize=3, ms=6, label=label
                    )
                    label = None
        if found := block.values("dense", CIFAR100):
            mean, sd = mean_sd(found)
            ax.axhspan(100 * (mean - sd), 100 * (mean + sd), color=DENSE, alpha=0.2, lw=0)
            ax.axhline(100 * mean, color=DENSE, ls="-.", lw=1.8, label="dense")
        _floors(ax, block)
        ax.set(title=block.recipe, xlabel="groups per latent that are left")
        ax.set_xscale("log", base=2)
        ax.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        ax.minorticks_off()
        ax.grid(True, axis="y")
    _finish(columns, "CIFAR-100 accuracy (%)")
    return figure


def forest_figure(blocks: Sequence[Block]) -> Figure:
    """Paired difference to lam=0 by arm with its 95 % interval, a column per block."""
    most = max(len(_differences(block)) for block in blocks)
    figure, columns = _canvas(len(blocks), 1.3 + 0.3 * most)
    for ax, block in zip(columns, blocks, strict=True):
        found = _differences(block)
        for y, (_, mean, low, high, colour) in enumerate(found):
            ax.plot([100 * low, 100 * high], [y, y], color=colour, lw=2)
            ax.plot(100 * mean, y, "o", color=colour, ms=6)
        ax.axvline(0, color="#8a8f96", lw=1)
        ax.set_yticks(range(len(found)), [name for name, *_ in found])
        ax.invert_yaxis()
        ax.set(title=block.recipe, xlabel="minus lam=0 (or its twin)\npoints, 95 % interval")
        ax.grid(True, axis="x")
    return figure


def _differences(block: Block) -> list[tuple[str, float, float, float, str]]:
    found = []
    for arm in block.planned:
        twin = block.twin(arm, "lam=0")
        interval = block.difference(arm, twin, CIFAR100) if twin else None
        if interval and interval.low is not None and interval.high is not None:
            first = arm.split("+")[0]
            colour = DENSE if first == "dense" else BLUE if first != "lam=0" else COLOURS[1]
            found.append((arm, interval.mean, interval.low, interval.high, colour))
    return found


def efficiency_figure(blocks: Sequence[Block]) -> Figure:
    """Accuracy of the sparse arm against the latents kept, a column per block."""
    figure, columns = _canvas(len(blocks), 3.6)
    styles = (("accuracy", BLUE, "o-"), ("random_latents", COLOURS[1], "s--"), ("pca", DENSE, "^:"))
    for ax, block in zip(columns, blocks, strict=True):
        points = [p for p in curve(block, SPARSE).values() if "accuracy" in p]
        x = [mean_sd(point["latents"])[0] for point in points]
        for name, colour, style in styles:
            y = [100 * mean_sd(point[name])[0] for point in points]
            label = "latents of the groups kept" if name == "accuracy" else KEPT[name].title
            ax.plot(x, y, style, color=colour, label=label)
        _floors(ax, block)
        ax.set(title=f"{block.recipe}, {SPARSE}", xlabel="latents kept")
        ax.grid(True, axis="y")
    _finish(columns, "CIFAR-100 accuracy (%)")
    return figure


Draw = Callable[[Sequence[Block]], Figure]
FIGURES: dict[str, tuple[int, Draw, Callable[[Block], bool], str]] = {
    "results-lambda.png": (
        3, lambda_figure, lambda b: any(b.values(a, CIFAR100) for a in b.matching(PENALISED)),
        "CIFAR-100 accuracy against the groups per latent that a penalty leaves",
    ),
    "results-arms.png": (
        2, forest_figure, lambda b: bool(_differences(b)),
        "Paired difference to the unpenalised group map, by arm, with 95 % intervals",
    ),
    "results-efficiency.png": (
        11, efficiency_figure, lambda b: len(curve(b, SPARSE)) > 1,
        "Accuracy against latents kept, for groups, random latents and principal components",
    ),
}  # fmt: skip
"""Name: its table, how it is drawn, whether a block has anything for it, and what it shows."""


def shown(study: Study) -> dict[str, list[Block]]:
    """Return the blocks of each figure that has any."""
    found = {
        name: [block for block in study.blocks(table) if has(block)]
        for name, (table, _, has, _) in FIGURES.items()
    }
    return {name: blocks for name, blocks in found.items() if blocks}


def draw(name: str, blocks: Sequence[Block]) -> Figure:
    """Return a figure by its name."""
    with matplotlib.rc_context(STYLE):
        return FIGURES[name][1](blocks)


def _canvas(columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.4 * columns, height), layout="constrained")
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]


def _floors(ax: Axes, block: Block) -> None:
    for which, label, colour, style in (
        ("untrained", "untrained encoder", UNTRAINED, "--"),
        ("pixels", "raw pixels", PIXELS, ":"),
    ):
        if floor := block.floor(CIFAR100, which):
            ax.axhline(100 * mean_sd(floor)[0], color=colour, ls=style, lw=1.6, label=label)


def _finish(columns: Sequence[Axes], label: str) -> None:
    columns[0].set_ylabel(label)
    for ax in columns:
        ax.margins(y=0.12)
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2, borderaxespad=0)
