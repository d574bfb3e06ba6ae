"""The runner of the queue skips, resumes, packs, stops in time and names mistakes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run as runner

import sparsejepa
from sparsejepa.errors import UserError
from sparsejepa.study import runs
from sparsejepa.study.results import Task, read_rows

RECIPES = Path(__file__).parents[1] / "recipes"


def write_queue(
    folder: Path, images: str = "scenes", steps: int = 6, checkpoint_every: int = 2, **changes: Any
) -> Path:
    settings = {
        "data": images, "preset": "nano", "steps": steps, "batch_size": 16, "predictor_depth": 1,
        "threads": 1, "checkpoint_every": checkpoint_every,
    }  # fmt: skip
    lines = "\n".join(f"{k} = {json.dumps(v)}" for k, v in settings.items())
    (folder / "tiny.toml").write_text(f"[settings]\n{lines}\n")
    run = {"recipe": "tiny", "arms": ["dense", "lam=0.1"], "seeds": [0, 1], "minutes": 0.01}
    run |= {"hardware": "1 CPU core", "tables": [1, 2]} | changes
    lines = "\n".join(f"{k} = {json.dumps(v)}" for k, v in run.items())
    queue = folder / "queue.toml"
    queue.write_text(f"[[run]]\n{lines}\n")
    return queue


def words(queue: Path, *more: str) -> list[str]:
    folder = queue.parent
    return [
        "--queue", str(queue), "--results", str(folder / "results.jsonl"), "--runs",
        str(folder / "runs"), "--device", "cpu", "--jobs", "1", *more,
    ]  # fmt: skip


class Timer:
    """A timer that runs out when it is told to."""

    def __init__(self, seconds: float, function: Callable[[], None]) -> None:
        self.run_out, self.daemon = function, False

    def start(self) -> None:
        Timer.last = self

    def cancel(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace training and probing, seed 1 by a wait for the budget's end; it lists what ran."""
    ran: list[str] = []
    monkeypatch.setattr(runner.threading, "Timer", Timer)

    def run_and_probe(task: Task, console: Any = None) -> dict[str, Any]:
        ran.append(re.sub(r"-[0-9a-f]{8}(?=~|$)", "", task.run_dir.name))
        if task.config.optim.lr == 3:
            raise UserError(f"{task.run_dir}: 'kl' is not finite at step 7; start anew")
        if task.config.optim.lr == 4:
            raise UserError("images: no such file")
        if task.config.optim.lr == 5:
            raise RuntimeError("CUDA out of memory.\nTried a lot")
        if task.config.run.seed == 1:
            Timer.last.run_out()
            time.sleep(60)
        probe = {"data": "scenes", "target": "count", "protocol": "logistic", "accuracy": 0.5}
        return {
            **runs._about(task), "probes": [probe], "groups_per_latent": None, "seconds": 90.0,
            "probe_seconds": 30.0, "alarms": [],
        }  # fmt: skip

    monkeypatch.setattr(runs, "run_and_probe", run_and_probe)
    monkeypatch.setattr(runs, "check_tasks", lambda tasks: None)
    return ran


Capture = pytest.CaptureFixture[str]


def test_the_budget_stops_the_queue_and_says_what_is_left(
    tmp_path: Path, fake: list[str], capsys: Capture
) -> None:
    queue = write_queue(tmp_path)
    assert runner.main(words(queue, "--budget-minutes", "1")) == 0
    assert fake == ["dense-s0", "lam=0.1-s0", "dense-s1"]  # the last one was cut off
    assert [(r["arm"], r["seed"]) for r in read_rows(tmp_path / "results.jsonl")] == [
        ("dense", 0), ("lam=0.1", 0)
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "used up" in said and "left: 2 of 4 runs of tiny (dense, lam=0.1)" in said
    assert "2 runs left, about 0.02 minutes" in said


def test_only_runs_that_fit_the_budget_are_begun(
    tmp_path: Path, fake: list[str], capsys: Capture
) -> None:
    queue = write_queue(tmp_path, arms=["dense+lr=0.1"], seeds=[0], minutes=5)
    longer = queue.read_text()
    write_queue(tmp_path, arms=["lam=0.1", "lam=0.2"], seeds=[0], minutes=1)
    queue.write_text(longer + queue.read_text())
    assert runner.main(words(queue, "--budget-minutes", "3")) == 0
    assert fake == ["lam=0.1-s0", "lam=0.2-s0"]
    assert "1 run left, about 5 minutes" in capsys.readouterr().out


def test_runs_are_chosen_by_names_and_hardware(tmp_path: Path, capsys: Capture) -> None:
    queue = write_queue(tmp_path)
    cpu = queue.read_text()
    write_queue(tmp_path, arms=["density=0.25"], hardware="1 GPU", minutes=2)
    queue.write_text(cpu + queue.read_text())

    def listed(*more: str) -> set[str]:
        args = runner.parse(words(queue, *more))
        return {task.run_dir.name[:-9] for e in runner.read_queue(args) for task in e.tasks}

    assert listed("--only", "*/dense-s0", "--only", "*s1") == {
        "dense-s0", "dense-s1", "lam=0.1-s1", "density=0.25-s1",
    }  # fmt: skip
    assert runner.main(words(queue, "--hardware", "gpu", "--dry-run")) == 0
    assert "left: 2 of 2 runs of tiny (density=0.25)" in capsys.readouterr().out
    assert runner.main(words(queue, "--only", "tinny/*")) == 2
    assert "no run is called tinny/*" in capsys.readouterr().err
    assert runner.main(words(queue, "--only", "*/density*")) == 2  # --device cpu
    assert "no run called */density* for --hardware cpu" in capsys.readouterr().err


def test_a_failed_run_is_recorded_and_retried_when_asked(
    tmp_path: Path, fake: list[str], capsys: Capture
) -> None:
    queue = write_queue(tmp_path, arms=["dense+lr=3", "dense"], seeds=[0])
    assert runner.main(words(queue)) == 0
    row, other = read_rows(tmp_path / "results.jsonl")
    assert row["failed"] == "kl is not finite at step 7" and row["arm"] == "dense+lr=3"
    assert other["failed"] is None and row["recipe"] == "tiny"
    assert "1 run failed and recorded so; --retry-failed" in capsys.readouterr().out
    assert runner.main(words(queue)) == 0 and fake == ["dense+lr=3-s0", "dense-s0"]
    assert runner.main(words(queue, "--retry-failed")) == 0
    assert fake[2:] == ["dense+lr=3-s0~2"] and len(read_rows(tmp_path / "results.jsonl")) == 3


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("dense+lr=4", "images: no such file"),
        ("dense+lr=5", "RuntimeError: CUDA out of memory. Tried a lot ("),
    ],
)
def test_other_failures_are_status_1_and_cost_no_other_run(
    tmp_path: Path, fake: list[str], capsys: Capture, arm: str, said: str
) -> None:
    queue = write_queue(tmp_path, arms=[arm, "dense"], seeds=[0])
    assert runner.main(words(queue)) == 1
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("failed:")]
    assert "1 of 2 runs failed" in line and said in line
    assert [row["arm"] for row in read_rows(tmp_path / "results.jsonl")] == ["dense"]
    assert fake == [f"{arm}-s0", "dense-s0"]  # tried once


def test_lines_beside_count_those_of_other_training_do_not_and_folders_follow_the_recipe(
    tmp_path: Path, fake: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, results = write_queue(tmp_path, seeds=[0]), tmp_path / "results.jsonl"
    assert runner.main(words(queue)) == 0
    results.rename(tmp_path / "before.jsonl")
    (tmp_path / "bench.jsonl").write_text('{"verb": "bench"}\n[1]\n')
    assert runner.main(words(queue)) == 0 and len(fake) == 2 and not results.exists()
    monkeypatch.setattr(sparsejepa, "TRAIN_VERSION", sparsejepa.TRAIN_VERSION + 1)
    assert runner.main(words(queue)) == 0 and fake[2:] == fake[:2]
    assert [row["train_version"] for row in read_rows(results)] == [sparsejepa.TRAIN_VERSION] * 2
    assert runner.main(words(queue)) == 0 and len(fake) == 4

    def folders(steps: int) -> set[Path]:
        entries = runner.read_queue(runner.parse(words(write_queue(tmp_path, steps=steps))))
        return {task.run_dir for entry in entries for task in entry.tasks}

    assert len(folders(6)) == 4 and not folders(6) & folders(7)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("queue.toml", '"tiny"', '"tinny"', "unknown recipe 'tinny' (did you mean 'tiny'?)"),
        ("queue.toml", "lam=0.1", "lamb=1", "unknown arm 'lamb=1'"),
        ("queue.toml", "lam=0.1", "lam=-1", "--lam -1"),
        ("queue.toml", "dense", "dense+bta=1", "'bta=1' is no SETTING=VALUE (did you mean 'beta'"),
        ("queue.toml", "minutes", "minuts", "unknown entry 'minuts' (did you mean 'minutes'?)"),
        ("queue.toml", "minutes = 0.01\n", "", "'minutes' is missing"),
        ("queue.toml", "[[run]]", "[[run]", "not valid TOML"),
        ("queue.toml", "[[run]]", "[[walk]]", "unknown entry 'walk'"),
        ("tiny.toml", '"nano"', '"nanno"', "--preset nanno"),
        ("tiny.toml", "steps", "stepps", "unknown setting 'stepps'"),
        ("tiny.toml", "[settings]", "probes = 1\n[settings]", "unknown entry 'probes' (did you"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    tmp_path: Path, fake: list[str], capsys: Capture, file: str, old: str, new: str, message: str
) -> None:
    queue = write_queue(tmp_path)
    whole = (tmp_path / file).read_text()
    assert old in whole
    (tmp_path / file).write_text(whole.replace(old, new, 1))
    assert runner.main(words(queue)) == 2
    said = capsys.readouterr().err
    assert message in said and str(queue) in said and said.count("\n") == 1 and not fake
