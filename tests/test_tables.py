"""The study's pages: what is averaged and paired, what is kept apart, and what is shown."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tables
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from study import (
    CIFAR100,
    DEAD,
    SPARSE,
    Block,
    Study,
    one_batch,
    read_study,
    recipe_config,
)

import sparsejepa
from sparsejepa.config import load_toml
from sparsejepa.study.sweep import arm_settings

ROOT = Path(__file__).parents[1]
SMALL, PAIR = "cifar100-5k-nano-10", "cifar100-5k-pair"
CHANCE = {"cifar100": "fine_label", "cifar10": "label", "gtsrb32": "class"}


def make_row(
    name: str, arm: str, seed: int, accuracy: float = 0.2, *,
    commit: str = "c0ffee", finished: str = "2026-01-01", failed: str | None = None,
    far: float | None = None, changed: dict[str, Any] | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A line of results as the runner writes it, with made-up numbers."""
    about = recipe(name)
    config = recipe_config(about).replace(**arm_settings(arm), seed=seed, **(changed or {}))
    probes = []
    for i, data in enumerate(about.get("probe", [config.data])):
        extra = about.get("extra_protocols", []) if i == 0 else []
        for protocol in ["logistic", *extra]:
            value = far if far is not None and data == "gtsrb32" else accuracy
            probes.append(
                {"data": data, "target": CHANCE.get(data, "count"), "protocol": protocol,
                 "accuracy": value, "untrained": 0.1 + seed / 1000, "pixels": 0.16}
            )  # fmt: skip
    return {
        "key": f"{name}{arm}{seed}{finished}", "recipe": name, "arm": arm, "seed": seed,
        "data": config.data, "failed": failed, "probes": [] if failed else probes, "alarms": [],
        "steps": 390, "seconds": 90.0, "probe_seconds": 10.0, "settings": config.to_dict(),
        "probed": {"data": [], "limit": about.get("probe_limit")}, "finished": finished,
        "environment": {"cpu": "CPU", "cores": 2, "gpus": [], "commit": commit},
        "train_version": sparsejepa.TRAIN_VERSION, "eval_version": sparsejepa.EVAL_VERSION, **more,
    }  # fmt: skip


def make_study(rows: list[dict[str, Any]], **more: Any) -> Study:
    """The planned queue with these rows and no others."""
    empty: dict[str, Any] = {"trials": {}, "explain": []}
    return dataclasses.replace(planned(), rows=rows, **{**empty, **more})


@functools.cache
def planned() -> Study:
    return read_study(ROOT)


@functools.cache
def recipe(name: str) -> dict[str, Any]:
    return load_toml(ROOT / "recipes" / f"{name}.toml")


def block(rows: list[dict[str, Any]], table: int = 2, name: str = SMALL) -> Block:
    return next(b for b in make_study(rows).blocks(table) if b.recipe == name)


def three(arm: str, *accuracies: float, name: str = SMALL, **more: Any) -> list[dict[str, Any]]:
    return [make_row(name, arm, seed, a, **more) for seed, a in enumerate(accuracies)]


def plain(text: str) -> str:
    """A page with ordinary spaces."""
    return text.replace("\N{NO-BREAK SPACE}", " ")


def cells(page: str, arm: str) -> list[str]:
    """The cells of the first line of an arm."""
    line = next(line for line in page.splitlines() if line.startswith("|") and f"`{arm}`" in line)
    return [cell.strip() for cell in line.split("|")[1:-1]]


# --- the pages of this checkout


def test_pages_are_what_results_give() -> None:
    assert tables.main(["--check"]) == 0


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the pages are made of, with a README and one recipe's results."""
    for name in ("recipes", "tests", "docs", "results"):
        (tmp_path / name).mkdir(parents=True)
    for path in (ROOT / "recipes").glob("*.toml"):
        shutil.copy(path, tmp_path / "recipes")
    for name in ("tests/test_theory.py", "docs/results.md", "docs/claims.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text(
        "# top\n\n<!-- table-1:begin -->\n<!-- table-1:end -->\n\nend\n"
    )
    rows = [r for arm in ("dense", "lam=0", SPARSE) for r in three(arm, 0.2, 0.21, name=PAIR)]
    (tmp_path / "results" / "queue.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


Capture = pytest.CaptureFixture[str]


def test_write_then_check_then_a_changed_row(checkout: Path, capsys: Capture) -> None:
    arguments = ["--root", str(checkout)]
    assert tables.main([*arguments, "--check"]) == 1
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("# top\n") and readme.endswith("\n\nend\n")
    assert "20.5 ± 0.7" in plain(readme)

    path = checkout / "results" / "queue.jsonl"
    path.write_text(path.read_text().replace('"accuracy": 0.21', '"accuracy": 0.23', 1))
    assert tables.main([*arguments, "--check"]) == 1
    assert "README.md is not what results/ give" in capsys.readouterr().out
    assert tables.main(arguments) == 0
    assert "21.5 ± 2.1" in plain((checkout / "README.md").read_text())


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("README.md", "<!-- tables:begin --><!-- tables:end -->", "unknown marker 'tables'"),
        ("recipes/queue.toml", '[[run]]\nrecipe = "nonsense"\n', "unknown recipe 'nonsense'"),
        ("results/queue.jsonl", '{"key": 1}\n{"ar', "line 2: no JSON object"),
    ],
)
def test_a_broken_file_is_one_clear_line(
    checkout: Path, capsys: Capture, name: str, text: str, said: str
) -> None:
    (checkout / name).write_text(text)
    before = (checkout / "docs" / "results.md").read_text()
    assert tables.main(["--root", str(checkout)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert (checkout / "docs" / "results.md").read_text() == before


# --- what is averaged and paired


@pytest.mark.parametrize("name", ["TRAIN_VERSION", "EVAL_VERSION"])
def test_lines_of_other_versions_are_counted_and_shown_nowhere(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert len(read_study(checkout).rows) == 6
    monkeypatch.setattr(sparsejepa, name, 99)
    study = read_study(checkout)
    assert study.rows == [] and len(study.others) == 6
    assert "6 lines of `results/` are of other" in tables.regions(study)["versions"]


def test_rows_with_other_settings_are_kept_apart_and_named() -> None:
    arms = ["dense", "lam=0.01", f"{SPARSE}+pattern=random", "dense+beta=0"]
    rows = [make_row(SMALL, a, s, changed={"threads": 1 + s}) for a in arms for s in range(3)]
    found = block(rows)  # arms and machines are no other settings
    assert [len(found.rows[arm]) for arm in arms] == [3] * 4 and found.apart == ""
    assert found.twin(f"{SPARSE}+beta=0", "lam=0") == "lam=0+beta=0"
    assert found.twin(f"{SPARSE}+pattern=random", "lam=0") == "lam=0"
    assert found.twin("lam=0", "lam=0") == ""
    rows = three("dense", 0.2, 0.2, 0.2) + three("lam=0", 0.9, changed={"lr": 0.5})
    found = block(rows)
    assert found.values("lam=0", CIFAR100) == {}
    assert "1 run with other settings" in found.apart


@pytest.mark.parametrize(
    ("environment", "run", "named"),
    [
        ({"gpus": ["H200"]}, {}, "on cuda with torch 2.8"),
        ({"torch": "2.9.1+cpu"}, {}, "on cpu with torch 2.9"),
        ({"torch": "2.8.1"}, {}, ""),
        ({"gpus": ["H200"]}, {"device": "cpu"}, ""),
    ],
)
def test_devices_and_torch_versions_are_kept_apart(
    environment: dict[str, Any], run: dict[str, Any], named: str
) -> None:
    rows = three("dense", 0.2, 0.2, 0.2) + three("lam=0", 0.3, 0.3)
    for i, row in enumerate(rows):
        row["environment"] |= {"torch": "2.8.0+cu126"} | (environment if i > 2 else {})
        row["settings"]["run"] |= run
    found = block(rows)
    assert len(found.values("lam=0", CIFAR100)) == (0 if named else 2)
    assert (f"2 runs {named}" in found.apart) == bool(named)


def test_of_batches_that_cover_as_much_the_newest_counts() -> None:
    old = three("dense", 0.1, finished="2026-01-02", changed={"lr": 0.5})
    new = three("dense", 0.3, finished="2026-01-03", changed={"lr": 0.25})
    for rows in (old + new, new + old):
        chosen, apart = one_batch(rows, recipe(SMALL))
        assert chosen["dense"][0]["probes"][0]["accuracy"] == 0.3
        assert "1 run with other settings" in apart
    again = three("dense", 0.3, finished="2") + three("dense", 0.1, finished="1")
    assert block(again).values("dense", CIFAR100) == {0: 0.3}  # a repeat replaces a run


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=3))
def test_a_cell_is_numpys_and_scipys_arithmetic(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    found = block(three("lam=0.01", *a) + three("lam=0", *b))
    assert found.cell("lam=0.01", CIFAR100) == f"{100 * a.mean():.1f} ± {100 * a.std(ddof=1):.1f}"
    shown = found.versus("lam=0.01", "lam=0", CIFAR100)
    numbers = [float(x) for x in re.findall(r"[+-][\d.]+", shown)]
    assert numbers[0] == pytest.approx(100 * (a - b).mean(), abs=0.051)
    if np.ptp(a - b) > 1e-6:
        want = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert numbers[1:3] == pytest.approx([100 * want.low, 100 * want.high], abs=0.051)


def test_failed_runs_are_counted_and_not_averaged() -> None:
    rows = three("lam=0.1", 0.2, 0.3)
    rows.append(make_row(SMALL, "lam=0.1", 2, failed="loss is not finite", dead_groups=9))
    found = block(rows)
    assert found.values("lam=0.1", DEAD) == {}
    assert found.values("lam=0.1", CIFAR100) == {0: 0.2, 1: 0.3}
    assert found.done("lam=0.1") == "2 / 3, 1 failed"
    rows = [make_row(SMALL, "lam=0.1", s, failed="loss at step 3") for s in range(3)]
    assert block(rows).cell("lam=0.1", CIFAR100) == "failed"


# --- what is shown


def test_what_is_missing_is_queued_and_floors_stand_below() -> None:
    made = plain(tables.regions(make_study(three("dense", 0.2, 0.2, 0.2)))["table-2"])
    plan = {arm: len(seeds) for arm, seeds in block([]).planned.items()}
    line = cells(made, "lam=0.01")
    assert line[1] == "queued" and line[-1] == f"0 / {plan['lam=0.01']}"
    assert cells(made, "dense")[-1] == f"3 / {plan['dense']}"
    assert "| *untrained encoder* | 10.1 ± 0.1 |" in made
    assert "| *raw pixels* | 16.0 |" in made


def filled() -> Study:
    """Every planned run with made-up numbers."""
    rows = {}
    for run in planned().queue:
        for arm, seed in itertools.product(run["arms"], run["seeds"]):
            rng = np.random.default_rng(zlib.crc32(f"{run['recipe']}{arm}{seed}".encode()))
            curve = [
                {"groups": None if arm == "dense" else g, "latents": 6 * g, "pca": 0.2,
                 "accuracy": 0.15 + g / 1000, "random_latents": 0.13 + rng.normal(0, 0.003)}
                for g in (16, 8, 4, 2, 1)
            ]  # fmt: skip
            rows[run["recipe"], arm, seed] = make_row(
                run["recipe"], arm, seed, 0.2 + rng.normal(0, 0.005),
                far=0.5 + rng.normal(0, 0.01), dead_groups=0,
                groups_per_latent=None if arm.startswith("dense") else 16 * rng.random(),
                measures={
                    "information": {"total_correlation": 20 + rng.normal()},
                    "factors": {"dci_disentanglement": 0.05 + rng.normal(0, 0.005)},
                    "kept": {"curve": curve},
                },
            )  # fmt: skip
    return make_study(list(rows.values()))


def test_a_full_study_has_no_gap() -> None:
    made = tables.regions(filled())
    for number in tables.SPECS:
        table = made[f"table-{number}"]
        assert "queued" not in table.lower() and "| --- |" in table
        rows = [line for line in table.splitlines() if line.startswith("|")]
        for above, line in itertools.pairwise(rows):
            if line.startswith("| ---"):
                assert line.count("|") == above.count("|")
    assert "queued" not in made["claims"]
    assert made == tables.regions(filled())  # the same rows, the same pages
