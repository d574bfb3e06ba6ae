"""The memory of a long run stays flat, checkpoints and evaluations included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
import json, os, sys
from sparsejepa.config import preset
from sparsejepa.study import pretrain
from sparsejepa.training.step import TrainStep

step, samples = TrainStep.__call__, []


def measured(self, pixels, number):
    values = step(self, pixels, number)
    if number >= 200 and number % 20 == 0:
        with open("/proc/self/statm") as file:
            samples.append((number, int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")))
    return values


TrainStep.__call__ = measured
config = preset("nano").replace(
    data=sys.argv[1], steps=2000, batch_size=8, predictor_dim=32, predictor_depth=1, num_groups=4,
    threads=1, device="cpu", log_every=10, checkpoint_every=100, eval_every=200, density=0.5,
    drop_path=0.1,
)
pretrain(config, out=sys.argv[2])
print(json.dumps(samples))
"""
ALLOWED = 1024.0
"""Bytes a step: the resolution of what a system's allocator makes of 2,000 steps, 2 MB."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_is_flat_over_2000_steps(folder: Path, tmp_path: Path) -> None:
    """The resident memory grows by less than 1 KiB a step, 2 MB in all."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "run")],
        capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps, memory = np.array(json.loads(done.stdout), float).T
    assert len(steps) == 90
    centred = steps - steps.mean()
    slope = float(centred @ memory / (centred @ centred))
    rest = memory - memory.mean() - slope * centred
    error = float(np.sqrt(rest @ rest / (len(steps) - 2) / (centred @ centred)))
    print(
        f"\nresident memory over steps 200 to 2,000: {memory.mean() / 2**20:.1f} MiB on average, "
        f"{memory[0] / 2**20:.1f} first, {memory[-1] / 2**20:.1f} last, {memory.max() / 2**20:.1f} "
        f"at most; slope {slope:.0f} bytes a step, standard error {error:.0f}"
    )
    assert slope < ALLOWED
