"""Peak memory of a step, ours and the reference's, each measured in a process of its own.

A process's peak is a straight line over the batch: the slope is the memory per image (activations),
the intercept what is there anyway (interpreter, libraries, weights and moments). On the CPU the
peak is that of the whole process, allocator and all; on a GPU it is what torch has allocated.

    python -m sparsejepa.benchmarks.memory CASE

takes a few steps of a case, given as JSON, and prints the peak in bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from sparsejepa.benchmarks import settings as bench
from sparsejepa.benchmarks.growth import Shaped
from sparsejepa.benchmarks.reference import ReferenceStep
from sparsejepa.benchmarks.settings import BenchSettings, Section
from sparsejepa.benchmarks.timing import Contender
from sparsejepa.config import ENCODER_SIZES, Config
from sparsejepa.environment import has_bf16
from sparsejepa.training.step import TrainStep

CALLS = 3
"""Steps that a case takes: the optimiser's state comes into being in the first."""


@dataclass(frozen=True)
class Case:
    """A step whose memory is measured."""

    settings: BenchSettings
    precision: str
    reference: bool = False
    depth: int | None = None
    """Blocks of the encoder, if not those of its name; of ours only."""

    @classmethod
    def read(cls, text: str) -> Case:
        """Return the case that `json.dumps(asdict(case))` wrote."""
        values = json.loads(text)
        settings = BenchSettings(**values.pop("settings"))
        shape = settings.target_shape[0], settings.target_shape[1]  # JSON knows no tuples
        return cls(replace(settings, target_shape=shape), **values)


class Unmeasured(Exception):
    """A case has no number; the message says why."""


def section(settings: BenchSettings) -> Section:
    """Measure memory per image, beside the reference's and as depth and tokens grow."""
    result = Section("memory", "Peak memory of a step")
    per_image: dict[str, float] = {}
    for name, case in _cases(settings):
        parts = (2, 1) if settings.quick else (4, 2, 1)
        batches = sorted({max(1, settings.batch // part) for part in parts})
        try:
            peaks = [peak(replace(case, settings=replace(case.settings, batch=b))) for b in batches]
        except Unmeasured as error:
            result.notes.append(f"{name}: not measured ({error})")
            continue
        slope, fixed = np.polyfit(batches, peaks, 1) if len(batches) > 1 else (0.0, peaks[0])
        per_image[name] = float(slope)
        same = case.settings == settings and case.depth is None
        reference = per_image.get(f"reference, {case.precision}") if same else None
        result.rows.append(
            {
                "name": name,
                **dict.fromkeys(("median_s", "low_s", "high_s")),  # nothing is timed
                "per_image_mb": float(slope) / 1e6,
                "fixed_mb": float(fixed) / 1e6,
                "peak_mb": peaks[-1] / 1e6,
                "batch": batches[-1],
                "bend_mb": float(np.ptp(np.polyval((slope, fixed), batches) - peaks)) / 1e6,
                "times_reference": float(slope) / reference if reference else None,
            }
        )
    return result


def peak(case: Case) -> float:
    """Return the peak in bytes of a new process that takes a few steps of `case`.

    Raises Unmeasured if it fails, or if this system does not say.
    """
    done = subprocess.run(
        [sys.executable, "-m", "sparsejepa.benchmarks.memory", json.dumps(asdict(case))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode < 0:
        raise Unmeasured(f"stopped by signal {-done.returncode}: too little memory?")
    if done.returncode > 0:
        raise Unmeasured((done.stderr.strip() or "no reason given").splitlines()[-1])
    return float(done.stdout.split()[-1])


def _cases(settings: BenchSettings) -> Iterator[tuple[str, Case]]:
    """Yield the cases with their names, references before ours."""
    precisions = ["fp32", "bf16"] if has_bf16(settings.device) else ["fp32"]
    for precision in precisions:
        yield f"reference, {precision}", Case(settings, precision, reference=True)
    for precision in precisions:
        yield f"ours, {precision}", Case(settings, precision)
    if settings.quick:
        return
    last, blocks = precisions[-1], ENCODER_SIZES[settings.encoder][1]
    for depth in (blocks // 2, 2 * blocks):
        yield f"ours, {last}, depth {depth}", Case(settings, last, depth=depth)
    for side in (settings.grid[0] // 2, settings.grid[0] * 3 // 2):
        grown = replace(
            settings,
            img_size=side * settings.patch_size,
            target_shape=(max(1, round(side * 3 / 8)), max(1, side // 2)),
            context=max(1, side * side * 5 // 16),
        )
        yield f"ours, {last}, {side * side} tokens", Case(grown, last)


def build(case: Case) -> Contender:
    """Return a call of the case's step."""
    settings = case.settings
    if case.reference:
        return ReferenceStep(settings, bf16=case.precision == "bf16")
    of = bench.config(settings, precision=case.precision)
    if case.depth is not None:
        width, _, heads = of.encoder_shape
        parts = {f.name: getattr(of, f.name) for f in fields(Config)}
        of = Shaped(**parts, shape=(width, case.depth, heads))
    step = TrainStep(of, bench.model(settings, of), bench.augmentation(settings), bench.STEPS)
    pixels = bench.images(settings)
    return lambda number: step(pixels, number)


def highest(device: str) -> int:
    """Return the peak in bytes of this process so far. Raises Unmeasured if nothing tells it."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not `getrusage`: there a new process begins with the peak of the one that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        raise Unmeasured("this system does not tell a process's peak") from None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def main(text: str) -> None:
    """Take the steps of a case and print the peak in bytes."""
    case = Case.read(text)
    torch.set_num_threads(case.settings.threads)
    step = build(case)
    for number in range(CALLS):
        step(number)
    print(highest(case.settings.device))


if __name__ == "__main__":
    main(sys.argv[1])
