"""The demo: the main job on the built-in scenes, minutes on two CPU cores, no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejepa.config import Config, preset
from sparsejepa.study.sweep import REPORT, run_sweep

if TYPE_CHECKING:
    from rich.console import Console

LAM = 0.03
# Few targets and labelled images, so that the probes take seconds.
TARGETS = {"scenes": ("count",), "scenes:single": ("size", "x")}
PROBE_LIMIT = 3000
# Shows in seconds that everything works; learns nothing.
QUICK = {"limit": 256, "steps": 4, "batch_size": 32, "patch_size": 8}
QUICK_PROBE_LIMIT = 200


def run_demo(
    out: Path, *, jobs: int | None = None, quick: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Train dense, lam=0 and one sparse arm on scenes, probe count and factors, write a page.

    Args:
        out: folder for the runs, results.jsonl, figures and report.html.
        jobs: runs at a time, as for a sweep.
        quick: a smoke run of seconds.

    Returns what `SweepResult.to_dict` does. Finished runs are not repeated. Raises UserError as
    `run_sweep` does.
    """
    config: Config = preset("demo").replace(**(QUICK if quick else {}))
    result = run_sweep(
        config,
        lams=(LAM,),
        seeds=1,
        out=out,
        probe_data=tuple(TARGETS),
        targets=TARGETS,
        probe_limit=QUICK_PROBE_LIMIT if quick else PROBE_LIMIT,
        jobs=jobs,
        console=console,
        command="sparsejepa demo" + (" --quick" if quick else ""),
        title="Dense against sparse on the built-in scenes",
    )
    if console is not None:
        console.print(result.table)
        for text in (result.verdict.text, *result.verdict.remarks):
            console.print(text, highlight=False, markup=False)
        console.print(f"The page with figures: {out / REPORT}", highlight=False, markup=False)
    return result.to_dict()
