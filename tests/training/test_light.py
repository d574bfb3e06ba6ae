"""What a run imports before its first step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HEAVY = (
    "sklearn scipy matplotlib timm torchvision transformers pandas pyarrow datasets tensorboard"
    " jinja2 torch.distributed.checkpoint"
).split()

UNTIL_FIRST_STEP = """
import json, sys
from sparsejepa.cli import main
import sparsejepa.training.step as module

class Done(BaseException): pass

step = module.TrainStep.__call__
def first(self, pixels, number):
    step(self, pixels, number)
    raise Done

module.TrainStep.__call__ = first
try:
    main(sys.argv[1:])
except Done:
    print("found", json.dumps([name for name in json.load(sys.stdin) if name in sys.modules]))
"""


def test_a_run_on_a_folder_imports_nothing_heavy_before_its_first_step(
    folder: Path, tmp_path: Path
) -> None:
    words = ["pretrain", str(folder), "--preset", "nano", "--steps", "4", "--batch-size", "8"]
    words += ["--device", "cpu", "--threads", "1", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_FIRST_STEP, *words], input=json.dumps(HEAVY),
        capture_output=True, text=True,
    )  # fmt: skip
    assert "found []" in done.stdout, done.stdout + done.stderr
