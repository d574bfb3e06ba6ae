"""Results as plain tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def show_facts(console: Console, facts: Mapping[str, Any], title: str) -> None:
    """Print names and values in two columns, nested names joined."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        rows = value.items() if isinstance(value, Mapping) else [("", value)]
        for inner, item in rows:
            table.add_row(f"{name} {inner}".strip().replace("_", " "), _text(item))
    console.print(title, style="bold")
    console.print(table)


def show_rows(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print dictionaries with the same keys as a table, numbers to the right."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in rows[0] if rows else ():
        number = isinstance(rows[0][name], int | float)
        table.add_column(name.replace("_", " "), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console.print(table)


def percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    """Return a share (0 to 1) in percent, with its interval if there is one."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}"
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else text


def estimate_text(estimate: Mapping[str, Any] | None) -> str:
    """Return an estimate of metrics.json as "0.31 [0.29, 0.33]", or "–" where it is not defined."""
    if estimate is None or estimate["value"] is None:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['value']:.3g}"
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple) and value:
        return ", ".join("x".join(map(str, v)) if isinstance(v, list) else _text(v) for v in value)
    return "-" if value in (None, "", [], ()) else str(value)
