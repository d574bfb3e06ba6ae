"""Recipes say what they run, and the queue holds each run once, with its controls."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import run as runner
import study

from sparsejepa import cli
from sparsejepa.config import load_toml, preset
from sparsejepa.study.results import Probes
from sparsejepa.study.sweep import DEMO_PROBES

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in study.recipe_files(RECIPES))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_command_is_its_settings(name: str) -> None:
    recipe = load_toml(RECIPES / f"{name}.toml")
    assert {"about", "command", "hardware", "minutes", "expected", "settings"} <= set(recipe)
    config, probes = study.read_recipe(RECIPES, name)
    words = shlex.split(recipe["command"])
    if words == ["sparsejepa", "demo"]:
        assert config == preset("demo") and config.data == "scenes"
        assert probes == DEMO_PROBES
        return
    if words[:2] == ["python", "recipes/run.py"]:
        entries = runner.read_queue(runner.parse(words[2:]))
        assert {task.recipe for entry in entries for task in entry.tasks} == {name}
        return
    assert words[:2] == ["sparsejepa", "sweep"]
    args = cli.parse(words[1:])
    assert args.settings() == config
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
