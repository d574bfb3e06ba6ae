"""Recipes say what they run, and the runner skips, resumes, stops in time and names mistakes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsejepa import cli, demo, runs
from sparsejepa.config import load_toml, preset
from sparsejepa.runs import Probes, Task, read_rows
from sparsejepa.sweep import sweep_arms
from sparsejepa.training.build import arm_name

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(p.stem for p in RECIPES.glob("*.toml") if p.stem != "queue")


@pytest.fixture(scope="module")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 + 48 noisy images in two classes that differ in colour."""
    root, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 24)):
        for name, tint in (("red", (90, 0, 0)), ("blue", (0, 0, 90))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (32, 32, 3)) + tint
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_run", RECIPES / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipes_run"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_command_is_its_settings(name: str, runner: ModuleType) -> None:
    recipe = load_toml(RECIPES / f"{name}.toml")
    assert {"about", "command", "hardware", "minutes", "expected", "settings"} <= set(recipe)
    config, probes = runner.read_recipe(RECIPES, name)
    words = shlex.split(recipe["command"])
    if words == ["sparsejepa", "demo"]:
        assert config == preset("demo") and config.data == "scenes"
        assert probes == Probes(tuple(demo.TARGETS), targets=demo.TARGETS, limit=demo.PROBE_LIMIT)
        return
    assert words[:2] == ["sparsejepa", "sweep"]
    args = cli.parse(words[1:])
    assert args.settings(args.data) == config
    data = tuple(args.data_eval.split(",")) if args.data_eval else (config.data,)
    assert probes == Probes(data, limit=args.probe_limit)


def test_every_run_of_the_queue_is_in_its_recipes_sweep() -> None:
    seen = set()
    for run in load_toml(RECIPES / "queue.toml")["run"]:
        recipe = load_toml(RECIPES / f"{run['recipe']}.toml")
        if recipe["command"] == "sparsejepa demo":
            arms, seeds = sweep_arms(preset("demo"), [demo.LAM]), 1
        else:
            args = cli.parse(shlex.split(recipe["command"])[1:])
            arms = sweep_arms(args.settings(args.data), args.lam, args.density)
            seeds = args.seeds
        assert set(run["arms"]) <= set(arms) and max(run["seeds"]) < seeds
        assert {"dense", "lam=0"} <= set(run["arms"])  # no sparse arm without its controls
        for arm, seed in itertools.product(run["arms"], run["seeds"]):
            assert (run["recipe"], arm, seed) not in seen
            seen.add((run["recipe"], arm, seed))


def write_queue(folder: Path, images: str = "scenes", **changes: Any) -> Path:
    settings = {
        "data": images, "preset": "nano", "steps": 6, "batch_size": 16, "predictor_depth": 1,
        "threads": 1, "checkpoint_every": 2,
    }  # fmt: skip
    lines = "\n".join(f"{k} = {json.dumps(v)}" for k, v in settings.items())
    (folder / "tiny.toml").write_text(f"[settings]\n{lines}\n")
    run = {"recipe": "tiny", "arms": ["dense", "lam=0.1"], "seeds": [0, 1], "minutes": 3} | changes
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
        end = time.monotonic() + (30 if task.config.run.seed == 1 else 0)
        while time.monotonic() < end:
            time.sleep(0.01)
        probe = {"data": "scenes", "target": "count", "protocol": "logistic", "accuracy": 0.5}
        return {
            "key": task.key, "arm": arm_name(task.config), "seed": task.config.run.seed,
            "probes": [probe], "groups_per_latent": None, "seconds": 1.0, "probe_seconds": 1.0,
            "alarms": [],
        }  # fmt: skip

    monkeypatch.setattr(runs, "run_and_probe", run_and_probe)
    monkeypatch.setattr(runs, "_check", lambda tasks: ([4] * len(tasks), True))
    return ran


def test_the_budget_stops_the_queue_and_says_what_is_left(
    tmp_path: Path, runner: ModuleType, fake: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    queue = write_queue(tmp_path)
    assert runner.main(words(queue, "--budget-minutes", "0.02")) == 0
    assert fake == ["dense-s0", "lam=0.1-s0", "dense-s1"]  # the last one was cut off
    assert [(r["arm"], r["seed"]) for r in read_rows(tmp_path / "results.jsonl")] == [
        ("dense", 0), ("lam=0.1", 0)
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "used up" in said and "left: tiny/dense-s1" in said and "2 runs left" in said
    runner.main(words(queue, "--budget-minutes", "0.02", "--only", "tiny/lam=*"))
    assert fake[3:] == ["lam=0.1-s1"]


def test_dry_run_only_lists(
    tmp_path: Path, runner: ModuleType, fake: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(words(write_queue(tmp_path), "--dry-run", "--only", "tiny")) == 0
    said = capsys.readouterr().out
    assert "to do: tiny/dense-s0, about 3 minutes" in said and "4 runs to do" in said
    assert not fake and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "tinny"}, "unknown recipe 'tinny' (did you mean 'tiny'?)"),
        ({"arms": ["dense", "lamb=1"]}, "unknown arm 'lamb=1'"),
        ({"arms": ["lam=-1"]}, "--lam -1"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    tmp_path: Path, runner: ModuleType, fake: list[str], capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any], message: str,
) -> None:  # fmt: skip
    assert runner.main(words(write_queue(tmp_path, **changes))) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not fake


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[run]]\narms = ["dense"]\nseeds = [0]\n', "'recipe' is missing"),
        ("[[run]\n", "not valid TOML"),
    ],
)
def test_a_broken_queue_is_named(
    tmp_path: Path, runner: ModuleType, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    queue = tmp_path / "queue.toml"
    queue.write_text(text)
    assert runner.main(words(queue)) == 2
    said = capsys.readouterr().err
    assert message in said and str(queue) in said


def test_unknown_presets_and_settings_are_named(
    tmp_path: Path, runner: ModuleType, capsys: pytest.CaptureFixture[str]
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


def test_real_runs_resume_and_are_skipped(
    tmp_path: Path, runner: ModuleType, monkeypatch: pytest.MonkeyPatch, tiny_images: Path
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
