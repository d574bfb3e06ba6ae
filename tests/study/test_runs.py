"""Runs and the probes on them: which are done, what a line holds, processes that die or stop."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from rich.console import Console

import sparsejepa
from sparsejepa.config import preset
from sparsejepa.data import catalog
from sparsejepa.encoders.load import load
from sparsejepa.errors import Interrupted, SizesDiffer, TooFewImages, UserError
from sparsejepa.evaluation import measured, probe
from sparsejepa.evaluation.probe import evaluate
from sparsejepa.study import runs
from sparsejepa.study.results import Probes, Task, read_rows
from sparsejepa.study.runs import run_and_probe, run_tasks, side_by_side
from sparsejepa.study.sweep import arm_settings
from sparsejepa.training.build import arm_name
from tests.study.test_results import FIELDS

TINY = preset("nano").replace(
    data="scenes", steps=4, batch_size=32, predictor_depth=1, device="cpu", threads=1
)


def make_task(tmp_path: Path, arm: str = "lam=0", seed: int = 0, **settings: Any) -> Task:
    config = TINY.replace(**arm_settings(arm), seed=seed, **settings)
    return Task(config, tmp_path / f"{arm}-s{seed}", Probes((config.data,)))


# --- which runs are done


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace training and probing; the list records what ran. The learning rate says how it ends.

    1: interrupted, 2: data that is not there, 3: a loss that is not finite.
    """
    ran: list[str] = []

    def run_and_probe(task: Task, console: Any = None) -> dict[str, Any]:
        ran.append(task.run_dir.name)
        match task.config.optim.lr:
            case 1:
                raise KeyboardInterrupt
            case 2:
                raise UserError(f"{task.config.data}: no such file")
            case 3:
                raise UserError(f"{task.run_dir}: 'kl' is not finite at step 7; start anew")
        probe = {"data": "scenes", "target": "count", "protocol": "logistic", "accuracy": 0.5}
        return {
            "key": task.key, "arm": arm_name(task.config), "seed": task.config.run.seed,
            "probes": [probe], "groups_per_latent": None, "seconds": 1.0, "probe_seconds": 1.0,
            "alarms": ["one"],
        }  # fmt: skip

    monkeypatch.setattr(runs, "run_and_probe", run_and_probe)
    monkeypatch.setattr(runs, "check_tasks", lambda tasks: None)
    return ran


def test_finished_runs_are_not_repeated(tmp_path: Path, fake: list[str]) -> None:
    results = tmp_path / "results.jsonl"
    tasks = [make_task(tmp_path, arm, seed) for seed in (0, 1) for arm in ("dense", "lam=0")]
    first = run_tasks(tasks[:3], results, jobs=1)
    assert fake == ["dense-s0", "lam=0-s0", "dense-s1"]
    rows = run_tasks(tasks, results, jobs=1)
    assert fake[3:] == ["lam=0-s1"]
    assert rows[:3] == first and [r["key"] for r in rows] == [t.key for t in tasks]
    assert read_rows(results) == rows
    assert run_tasks(tasks, results) == rows and len(fake) == 4
    assert run_tasks(tasks, tmp_path / "other.jsonl", before=rows) == rows and len(fake) == 4


def test_one_failing_run_costs_no_other_and_a_stop_keeps_the_lines(
    tmp_path: Path, fake: list[str]
) -> None:
    results = tmp_path / "results.jsonl"
    tasks = [make_task(tmp_path, seed=i, lr=lr) for i, lr in enumerate((2.0, 1e-3, 1.0, 1e-3))]
    with (tmp_path / "log").open("w") as log:
        console = Console(file=log, width=200)
        with pytest.raises(UserError, match=r"1 of 2 runs failed.*no such file"):
            run_tasks(tasks[:2], results, jobs=1, console=console)
    said = (tmp_path / "log").read_text()
    assert "lam=0-s0: failed" in said and "lam=0-s1: scenes: count 50.0 %" in said
    assert "alarm: one" in said
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tasks[1:], results, jobs=1)
    assert [row["seed"] for row in read_rows(results)] == [1] and len(fake) == 3


def test_a_run_that_is_not_finite_is_recorded_and_repeated_only_when_asked(
    tmp_path: Path, fake: list[str]
) -> None:
    results = tmp_path / "results.jsonl"
    tasks = [make_task(tmp_path, seed=seed, lr=(3.0, 1e-3)[seed]) for seed in range(2)]
    first, second = run_tasks(tasks, results, jobs=1)
    assert first["failed"] == "kl is not finite at step 7" and first["probes"] == []
    assert set(first) < FIELDS and first["key"] == tasks[0].key
    assert second["failed"] is None
    assert run_tasks(tasks, results, jobs=1) == [first, second] and len(fake) == 2
    # It is run again beside the first one, and the last line counts.
    again = run_tasks(tasks, results, jobs=1, retry_failed=True)
    assert fake[2:] == ["lam=0-s0~2"] and again[1] == second
    assert [row["key"] for row in read_rows(results)] == [first["key"], second["key"], first["key"]]


# --- what a line holds

SETTINGS: dict[str, Any] = {
    "patch_size": 8, "img_size": (32,), "predictor_dim": 32, "steps": 3, "batch_size": 16,
    "limit": 64, "holdout": 130, "num_targets": 1, "context_counts": (6,), "seed": 1,
}  # fmt: skip


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small parts of the built-in scenes; the list says which splits were loaded."""
    calls: list[str] = []

    def small(name: str, split: str = "train", **settings: Any) -> Any:
        calls.append(f"{name}/{split}")
        images = catalog.load_dataset(name, split, **settings)
        return images.subset(400 if split == "train" else 120)

    monkeypatch.setattr(probe, "load_dataset", small)
    monkeypatch.setattr(measured, "FACTOR_IMAGES", (300, 120))
    return calls


@pytest.mark.parametrize("groups", ["none", "region"])
def test_measures_and_floors_are_of_the_runs_own_held_out_images_and_seed(
    tmp_path: Path, splits: list[str], groups: str
) -> None:
    probes = Probes(
        ("scenes", "scenes:single"), ("logistic:25%",),
        {"scenes": ("count",), "scenes:single": ("shape",)}, 200,
        ("information", "factors", "kept"), ("knn",),
    )  # fmt: skip
    task = Task(TINY.replace(**SETTINGS, groups=groups), tmp_path / groups, probes)
    row = run_and_probe(task)
    assert "scenes/test" not in splits and "scenes:single/test" in splits
    facts = [(p["data"], p["protocol"], p["settings"]["scored_on"]) for p in row["probes"]]
    assert facts == [
        ("scenes", "logistic:25%", "holdout"), ("scenes", "knn", "holdout"),
        ("scenes:single", "logistic:25%", "test"),
    ]  # fmt: skip
    # The untrained floors are those of the run's own seed, probed as all runs are.
    again = evaluate(
        load(task.run_dir).untrained(1), "scenes", protocols=("logistic:25%", "knn"),
        targets=["count"], limit=200, holdout=130, img_size=(32, 32), floors=False,
    )  # fmt: skip
    assert [p["untrained"] for p in row["probes"][:2]] == [p.accuracy for p in again]
    assert all(0 <= p["pixels"] <= 1 for p in row["probes"])
    found, sparse = row["measures"], groups == "region"
    assert set(found) == set(probes.measures) and row["gpu_seconds"] == 0
    assert None not in found["information"].values()
    assert (found["factors"]["groups_dci_disentanglement"] is not None) == sparse
    assert found["kept"]["order"] == ("groups" if sparse else "variance")
    assert (found["information"]["n"], found["kept"]["n_test"]) == (130, 130)


@pytest.mark.parametrize("groups", ["none", "region"])
def test_a_line_has_the_fields_that_are_documented_and_its_encoder_is_kept(
    tmp_path: Path, splits: list[str], monkeypatch: pytest.MonkeyPatch, groups: str
) -> None:
    probes = Probes(("scenes",), targets={"scenes": ("count",)}, limit=200)
    task = Task(TINY.replace(**SETTINGS, groups=groups), tmp_path / "a", probes)
    task = replace(task, encoders=tmp_path / "encoders")
    results = tmp_path / "results.jsonl"
    (row,) = run_tasks([task], results, jobs=1)
    assert set(row) == FIELDS - {"trial"}
    kept = tmp_path / "encoders" / task.key
    names = {"encoder.safetensors", "config.json", "groups.safetensors"}
    without = {"groups.safetensors"} if groups == "none" else set()
    assert {path.name for path in kept.iterdir()} == names - without
    weights = (kept / "encoder.safetensors").read_bytes()
    assert row["encoder"] == hashlib.sha256(weights).hexdigest()
    # Only probes changed: the kept encoder is read, without the run directory.
    shutil.rmtree(task.run_dir)
    trained: list[Any] = []
    real = runs.train
    monkeypatch.setattr(runs, "train", lambda *a, **k: trained.append(a) or real(*a, **k))
    monkeypatch.setattr(sparsejepa, "EVAL_VERSION", 2)
    (again,) = run_tasks([replace(task)], results, jobs=1)
    assert not trained and not (task.run_dir / "config.toml").exists()
    changed = {name for name in row if row[name] != again[name]}
    assert {"key", "eval_version"} <= changed
    assert changed <= {"key", "eval_version", "probes", "probe_seconds", "finished"}
    assert again["probes"][0]["accuracy"] == row["probes"][0]["accuracy"]
    # A kept encoder that is not the one of the line is not read, and the run is trained again.
    (kept / "encoder.safetensors").write_bytes(weights[:-1])
    monkeypatch.setattr(sparsejepa, "EVAL_VERSION", 3)
    (anew,) = run_tasks([replace(task)], results, jobs=1)
    assert trained and anew["encoder"] == row["encoder"]
    assert (kept / "encoder.safetensors").read_bytes() == weights


# --- how runs begin


def test_unlabelled_probe_data_is_refused_before_training(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(40):
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(flat / f"{i}.png")
    with pytest.raises(UserError, match=r"no labels.*--data-eval"):
        run_tasks([make_task(tmp_path / "out", data=str(flat))], tmp_path / "r", jobs=1)
    assert not (tmp_path / "out").exists()


# --- processes of their own


def end(how: int) -> int:
    """Wait, fail, or die by a signal, as `how` says."""
    if how < 0:
        os.kill(os.getpid(), -how)
    if how > 0:
        time.sleep(how)
    if how == 0:
        raise UserError("is no good")
    return how


def test_a_worker_that_dies_is_reported_and_costs_no_other() -> None:
    tasks = [-signal.SIGKILL, 0, 1]
    found = dict(ended for ended in side_by_side(tasks, end, 2) if ended)
    assert "killed, perhaps for want of memory" in str(found[-signal.SIGKILL])
    assert str(found[0]) == "is no good" and found[1] == 1


@pytest.mark.parametrize(
    "error",
    [UserError("a"), SizesDiffer("b"), TooFewImages("c", 5), Interrupted(15)],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_the_way_from_a_worker(error: BaseException) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_each_run_at_a_time_has_a_gpu_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four GPUs and five runs; a stand-in for the processes keeps the first one longest."""
    seen: dict[int, tuple[str, int]] = {}
    held: list[Any] = []

    class Process:
        def join(self) -> None:
            pass

    def stand_in(step: Any, task: Task, stop: Any) -> tuple[Any, Any]:
        pipe, other = multiprocessing.Pipe(duplex=False)
        seed, run = task.config.run.seed, task.config.run
        seen[seed] = run.device, task.jobs
        held.append(other)  # open until the end of the test
        if seed != 0:
            other.send({"key": task.key, "failed": "as planned"})
        if len(seen) == 5:
            held[0].send({"key": task.key, "failed": "as planned"})
        return Process(), pipe

    monkeypatch.setattr(runs, "_begin", stand_in)
    monkeypatch.setattr(runs, "check_tasks", lambda tasks: None)
    monkeypatch.setattr(runs, "resolve_device", lambda name: "cuda")
    monkeypatch.setattr(runs.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(runs, "cores", lambda: 64)
    tasks = [make_task(tmp_path, seed=seed, device="auto", threads=None) for seed in range(5)]

    def devices(tasks: list[Task], name: str, **more: Any) -> list[str]:
        seen.clear()
        held.clear()
        assert len(run_tasks(tasks, tmp_path / name, **more)) == 5
        return [device for device, _ in dict(sorted(seen.items())).values()]

    found = devices(tasks, "a")
    assert set(found) == {f"cuda:{i}" for i in range(4)} and found.count(found[0]) == 1
    assert {jobs for _, jobs in seen.values()} == {1}
    # Five at a time: two share a GPU; one that is named stays.
    assert devices(tasks, "b", jobs=5).count("cuda:0") == 2
    assert {jobs for _, jobs in seen.values()} == {2}
    named = [replace(t, config=t.config.replace(device="cuda:3")) for t in tasks]
    assert set(devices(named, "c")) == {"cuda:3"}


SWEEP = """
import sys
from pathlib import Path
from sparsejepa.study.sweep import run_sweep
from sparsejepa.config import preset

if __name__ == "__main__":
    config = preset("nano").replace(
        data=sys.argv[2], steps=200, batch_size=16, device="cpu", checkpoint_every=1000,
    )
    run_sweep(config, lams=[], seeds=1, out=Path(sys.argv[1]), jobs=2)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_workers_stop_with_a_checkpoint_and_go_on(
    tmp_path: Path, tiny_images: Path, kill: signal.Signals
) -> None:
    script, out = tmp_path / "sweep.py", tmp_path / "out"
    script.write_text(SWEEP)
    words = [sys.executable, str(script), str(out), str(tiny_images)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True)
    logs = [out / arm / "metrics.jsonl" for arm in ("dense-s0", "lam=0-s0")]
    while not (begun := [log for log in logs if log.exists() and log.read_text()]):
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, kill)  # as a terminal does; workers have groups of their own
    process.wait()
    assert children and not psutil.wait_procs(children, timeout=120)[1]  # not even orphans stay
    assert all(list(log.parent.glob("checkpoints/step-*")) for log in begun)
    assert not any(log.with_name("summary.json").exists() for log in begun)
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["steps"] for row in read_rows(out / "results.jsonl")] == [200, 200]
