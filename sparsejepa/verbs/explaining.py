"""The verbs that read what was learned: explain, compare."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from sparsejepa.errors import UserError
from sparsejepa.explain.options import Options
from sparsejepa.terminal import estimate_text, show_facts, show_rows
from sparsejepa.verbs.base import DATA, Verb

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Explain(Options, Verb):
    """Measure what a frozen encoder and its groups have learned, and show it on one page.

    Writes report.html and metrics.json into the run directory. A dense run and a public encoder
    have no groups: they are fitted to the frozen tokens, and the page says so.
    """

    run: Positional[str | None] = None
    """Run directory or timm:NAME."""
    data: str = ""
    """Images: a name (sparsejepa data list), hub:OWNER/NAME or a folder; labels, factors.csv and
    masks/ are used where there are any."""


def explain(args: Explain, console: Console) -> dict[str, Any]:
    """Explain, and print the verdict and the measures."""
    args.check()
    if not args.run:
        raise UserError("which encoder? Name a run directory or timm:NAME after the verb")
    if not args.data:
        raise UserError(f"--data is needed: {DATA}")
    from sparsejepa.encoders.encoder import FITTED
    from sparsejepa.explain.run import METRICS, REPORT, run_explain, run_folder

    found = run_explain(
        args.run,
        args.data,
        options=args,
        command=shlex.join(["sparsejepa", *sys.argv[1:]]),
        say=lambda text: console.print(text, highlight=False, markup=False),
    )
    out = args.out or run_folder(args.run)
    show_measures(console, found["measures"])
    console.print(found["verdict"], highlight=False, markup=False)
    for remark in found["remarks"]:
        console.print(f"- {remark}", highlight=False, markup=False)
    if found["groups"]["post_hoc"]:
        console.print(f"The fitted groups, for --groups of embed and export: {out / FITTED}")
    console.print(f"The page: {out / REPORT}; the numbers: {out / METRICS}", highlight=False)
    return found


def show_measures(console: Console, measures: list[dict[str, Any]]) -> None:
    """Print one table per section, a row a measure and a column per encoder or floor."""
    for section in dict.fromkeys(row["section"] for row in measures):
        rows = [row for row in measures if row["section"] == section]
        columns = list(dict.fromkeys(name for row in rows for name in row["values"]))
        console.print(section, style="bold")
        show_rows(
            console,
            [
                {"measure": row["name"]}
                | {name: estimate_text(row["values"].get(name)) for name in columns}
                for row in rows
            ],
        )


@dataclass(frozen=True)
class Compare(Verb):
    """Put two explained runs on one page: measures, maps and which group matches which."""

    runs: Positional[tuple[str, ...]] = ()
    """Two run directories (or folders of a report) that `explain` has read on the same data."""
    out: Path | None = None
    """Page to write; compare-NAME.html beside the first run's report if not given."""


def compare(args: Compare, console: Console) -> dict[str, Any]:
    """Compare two runs."""
    if len(args.runs) != 2:
        raise UserError(f"compare takes two runs, got {len(args.runs)}")
    from sparsejepa.explain.compare import compare_runs

    first, second = (Path(run) for run in args.runs)
    command = shlex.join(["sparsejepa", *sys.argv[1:]])
    found = compare_runs(first, second, out=args.out, command=command)
    console.print(found["verdict"], highlight=False, markup=False)
    show_measures(console, found["measures"])
    show_facts(console, found["groups"], f"The page: {found['out']}")
    return found
