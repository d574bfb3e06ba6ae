"""The loop end to end on small data: files, resumption to the bit, refusals, alarms."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from safetensors.torch import load_file

import sparsejepa
from sparsejepa import cli
from sparsejepa.config import Config
from sparsejepa.data.catalog import load_images
from sparsejepa.errors import Interrupted, UserError
from sparsejepa.model.groups import GroupMap
from sparsejepa.study import pretrain
from sparsejepa.training import step as step_module
from sparsejepa.training.loop import EpochOrder, plan, train
from sparsejepa.training.monitor import OnlineEvaluation

from . import tiny


def config_of(folder: Path, **settings: Any) -> Config:
    return tiny.config_of(folder, **{"batch_size": 16, "steps": 12, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"groups": "none"},
        {"lam": 0.0},
        {"lam": 0.1},
        {"groups": "concept", "density": 0.5},
        {"groups": "feature", "kl": "posterior"},
        {"w_form": "plain", "predictor": "mlp", "loss": "l2"},
        {"predict": "pixels"},
        {"predictor": "groups", "checkpoint_activations": True},
        {"pattern": "random", "density": 0.5},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_every_arm_trains_and_leaves_a_whole_run_directory(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = pretrain(config_of(folder, **settings), out=tmp_path / "run")
    files = {p.name for p in run.path.iterdir()}
    expected = {"config.toml", "environment.json", "metrics.jsonl", "checkpoints",
                "encoder.safetensors", "config.json", "summary.json"}  # fmt: skip
    assert files == expected | (
        {"groups.safetensors"} if settings.get("groups") != "none" else set()
    )
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "prediction", "images_per_second"} <= rows[0].keys()
    assert any("knn" in row and "rankme" in row for row in rows)
    assert run.summary["steps"] == 12 and run.summary["images"] == 12 * 16
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    assert run.encoder().tokens(torch.from_numpy(pixels)).shape == (2, 16, 96)
    again = pretrain(config_of(folder, **settings), out=tmp_path / "run", resume=True)
    assert again.summary == run.summary


def launch(config: Config, out: Path) -> subprocess.Popen[str]:
    """Start `sparsejepa pretrain --resume` with these settings in a process of its own."""
    file = out.with_suffix(".toml")
    file.write_text(tomli_w.dumps(config.to_dict()))
    words = ["pretrain", "--config", str(file), "--out", str(out), "--resume"]
    return subprocess.Popen(
        [sys.executable, "-m", "sparsejepa", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(out: Path, process: subprocess.Popen[str], step: int) -> None:
    """Wait until metrics.jsonl has reached `step` or the process has ended."""
    while process.poll() is None:
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        if whole and json.loads(whole[-1])["step"] >= step:
            return
        time.sleep(0.01)


def test_kill_at_three_random_moments_then_equal_weights_to_the_bit(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(
        folder, steps=90, checkpoint_every=7, drop_path=0.2, density=0.5,
        groups="concept",
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = launch(config, whole)
    rng = random.Random(0)
    kills = 0
    for step in sorted(rng.sample(range(5, 75), 3)):
        process = launch(config, killed)
        wait_for_steps(killed, process, step)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    last = launch(config, killed)
    for process in (first, last):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert kills == 3
    shard = f"checkpoints/step-{90:09d}/shard-00001-model-00001-of-00001.safetensors"
    for name in (shard, "encoder.safetensors", "groups.safetensors"):
        a, b = load_file(whole / name), load_file(killed / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert load_file(whole / shard)["model.groups.mean_gradient"].any()
    steps = [
        row["step"]
        for row in map(json.loads, (killed / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    ]
    assert steps == sorted(set(steps)), "a resumed run repeats no line"


def test_a_signal_saves_ends_with_its_status_and_resume_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, steps=4000, checkpoint_every=3999)
    process = launch(config, tmp_path / "run")
    wait_for_steps(tmp_path / "run", process, 5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and "--resume" in errors
    assert not (tmp_path / "run" / ".lock").exists()
    stopped = last_checkpoint(tmp_path / "run")
    assert 6 <= stopped < 3999
    assert not (tmp_path / "run" / "summary.json").exists()
    again = launch(config, tmp_path / "run")
    wait_for_steps(tmp_path / "run", again, stopped + 3)
    again.kill()
    again.communicate()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows if row.endswith("}")]
    assert stopped - 1 in steps and steps == sorted(set(steps))


def last_checkpoint(out: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in out.glob("checkpoints/step-*"))


def test_an_existing_run_is_neither_overwritten_nor_mixed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(config_of(folder), out=out)
    with pytest.raises(UserError, match="--resume"):
        pretrain(config_of(folder), out=out)
    with pytest.raises(UserError, match=r"--lam 0\.5"):
        pretrain(config_of(folder, lam=0.5), out=out, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="no run"):
        pretrain(config_of(folder), out=tmp_path / "other")


def test_a_run_that_another_job_began_or_ended_meanwhile_is_left_alone(
    folder: Path, tmp_path: Path
) -> None:
    """It does so while this one loads its images, before it has the lock."""
    out, config = tmp_path / "run", config_of(folder, steps=4)

    def overtaken(given: Config) -> Any:
        theirs = pretrain(config, out=out)
        theirs.path.joinpath("environment.json").write_text("theirs")
        return load_images(given)

    for resume in (False, True):
        shutil.rmtree(out, ignore_errors=True)
        if resume:
            found = train(config, overtaken, out=out, resume=True).summary
            assert found == json.loads((out / "summary.json").read_text())
        else:
            with pytest.raises(UserError, match="already holds a run"):
                train(config, overtaken, out=out)
        assert (out / "environment.json").read_text() == "theirs"


def test_a_run_of_another_train_version_is_refused_and_kept_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    words = ["pretrain", str(folder), "--preset", "nano", "--steps", "4", "--batch-size", "8"]
    words += ["--device", "cpu", "--threads", "1", "--out", str(out)]
    assert cli.main(words) == 0
    for unfinished in (False, True):
        if unfinished:
            (out / "summary.json").unlink()
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with monkeypatch.context() as patch:
            patch.setattr(sparsejepa, "TRAIN_VERSION", sparsejepa.TRAIN_VERSION + 1)
            capsys.readouterr()
            assert cli.main([*words, "--resume"]) == 2
        said = capsys.readouterr().err
        now = sparsejepa.TRAIN_VERSION
        begun = f"train version {now}, this release {now + 1}"
        assert f"{begun}; name a new folder with --out, or finish" in said
        assert said.count("\n") == 1
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert cli.main([*words, "--resume"]) == 0


def test_a_loss_that_is_not_finite_stops_with_step_and_term(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "CLIP", float("inf"))
    with pytest.raises(UserError, match=r"'(prediction|group|kl)' is not finite at step \d+"):
        pretrain(config_of(folder, lr=1e8, warmup=0.0, steps=40), out=tmp_path / "run")


def test_a_gradient_of_w_that_is_not_finite_stops_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(self: GroupMap, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            self.mean_gradient[0, 0, 0] = float("nan")
        step(self, *args, **kwargs)

    calls: list[int] = []
    step = GroupMap.proximal_step
    monkeypatch.setattr(GroupMap, "proximal_step", spoilt)
    with pytest.raises(UserError, match=r"'W' is not finite at step 2; .* that of step 2\)"):
        pretrain(config_of(folder), out=tmp_path / "run")
    assert last_checkpoint(tmp_path / "run") == 2  # the steps 0 and 1, before it was spoilt
    calls.clear()
    config = config_of(folder, steps=400, checkpoint_every=400)  # looked at every four steps
    with pytest.raises(UserError, match="'group' is not finite at step 3"):
        pretrain(config, out=tmp_path / "other")


def test_a_signal_during_the_evaluation_still_saves_before_it_stops(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives when it has been decided already that this step saves nothing."""
    evaluate = OnlineEvaluation.__call__

    def interrupted(self: OnlineEvaluation, *args: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return evaluate(self, *args)

    monkeypatch.setattr(OnlineEvaluation, "__call__", interrupted)
    config = config_of(folder, steps=40, checkpoint_every=100)
    with pytest.raises(Interrupted) as stop:
        pretrain(config, out=tmp_path / "run")
    assert stop.value.number == signal.SIGINT
    assert last_checkpoint(tmp_path / "run") == 5


def test_resume_refuses_other_images_and_clears_what_a_kill_left(
    folder: Path, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "run"
    shutil.copytree(folder, images)
    out.mkdir()
    (out / ".config.toml.123.tmp").touch()  # killed before the first file was whole
    pretrain(config_of(images), out=out)
    assert not (out / ".config.toml.123.tmp").exists()
    (out / "summary.json").unlink()
    (images / "dark" / "0.png").unlink()
    with pytest.raises(UserError, match=r"images or labels are not what .*run began with"):
        pretrain(config_of(images), out=out, resume=True)


def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path
) -> None:
    bad = {
        "--patch-size": {"patch_size": 5},
        "--batch-size": {"batch_size": 500},
        "--lam": {"lam": -1.0},
        "--num-groups": {"num_groups": 97},
        "--context-counts": {"context_counts": (16,)},
        "--crop-scale": {"crop_scale": (0.9, 0.5)},
        "--density": {"density": 0.1},
        "--device": {"device": "tpu"},
        "--device cuda:": {"device": "cuda:"},
        "--predictor-dim": {"predictor": "mlp", "predictor_dim": 30},
        "--loss l1: unknown": {"loss": "l1"},
        "did you mean 'nano'": {"encoder": "nanoo"},
        "use another, or set --img-size": {"patch_size": 3},
    }
    for name, settings in bad.items():
        with pytest.raises(UserError, match=name):
            pretrain(config_of(folder, **settings), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="did you mean 'lam'"):
        pretrain(str(folder), lamb=0.1)


def test_plan_agrees_with_the_run(folder: Path) -> None:
    got = plan(config_of(folder, steps=None, epochs=3, lam=0.1), load_images)
    assert got["steps"] == 3 * (got["train_images"] // 16)
    assert got["patches"] == 16 and got["arm"] == "lam=0.1"
    assert got["images_per_second"] > 0 and got["parameters"]["encoder"] > 600_000
    with pytest.raises(UserError, match="--accumulate 3"):
        plan(config_of(folder, accumulate=3), load_images)


def test_order_visits_every_image_once_an_epoch() -> None:
    order = EpochOrder(50, 10, seed=3)
    seen = torch.cat([order(s) for s in range(5)])
    assert sorted(seen.tolist()) == list(range(50))
    assert not torch.equal(seen, torch.cat([order(s) for s in range(5, 10)]))
    assert torch.equal(EpochOrder(50, 10, seed=3)(7), order(7))
