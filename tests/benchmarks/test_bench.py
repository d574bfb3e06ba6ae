"""The command: what it writes, that its parts add up, and what it says to bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from sparsejepa import cli
from sparsejepa.benchmarks import growth, parts, products, steps
from sparsejepa.benchmarks import settings as bench
from sparsejepa.benchmarks.growth import PeakMemory
from sparsejepa.benchmarks.run import SECTIONS
from sparsejepa.benchmarks.settings import BenchSettings, Section
from sparsejepa.environment import has_bf16
from sparsejepa.model.memory import peak_memory
from sparsejepa.report.bench import bench_figure

SMALL = BenchSettings(
    encoder="nano", img_size=16, batch=4, predictor_dim=32, predictor_depth=1, target_shape=(2, 2),
    context=5, rounds=1, quick=True,
)  # fmt: skip
FLAGS = "--encoder nano --img-size 16 --batch-size 4 --predictor-dim 32 --predictor-depth 1 --quick"


def mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str) -> str:
    """Return the one line that the command answers with; nothing may have been written."""
    status = cli.main(["bench", *shlex.split(words), "--out", str(tmp_path / "bench")])
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert not (tmp_path / "bench").exists()
    return said


def test_command_writes_lines_and_a_figure(tmp_path: Path) -> None:
    words = f"bench --sections products parts growth {FLAGS} --threads 1 --json --out {tmp_path}"
    done = subprocess.run(
        [sys.executable, "-m", "sparsejepa", *shlex.split(words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["products", "parts", "growth"]
    assert json.loads(done.stdout)["sections"] == lines
    for line in lines:
        assert line["command"] == f"sparsejepa {words}"
        assert line["environment"]["torch"] == torch.__version__
        assert line["environment"]["threads"] == 1
        assert line["settings"]["batch"] == 4
        assert line["rows"] and line["title"] in done.stderr
        for row in line["rows"]:
            assert row["name"] and row["low_s"] <= row["median_s"] <= row["high_s"]
            assert not any(isinstance(value, dict | list) for value in row.values())
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.size[0] > 1000


@pytest.fixture(scope="module")
def contest() -> Section:
    return steps.section(SMALL)


def test_the_contest_has_a_row_for_each(contest: Section) -> None:
    names = [row["name"] for row in contest.rows]
    kind = "bf16" if has_bf16("cpu") else "fp32"
    wanted = ["reference, fp32", "ours, dense, fp32", f"its products alone, {kind}"]
    wanted += [f"ours, {groups} groups, {kind}" for groups in ("region", "concept", "feature")]
    wanted += [f"ours, {way} predictor, {kind}" for way in ("packed", "union")]
    wanted += [f"ours, predictor {width} x 4, {kind}" for width in (128, 192)]
    assert set(wanted) <= set(names) and len(set(names)) == len(names)
    rows = {row["name"]: row for row in contest.rows}
    assert rows["reference, fp32"]["x_reference_fp32"] == 1
    assert rows[wanted[2]]["share"] == 1
    row = rows["ours, dense, fp32"]
    ratio = rows["reference, fp32"]["median_s"] / row["median_s"]
    assert row["x_reference_fp32"] == pytest.approx(ratio)
    assert row["images_per_second"] == pytest.approx(4 / row["median_s"])


def test_the_figure_takes_any_of_the_sections(contest: Section) -> None:
    found = {"name": contest.name, "title": contest.title, "rows": contest.rows, "notes": []}
    assert len(bench_figure([found]).axes) == 1
    assert len(bench_figure([]).axes) == 0


def test_parts_add_up_to_the_step() -> None:
    *rows, whole = parts.section(SMALL).rows
    assert [row["name"] for row in rows] == list(parts.PARTS)
    assert sum(row["median_s"] for row in rows) == pytest.approx(whole["median_s"])
    assert all(row["median_s"] > 0 for row in rows)
    assert sum(row["share_of_flops"] for row in rows) == pytest.approx(1)


def test_all_products_together_weigh_each_by_its_count() -> None:
    rows = products.section(SMALL).rows
    for kind in ("fp32", "bf16"):
        single = [r for r in rows if r.get("detail") and r["name"].endswith(kind)]
        whole = next(r for r in rows if r["name"] == f"a step's products, {kind}")
        assert sum(r["median_s"] for r in single) == pytest.approx(whole["median_s"])
        assert sum(2 * r["m"] * r["k"] * r["n"] * r["count"] for r in single) == pytest.approx(
            1e9 * whole["gflop"]
        )


def test_growth_exponents_are_slopes() -> None:
    rows = [row for row in growth.section(SMALL).rows if row["axis"] == "batch"]
    first, second = rows
    assert first["exponent_median_s"] is None
    slope = math.log2(second["median_s"] / first["median_s"])
    assert second["exponent_median_s"] == pytest.approx(slope)
    assert second["exponent_gflop"] == pytest.approx(1, abs=0.01)


def test_memory_counts_what_lives_at_once() -> None:
    with PeakMemory() as memory:
        a = torch.ones(1000)
        b = a.view(10, 100) + 1
        del a
        c = b * 2
        del b, c
        torch.ones(10)
    assert memory.peak == 2 * 4000
    assert memory.now < 4000


def test_estimated_memory_is_of_the_right_size() -> None:
    wide = BenchSettings(encoder="nano", batch=16, predictor_dim=64, predictor_depth=3)
    of = bench.config(wide, precision="fp32")
    step, _ = steps.our_step(wide, precision="fp32")
    measured = growth._peak_memory(step, "cpu")
    assert 0.5 < measured / peak_memory(bench.sizes(wide, of), 4) < 1.5


def test_every_step_has_the_masks_that_were_asked_for() -> None:
    sampler = bench.model(SMALL, bench.config(SMALL)).sampler
    assert list(sampler.plans) and {p.target for p in sampler.plans} == {(2, 2)}
    assert {p.count for p in sampler.plans} == {5}


def test_unknown_section(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = mistake(capsys, tmp_path, "--sections step")
    assert "--sections step: unknown (did you mean 'steps'?)" in said
    assert all(name in said for name in SECTIONS)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--patch-size 5", "--patch-size"),
        ("--img-size 8", "--patch-size"),
        ("--patch-size 64", "--patch-size"),
        ("--context 60", "--context"),
        ("--encoder tiniest", "--encoder"),
        ("--batch-size 1", "--batch-size"),
        ("--predictor-dim 30", "--predictor-dim"),
        ("--rounds 0", "--rounds"),
        ("--threads 0", "--threads"),
        ("--device cuda:99", "--device"),
    ],
)
def test_sizes_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, flag: str
) -> None:
    said = mistake(capsys, tmp_path, words)
    assert flag in said and "--context-counts" not in said


def test_without_bf16_its_contenders_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bf16", lambda device: False)
    found = steps.section(SMALL)
    assert not any("bf16" in row["name"] for row in found.rows)
    assert sum("bf16" in note for note in found.notes) == 1
    assert any("fp32 is the yardstick" in note for note in products.section(SMALL).notes)


def test_with_little_memory_less_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "available_memory", lambda device: 1e6)
    monkeypatch.setattr(growth, "available_memory", lambda device: 60e6)
    found = steps.section(SMALL)
    assert len(found.rows) == 3 and any("GiB" in note for note in found.notes)
    found = growth.section(SMALL)
    assert found.rows and any("left out" in note for note in found.notes)


def test_failed_compilation_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function, **options):
        def call(*args):
            raise RuntimeError("no C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(steps, "available_memory", lambda device: math.inf)
    small = dataclasses.replace(SMALL, compile=True)
    found = steps.section(small)
    assert any("no C++ compiler found" in note for note in found.notes)
    assert not any("compiled" in row["name"] for row in found.rows)
