"""Results as plain tables on a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Control characters but tab and newline, separators of lines, changes of direction, and halves of
# characters, as names of files that are not text have.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey: what is not is written as an escape."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def open_console(stream: TextIO, **options: Any) -> Console:
    """Return a console for people: no markup, and every text of the data made `printable`.

    `options` are rich's, such as width and quiet.
    """
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return PlainConsole(file=stream, highlight=False, markup=False, emoji=False, **options)


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
    return "-" if value in (None, "", [], ()) else str(value).replace("\n", "\\n")
