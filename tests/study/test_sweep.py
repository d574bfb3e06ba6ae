"""The sweep and its runs: arms, keys, result lines, workers, and one tiny sweep from end to end."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from sparsejepa import cli
from sparsejepa.config import REMOVED, preset
from sparsejepa.errors import UserError
from sparsejepa.model.groups import GroupMap
from sparsejepa.study import runs
from sparsejepa.study import tasks as tasks_module
from sparsejepa.study.results import read_results, read_rows
from sparsejepa.study.runs import run_tasks
from sparsejepa.study.sweep import (
    DEMO_LAM,
    DEMO_PROBES,
    arm_settings,
    run_sweep,
    sweep_arms,
)
from sparsejepa.study.tasks import Probes, Task, row_key
from sparsejepa.training.build import arm_name
from sparsejepa.training.checkpoint import has_checkpoint
from sparsejepa.version import TRAIN_VERSION

TINY = preset("nano").replace(
    data="scenes", steps=4, batch_size=32, predictor_depth=1, device="cpu", threads=1
)


def make_task(tmp_path: Path, arm: str = "lam=0", seed: int = 0, **settings: Any) -> Task:
    config = TINY.replace(**arm_settings(arm), seed=seed, **settings)
    return Task(config, tmp_path / f"{arm}-s{seed}", Probes(("scenes",)))


def test_dense_and_unpenalised_are_always_inside() -> None:
    assert sweep_arms(TINY, ()) == ["dense", "lam=0"]
    got = sweep_arms(TINY, (0.1, 0, 0.001, 0.1), (0.5, 0.25))
    assert got == ["dense", "lam=0", "lam=0.001", "lam=0.1", "density=0.25", "density=0.5"]
    with pytest.raises(UserError, match="--groups none"):
        sweep_arms(TINY.replace(groups="none"), (0.1,))


@given(st.sampled_from(["region", "concept"]), st.sampled_from(["dense", "lam", "density"]),
       st.sampled_from([0.0, 0.001, 0.25, 1e-5, 0.9]))  # fmt: skip
def test_arm_settings_inverts_arm_name(kind: str, arm: str, level: float) -> None:
    name = arm if arm == "dense" else f"{arm}={level:g}"
    config = TINY.replace(groups=kind, density=0.77, lam=0.5).replace(**arm_settings(name))
    assert arm_name(config) == name
    assert config.groups.groups == ("none" if arm == "dense" else kind)


def test_controls_have_names_of_their_own() -> None:
    def name(**settings: object) -> str:
        return arm_name(TINY.replace(density=0.25, **settings))

    assert name(pattern="random") == "density=0.25+pattern=random"
    assert name(pattern="runs/a") == "density=0.25+pattern=RUN"
    assert name(predictor="groups") == "density=0.25+predictor=groups"


@pytest.mark.parametrize("arm", ["", "lam", "lam=", "lam=much", "Dense", "rho=1", "dense=1", "+"])
def test_unknown_arms_are_named(arm: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"unknown arm '{arm}'")):
        arm_settings(arm)


NUMBERS = st.floats(0, 1e6, allow_subnormal=False)
ITEMS = st.fixed_dictionaries({}, optional={
    "beta": NUMBERS, "lr": NUMBERS, "num_groups": st.integers(1, 10**6), "flip": st.booleans(),
    "encoder": st.sampled_from(["nano", "tiny"]), "crop_scale": st.tuples(NUMBERS, NUMBERS),
    "img_size": st.tuples(st.integers(1, 999)), "steps": st.integers(1, 10**6),
})  # fmt: skip


def word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(word, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@given(st.sampled_from(["dense", "lam=0.01", "density=0.25"]), ITEMS)
def test_an_arm_goes_on_with_settings(first: str, items: dict[str, Any]) -> None:
    arm = "+".join([first, *(f"{name}={word(value)}" for name, value in items.items())])
    settings = arm_settings(arm)
    assert settings == arm_settings(first) | items
    config = TINY.replace(**settings)
    assert {name: config.flat()[name] for name in items} == items
    for name, value in items.items():
        assert type(settings[name]) is type(value)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("dense+lr=fast", "--lr fast: must be a number"),
        ("dense+beta=true", "--beta True: must be a number"),
        ("dense+crop_scale=0.1", "--crop-scale 0.1: must be 2 numbers"),
        ("dense+crop_scale=a,b", "--crop-scale a b: must be 2 numbers"),
        ("dense+epochs=1.5", "--epochs 1.5: must be a whole number"),
        ("dense+img_size=32.5", "--img-size 32.5: must be whole numbers"),
        ("dense+flip=1", "--flip 1: must be true or false"),
        ("dense+loss=l1", "--loss l1: unknown"),
        ("lam=nan", "--lam nan: must be at least 0"),
    ],
)
def test_settings_of_the_wrong_type_are_named(arm: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        TINY.replace(**arm_settings(arm)).check()


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("dense+bta=0", "'bta=0' is no SETTING=VALUE (did you mean 'beta'?)"),
        ("dense+beta", "'beta' is no SETTING=VALUE"),
        ("dense+beta=", "'beta=' is no SETTING=VALUE"),
        ("dense++beta=0", "'' is no SETTING=VALUE"),
    ],
)
def test_wrong_settings_of_arms_are_named(arm: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"arm '{arm}': {message}")):
        arm_settings(arm)


def test_dense_is_one_run_whatever_the_base_lambda() -> None:
    one, two = (TINY.replace(lam=lam).replace(**arm_settings("dense")) for lam in (0.01, 0.5))
    assert one == two


def test_key_is_about_numbers_only(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    same = make_task(tmp_path / "elsewhere", threads=2, device="auto", data_root="/data")
    assert task.key == same.key and re.fullmatch("[0-9a-f]{16}", task.key)
    others = [
        make_task(tmp_path, seed=1),
        make_task(tmp_path, arm="dense"),
        make_task(tmp_path, lr=1e-4),
        *(
            dataclasses.replace(task, probes=probes)
            for probes in (
                Probes(("scenes", "scenes:single")),
                Probes(("scenes",), ("knn",)),
                Probes(("scenes",), targets={"scenes": ("count",)}),
                Probes(("scenes",), limit=100),
            )
        ),
    ]
    assert len({task.key, *(t.key for t in others)}) == 8


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace training and probing; the list records what ran."""
    ran: list[str] = []

    def run_and_probe(task: Task, console: Any = None) -> dict[str, Any]:
        ran.append(task.run_dir.name)
        if task.config.optim.lr > 1:
            if task.config.optim.lr > 5:
                raise UserError(f"{task.config.data}: no such file")
            raise UserError(f"{task.run_dir}: 'kl' is not finite at step 7; start anew")
        if task.config.optim.lr > 0.5:
            raise KeyboardInterrupt
        probe = {"data": "scenes", "target": "count", "protocol": "logistic", "accuracy": 0.5}
        return {
            "key": task.key, "arm": arm_name(task.config), "seed": task.config.run.seed,
            "probes": [probe], "groups_per_latent": None, "seconds": 1.0, "probe_seconds": 1.0,
            "alarms": [],
        }  # fmt: skip

    monkeypatch.setattr(tasks_module, "run_and_probe", run_and_probe)
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


def test_one_failing_run_does_not_cost_the_others(tmp_path: Path, fake: list[str]) -> None:
    results = tmp_path / "results.jsonl"
    tasks = [make_task(tmp_path, "lam=0", seed, lr=9.0 if seed == 0 else 1e-3) for seed in range(3)]
    console = Console(file=(tmp_path / "log").open("w"), width=200)
    with pytest.raises(UserError, match=r"1 of 3 runs failed.*no such file"):
        run_tasks(tasks, results, jobs=1, console=console)
    console.file.close()
    assert [row["seed"] for row in read_rows(results)] == [1, 2]
    log = (tmp_path / "log").read_text()
    assert "lam=0-s0: failed" in log and "lam=0-s1: scenes: count 50.0 %" in log


def test_a_run_that_is_not_finite_is_recorded_and_not_repeated(
    tmp_path: Path, fake: list[str]
) -> None:
    results = tmp_path / "results.jsonl"
    tasks = [make_task(tmp_path, "lam=0", seed, lr=3.0 if seed == 0 else 1e-3) for seed in range(2)]
    first, second = run_tasks(tasks, results, jobs=1)
    assert first["failed"] == "kl is not finite at step 7" and first["probes"] == []
    assert (first["key"], first["arm"], first["seed"]) == (tasks[0].key, "lam=0", 0)
    assert first["settings"]["optim"]["lr"] == 3.0 and first["train_version"] == TRAIN_VERSION
    assert second["failed"] is None
    assert run_tasks(tasks, results, jobs=1) == [first, second] and len(fake) == 2
    # Asked for, it is run again beside the first one, and the last line counts.
    again = run_tasks(tasks, results, jobs=1, again=lambda row: row["failed"])
    assert fake[2:] == ["lam=0-s0~2"] and again[1] == second
    assert [row["key"] for row in read_rows(results)] == [first["key"], second["key"], first["key"]]
    run_tasks(tasks, results, jobs=1, again=lambda row: row["failed"])
    assert fake[3:] == ["lam=0-s0~3"]


def test_a_sweep_leaves_failed_runs_out_and_says_so(
    tmp_path: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A group map whose predictions overflow; the dense arm has none.
    forward = GroupMap.forward
    monkeypatch.setattr(GroupMap, "forward", lambda *args: forward(*args) * float("inf"))
    config = TINY.replace(data=str(tiny_images))
    result = run_sweep(config, seeds=1, jobs=1, out=tmp_path / "sweep")
    assert [row["arm"] for row in result.rows] == ["dense"]
    rows = read_rows(tmp_path / "sweep" / "results.jsonl")
    assert [bool(row["failed"]) for row in rows] == [False, True]
    assert result.verdict.remarks[-1] == f"lam=0, seed 0: failed, {rows[1]['failed']}."
    assert "lam=0, seed 0: failed" in (tmp_path / "sweep" / "report.html").read_text()
    with pytest.raises(UserError, match="all runs failed; dense, seed 0: failed"):
        run_sweep(config.replace(lr=1e9), seeds=1, jobs=1, out=tmp_path / "other")


@pytest.mark.parametrize("line", ['{"key": "a", "arm": "dense"}', "[1]", "17"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, fake: list[str]) -> None:
    results = tmp_path / "results.jsonl"
    good = {"key": "a", "arm": "dense", "seed": 0, "probes": []}
    results.write_text(json.dumps(good) + '\n{"torn\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(f"{results}, line 3: no line of results")):
        run_tasks([make_task(tmp_path)], results, jobs=1)
    assert not fake
    results.write_text(json.dumps(good) + '\n{"torn\n')
    assert read_results(results) == [good]


@given(st.sampled_from(["dense", "lam=0.1", "density=0.25+crop_scale=0.1,0.2"]), st.integers(0, 99))
def test_a_rows_key_outlives_new_settings(arm: str, seed: int) -> None:
    config = TINY.replace(**arm_settings(arm), seed=seed)
    task = Task(config, Path("x"), Probes(("scenes",), targets={"scenes": ("count",)}, limit=9))
    row: dict[str, Any] = {
        "key": "as written then", "settings": config.to_dict(), "train_version": TRAIN_VERSION,
        "probed": dataclasses.asdict(task.probes),
    }  # fmt: skip
    row = json.loads(json.dumps(row))
    assert row_key(row) == task.key
    # As if these did not exist when the line was written; they have their defaults here.
    for section, name in (("images", "corruption"), ("loss", "predict"), ("optim", "accumulate")):
        del row["settings"][section][name]
    del row["probed"]["measures"]
    assert row_key(row) == task.key
    # Another value is another run, and what cannot be read keeps its key.
    row["settings"]["loss"]["beta"] = 0.6
    assert row_key(row) not in (task.key, "as written then")
    row["settings"]["loss"]["gone"] = 0.5
    assert row_key(row) == "as written then"
    assert row_key({"key": "old"}) == "old"


def test_a_rows_key_outlives_removed_settings() -> None:
    """A line from before they were removed names them all; its key is the one written then."""
    config = preset("nano").replace(data="cifar100", lam=0.03, seed=4, limit=500)
    task = Task(config, Path("x"), Probes(("scenes",), targets={"scenes": ("count",)}, limit=9))
    settings = config.to_dict()
    gone = {name: now for name, (now, _) in REMOVED.items() if now is not None}
    settings["optim"] |= {name: list(v) if isinstance(v, tuple) else v for name, v in gone.items()}
    row = {"key": "f38e803f9de04e67", "settings": settings, "train_version": 3,
           "probed": dataclasses.asdict(task.probes)}  # fmt: skip
    row = json.loads(json.dumps(row))
    assert row_key(row) == row["key"]
    assert row_key({**row, "train_version": TRAIN_VERSION}) == task.key
    row["settings"]["optim"] |= {"vicreg": [0.1, 0.0], "key": "of a run that nothing repeats"}
    assert row_key(row) == row["key"], "at another value it keeps the key that it has"


def test_an_interruption_ends_the_sweep_and_keeps_the_lines(
    tmp_path: Path, fake: list[str]
) -> None:
    results = tmp_path / "results.jsonl"
    tasks = [make_task(tmp_path, "lam=0", seed, lr=0.9 if seed == 1 else 1e-3) for seed in range(3)]
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tasks, results, jobs=1)
    assert [row["seed"] for row in read_rows(results)] == [0] and len(fake) == 2


@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"seeds": 0}, "--seeds 0"), ({"jobs": 0}, "--jobs 0"), ({"lams": [-1]}, "--lam -1")],
)
def test_bad_numbers_are_named(tmp_path: Path, changes: dict[str, Any], flag: str) -> None:
    settings: dict[str, Any] = {"lams": [0.01], "seeds": 1, "out": tmp_path / "out", **changes}
    with pytest.raises(UserError, match=flag):
        run_sweep(TINY, **settings)
    assert not (tmp_path / "out").exists()


def test_a_tiny_sweep_from_end_to_end(tmp_path: Path, tiny_images: Path) -> None:
    out, config = tmp_path / "sweep", TINY.replace(data=str(tiny_images))
    kw: dict[str, Any] = {"lams": [0.1], "seeds": 1, "out": out, "jobs": 1}
    result = run_sweep(config, **kw)
    assert [row["arm"] for row in result.rows] == ["dense", "lam=0", "lam=0.1"]
    assert result.rows == read_rows(out / "results.jsonl")
    json.dumps(result.to_dict(), allow_nan=False)
    assert result.table.row_count == 5
    for row in result.rows:
        for probe in row["probes"]:
            assert 0 <= probe["accuracy"] <= 1
            assert 0 <= probe["untrained"] <= 1 and 0 <= probe["pixels"] <= 1
        assert "data_root" not in row["settings"]["images"]
        assert row["steps"] == 4 and row["environment"]["torch"]
    floors = {(p["target"], p["untrained"], p["pixels"]) for r in result.rows for p in r["probes"]}
    assert len(floors) == len(result.rows[0]["probes"])  # paired: one floor per seed and target
    dense, free, _ = result.rows
    assert dense["nonzero_elements"] is None
    assert free["nonzero_elements"] == free["elements"] and free["density"] == 1
    page = (out / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and (out / "figures" / "training.png").exists()

    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/encoder.safetensors")}
    again = run_sweep(config, **kw)
    assert again.rows == result.rows and len(read_rows(out / "results.jsonl")) == 3
    assert stamps == {p: p.stat().st_mtime_ns for p in out.glob("*/encoder.safetensors")}

    with pytest.raises(UserError, match="--lr"):
        run_sweep(config.replace(lr=1e-4), **kw)
    assert again.rows == read_rows(out / "results.jsonl")

    shutil.rmtree(out / "dense-s0")  # what was measured is shown without it
    assert run_sweep(config, **kw).rows == result.rows
    page = (out / "report.html").read_text()
    assert "dense-s0 is gone" in page and page.count("<figure") >= 1


def test_unlabelled_probe_data_is_refused_before_training(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(40):
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(flat / f"{i}.png")
    config = TINY.replace(data=str(flat))
    with pytest.raises(UserError, match=r"no labels.*--data-eval"):
        run_sweep(config, seeds=1, out=tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quick_demo_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--quick", "--jobs", "1", "--out", str(tmp_path / "demo"), "--json"]
    assert cli.main(words) == 0
    out, said = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert [row["arm"] for row in found["runs"]] == ["dense", "lam=0", f"lam={DEMO_LAM:g}"]
    targets = {(p["data"], p["target"]) for row in found["runs"] for p in row["probes"]}
    wanted = DEMO_PROBES.targets.items()
    assert targets == {(data, name) for data, names in wanted for name in names}
    assert "untrained floor" in said and "raw-pixel floor" in said
    assert "No verdict" in said or "On scenes" in said
    assert Path(found["report"]).read_text().startswith("<!DOCTYPE html>")


SWEEP = """
import sys
from pathlib import Path
from sparsejepa.study.sweep import run_sweep
from sparsejepa.config import preset

if __name__ == "__main__":
    config = preset("nano").replace(
        data=sys.argv[2], steps=200, batch_size=16, device="cpu",
        checkpoint_every=1000,
    )
    run_sweep(config, lams=[], seeds=1, out=Path(sys.argv[1]), jobs=2)
"""


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.1)


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
    wait_for(lambda: all(log.exists() and log.read_text() for log in logs), process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.killpg(process.pid, kill)  # as a terminal does; workers have groups of their own
    process.wait()
    assert not psutil.wait_procs(children, timeout=120)[1]  # not even orphans stay
    assert all(has_checkpoint(log.parent) for log in logs)
    assert not any(log.with_name("summary.json").exists() for log in logs)
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["steps"] for row in read_rows(out / "results.jsonl")] == [200, 200]


def test_a_folder_of_several_sizes_is_probed_at_the_size_of_pretraining(
    tmp_path: Path, tiny_images: Path
) -> None:
    folder = tmp_path / "sizes"
    shutil.copytree(tiny_images, folder)
    for split in ("train", "test"):
        Image.new("RGB", (48, 40), (90, 0, 0)).save(folder / split / "red" / "large.png")
    config = TINY.replace(data=str(folder), img_size=32)
    task = Task(config, tmp_path / "dense-s1", Probes((str(folder),)))
    task = dataclasses.replace(task, config=config.replace(groups="none", seed=1))
    (row,) = run_tasks([task], tmp_path / "results.jsonl", jobs=1)
    assert row["probes"][0]["settings"]["data_img_size"] == [32, 32]
    assert row["probes"][0]["n_test"] == 49
