"""Protocols, measures and held-out images from a run to its line of results."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsejepa import version
from sparsejepa.config import Config
from sparsejepa.data import catalog
from sparsejepa.encoders.load import load
from sparsejepa.evaluation import measured, probe
from sparsejepa.evaluation.finetune import FineTune, Recipe
from sparsejepa.evaluation.probe import evaluate
from sparsejepa.study import tasks
from sparsejepa.study.results import DONE, ROW
from sparsejepa.study.runs import run_tasks
from sparsejepa.study.tasks import Probes, Task, attempt, row_key, run_and_probe

SETTINGS: dict[str, Any] = {
    "encoder": "nano", "patch_size": 8, "img_size": (32,), "predictor_dim": 32,
    "predictor_depth": 1, "steps": 3, "batch_size": 16, "limit": 64, "holdout": 130,
    "num_targets": 1, "context_counts": (6,), "device": "cpu", "threads": 1, "seed": 1,
}  # fmt: skip
INFORMATION = {
    "data", "scored_on", "total_correlation", "note", "rankme", "n",
    "untrained_total_correlation", "untrained_rankme",
}  # fmt: skip
FACTORS = {
    "data", "dci_disentanglement", "dci_completeness", "dci_informativeness", "mig",
    "groups_dci_disentanglement", "untrained_dci_disentanglement", "untrained_dci_completeness",
    "untrained_dci_informativeness", "n_train", "n_test",
}  # fmt: skip
KEPT = {
    "data", "target", "scored_on", "order", "curve", "encoder_flops", "n_train", "n_test",
}  # fmt: skip


class QuickTune(FineTune):
    def __init__(self, encoder: Any, *, random_state: int = 0) -> None:
        recipe = Recipe(passes=1, least_steps=3)
        super().__init__(encoder, random_state=random_state, recipe=recipe)


@pytest.fixture
def splits(monkeypatch) -> list[str]:
    """Small parts of the built-in scenes; the list says which splits were loaded."""
    calls: list[str] = []

    def small(name: str, split: str = "train", **settings: Any):
        calls.append(f"{name}/{split}")
        images = catalog.load_dataset(name, split, **settings)
        return images.subset(400 if split == "train" else 120)

    monkeypatch.setattr(probe, "load_dataset", small)
    monkeypatch.setattr(probe, "FineTune", QuickTune)
    monkeypatch.setattr(measured, "FACTOR_IMAGES", (300, 120))
    return calls


def make_task(tmp_path: Path, groups: str, measures: tuple[str, ...] = ()) -> Task:
    config = Config(data="scenes").replace(**SETTINGS, groups=groups)
    probes = Probes(
        ("scenes", "scenes:single"), ("logistic:25%", "finetune"),
        {"scenes": ("count",), "scenes:single": ("shape",)}, 200, measures,
    )  # fmt: skip
    return Task(config, tmp_path / groups, probes)


@pytest.mark.parametrize("groups", ["none", "region"])
def test_a_line_has_every_measure(tmp_path: Path, splits: list[str], groups: str) -> None:
    task = make_task(tmp_path, groups, ("information", "factors", "kept"))
    row = run_and_probe(task)
    assert row["gpu_seconds"] == 0
    found = row["measures"]
    assert {name: set(values) for name, values in found.items()} == {
        "information": INFORMATION, "factors": FACTORS, "kept": KEPT,
    }  # fmt: skip
    assert None not in found["information"].values()
    sparse = groups == "region"
    assert (found["factors"]["groups_dci_disentanglement"] is not None) == sparse
    assert found["kept"]["order"] == ("groups" if sparse else "variance")
    assert (found["information"]["n"], found["kept"]["n_test"]) == (130, 130)
    assert {row["protocol"] for row in row["probes"]} == {"logistic:25%", "finetune"}


def test_held_out_images_replace_the_test_split_of_the_run_only(
    tmp_path: Path, splits: list[str]
) -> None:
    task = make_task(tmp_path, "region", ("information",))
    row = run_and_probe(task)
    assert "scenes/test" not in splits and "scenes:single/test" in splits
    facts = [(p["data"], p["settings"]["scored_on"], p["n_test"]) for p in row["probes"]]
    assert set(facts) == {("scenes", "holdout", 130), ("scenes:single", "test", 120)}
    # The untrained floors are those of the run's own seed.
    encoder = load(task.run_dir)
    again = evaluate(
        encoder.untrained(1), "scenes", protocols=task.probes.protocols, targets=["count"],
        limit=200, holdout=130, img_size=(32, 32), floors=False,
    )  # fmt: skip
    mine = [p for p in row["probes"] if p["data"] == "scenes"]
    assert [p["untrained"] for p in mine] == [p.accuracy for p in again]
    assert [p["pixels"] is None for p in mine] == [False, True]


def test_floors_are_of_one_version(
    tmp_path: Path, splits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = replace(make_task(tmp_path, "none"), probes=Probes(("scenes",), limit=200))

    def floors() -> int:
        return len(list((tmp_path / "floors").glob("untrained-s1-*.json")))

    attempt(task)
    assert floors() == 1
    monkeypatch.setattr(version, "EVAL_VERSION", 2)
    assert attempt(task)["eval_version"] == 2 and floors() == 2


@pytest.mark.parametrize("groups", ["none", "region"])
def test_a_line_has_the_fields_that_are_documented_and_its_encoder_is_kept(
    tmp_path: Path, splits: list[str], monkeypatch: pytest.MonkeyPatch, groups: str
) -> None:
    probes = Probes(("scenes",), targets={"scenes": ("count",)}, limit=200)
    task = replace(make_task(tmp_path, groups), probes=probes, encoders=tmp_path / "encoders")
    results = tmp_path / "results.jsonl"
    (row,) = run_tasks([task], results, jobs=1)
    assert set(row) == set(ROW) | set(DONE)
    kept = tmp_path / "encoders" / task.key
    names = {"encoder.safetensors", "config.json", "groups.safetensors"}
    without = {"groups.safetensors"} if groups == "none" else set()
    assert {path.name for path in kept.iterdir()} == names - without
    weights = (kept / "encoder.safetensors").read_bytes()
    assert row["encoder"] == hashlib.sha256(weights).hexdigest()
    # Only probes changed: the kept encoder is read, without the run directory.
    shutil.rmtree(task.run_dir)
    trained: list[Any] = []
    real = tasks.train
    monkeypatch.setattr(tasks, "train", lambda *a, **k: trained.append(a) or real(*a, **k))
    monkeypatch.setattr(version, "EVAL_VERSION", 2)
    (again,) = run_tasks([replace(task)], results, jobs=1)
    assert not trained and not (task.run_dir / "config.toml").exists()
    changed = {name for name in row if row[name] != again[name]}
    assert {"key", "eval_version"} <= changed
    assert changed <= {"key", "eval_version", "probes", "probe_seconds", "finished"}
    assert again["probes"][0]["accuracy"] == row["probes"][0]["accuracy"]
    # A kept encoder that is not the one of the line is not read, and the run is trained again.
    (kept / "encoder.safetensors").write_bytes(weights[:-1])
    monkeypatch.setattr(version, "EVAL_VERSION", 3)
    (anew,) = run_tasks([replace(task)], results, jobs=1)
    assert trained and anew["encoder"] == row["encoder"]
    assert (kept / "encoder.safetensors").read_bytes() == weights


def test_the_key_knows_measures_and_lines_from_before_there_were_any(tmp_path: Path) -> None:
    task = make_task(tmp_path, "region")
    asked = replace(task, probes=replace(task.probes, measures=("kept",)))
    assert asked.key != task.key
    probed = {k: v for k, v in vars(task.probes).items() if k != "measures"}
    old = {"key": "x", "settings": task.config.to_dict(), "probed": probed}
    old["train_version"] = version.TRAIN_VERSION
    assert row_key(old) == task.key
    assert row_key({**old, "probed": {**probed, "measures": ["kept"]}}) == asked.key
