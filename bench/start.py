"""Processor time until a run's first step, beside that of `import torch` and one AdamW step.

python bench/start.py [--repeats 5]

Both are processes of their own with one thread, taken in turn; the median of each is printed. The
run is ``sparsejepa pretrain`` with preset nano on 32 images of 32x32 pixels in a folder, a first
time for the cache of decoded images, which is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PLAIN = """
import torch
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.zeros(4, 8)).sum().backward()
optimizer.step()
"""

RUN = """
import os, sys
from sparsejepa.cli import main
import sparsejepa.training.step as module

step = module.TrainStep.__call__

def first(self, pixels, number):
    step(self, pixels, number)
    os._exit(0)

module.TrainStep.__call__ = first
main(sys.argv[1:])
"""


def seconds(code: str, *words: str) -> float:
    """Return the processor time of a Python process, user and system."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPARSEJEPA_CACHE"] = f"{folder}/cache"
        rng = np.random.default_rng(0)
        for number in range(32):
            path = Path(folder, "images", "ab"[number % 2], f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
        words = f"pretrain {folder}/images --preset nano --steps 2 --batch-size 8 --device cpu"
        plain, run = [], []
        for repeat in range(repeats + 1):
            plain.append(seconds(PLAIN))
            out = ["--threads", "1", "--out", f"{folder}/run-{repeat}"]
            run.append(seconds(RUN, *words.split(), *out))
    ours, theirs = statistics.median(run[1:]), statistics.median(plain[1:])
    print(f"first step of a run {ours:.2f} s, import torch and a step of AdamW {theirs:.2f} s")
    print(f"ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
