"""The sweep and its runs: arms, keys, result lines, workers, and one tiny sweep from end to end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejepa import cli
from sparsejepa.config import preset
from sparsejepa.errors import UserError
from sparsejepa.model.groups import GroupMap
from sparsejepa.study.results import read_rows
from sparsejepa.study.sweep import (
    DEMO_LAM,
    DEMO_PROBES,
    arm_settings,
    run_sweep,
    sweep_arms,
)
from sparsejepa.training.build import arm_name

TINY = preset("nano").replace(
    data="scenes", steps=4, batch_size=32, predictor_depth=1, device="cpu", threads=1
)


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
    control = TINY.replace(groups=kind, density=0.25)
    for changes, more in (
        ({"pattern": "random"}, "pattern=random"),
        ({"pattern": "a"}, "pattern=RUN"),
    ):
        assert arm_name(control.replace(**changes)) == f"density=0.25+{more}"


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
        *((arm, f"unknown arm '{arm}'") for arm in ("", "lam", "lam=much", "Dense", "rho=1", "+")),
        ("dense+bta=0", "'bta=0' is no SETTING=VALUE (did you mean 'beta'?)"),
        ("dense+beta", "'beta' is no SETTING=VALUE"),
        ("dense++beta=0", "'' is no SETTING=VALUE"),
        ("dense+seed=1", "'seed' is not an arm's to set"),
        ("dense+lr=fast", "--lr fast: must be a number"),
        ("dense+beta=true", "--beta True: must be a number"),
        ("dense+crop_scale=0.1", "--crop-scale 0.1: must be 2 numbers"),
        ("dense+epochs=1.5", "--epochs 1.5: must be a whole number"),
        ("lam=nan", "--lam nan: must be at least 0"),
    ],
)
def test_wrong_arms_are_named(arm: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        TINY.replace(**arm_settings(arm)).check()


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
    assert len(result.to_dict()["table"]["rows"]) == 5
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
    assert page.startswith("<!DOCTYPE html>") and list((out / "figures").glob("accuracy-*.png"))

    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/encoder.safetensors")}
    again = run_sweep(config, **kw)
    assert again.rows == result.rows and len(read_rows(out / "results.jsonl")) == 3
    assert stamps == {p: p.stat().st_mtime_ns for p in out.glob("*/encoder.safetensors")}

    with pytest.raises(UserError, match="--lr"):
        run_sweep(config.replace(lr=1e-4), **kw)
    assert again.rows == read_rows(out / "results.jsonl")

    shutil.rmtree(out / "dense-s0")  # what was measured is shown without it
    assert run_sweep(config, **kw).rows == result.rows


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
