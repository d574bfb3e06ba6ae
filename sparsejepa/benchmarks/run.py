"""Runs the sections one after the other and writes what they find."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsejepa.benchmarks.settings import BenchSettings, Section
from sparsejepa.environment import environment
from sparsejepa.errors import UserError, nearest
from sparsejepa.files import write_text
from sparsejepa.report.bench import bench_figure, show_section
from sparsejepa.report.figures import save_png

SECTIONS = {
    "products": "products",
    "parts": "parts",
    "steps": "steps",
    "peers": "peers",
    "data": "data",
    "loading": "loading",
    "probe": "probes",
    "memory": "memory",
    "growth": "growth",
}
"""Each section's module, which has a function `section(settings) -> Section`."""

LINES, FIGURE = "bench.jsonl", "bench.png"


def run_bench(
    settings: BenchSettings, names: Sequence[str], out: Path, command: str, console: Any
) -> dict[str, Any]:
    """Measure, print a table per section, and write `LINES` and `FIGURE` into `out`.

    Args:
        settings: sizes and device; `check` them first.
        names: of `SECTIONS`; all of them if empty.
        out: folder; what an earlier benchmark wrote there is replaced.
        command: what the user typed, for the record.
        console: rich console for tables and progress.

    Returns:
        The lines written, by section. Raises UserError for an unknown section or an `out` that is a
        file.
    """
    names = names or list(SECTIONS)
    for name in names:
        if name not in SECTIONS:
            known = ", ".join(SECTIONS)
            hint = nearest(name, SECTIONS)
            raise UserError(f"--sections {name}: unknown{hint}; there are {known}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    torch.set_num_threads(settings.threads)
    if settings.device.startswith("cuda"):
        torch.cuda.set_device(settings.device)
    out.mkdir(parents=True, exist_ok=True)
    about = {"command": command, "environment": environment() | {"threads": settings.threads}}
    about["settings"] = dataclasses.asdict(settings)
    lines: list[dict[str, Any]] = []
    for number, name in enumerate(names, 1):
        console.print(f"measuring {name} ({number} of {len(names)})")
        began = time.perf_counter()
        found = dataclasses.asdict(_measure(name, settings))
        lines.append(found | about | {"seconds": time.perf_counter() - began})
        show_section(console, found)
        # After each section: what has been measured survives an interruption.
        write_text(out / LINES, "".join(json.dumps(line) + "\n" for line in lines))
        save_png(bench_figure(lines), out / FIGURE)
    console.print(f"written: {out / LINES}, {out / FIGURE}")
    return {"out": out, "sections": lines}


def _measure(name: str, settings: BenchSettings) -> Section:
    """Return what a section found, or a note that memory did not suffice for it."""
    gc.collect()
    if settings.device.startswith("cuda"):
        torch.cuda.empty_cache()  # what earlier sections kept counts as taken
    module = importlib.import_module(f"sparsejepa.benchmarks.{SECTIONS[name]}")
    try:
        return module.section(settings)
    except (MemoryError, torch.OutOfMemoryError):
        note = "left out: not enough memory; a smaller --batch-size may do"
        return Section(name, name, [], [note])
