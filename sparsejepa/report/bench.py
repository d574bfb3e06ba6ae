"""Tables and the figure of the benchmark, from its sections as plain dictionaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from sparsejepa.report.figures import COLOURS, INK, STYLE

if TYPE_CHECKING:
    from rich.console import Console

_LABELS = {
    "median_s": "ms", "images_per_second": "images/s", "gflops": "GFLOP/s", "gflop": "GFLOP",
    "mbytes": "MB", "gbytes_per_second": "GB/s", "memory_mb": "memory MB",
    "x_reference_fp32": "x reference fp32", "x_reference_bf16": "x reference bf16",
    "exponent_gflop": "exponent: GFLOP", "exponent_median_s": "time",
    "exponent_memory_mb": "memory",
}  # fmt: skip
_REFERENCE, _OURS, _LIMIT = "#8a8f96", COLOURS[0], COLOURS[4]


def show_section(console: Console, section: Mapping[str, Any]) -> None:
    """Print a section's rows as a table, then its notes.

    Times are in milliseconds; brackets hold the quartiles. Rows marked ``detail`` and columns
    without a value are left out.
    """
    from rich.table import Table

    rows = [row for row in section["rows"] if not row.get("detail")]
    hidden = {"name", "low_s", "high_s", "detail", "axis", "x"}
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if c not in hidden]
    columns = [c for c in columns if not c.endswith(("_low", "_high"))]
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    table = Table(box=None, padding=(0, 2, 0, 0))
    console.print(section["title"], style="bold")
    table.add_column("")
    for column in columns:
        label = _LABELS.get(column) or column.replace("_", " ")
        table.add_column(label, justify="right")
    for row in rows:
        table.add_row(row["name"], *(_cell(row, column) for column in columns))
    console.print(table)
    for note in section["notes"]:
        console.print(f"  {note}")
    console.print()


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    if isinstance(value, str | bool):
        return str(value)
    if column == "median_s":
        low, high = row.get("low_s"), row.get("high_s")
        spread = f" [{_number(1e3 * low)}, {_number(1e3 * high)}]" if low and high else ""
        return f"{_number(1e3 * value)}{spread}"
    if column.startswith("x_") and f"{column}_low" in row:
        return f"{value:.2f} [{row[f'{column}_low']:.2f}, {row[f'{column}_high']:.2f}]"
    return _number(value)


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"


def bench_figure(sections: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the sections that have a picture: the contest, the step by part, the growth."""
    by_name = {section["name"]: section for section in sections}
    panels: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    for name in ("steps", "peers"):
        if name in by_name:
            panels.append((_contest, (by_name[name],)))
    if "parts" in by_name:
        panels.append((_parts, (by_name["parts"],)))
    if "growth" in by_name:
        panels.append((_growth, (by_name["growth"], "median_s", "time of a step")))
        panels.append((_growth, (by_name["growth"], "memory_mb", "peak memory of a step")))
    columns = min(2, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7 * columns, 4.6 * rows), layout="constrained")
        for i, (draw, given) in enumerate(panels):
            draw(figure.add_subplot(rows, columns, i + 1), *given)
    return figure


def _contest(ax: Axes, section: Mapping[str, Any]) -> None:
    """Bars of images per second with quartiles; the ratio to the fp32 reference beside each."""
    rows = [row for row in section["rows"] if row.get("images_per_second")]
    top = max((row["images_per_second"] for row in rows), default=1.0)
    for i, row in enumerate(rows):
        rate, name = row["images_per_second"], row["name"]
        low, high = row.get("images_per_second_low", rate), row.get("images_per_second_high", rate)
        limit = "products" in name
        colour = _LIMIT if limit else _OURS if name.startswith("ours") else _REFERENCE
        ax.barh(i, rate, color=colour, alpha=0.45 if limit else 1.0, height=0.72)
        ax.errorbar(rate, i, xerr=[[rate - low], [high - rate]], color=INK, capsize=3, lw=1.2)
        ratio = row.get("x_reference_fp32")
        text = f"{rate:,.0f}" + (f"  ({ratio:.1f} x)" if ratio else "")
        ax.text(max(rate, high) + 0.015 * top, i, text, va="center", fontsize=9.5)
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.invert_yaxis()
    ax.set(title=f"{section['title']}: images/s", xlim=(0, 1.28 * top))
    ax.grid(True, axis="x")
    ax.set_axisbelow(True)


def _parts(ax: Axes, section: Mapping[str, Any]) -> None:
    """For each part its share of the time beside its share of the operations."""
    rows = [row for row in section["rows"] if row["name"] != "whole step"]
    for shift, key, colour, label in (
        (-0.2, "share_of_time", _OURS, "of the time"),
        (0.2, "share_of_flops", COLOURS[1], "of the operations"),
    ):
        shares = [100 * row[key] for row in rows]
        places = [i + shift for i in range(len(rows))]
        ax.barh(places, shares, height=0.36, color=colour, label=label)
        for place, share in zip(places, shares, strict=True):
            if share:
                ax.text(share + 0.6, place, f"{share:.1f}", va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.invert_yaxis()
    ax.set(title=f"{section['title']}: shares in %")
    ax.margins(x=0.12)
    ax.grid(True, axis="x")
    ax.set_axisbelow(True)
    ax.legend(loc="lower right")


def _growth(ax: Axes, section: Mapping[str, Any], measure: str, label: str) -> None:
    """One line for each thing that grows, both relative to its first point."""
    axes: dict[str, list[Mapping[str, Any]]] = {}
    for row in section["rows"]:
        axes.setdefault(row["axis"], []).append(row)
    markers = "osD^vPX"
    largest = 2.0
    for i, (axis, rows) in enumerate(axes.items()):
        x = [row["x"] / rows[0]["x"] for row in rows]
        largest = max(largest, *x)
        ax.plot(
            x, [row[measure] / rows[0][measure] for row in rows], marker=markers[i % 7], ms=5,
            color=COLOURS[i % len(COLOURS)], lw=1.8, label=f"{axis} (from {rows[0]['x']})",
        )  # fmt: skip
    ax.plot([1, largest], [1, largest], color=INK, lw=1, ls=":", label="linear")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    for scale in (ax.xaxis, ax.yaxis):
        ticks = [2**n for n in range(int(math.log2(largest)) + 2)]
        scale.set_major_locator(FixedLocator(ticks))
        scale.set_minor_formatter(NullFormatter())
        scale.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set(title=f"Growth: {label}, relative to the first point", xlabel="how many times larger")
    ax.grid(True)
    ax.legend(loc="upper left")
