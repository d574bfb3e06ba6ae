"""The study's pages: what is averaged and paired, what is kept apart, and verdicts by rule."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import front
import numpy as np
import pytest
import tables
from claims import CLAIMS, ledger
from hypothesis import given, settings
from hypothesis import strategies as st
from judges import names_of_tests
from layouts import CIFAR10, CIFAR100, DEAD, FAR, SPARSE, best, interaction, pick
from rules import FAILS, HOLDS, PART, UNTESTED
from scipy import stats
from search import read_search, replay
from study import Block, Study, choose, matches, read_study, recipe_config

from sparsejepa import version
from sparsejepa.config import load_toml
from sparsejepa.study.sweep import arm_settings
from sparsejepa.study.verdict import paired_interval

ROOT = Path(__file__).parents[1]
SMALL, PAIR = "cifar100-5k-nano-10", "cifar100-5k-pair"
CHANCE = {"cifar100": ("fine_label", 100), "cifar10": ("label", 10), "gtsrb32": ("class", 43)}


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
        target, classes = CHANCE.get(data, ("count", 8))
        extra = about.get("extra_protocols", []) if i == 0 else []
        for protocol in ["logistic", *extra]:
            value = far if far is not None and data == "gtsrb32" else accuracy
            probes.append(
                {"data": data, "target": target, "protocol": protocol, "accuracy": value,
                 "untrained": 0.1 + seed / 1000, "pixels": None if protocol == "finetune" else 0.16,
                 "n_train": 5000, "n_test": 10000, "n_classes": classes}
            )  # fmt: skip
    return {
        "key": f"{name}{arm}{seed}{finished}", "recipe": name, "arm": arm, "seed": seed,
        "data": config.data, "failed": failed, "probes": [] if failed else probes, "alarms": [],
        "steps": 390, "seconds": 90.0, "probe_seconds": 10.0, "settings": config.to_dict(),
        "probed": {"data": [], "limit": about.get("probe_limit")}, "finished": finished,
        "environment": {"cpu": "CPU", "cores": 2, "gpus": [], "commit": commit},
        "train_version": version.TRAIN_VERSION, "eval_version": version.EVAL_VERSION, **more,
    }  # fmt: skip


def make_study(rows: list[dict[str, Any]], **more: Any) -> Study:
    """The planned queue with these rows and no others."""
    empty: dict[str, Any] = {"trials": {}, "explain": [], "bench": []}
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


def test_measured_numbers_of_the_readme_are_generated() -> None:
    """Outside the block stand only the needs of the demo, which results/ do not hold."""
    allowed = {"1.9 GiB"}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    outside = re.sub(f"{tables.BEGIN}.*{tables.END}", "", text, flags=re.S)
    outside = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", outside, flags=re.S)
    unit = r"%|images/s|GiB|MiB|minutes|points|times|seconds|nats|hours"
    found = {m[0] for m in re.finditer(rf"\d[\d.,]*\s*(?:{unit})", outside)}
    assert found <= allowed, f"not from results/: {sorted(found - allowed)}"


def test_links_and_figures_of_the_pages_exist() -> None:
    for page in ("results.md", "claims.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)]+)\)", text):
            name, _, anchor = link.partition("#")
            target = ROOT / "docs" / (name or page)
            assert target.exists(), link
            if anchor:
                assert f'id="{anchor}"' in target.read_text(encoding="utf-8"), link


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the pages are made of, with a README and one recipe's results."""
    for name in ("recipes", "tests", "docs/images", "results"):
        (tmp_path / name).mkdir(parents=True)
    for path in (ROOT / "recipes").glob("*.toml"):
        shutil.copy(path, tmp_path / "recipes")
    shutil.copy(ROOT / "tests" / "test_theory.py", tmp_path / "tests")
    (tmp_path / "README.md").write_text(f"# top\n\n{tables.BEGIN}\n{tables.END}\n\nend\n")
    rows = [r for arm in ("dense", "lam=0", SPARSE) for r in three(arm, 0.2, 0.21, name=PAIR)]
    (tmp_path / "results" / "queue.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_write_then_check_then_a_changed_row(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--root", str(checkout)]
    assert tables.main([*arguments, "--check"]) == 1
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("# top\n") and readme.endswith("\n\nend\n")
    assert "20.5 ± 0.7" in plain(readme)

    path = checkout / "results" / "queue.jsonl"
    path.write_text(path.read_text().replace('"accuracy": 0.21', '"accuracy": 0.23', 1))
    capsys.readouterr()
    assert tables.main([*arguments, "--check"]) == 1
    assert "results.md is not what results/ give" in capsys.readouterr().out
    assert tables.main(arguments) == 0
    assert "21.5 ± 2.1" in plain((checkout / "README.md").read_text())


def test_a_readme_without_markers_is_one_clear_line(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "README.md").write_text("# top\n")
    assert tables.main(["--root", str(checkout)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and tables.BEGIN in error and "README.md" in error
    assert not (checkout / "docs" / "results.md").exists()


def test_a_queue_with_an_unknown_recipe_is_one_clear_line(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = checkout / "recipes" / "queue.toml"
    queue.write_text('[[run]]\nrecipe = "nonsense"\narms = ["dense"]\nseeds = [0]\ntables = [1]\n')
    assert tables.main(["--root", str(checkout)]) == 2
    assert "nonsense" in capsys.readouterr().err


# --- what is averaged and paired


@pytest.mark.parametrize("name", ["TRAIN_VERSION", "EVAL_VERSION"])
def test_lines_of_other_versions_are_counted_and_shown_nowhere(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(version, "TRAIN_VERSION", 1)  # that of results/
    old = read_study(ROOT)
    assert old.rows and old.trials and old.explain and not old.left_out
    monkeypatch.setattr(version, name, 2)
    new = read_study(ROOT)
    assert not (new.rows or new.trials or new.explain) and new.bench == old.bench
    lines = [len(old.rows), *map(len, old.trials.values()), len(old.explain)]
    assert len(new.others) == sum(lines)
    for page in tables.pages(new).values():
        assert page.count(f"{sum(lines)} lines of train version 1 and eval version 1 are kept") == 1
    _, counts = ledger(new)
    assert {name for name, count in counts["small"].items() if count} == {UNTESTED}
    own = make_row(SMALL, "dense", 0, train_version=2, eval_version=1)
    (checkout / "results" / "queue.jsonl").write_text(json.dumps(own) + "\n")
    assert len(read_study(checkout).rows) == (name == "TRAIN_VERSION")


def test_rows_with_other_settings_are_kept_apart_and_named() -> None:
    rows = three("dense", 0.2, 0.2, 0.2) + three("lam=0", 0.9, changed={"lr": 0.5})
    found = block(rows)
    assert found.values("lam=0", CIFAR100) == {}
    assert "1 run with other settings" in found.apart


def test_arms_and_machines_are_no_other_settings() -> None:
    arms = ["dense", "lam=0.01", f"{SPARSE}+pattern=random", "dense+beta=0+crop_scale=0.1,0.2"]
    rows = [make_row(SMALL, a, s, changed={"threads": 1 + s}) for a in arms for s in range(3)]
    found = block(rows)
    assert [len(found.rows[arm]) for arm in arms] == [3] * 4
    assert found.apart == ""


def test_of_batches_that_cover_as_much_the_newest_counts() -> None:
    old = three("dense", 0.1, finished="2026-01-02", changed={"lr": 0.5})
    new = three("dense", 0.3, finished="2026-01-03", changed={"lr": 0.25})
    for rows in (old + new, new + old):
        chosen, apart = choose(rows, recipe(SMALL))
        assert chosen["dense"][0]["probes"][0]["accuracy"] == 0.3
        assert "1 run with other settings" in apart


def test_a_repeat_replaces_the_earlier_run_and_is_named() -> None:
    rows = three("dense", 0.1, finished="1") + three("dense", 0.3, finished="2")
    found = block(rows)
    assert found.values("dense", CIFAR100) == {0: 0.3} and "1 earlier repeat" in found.apart


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
        assert numbers[1] - 0.11 <= numbers[3] <= numbers[4] <= numbers[2] + 0.11


def test_differences_pair_by_seed_and_not_by_position() -> None:
    rows = [make_row(SMALL, "lam=0.01", s, 0.2 + s / 100) for s in (1, 2)]
    rows += [make_row(SMALL, "lam=0", s, 0.1 + s / 100) for s in (0, 1, 2)]
    interval = block(rows).difference("lam=0.01", "lam=0", CIFAR100)
    assert interval is not None and interval.n == 2
    assert interval.mean == pytest.approx(0.1) and interval.high == pytest.approx(0.1)


def test_failed_runs_are_counted_and_not_averaged() -> None:
    rows = three("lam=0.1", 0.2, 0.3)
    rows.append(make_row(SMALL, "lam=0.1", 2, failed="loss is not finite", dead_groups=9))
    found = block(rows)
    assert found.values("lam=0.1", DEAD) == {}
    assert found.values("lam=0.1", CIFAR100) == {0: 0.2, 1: 0.3}
    assert found.done("lam=0.1") == "2 / 3, 1 of 3 failed"
    rows = [make_row(SMALL, "lam=0.1", s, failed="loss at step 3") for s in range(3)]
    assert block(rows).cell("lam=0.1", CIFAR100) == "failed"


def test_what_is_missing_is_queued_and_what_is_not_planned_is_not_run() -> None:
    page = tables.results_page(make_study(three("dense", 0.2)))
    plan = {arm: len(seeds) for arm, seeds in block([]).planned.items()}
    line = cells(page, "lam=0.01")
    assert line[1] == "queued" and line[-1] == f"0 / {plan['lam=0.01']}"
    assert cells(page, "dense")[-1] == f"1 / {plan['dense']}"
    found = block([], 1, PAIR)
    assert found.cell("dense", FAR[0]) == "not run"
    assert "Queued: `dense` (0 / 10)" in page


def test_floors_stand_beside_every_accuracy() -> None:
    page = tables.results_page(make_study(three("dense", 0.2, 0.2, 0.2)))
    section = plain(page[page.index("table-2") : page.index("table-3")])
    assert "| *untrained encoder* | 10.1 ± 0.1 |" in section
    assert "| *raw pixels* | 16.0 |" in section


def test_the_twin_of_an_arm_has_the_same_additions() -> None:
    found = block([])
    assert found.twin(f"{SPARSE}+beta=0", "lam=0") == "lam=0+beta=0"
    assert found.twin(f"{SPARSE}+pattern=random", "lam=0") == "lam=0"
    assert found.twin("dense+beta=0+lr=0.01", "dense") == "dense"
    assert found.twin("lam=0", "lam=0") == ""


def test_the_best_arm_pays_for_the_choice() -> None:
    rng = np.random.default_rng(0)
    made = {
        arm: [0.2 + shift + x for x in rng.normal(0, 0.004, 3)]
        for arm, shift in (("lam=0", 0), ("lam=0.01", 0.02), ("lam=0.1", 0.01), (SPARSE, 0.0))
    }
    found = block([row for arm, values in made.items() for row in three(arm, *values)])
    assert pick(found) == ("lam=0.01", 3)
    want = paired_interval(made["lam=0.01"], made["lam=0"], level=1 - 0.05 / (3 * 2))
    assert CIFAR100.difference(want) in best(found)


def test_near_less_far_is_paired_by_seed() -> None:
    rng = np.random.default_rng(1)
    near, far = rng.uniform(0.2, 0.4, (2, 2, 4))
    rows = [
        make_row(PAIR, arm, s, near[i, s], far=far[i, s])
        for i, arm in enumerate((SPARSE, "lam=0"))
        for s in range(4)
    ]
    interval = interaction(block(rows, 7, PAIR), SPARSE, "lam=0", CIFAR10, FAR[1])
    want = stats.ttest_1samp((near[0] - near[1]) - (far[0] - far[1]), 0).confidence_interval(0.95)
    assert interval is not None and interval.n == 4
    assert (interval.low, interval.high) == pytest.approx((want.low, want.high))


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("dense", ["dense"], ["dense+beta=0", "lam=0"]),
        ("lam=0.*|density=0.*", ["lam=0.001", "density=0.25"], ["lam=0", "lam=0.1+beta=0"]),
        ("*+lr=*+*", ["dense+beta=0+lr=0.3", "dense+lr=1"], ["dense+beta=0"]),
        ("lam=*+ema=*+*", ["lam=0+ema=0.9+ema_final=0.99", "lam=0.1+ema=0.9"], ["lam=0"]),
        ("density=0.25+num_groups=*", ["density=0.25+num_groups=4"],
         ["density=0.25", "density=0.25+num_groups=4+beta=0"]),
    ],
)  # fmt: skip
def test_patterns_of_arms(pattern: str, inside: list[str], outside: list[str]) -> None:
    assert all(matches(arm, pattern) for arm in inside)
    assert not any(matches(arm, pattern) for arm in outside)


def test_the_trace_of_a_search_is_shown() -> None:
    search = read_search(ROOT / "recipes" / "search-demo.toml")
    score = {"settings": {"scored_on": "holdout"}}
    rows = [
        {"key": task.key, "recipe": search.recipe, "arm": task.arm, "seed": 0, "failed": None,
         "probes": [{**score, "accuracy": 0.2 + i / 1000}], "settings": task.config.to_dict(),
         "probed": dataclasses.asdict(task.probes), "environment": {}, "seconds": 1800,
         "train_version": version.TRAIN_VERSION}
        for i, task in enumerate(replay([], search).todo)
    ]  # fmt: skip
    study = make_study([], trials={"search-demo.jsonl": rows})
    trace = plain(tables.searched(study))
    assert f"{len(rows)} trials, {len(rows) / 2:.1f} h of work" in trace
    lines = [line for line in trace.splitlines() if "| `dense` |" in line]
    assert "| as before | 100 | 1 | 20.0 | yes |" in lines[0]
    assert lines[1].endswith("ema=0.98 | 100 | 1 | 20.1 |  |")
    assert "dense: as before" in front.found_text(study)


# --- the whole study, made up


def filled() -> Study:
    """Every planned run with made-up numbers."""
    plan = planned()
    rows = {}
    for run in plan.queue:
        for arm in run["arms"]:
            for seed in run["seeds"]:
                rng = np.random.default_rng(zlib.crc32(f"{run['recipe']}{arm}{seed}".encode()))
                name, _, level = arm.split("+")[0].partition("=")
                share = float(level) if name == "density" else 1.0
                curve = [
                    {"groups": None if arm == "dense" else g, "latents": 6 * g,
                     "accuracy": 0.15 + 0.01 * math.log2(g), "pca": 0.16 + 0.01 * math.log2(g),
                     "random_latents": 0.13 + 0.015 * math.log2(g) + rng.normal(0, 0.003),
                     "feature_bytes": 12 * g, "map_flops": 100 * g}
                    for g in (16, 8, 4, 2, 1)
                ]  # fmt: skip
                rows[run["recipe"], arm, seed] = make_row(
                    run["recipe"], arm, seed, 0.2 + rng.normal(0, 0.005),
                    far=0.5 + rng.normal(0, 0.01),
                    groups_per_latent=None if arm.startswith("dense") else 16 * share,
                    dead_groups=0,
                    measures={
                        "information": {"total_correlation": 20 + rng.normal(),
                                        "untrained_total_correlation": 200.0},
                        "factors": {"dci_disentanglement": 0.05 + rng.normal(0, 0.005),
                                    "untrained_dci_disentanglement": 0.1},
                        "kept": {"curve": curve},
                    },
                )  # fmt: skip
    return make_study(list(rows.values()))


def test_a_full_study_has_no_gap() -> None:
    page = tables.results_page(filled())
    tabled = page[page.index("table-1") : page.index("## The search")]
    assert "queued" not in tabled.lower()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for above, line in itertools.pairwise(rows):
        if line.startswith("| ---"):
            assert line.count("|") == above.count("|")
    assert page == tables.results_page(filled())  # the same rows, the same page


# --- verdicts


def test_without_numbers_and_tests_nothing_is_judged(tmp_path: Path) -> None:
    study = dataclasses.replace(make_study([]), root=tmp_path)
    _, counts = ledger(study)
    for found in counts.values():
        assert set(found) == {HOLDS, PART, FAILS, UNTESTED}
        assert sum(found.values()) == found[UNTESTED] > 0


def test_tests_that_claims_name_exist() -> None:
    page, _ = ledger(make_study([]))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named and named <= names_of_tests(ROOT / "tests" / "test_theory.py")


def test_a_gain_at_small_scale_is_no_verdict_at_full_scale() -> None:
    noise = np.random.default_rng(2).normal(0, 0.001, (3, 5))
    rows = [
        make_row(PAIR, arm, s, 0.2 + shift + noise[i, s])
        for i, (arm, shift) in enumerate((("dense", 0), ("lam=0", 0), (SPARSE, 0.03)))
        for s in range(5)
    ]
    page, _ = ledger(make_study(rows))
    lines = page.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| CIFAR-100: 40.01 %"))
    assert "| small | **holds** |" in lines[at] and "5 seeds" in lines[at]
    assert "| full | **not tested** |" in lines[at + 1]


def test_where_dense_does_not_beat_its_floor_nothing_is_judged() -> None:
    rows = [make_row(PAIR, a, s, 0.1 + s / 1000) for a in ("dense", "lam=0") for s in range(5)]
    rows += [make_row(PAIR, SPARSE, s, 0.2 + s / 1000) for s in range(5)]
    page, _ = ledger(make_study(rows))
    line = next(line for line in page.splitlines() if line.startswith("| CIFAR-100: 40.01 %"))
    assert "**not tested**" in line and "does not clearly beat its untrained floor" in line


def test_the_ledger_has_every_claim_of_the_paper() -> None:
    sections = [claim.section for claim in CLAIMS]
    wanted = {
        "Accuracy of the linear probe": 4, "The two propositions": 2, "Trade-offs": 3,
        "Failure signatures": 4, "Suggested experiments": 3, "Open questions": 3,
    }  # fmt: skip
    assert {name: sections.count(name) for name in wanted} == wanted
    assert len({name for name in sections if name.startswith("Mechanism")}) == 3
    page, counts = ledger(filled())
    assert all(claim.text in page for claim in CLAIMS)
    assert sum(sum(found.values()) for found in counts.values()) == sum(
        len(claim.scales) for claim in CLAIMS
    )
