"""The runner with real runs: resumed, killed, ended by a signal."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import run as runner

from sparsejepa.study import runs
from sparsejepa.study.results import read_rows
from tests.test_runner import words, write_queue

RECIPES = Path(__file__).parents[1] / "recipes"


def test_real_runs_resume_and_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_images: Path
) -> None:
    queue = write_queue(tmp_path, str(tiny_images), arms=["lam=0.1"], seeds=[0])
    save, calls = runs.append_row, []

    def killed(*args: Any) -> None:
        calls.append(args)
        raise KeyboardInterrupt  # after training, before the line is written

    monkeypatch.setattr(runs, "append_row", killed)
    assert runner.main(words(queue)) == 130 and len(calls) == 1
    assert read_rows(tmp_path / "results.jsonl") == []
    (weights,) = (tmp_path / "runs" / "tiny").glob("lam=0.1-s0-*/encoder.safetensors")
    stamp = weights.stat().st_mtime_ns

    monkeypatch.setattr(runs, "append_row", save)
    assert runner.main(words(queue)) == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert len(rows) == 1 and rows[0]["steps"] == 6 and rows[0]["arm"] == "lam=0.1"
    assert "--only tiny/lam=0.1-s0" in rows[0]["command"]
    assert runner.main(words(queue)) == 0
    assert read_rows(tmp_path / "results.jsonl") == rows
    assert weights.stat().st_mtime_ns == stamp


def finished(row: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on interruptions."""
    numbers = ("key", "arm", "seed", "steps", "knn", "rankme", "density", "nonzero_elements")
    probes = [(p["target"], p["accuracy"], p["untrained"], p["pixels"]) for p in row["probes"]]
    return {name: row[name] for name in numbers} | {"probes": probes}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_runner_that_is_killed_ends_with_the_same_numbers(
    tmp_path: Path, tiny_images: Path
) -> None:
    queue = write_queue(tmp_path, str(tiny_images), seeds=[0], steps=60)
    script = [sys.executable, str(RECIPES / "run.py"), "--queue", str(queue), "--device", "cpu"]
    undisturbed, results = tmp_path / "undisturbed" / "r.jsonl", tmp_path / "results.jsonl"
    there = ["--results", str(undisturbed), "--runs", str(tmp_path / "undisturbed")]
    subprocess.run([*script, "--jobs", "1", *there], check=True)
    here = ["--results", str(results), "--runs", str(tmp_path / "runs"), "--jobs", "2"]

    def progress() -> int:
        """The bytes of the logs, which grow and are cut back to the checkpoint."""
        logs = (tmp_path / "runs" / "tiny").glob("*-s0-*/metrics.jsonl")
        return sum(log.stat().st_size for log in logs)

    draw = random.Random(0)
    for _ in range(3):
        begun = progress()
        process = subprocess.Popen([*script, *here], start_new_session=True)
        while process.poll() is None and progress() == begun:  # starting takes longest
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(draw.uniform(0, 2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not psutil.wait_procs(children, timeout=120)[1]
    assert len(read_rows(results)) < 2
    subprocess.run([*script, *here], check=True)
    rows = read_rows(results)
    assert len(rows) == 2
    wanted = {row["key"]: finished(row) for row in read_rows(undisturbed)}
    assert {row["key"]: finished(row) for row in rows} == wanted


@pytest.mark.slow
def test_sigterm_ends_the_runner_quietly(tmp_path: Path, tiny_images: Path) -> None:
    queue = write_queue(tmp_path, str(tiny_images), seeds=[0], steps=100_000, checkpoint_every=1)
    script = [sys.executable, str(RECIPES / "run.py"), *words(queue)[:-1], "2"]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "runs" / "tiny"
    while not list(folder.glob("dense-s0-*/checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate()
    assert said == "run.py: interrupted; the same command goes on from there\n"
    assert process.returncode == 130
