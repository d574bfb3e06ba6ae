"""Progress of several runs at a time on a terminal or in a log."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejepa.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


class RunsProgress:
    """A line per finished run and, on a terminal, one bar over all runs.

    Args:
        runs: the run directories of those that are to be done.
        steps: of each of them.
        total: number of runs, those done before among them.
        jobs: runs at a time.
        bar: whether to show the bar.
    """

    def __init__(
        self,
        console: Console | None,
        runs: Sequence[Path],
        steps: Sequence[int],
        total: int,
        jobs: int,
        *,
        bar: bool,
    ) -> None:
        self._console, self._runs, self._steps = console, runs, steps
        self._done, self._bar = 0, None
        if bar and console is not None and console.is_terminal:
            from rich.progress import Progress

            self._bar = Progress(console=console)
            self._line = self._bar.add_task("", total=sum(steps))
        self._say(f"{len(runs)} of {total} runs to do, {jobs} at a time")

    def __enter__(self) -> RunsProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def tick(self) -> None:
        """Bring the bar up to date."""
        if self._bar:
            pairs = zip(self._runs, self._steps, strict=True)
            steps = sum(min(_last_step(run_dir), most) for run_dir, most in pairs)
            text = f"{self._done} of {len(self._runs)} runs"
            self._bar.update(self._line, completed=steps, description=text)

    def finished(self, run_dir: Path, row: dict[str, Any] | UserError) -> None:
        """Say how a run ended: its line of results, or its error."""
        from sparsejepa.study.verdict import measure_name

        self._done += 1
        if isinstance(row, UserError):
            self._say(f"{run_dir.name}: failed: {row}")
            return
        if row["failed"]:
            self._say(f"{run_dir.name}: failed and recorded so: {row['failed']}")
            return
        first = row["probes"][0]
        text = f"{run_dir.name}: {measure_name(first)} {100 * first['accuracy']:.1f} %"
        if row["groups_per_latent"] is not None:
            text += f", {row['groups_per_latent']:.1f} groups per latent"
        self._say(f"{text}, {row['seconds']:.0f} s + {row['probe_seconds']:.0f} s probes")
        for alarm in row["alarms"]:
            self._say(f"  alarm: {alarm}")

    def _say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False)


def _last_step(run_dir: Path) -> int:
    """Return the steps that a run has done so far, by the end of its metrics.jsonl."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()[1:]
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError):
            return json.loads(line)["step"] + 1
    return 0
