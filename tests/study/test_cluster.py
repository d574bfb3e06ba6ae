"""Runs as jobs of a stand-in for SLURM: cut off, left alone, picked up, and refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparsejepa import cli
from sparsejepa.config import preset
from sparsejepa.errors import UserError
from sparsejepa.study import cluster
from sparsejepa.study.results import Probes, Task, read_rows
from sparsejepa.study.runs import run_tasks
from sparsejepa.study.sweep import arm_settings

STAND_IN = Path(__file__).with_name("slurm_stand_in.py")


def make_task(folder: Path, data: Path, arm: str = "lam=0", **settings: Any) -> Task:
    config = preset("nano").replace(
        data=str(data), predictor_depth=1, device="cpu", threads=1,
        **{"steps": 4, "batch_size": 16, **arm_settings(arm), **settings},
    )  # fmt: skip
    return Task(config, folder / f"{arm}-s0", Probes((str(data),), limit=40))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-in's commands before all others; return the folder of its jobs."""
    commands, jobs = tmp_path / "bin", tmp_path / "slurm"
    commands.mkdir()
    jobs.mkdir()
    for name in ("sbatch", "srun", "sacct", "scontrol", "scancel"):
        command = commands / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} {name} "$@"\n')
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(jobs))
    return jobs


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on where and how often a run was cut off."""
    names = ("key", "arm", "steps", "knn", "rankme", "density", "nonzero_elements")
    return {n: row[n] for n in names} | {"probes": [p["accuracy"] for p in row["probes"]]}


def steps_of(run_dir: Path) -> int:
    return sum("loss" in row for row in read_rows(run_dir / "metrics.jsonl"))


@pytest.mark.slow
def test_slurm_jobs_go_on_after_their_time_is_up(
    tmp_path: Path, slurm: Path, tiny_images: Path
) -> None:
    long = {"steps": 60, "checkpoint_every": 1000, "batch_size": 32}
    tasks = [
        make_task(tmp_path / "sweep", tiny_images, "lam=0.1", **long),
        make_task(tmp_path / "sweep", tiny_images, "dense"),
    ]
    options = ("time=90", "partition=gpu", "account=a b", "requeue-note=$(touch x); `y`")
    folder = tmp_path / "sweep" / "jobs"
    # As the time limit does, when the run has no checkpoint but the one that it makes now.
    code = (
        "import sys, time, pathlib, subprocess\n"
        "log, job = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])\n"
        "while not (log.exists() and log.read_text().count('loss') > 5): time.sleep(0.02)\n"
        "subprocess.run(['scancel', job.name, '--signal', 'SIGUSR2'], check=True)\n"
    )
    log = tasks[0].run_dir / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", code, str(log), str(slurm / "1000_0")]) as cut:
        found = run_tasks(tasks, tmp_path / "sweep" / "results.jsonl", slurm=options)
    assert cut.returncode == 0
    logged = (folder / "submitit" / "1000_0_0_log.out").read_text()
    assert "Requeued job 1000_0" in logged and logged.count("Starting with") == 2
    script = (slurm / "1000.script").read_text()
    for line in (
        "#SBATCH --partition=gpu", "#SBATCH --time=90", "#SBATCH --array=0-1%2",
        "#SBATCH --signal=USR2@120", "#SBATCH --job-name=sweep",
        "#SBATCH --account='a b'", "#SBATCH --requeue-note='$(touch x); `y`'",
    ):  # fmt: skip
        assert line in script
    undisturbed = run_tasks(
        [make_task(tmp_path / "here", tiny_images, "lam=0.1", **long)],
        tmp_path / "here" / "results.jsonl", jobs=1,
    )  # fmt: skip
    assert numbers(found[0]) == numbers(undisturbed[0]) and found[1]["arm"] == "dense"
    assert steps_of(tasks[0].run_dir) == 60
    # What is finished is not submitted again, and no file is left of it.
    assert run_tasks(tasks, tmp_path / "sweep" / "results.jsonl", slurm=options) == found
    assert len(list(slurm.glob("*.script"))) == 1
    assert [p.name for p in folder.iterdir()] == ["submitit"]


def work(task: str) -> dict[str, Any]:
    """A step that fails, dies or works, as its task says."""
    if task == "fails":
        raise UserError(f"{task}: is no good")
    if task == "dies":
        os._exit(1)
    if task == "waits":
        time.sleep(60)
    return {"task": task}


def collect(folder: Path, *tasks: str) -> dict[str, Any]:
    named = {task: task for task in tasks}
    found = cluster.outcomes(folder, (), named, work, None)
    return dict(end for end in found if end is not None)


def test_jobs_that_fail_or_vanish_are_named_and_others_collected(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "GRACE_SECONDS", 0.5)
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "works.json").write_text('{"row": {"task": "of yesterday"}}')
    found = collect(folder, "fails", "dies", "works")
    assert str(found["fails"]) == "fails: is no good"
    assert "of dies ended without a word" in str(found["dies"])
    assert found["works"] == {"task": "works"}
    assert [path.name for path in folder.iterdir()] == ["submitit"]


def test_jobs_end_with_the_command_that_submitted_them(tmp_path: Path, slurm: Path) -> None:
    left = cluster.outcomes(tmp_path, (), {"waits": "waits"}, work, None)
    assert next(left) is None
    left.close()
    state = slurm / "1000" / "state"  # alone it is no array
    while not state.exists() or state.read_text() in ("", "RUNNING"):
        time.sleep(0.1)
    assert state.read_text() == "FAILED"


@pytest.mark.parametrize("item", ["account", "=a", "x\nrm=1", "x=1\nrm -rf y", "Setup=x"])
def test_what_could_reach_a_shell_is_refused(tmp_path: Path, slurm: Path, item: str) -> None:
    with pytest.raises(UserError, match="must be KEY=VALUE of sbatch"):
        cluster._executor(tmp_path, ("time=5", item), None)
    with pytest.raises(UserError, match="--slurm"):
        cluster._executor(Path("a\nrm -rf x"), (), None)


def test_missing_parts_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["sweep", str(tiny_images), "--preset", "nano", "--batch-size", "16", "--device", "cpu",
             "--seeds", "1", "--lam", "0", "--out", str(tmp_path / "sweep")]  # fmt: skip
    words += ["--slurm", "time=5"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(words) == 2
    assert "there is no SLURM here" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert cli.main(words) == 2
    assert "pip install 'sparsejepa[slurm]'" in capsys.readouterr().err
    with pytest.raises(UserError, match="the jobs were not taken: no such partition"):
        monkeypatch.setattr(cluster, "_executor", lambda *_: Refusing())
        collect(tmp_path, "a")


class Refusing:
    """An executor whose cluster takes no job."""

    @contextmanager
    def batch(self) -> Iterator[None]:
        yield
        raise subprocess.CalledProcessError(1, ["sbatch"], stderr="no such partition\n")

    def submit(self, job: Any) -> None:
        return None
