"""metrics.jsonl, trackers, what stops a run and what raises an alarm."""

from __future__ import annotations

import json
import math
import os
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import sparsejepa as sj
from sparsejepa.config import Config
from sparsejepa.errors import Interrupted, UserError
from sparsejepa.study import pretrain
from sparsejepa.training import monitor
from sparsejepa.training.monitor import MetricsLog, Watch, check_trackers, rankme
from sparsejepa.training.step import TERMS

from .tiny import config_of

ORDINARY = dict.fromkeys(TERMS, 0.5)


def watch_after(*rows: dict[str, Any], penalised: bool = True) -> Watch:
    return Watch(TERMS, penalised, rows)


def values(**changes: float) -> list[float]:
    return [{**ORDINARY, **changes}[name] for name in TERMS]


# --- metrics.jsonl --------------------------------------------------------------------------------


def test_metrics_log_drops_what_a_resume_repeats(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as log:
        for step in range(6):
            log.write({"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    shown: list[Any] = []
    with MetricsLog(tmp_path, 4, show=[shown.append]) as log:
        assert log.last["loss"] == 3.0 and [row["step"] for row in log.rows] == [0, 1, 2, 3]
        log.write({"step": 4, "loss": float("nan")})
        log.write({"step": 4, "alarm": "collapse: so it is"})
        assert log.alarms == ["collapse: so it is"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]
    assert rows[-2]["loss"] is None and shown == rows[-2:]


def test_metrics_are_whole_when_a_resume_cannot_rewrite_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricsLog(tmp_path, 0) as log:
        log.write({"step": 0, "loss": 1.0})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: No space left .* --resume"):
            MetricsLog(tmp_path, 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "loss": 1.0}
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


# --- trackers -------------------------------------------------------------------------------------


def test_every_number_is_shown_once_also_of_a_resumed_run_and_no_weight_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    usual = {"groups": "concept", "steps": 12, "checkpoint_every": 5}
    plain = pretrain(config_of(folder, **usual), out=tmp_path / "plain").path
    shown, stops = tmp_path / "shown", iter([False] * 13 + [True])
    log = monitor.MetricsLog.write

    def stopped(self: MetricsLog, row: dict[str, Any]) -> None:
        log(self, row)
        if next(stops, False):  # after steps that the newest checkpoint does not have
            raise Interrupted(15)

    monkeypatch.setattr(monitor.MetricsLog, "write", stopped)
    config = config_of(folder, **usual, log=("tensorboard", "wandb"))
    with pytest.raises(Interrupted):
        pretrain(config, out=shown)
    pretrain(config, out=shown, resume=True)
    for name in ("encoder.safetensors", "groups.safetensors"):
        a, b = load_file(plain / name), load_file(shown / name)
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert not (plain / "tensorboard").exists()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(shown / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    rows = list(map(json.loads, (shown / "metrics.jsonl").read_text().splitlines()))
    tags = found.Tags()["scalars"]
    assert {"loss", "lr", "knn", "rankme", "density"} <= set(tags) and "alarm" not in tags
    for name in tags:
        events = [(event.step, event.value) for event in found.Scalars(name)]
        wanted = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        assert [step for step, _ in events] == [step for step, _ in wanted], name
        if name != "images_per_second":
            assert np.allclose([v for _, v in events], [v for _, v in wanted])
    ids = {path.name.split("-")[-1] for path in shown.glob("wandb/offline-run-*")}
    assert len(ids) == 1


def test_a_tracker_that_is_unknown_missing_or_does_not_start_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"--log wandbb: unknown \(did you mean 'wandb'\?\)"):
        config_of(folder, log=("wandbb",)).check()
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as if its import failed
    with (
        pytest.raises(UserError, match=r"--log wandb: .*; mend that or leave it out"),
        monitor.trackers(("wandb",), tmp_path, Config(), 0),
    ):
        pass
    # Not there, and there only as a folder of runs in the working directory.
    for found in (None, ModuleSpec("wandb", None)):
        monkeypatch.setattr(monitor.importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(UserError, match=r"pip install 'sparsejepa\[wandb\]', or leave"):
            check_trackers(("wandb",))
    with pytest.raises(UserError, match="--log tensorboard: not installed"):
        pretrain(config_of(folder, log="tensorboard"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- what stops a run -----------------------------------------------------------------------------


def test_a_run_reports_what_embed_finds(folder: Path, tmp_path: Path) -> None:
    """The last numbers are those of the finished target encoder on the chosen training images."""
    run = pretrain(config_of(folder, precision="fp32"), out=tmp_path / "run")
    row = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    found = sj.embed(sj.load(str(run.path)), str(folder))
    x = np.asarray(found.x)[np.random.default_rng(0).permutation(len(found.x))]
    assert row["rankme"] == pytest.approx(rankme(x), rel=1e-4)
    assert row["std_mean"] == pytest.approx(x.std(0).mean(), rel=1e-4)
    assert row["std_min"] == pytest.approx(x.std(0).min(), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_not_finite_is_named_and_not_the_total_that_it_spoils(bad: float) -> None:
    said = watch_after().failed(7, values(total=bad, kl=bad, grad_norm=bad))
    assert said == "'kl' is not finite at step 7"
    said = watch_after().failed(7, values(total=bad, grad_norm=bad))
    assert said == "'total' is not finite at step 7"


def test_an_explosion_is_named_with_what_was_before() -> None:
    watch = watch_after({"prediction": 0.9}, {"prediction": 4.0}, {"prediction": None})
    assert watch.failed(3, values(prediction=3999.0)) is None
    said = watch.failed(3, values(prediction=-4001.0, total=1e9))
    assert said == "'prediction' exploded at step 3 (-4e+03, 4 at most before)"


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"kl": 1e-3}, {"kl": 40.0}),  # a collapse
        ({"prediction": 1e-6}, {"prediction": 1.0}),  # the way out of one
        ({"penalty": 3045.0}, {"penalty": 3100.0}),  # large because W is
        ({"grad_norm": 1e-3}, {"grad_norm": 1e6, "total": 1e5}),  # a single batch; is clipped
        ({}, {"penalty": 3045.0}),  # the first row
    ],
)
def test_what_ordinary_runs_do_is_let_pass(before: dict[str, float], now: dict[str, float]) -> None:
    assert watch_after(before).failed(1, values(**now)) is None


# --- alarms ---------------------------------------------------------------------------------------


def test_alarms_name_the_failure_signatures_once() -> None:
    watch = watch_after()
    assert watch.alarms({"max_usage": 0.95}, 0.5)[0].startswith("one group")
    assert watch.alarms({"max_usage": 0.95}, 0.6) == []
    assert watch.alarms({"density": 1.0}, 1.0)[0].startswith("no sparsity")
    assert watch.alarms({"rankme": 40.0, "std_mean": 0.3}, 0.1) == []
    assert watch.alarms({"rankme": 1.2, "std_mean": 0.3}, 0.2)[0].startswith("collapse")
    for _ in range(30):
        assert watch.alarms({"loss": 0.5}, 0.5) == []
    assert watch.alarms({"loss": 5.0}, 0.5)[0].startswith("unstable")
    assert watch.alarms({"groups_per_latent": 0.1}, 0.5)[0].startswith("no group")
    assert watch_after(penalised=False).alarms({"density": 1.0}, 1.0) == []
    # A single group is used by all latents, whatever lambda is.
    assert watch_after().alarms({"max_usage": 1.0, "density": 1.0}, 0.5) == []


def test_a_resumed_run_compares_with_the_rows_before_and_repeats_no_alarm() -> None:
    rows = [{"rankme": 40.0, "std_mean": 0.3}, *[{"loss": 0.5}] * 30, {"alarm": "one group: x"}]
    watch = watch_after(*rows)
    late = {"rankme": 3.0, "std_mean": 0.3, "loss": 5.0, "max_usage": 0.95}
    assert [text.split(":")[0] for text in watch.alarms(late, 0.5)] == ["unstable", "collapse"]
    assert watch.alarms({"rankme": None, "std_mean": None}, 0.6) == []


# --- rank of embeddings ---------------------------------------------------------------------------


def rankme_by_svd(x: np.ndarray) -> float:
    sigma = np.linalg.svd(x, compute_uv=False)
    p = sigma / sigma.sum()
    p = p[p > 0]
    return math.exp(-(p * np.log(p)).sum())


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 30), seed=st.integers(0, 999))
def test_rankme_is_the_entropy_of_numpys_singular_values(n: int, d: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(n, d)) * np.logspace(0, -3, d) + 0.3
    value = rankme(x)
    assert value == pytest.approx(rankme_by_svd(x), rel=1e-5)
    assert 1 - 1e-9 <= value <= min(n, d) + 1e-9


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equal_singular_values_is_the_rank(rank: int) -> None:
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(20, rank)))
    right, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, rank)))
    assert rankme(torch.from_numpy(q @ right.T)) == pytest.approx(rank, rel=1e-5)


def test_rankme_is_not_centred_and_safe_where_nothing_varies() -> None:
    assert rankme(torch.full((30, 5), 0.7)) == pytest.approx(1, abs=1e-6)
    assert rankme(torch.zeros(30, 5)) == 0
    assert math.isnan(rankme(torch.tensor([[1.0, math.nan]])))
