"""The search: successive halving from lines of results alone, on a holdout, and its mistakes."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import search
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejepa
from sparsejepa.study.results import Task, read_rows

TOML = """
recipe = "tiny"
holdout = 24
target = "class"
probe_limit = 50
arms = ["dense", "lam=0"]
rungs = [{ steps = 2, seeds = 1, keep = 0.5 }, { steps = 3, seeds = 2 }]

[[round]]
name = "rates"
grid = { lr = [1e-3, 1e-4], weight_decay = [0.0, 0.1] }

[[round]]
alternatives = [{ beta = 0.0 }, { beta = 0.1, predictor_depth = 2 }]
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    tiny = {
        "data": str(tiny_images), "preset": "nano", "patch_size": 8, "batch_size": 16,
        "predictor_depth": 1, "threads": 1,
    }  # fmt: skip
    lines = "\n".join(f"{k} = {json.dumps(v)}" for k, v in tiny.items())
    (folder / "tiny.toml").write_text(f"[settings]\n{lines}\n")
    (folder / "search-tiny.toml").write_text(TOML)
    return folder / "search-tiny.toml"


def row(task: Task, score: float | None) -> dict[str, Any]:
    """A line of results without a run; a score of None is a failed one."""
    probe = {"accuracy": score, "settings": {"scored_on": "holdout"}}
    line = {
        "key": task.key, "recipe": task.recipe, "arm": task.arm, "seed": task.config.run.seed,
        "failed": "loss is not finite at step 0" if score is None else None,
        "probes": [] if score is None else [probe], "settings": task.config.to_dict(),
        "probed": asdict(task.probes), "trial": task.trial,
        "train_version": sparsejepa.TRAIN_VERSION,
    }  # fmt: skip
    return json.loads(json.dumps(line))


def lines_of(rows: list[dict[str, Any]], spec: Any) -> list[search.Line]:
    return search.replay(rows, spec).lines


def finish(spec: Any, score: Callable[[Task], float | None]) -> list[dict[str, Any]]:
    """Run a search to its end; return its lines."""
    rows: list[dict[str, Any]] = []
    while todo := search.replay(rows, spec).todo:
        rows += [row(task, score(task)) for task in todo]
    return rows


def halving(
    rounds: list[list[dict[str, Any]]],
    rungs: list[tuple[int, int, float]],
    score: Callable[[dict[str, Any], int, int], float],
) -> dict[str, Any]:
    """Successive halving of one arm, written down as plainly as can be; returns the winner."""
    best: dict[str, Any] = {}
    for candidates in rounds:
        alive = [dict(best)] + [best | c for c in candidates if best | c != best]
        for steps, seeds, keep in rungs:
            mean = {i: fmean(score(c, steps, s) for s in range(seeds)) for i, c in enumerate(alive)}
            order = sorted(range(1, len(alive)), key=lambda i: -mean[i])
            if (steps, seeds, keep) == rungs[-1]:
                top = max(mean.values())
                best = next(c for i, c in enumerate(alive) if mean[i] == top)
            else:
                going = order[: max(1, math.ceil(keep * len(order)))]
                alive = [alive[0]] + [alive[i] for i in sorted(going)]
    return best


ROUNDS = [
    [{"lr": a, "weight_decay": b} for a in (1e-3, 1e-4) for b in (0.0, 0.1)],
    [{"beta": 0.0}, {"beta": 0.1, "predictor_depth": 2}],
]
NAMES = ("lr", "weight_decay", "beta", "predictor_depth")
BASE = {"lr": 2e-3, "weight_decay": 0.05, "beta": 0.02, "predictor_depth": 1}


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_winners_are_those_of_plain_halving(path: Path, random: Any) -> None:
    table: dict[Any, float] = {}

    def score(arm: str, settings: dict[str, Any], steps: int, seed: int) -> float:
        key = (arm, *(settings[name] for name in NAMES), steps, seed)
        return table.setdefault(key, random.randint(0, 5) / 8)  # ties are frequent, sums exact

    def of(task: Task) -> float:
        flat = task.config.flat()
        return score(task.arm, flat, flat["steps"], flat["seed"])

    found = search.read_search(path)
    rows = finish(found, of)
    state = search.replay(rows, found)
    for arm in found.arms:
        want = halving(
            ROUNDS, [(2, 1, 0.5), (3, 2, 0.5)],
            lambda c, steps, seed, arm=arm: score(arm, BASE | c, steps, seed),
        )  # fmt: skip
        assert state.winners[arm] == want
    # The trace is one of lines alone, whatever their order.
    random.shuffle(rows)
    assert search.replay(rows, found).lines == state.lines
    # No trial twice, arms with equal budgets, and seeds shared by all candidates of a rung.
    assert len({r["key"] for r in rows}) == len(rows)
    budget = Counter((line.arm, line.round, line.rung) for line in state.lines)
    for number, rung in itertools.product((1, 2), (1, 2)):
        assert budget["dense", number, rung] == budget["lam=0", number, rung]
    assert all(len(line.scores) == line.rung for line in state.lines)


@settings(max_examples=5)
@given(st.integers(0, 30), st.randoms(use_true_random=False))
def test_a_stopped_search_goes_on_the_same_way(path: Path, count: int, random: Any) -> None:
    def score(task: Task) -> float:
        return int(task.key[:4], 16) / 2**16

    found = search.read_search(path)
    whole = finish(found, score)
    rows: list[dict[str, Any]] = []
    while todo := search.replay(rows, found).todo:  # one at a time, in any order
        rows.append(row(task := random.choice(todo), score(task)))
        if len(rows) == count:
            part = lines_of(rows, found)
            assert any(line.kept is None for line in part) or part == lines_of(whole, found)
    assert {r["key"] for r in rows} == {r["key"] for r in whole}
    assert lines_of(rows, found) == lines_of(whole, found)


def test_the_trace_says_what_was_tried_in_order(path: Path) -> None:
    found = search.read_search(path)

    def score(task: Task) -> float:
        flat = task.config.flat()
        return 0.5 if flat["lr"] == 1e-4 else 0.25 + flat["seed"] / 4

    lines = lines_of(finish(found, score), found)
    assert lines[0] == search.Line(1, "rates", 1, "dense", {}, 2, (0.25,), 0, True)
    shown = [(search.text(x.candidate), x.score, x.kept) for x in lines if x.arm == "lam=0"][1:8]
    assert shown == [
        ("lr=0.001, weight_decay=0.0", "25.0", False),
        ("lr=0.001, weight_decay=0.1", "25.0", False),
        ("lr=0.0001, weight_decay=0.0", "50.0", True),
        ("lr=0.0001, weight_decay=0.1", "50.0", True),
        ("as before", "37.5 ± 17.7", False),
        ("lr=0.0001, weight_decay=0.0", "50.0 ± 0.0", True),
        ("lr=0.0001, weight_decay=0.1", "50.0 ± 0.0", False),
    ]
    assert [(x.round, x.rung) for x in lines] == sorted((x.round, x.rung) for x in lines)


def test_scores_on_test_are_refused(path: Path) -> None:
    found = search.read_search(path)
    rows = [row(task, 0.5) for task in search.replay([], found).todo]
    rows[0]["probes"][0]["settings"]["scored_on"] = "test"
    with pytest.raises(search.UserError, match="scored on test"):
        lines_of(rows, found)
    # Lines of other searches and versions are not looked at.
    now = sparsejepa.TRAIN_VERSION
    for other in ({"recipe": "other"}, {"train_version": now + 1}, {"eval_version": 99}):
        assert lines_of([{**r, **other} for r in rows], found) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("holdout = 24", "holdout = 0", "holdout = 0: set training images aside"),
        ("holdout = 24", "", "'holdout' is missing"),
        ("holdout", "hold_out", "unknown entry 'hold_out' (did you mean 'holdout'?)"),
        ('"tiny"', '"tinny"', "unknown recipe 'tinny' (did you mean 'tiny'?)"),
        ('"lam=0"]', '"lamb=0"]', "unknown arm 'lamb=0'"),
        ("lr = [", "lrr = [", "unknown setting 'lrr'"),
        ("seeds = 1, keep = 0.5", "keep = 0.5", "a rung: 'seeds' is missing"),
        ("alternatives = [", "alternatives = [{}, ", "round 2: give it a grid or alternatives"),
        ("rungs = [", "rungs = [[", "not valid TOML"),
    ],
)
def test_mistakes_are_one_line(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    old: str, new: str, message: str,
) -> None:  # fmt: skip
    (tmp_path / "tiny.toml").write_text(path.with_name("tiny.toml").read_text())
    wrong = tmp_path / "search-wrong.toml"
    assert old in TOML
    wrong.write_text(TOML.replace(old, new, 1))
    assert search.main([str(wrong), "--results", str(tmp_path / "r"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert message in said and str(wrong) in said and said.count("\n") == 1


def test_the_example_is_a_search(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert search.main(["demo", "--dry-run", "--results", str(tmp_path / "r")]) == 0
    assert "lam=0 so far (18 trials come next): as before" in capsys.readouterr().out


def test_a_real_search_resumes_and_never_sees_test(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "tiny.toml").write_text(path.with_name("tiny.toml").read_text())
    spec, results = tmp_path / "search-real.toml", tmp_path / "results.jsonl"
    text = TOML.replace('["dense", "lam=0"]', '["lam=0"]').replace("[1e-3, 1e-4]", "[1e9]")
    spec.write_text(text[: text.rindex("[[round]]")].replace("[0.0, 0.1]", "[0.1]"))
    words = [str(spec), "--results", str(results), "--runs", str(tmp_path / "runs")]
    words += ["--device", "cpu", "--jobs", "1"]
    save, calls = search.run_tasks, []

    def once(*args: Any, **more: Any) -> Any:
        calls.append(len(args[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(*args, **more)

    monkeypatch.setattr(search, "run_tasks", once)
    assert search.main(words) == 130
    half = read_rows(results)
    assert len(half) == calls[0] == 2
    assert search.main(words) == 0
    rows = read_rows(results)
    assert rows[:2] == half and len({r["key"] for r in rows}) == len(rows)
    for each in rows:
        assert each["recipe"] == "search-real" and set(each["trial"]) == {
            "round", "rung", "candidate",
        }  # fmt: skip
        assert bool(each["failed"]) == (each["settings"]["optim"]["lr"] == 1e9)
        for probe in each["probes"]:
            assert probe["n_test"] == 24 and probe["settings"]["scored_on"] == "holdout"
            assert probe["n_train"] <= 50
    said = capsys.readouterr().out
    assert "rates, rung 1, lam=0, 2 steps: as before: " in said and "1 failed" in said
    assert search.main(words) == 0 and read_rows(results) == rows
