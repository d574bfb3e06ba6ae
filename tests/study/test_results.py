"""Lines of results: what counts as one, what is named as broken, and which run a line is of."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejepa import TRAIN_VERSION
from sparsejepa.config import REMOVED, preset
from sparsejepa.errors import UserError
from sparsejepa.study import results
from sparsejepa.study.results import Probes, Task, append_row, read_results, read_rows, row_key
from sparsejepa.study.sweep import arm_settings

ROW = {"key": "a", "arm": "dense", "seed": 0, "probes": [{"accuracy": 0.25}]}


def test_broken_lines_are_passed_over_or_named_by_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == read_results(path) == []
    path.write_text('{"key": "a"')
    append_row(path, ROW)
    assert read_results(path) == read_rows(path) == [ROW]
    with pytest.raises(UserError, match=f"{re.escape(str(path))}, line 1: no JSON object"):
        read_rows(path, strict=True)
    append_row(path, {"verb": "bench"})
    assert read_results(path) == [ROW] and len(read_rows(path)) == 2
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not a text file"):
        read_rows(path)


FIELDS = set(re.findall(r"`(\w+)`", results.__doc__ or "")) - {"ProbeRow", "Probes"}


def test_the_lines_at_hand_have_the_fields_that_are_documented() -> None:
    # "final" is in the oldest lines: the run's last metrics.
    known, count = FIELDS | {"final"}, 0
    for path in (Path(__file__).parents[2] / "results").glob("*.jsonl"):
        for row in read_rows(path, strict=True):
            if "arm" in row:
                assert set(row) <= known, f"{path}: {sorted(set(row) - known)}"
                assert set(row) >= {"seed", "data", "probes", "settings", "environment"}
                count += 1
    assert count


def make_task(arm: str = "lam=0", seed: int = 0, folder: str = "x", **settings: Any) -> Task:
    config = preset("nano").replace(**arm_settings(arm) | settings, seed=seed)
    probes = Probes(("scenes",), targets={"scenes": ("count",)}, limit=9)
    return Task(config, Path(folder), probes)


def line(task: Task, **more: Any) -> dict[str, Any]:
    row = {"key": "as written then", "settings": task.config.to_dict(),
           "probed": asdict(task.probes), "train_version": TRAIN_VERSION}  # fmt: skip
    return json.loads(json.dumps(row | more))


def test_a_key_is_about_numbers_only() -> None:
    task, pattern = make_task(), {"density": 0.5, "pattern": "runs/a/dense-s0-0123abcd"}
    same = make_task(folder="y", threads=2, device="auto", data_root="/data")
    assert task.key == same.key and re.fullmatch("[0-9a-f]{16}", task.key)
    others = [
        make_task(seed=1),
        make_task("dense"),
        make_task(lr=1e-4),
        make_task("lam=0", 0, "x", **pattern),
    ]
    for changes in (
        {"data": ("scenes", "scenes:single")}, {"protocols": ("knn",)}, {"targets": {}},
        {"limit": 100}, {"measures": ("kept",)}, {"extra_protocols": ("knn",)},
    ):  # fmt: skip
        others.append(replace(task, probes=replace(task.probes, **changes)))
    assert len({task.key, *(t.key for t in others)}) == 11
    # A run that is taken as a pattern counts by its name, wherever it lies, whatever its hash was.
    assert (
        make_task("lam=0", 0, "y", **pattern | {"pattern": "b/dense-s0-9876fedc"}).key
        == others[3].key
    )


@given(st.sampled_from(["dense", "lam=0.1", "density=0.25+crop_scale=0.1,0.2"]), st.integers(0, 99))
def test_a_rows_key_outlives_new_settings(arm: str, seed: int) -> None:
    task = make_task(arm, seed)
    row = line(task)
    assert row_key(row) == task.key
    # As if these did not exist when the line was written; they have their defaults here.
    for section, name in (("images", "corruption"), ("loss", "predict"), ("optim", "accumulate")):
        del row["settings"][section][name]
    del row["probed"]["measures"], row["probed"]["extra_protocols"]
    assert row_key(row) == task.key
    # Another value is another run; what cannot be read, or is of other training, keeps its key.
    row["settings"]["loss"]["beta"] = 0.6
    assert row_key(row) not in (task.key, "as written then")
    assert row_key(row | {"train_version": TRAIN_VERSION + 1}) == "as written then"
    row["settings"]["loss"]["gone"] = 0.5
    assert row_key(row) == "as written then" and row_key({"key": "old"}) == "old"


def test_a_rows_key_outlives_removed_settings() -> None:
    """A line from before they were removed names them all; its key is the one written then."""
    config = preset("nano").replace(data="cifar100", lam=0.03, seed=4, limit=500)
    task = replace(make_task(), config=config)
    row = line(task, key="f38e803f9de04e67", train_version=3)
    gone = {name: now for name, now in REMOVED.items() if now is not None}
    row["settings"]["optim"] |= json.loads(json.dumps(gone))
    assert row_key(row) == row["key"]
    assert row_key({**row, "train_version": TRAIN_VERSION}) == task.key
    row["settings"]["optim"] |= {"vicreg": [0.1, 0.0]}
    row["key"] = "of a run that nothing repeats"
    assert row_key(row) == row["key"], "at another value it keeps the key that it has"
