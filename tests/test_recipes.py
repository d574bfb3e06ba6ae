"""Recipes say what they run, and the runner skips, resumes, stops in time and names mistakes."""

from __future__ import annotations

import json
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import common
import psutil
import pytest
import run as runner

from sparsejepa import cli, demo, runs
from sparsejepa.benchmarks.packing import Packing
from sparsejepa.config import load_toml, preset
from sparsejepa.environment import code_version
from sparsejepa.errors import UserError
from sparsejepa.results import append_row, read_rows
from sparsejepa.runs import Probes, Task
from sparsejepa.sweep import sweep_arms
from sparsejepa.training.build import arm_name

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in common.recipe_files(RECIPES))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_command_is_its_settings(name: str) -> None:
    recipe = load_toml(RECIPES / f"{name}.toml")
    assert {"about", "command", "hardware", "minutes", "expected", "settings"} <= set(recipe)
    config, probes = runner.read_recipe(RECIPES, name)
    words = shlex.split(recipe["command"])
    if words == ["sparsejepa", "demo"]:
        assert config == preset("demo") and config.data == "scenes"
        assert probes == Probes(tuple(demo.TARGETS), targets=demo.TARGETS, limit=demo.PROBE_LIMIT)
        return
    if words[:2] == ["python", "recipes/run.py"]:
        entries = runner.read_queue(runner.parse(words[2:]))
        assert {task.recipe for entry in entries for task in entry.tasks} == {name}
        return
    assert words[:2] == ["sparsejepa", "sweep"]
    args = cli.parse(words[1:])
    assert args.settings(args.data) == config
    data = tuple(args.data_eval.split(",")) if args.data_eval else (config.data,)
    assert probes == Probes(data, limit=args.probe_limit)


def test_the_queue_has_each_run_once_and_with_its_controls() -> None:
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in load_toml(RECIPES / "queue.toml")["run"]:
        assert {"minutes", "hardware", "tables"} <= set(run)
        for arm in run["arms"]:
            seeds.setdefault((run["recipe"], arm), []).extend(run["seeds"])
    for (recipe, _), found in seeds.items():
        assert len(set(found)) == len(found)
        for control in ("dense", "lam=0"):  # no arm without its controls, paired by seed
            assert set(found) <= set(seeds[recipe, control])


@pytest.mark.parametrize(
    "name", [n for n in NAMES if "sweep" in load_toml(RECIPES / f"{n}.toml")["command"]]
)
def test_a_sweeps_runs_in_the_queue_are_of_its_arms(name: str) -> None:
    args = cli.parse(shlex.split(load_toml(RECIPES / f"{name}.toml")["command"])[1:])
    arms = sweep_arms(args.settings(args.data), args.lam, args.density)
    for run in load_toml(RECIPES / "queue.toml")["run"]:
        if run["recipe"] == name:
            assert set(run["arms"]) <= set(arms) and max(run["seeds"]) < args.seeds


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


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace training and probing by a pause that Ctrl-C can end; the list records what ran."""
    ran: list[str] = []

    def run_and_probe(task: Task, console: Any = None) -> dict[str, Any]:
        ran.append(task.run_dir.name)
        if task.config.optim.lr == 3:
            raise UserError(f"{task.run_dir}: 'kl' is not finite at step 7; start anew")
        if task.config.optim.lr == 4:
            raise UserError("images: no such file")
        end = time.monotonic() + (30 if task.config.run.seed == 1 else 0)
        while time.monotonic() < end:
            time.sleep(0.01)
        probe = {"data": "scenes", "target": "count", "protocol": "logistic", "accuracy": 0.5}
        return {
            "key": task.key, "recipe": task.recipe, "arm": arm_name(task.config),
            "seed": task.config.run.seed, "probes": [probe], "groups_per_latent": None,
            "seconds": 90.0, "probe_seconds": 30.0, "alarms": [],
        }  # fmt: skip

    monkeypatch.setattr(runs, "run_and_probe", run_and_probe)
    monkeypatch.setattr(runs, "_check", lambda tasks: ([4] * len(tasks), True))
    return ran


Capture = pytest.CaptureFixture[str]


def test_the_budget_stops_the_queue_and_says_what_is_left(
    tmp_path: Path, fake: list[str], capsys: Capture
) -> None:
    queue = write_queue(tmp_path)
    assert runner.main(words(queue, "--budget-minutes", "0.1")) == 0
    assert fake == ["dense-s0", "lam=0.1-s0", "dense-s1"]  # the last one was cut off
    assert [(r["arm"], r["seed"]) for r in read_rows(tmp_path / "results.jsonl")] == [
        ("dense", 0), ("lam=0.1", 0)
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "used up" in said and "left: 2 of 4 runs of tiny (dense, lam=0.1)" in said
    # By now there are measured runs: 90 s and 30 s of probes each.
    assert "2 runs left, about 4 minutes (4 on 1 CPU core)" in said
    (tmp_path / "runs" / "tiny" / "lam=0.1-s1").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "lam=0.1-s1" / "config.toml").touch()  # begun
    runner.main(words(queue, "--budget-minutes", "0.02", "--only", "tiny/lam=*"))
    assert fake[3:] == ["lam=0.1-s1"]


def test_a_budget_too_small_for_any_run_is_refused(
    tmp_path: Path, fake: list[str], capsys: Capture
) -> None:
    queue = write_queue(tmp_path, minutes=3)
    assert runner.main(words(queue, "--budget-minutes", "1")) == 2
    said = capsys.readouterr().err
    assert "--budget-minutes 1: the shortest run left, tiny/dense-s0, takes about 3 minutes" in said
    assert said.count("\n") == 1 and not fake
    # A run that was begun may be nearly done.
    begun = tmp_path / "runs" / "tiny" / "dense-s0"
    begun.mkdir(parents=True)
    (begun / "config.toml").touch()
    assert runner.main(words(queue, "--budget-minutes", "1", "--only", "*-s0")) == 0
    assert fake == ["dense-s0", "lam=0.1-s0"]


def test_runs_that_fit_the_budget_go_first(tmp_path: Path, fake: list[str]) -> None:
    queue = write_queue(tmp_path, arms=["dense"], seeds=[0], minutes=5)
    longer = queue.read_text()
    write_queue(tmp_path, arms=["lam=0.1", "lam=0.2"], seeds=[0], minutes=2)
    queue.write_text(longer + queue.read_text())
    assert runner.main(words(queue, "--budget-minutes", "3")) == 0
    assert fake == ["lam=0.1-s0", "dense-s0", "lam=0.2-s0"]


def test_dry_run_only_lists(tmp_path: Path, fake: list[str], capsys: Capture) -> None:
    queue = write_queue(tmp_path, minutes=3)
    assert runner.main(words(queue, "--dry-run", "--only", "tiny")) == 0
    said = capsys.readouterr().out
    assert "to do: tiny/dense-s0, about 3 minutes on 1 CPU core, tables 1, 2\n" in said
    assert "4 runs to do, about 12 minutes (12 on 1 CPU core)" in said
    assert not fake and not (tmp_path / "runs").exists()


def test_runs_are_chosen_by_names_and_hardware(tmp_path: Path, capsys: Capture) -> None:
    queue = write_queue(tmp_path)
    cpu = queue.read_text()
    write_queue(tmp_path, arms=["density=0.25"], hardware="1 GPU", minutes=2)
    queue.write_text(cpu + queue.read_text())

    def listed(*more: str) -> list[str]:
        assert runner.main(words(queue, "--dry-run", *more)) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line.split()[2].strip(",") for line in lines if line.startswith("to do")]

    assert listed("--only", "*/dense-s0", "--only", "*s1") == [
        "tiny/dense-s0", "tiny/dense-s1", "tiny/lam=0.1-s1", "tiny/density=0.25-s1",
    ]  # fmt: skip
    assert listed("--hardware", "gpu") == ["tiny/density=0.25-s0", "tiny/density=0.25-s1"]
    assert "tiny/dense-s0" in listed("--hardware", "cpu") and len(listed("--hardware", "cpu")) == 4
    assert runner.main(words(queue, "--only", "tinny/*")) == 2
    assert "no run is called tinny/*" in capsys.readouterr().err


def test_estimates_are_medians_of_measured_runs(tmp_path: Path, capsys: Capture) -> None:
    arms = ["dense", "lam=0.1", "lam=0.2", "dense+lr=0.1", "lam=0.1+lr=0.1"]
    queue = write_queue(tmp_path, arms=arms, seeds=[9], minutes=7)
    for arm, minutes, more in (
        ("dense", 1, {}), ("dense", 2, {}), ("dense", 30, {}), ("lam=0.1", 4, {}),
        ("dense+lr=0.1", 5, {}), ("dense", 99, {"gpu_seconds": 9}), ("dense", 99, {"failed": "kl"}),
        ("dense", 99, {"recipe": "other"}),
    ):  # fmt: skip
        row = {"key": "-", "recipe": "tiny", "arm": arm, "seed": 0, "probes": []}
        row |= {"seconds": 60 * minutes - 9, "probe_seconds": 9}
        append_row(tmp_path / "results.jsonl", row | more)
    assert runner.main(words(queue, "--dry-run")) == 0
    said = capsys.readouterr().out
    for arm, minutes in zip(arms, (2, 4, 3, 5, 7), strict=True):
        assert f"tiny/{arm}-s9, about {minutes} minutes" in said


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


def test_other_failures_are_status_1_and_cost_no_other_run(
    tmp_path: Path, fake: list[str], capsys: Capture
) -> None:
    queue = write_queue(tmp_path, arms=["dense+lr=4", "dense"], seeds=[0])
    assert runner.main(words(queue)) == 1
    assert "failed: 1 of 2 runs failed" in capsys.readouterr().out
    assert [row["arm"] for row in read_rows(tmp_path / "results.jsonl")] == ["dense"]
    assert fake == ["dense+lr=4-s0", "dense-s0"]  # tried once


def test_runs_of_other_code_count_until_they_are_to_be_redone(
    tmp_path: Path, fake: list[str], capsys: Capture
) -> None:
    queue = write_queue(tmp_path, seeds=[0])
    assert runner.main(words(queue)) == 0
    assert "other code" not in capsys.readouterr().out
    results = tmp_path / "results.jsonl"
    old = results.read_text().replace(code_version(), "01234567", 1)
    results.write_text(old)
    assert runner.main(words(queue)) == 0 and len(fake) == 2
    assert f"1 run done by other code than {code_version()}" in capsys.readouterr().out
    assert runner.main(words(queue, "--redo-other-code")) == 0
    assert fake[2:] == ["dense-s0~2"] and results.read_text().startswith(old)
    assert runner.main(words(queue, "--redo-other-code")) == 0 and len(fake) == 3
    assert "other code" not in capsys.readouterr().out.splitlines()[-1]


def test_jobs_are_measured_once_for_a_recipe(
    tmp_path: Path, fake: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    measured, jobs = [], []

    def measure(config: Any, cores: int) -> list[Packing]:
        measured.append((config.data, config.run.device))
        return [Packing(1, 2, 100.0), Packing(2, 1, 150.0), Packing(4, 1, 154.0)]

    monkeypatch.setattr(common, "measure", measure)
    monkeypatch.setattr(runner, "run_tasks", lambda *args, **more: jobs.append(more["jobs"]))
    queue = write_queue(tmp_path)
    queue.write_text(queue.read_text() + queue.read_text().replace("[0, 1]", "[2, 3]"))
    auto = [*words(queue)[:-2], "--jobs", "auto"]
    assert runner.main(auto) == 0 and runner.main(auto) == 0
    assert measured == [("scenes", "cpu")] and jobs[:2] == [2, 2]
    assert (
        "tiny: 100 images/s with --jobs 1, 150 images/s with --jobs 2, 154"
        in capsys.readouterr().out
    )
    assert runner.main(words(queue)) == 0 and jobs[-1] == 1
    with pytest.raises(SystemExit):
        runner.main([*words(queue), "--jobs", "none"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "tinny"}, "unknown recipe 'tinny' (did you mean 'tiny'?)"),
        ({"arms": ["dense", "lamb=1"]}, "unknown arm 'lamb=1'"),
        ({"arms": ["lam=-1"]}, "--lam -1"),
        ({"arms": ["dense+bta=1"]}, "'bta=1' is no SETTING=VALUE (did you mean 'beta'?)"),
        ({"seeds": 3}, "'seeds' must be a list"),
        ({"minuts": 3}, "unknown entry 'minuts' (did you mean 'minutes'?)"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    tmp_path: Path, fake: list[str], capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any], message: str,
) -> None:  # fmt: skip
    assert runner.main(words(write_queue(tmp_path, **changes))) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not fake
    assert f"{tmp_path / 'queue.toml'}, run 1: " in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[run]]\narms = ["dense"]\nseeds = [0]\n', "'recipe' is missing"),
        ("[[run]\n", "not valid TOML"),
        ("", "'run' is missing"),
    ],
)
def test_a_broken_queue_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    queue = tmp_path / "queue.toml"
    queue.write_text(text)
    assert runner.main(words(queue)) == 2
    said = capsys.readouterr().err
    assert message in said and str(queue) in said


def test_unknown_presets_and_settings_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = write_queue(tmp_path)
    recipe = tmp_path / "tiny.toml"
    good = recipe.read_text()
    recipe.write_text(good.replace('"nano"', '"nanno"'))
    assert runner.main(words(queue)) == 2
    assert "--preset nanno" in capsys.readouterr().err
    recipe.write_text(good.replace("steps", "stepps"))
    assert runner.main(words(queue)) == 2
    assert "unknown setting 'stepps'" in capsys.readouterr().err
    recipe.write_text('probes = ["scenes"]\n' + good)
    assert runner.main(words(queue)) == 2
    assert "unknown entry 'probes' (did you mean 'probe'?)" in capsys.readouterr().err


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
    weights = tmp_path / "runs" / "tiny" / "lam=0.1-s0" / "encoder.safetensors"
    stamp = weights.stat().st_mtime_ns

    monkeypatch.setattr(runs, "append_row", save)
    assert runner.main(words(queue)) == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert len(rows) == 1 and rows[0]["steps"] == 6 and rows[0]["arm"] == "lam=0.1"
    assert "--only tiny/lam=0.1-s0" in rows[0]["command"]
    assert runner.main(words(queue)) == 0
    assert read_rows(tmp_path / "results.jsonl") == rows
    assert weights.stat().st_mtime_ns == stamp


ARMS = ["dense", "lam=0.1"]


def finished(row: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on interruptions."""
    numbers = ("key", "arm", "seed", "steps", "knn", "rankme", "density", "nonzero_elements")
    probes = [(p["target"], p["accuracy"], p["untrained"], p["pixels"]) for p in row["probes"]]
    return {name: row[name] for name in numbers} | {"probes": probes}


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_runner_that_is_killed_again_and_again_ends_with_the_same_numbers(
    tmp_path: Path, tiny_images: Path, jobs: str
) -> None:
    queue = write_queue(tmp_path, str(tiny_images), arms=ARMS, seeds=[0], steps=40)
    script = [sys.executable, str(RECIPES / "run.py"), "--queue", str(queue), "--device", "cpu"]
    undisturbed, results = tmp_path / "undisturbed.jsonl", tmp_path / "results.jsonl"
    there = ["--results", str(undisturbed), "--runs", str(tmp_path / "undisturbed")]
    subprocess.run([*script, "--jobs", "1", *there], check=True)
    here = ["--results", str(results), "--runs", str(tmp_path / "runs"), "--jobs", jobs]

    logs = [tmp_path / "runs" / "tiny" / f"{arm}-s0" / "metrics.jsonl" for arm in ARMS]

    def progress() -> int:
        return sum(log.stat().st_size for log in logs if log.exists())

    draw, kills = random.Random(0), 0
    while len(read_rows(results)) < len(ARMS):
        begun = progress()
        process = subprocess.Popen([*script, *here], start_new_session=True)
        while process.poll() is None and progress() == begun:  # starting takes longest
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(draw.uniform(0, 3))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        assert not psutil.wait_procs(children, timeout=120)[1]
    assert kills
    rows = read_rows(results)
    assert Counter(row["key"] for row in rows).most_common(1)[0][1] == 1
    wanted = {row["key"]: finished(row) for row in read_rows(undisturbed)}
    assert {row["key"]: finished(row) for row in rows} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_sigterm_ends_the_runner_quietly(tmp_path: Path, tiny_images: Path, jobs: str) -> None:
    queue = write_queue(tmp_path, str(tiny_images), seeds=[0], steps=100_000, checkpoint_every=1)
    script = [sys.executable, str(RECIPES / "run.py"), *words(queue)[:-1], jobs]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    weights = tmp_path / "runs" / "tiny" / "dense-s0" / "checkpoint.safetensors"
    while not weights.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate()
    assert said == "run.py: interrupted; the same command goes on from there\n"
    assert process.returncode == 130
