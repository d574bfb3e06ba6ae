"""`sparsejepa info --model`: predictions, mistakes, and the tables of docs/scaling.md."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsejepa import cli
from sparsejepa.benchmarks.hardware import GPUS, processor
from sparsejepa.benchmarks.predict import IMAGENET, Fleet, Prediction, named_model
from sparsejepa.config import ENCODER_SIZES, PRESETS, preset
from sparsejepa.model.costs import costs
from sparsejepa.model.groups import partition_cells
from sparsejepa.model.masks import MaskSampler
from sparsejepa.results import read_checked

ROOT = Path(__file__).resolve().parent.parent


def predict(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    assert cli.main(["info", *words.split(), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "prediction" in err
    return json.loads(out)


def h100(gpus: int = 1, name: str = "vit-b16", **changes: Any) -> Prediction:
    return Prediction(preset(name).replace(**changes), Fleet(GPUS["h100"], gpus))


def test_info_predicts_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = predict(capsys, "--model vit-h14 --gpu h100 --gpus 64 --price 3 --mfu 0.4")
    assert found["parameters"]["encoder"] == 630_434_560
    assert found["batch_per_processor"] == 32
    assert found["images_per_second"] == pytest.approx(2048 / found["step"]["seconds"])
    run = found["run"]
    assert run["steps"] == 300 * (IMAGENET // 2048)
    assert run["hours"] == pytest.approx(run["steps"] * found["step"]["seconds"] / 3600)
    assert run["cost"] == pytest.approx(3 * 64 * run["hours"])
    assert [row["chosen"] for row in found["memory"]] == [False, False, False, True]
    assert found["hardware"]["assumed_mfu"] == 0.4


def test_every_flag_of_a_prediction_counts(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset vit-b16 --batch 512 --accumulate 2 --gpus 4 --gpus-per-machine 2 "
    words += "--network 100 --gpu a100-80gb --groups none --epochs 10 --images 51200 "
    words += "--img-size 160 --patch-size 16 --parallel fsdp --checkpoint-activations"
    found = predict(capsys, words)
    assert found["run"]["steps"] == 1000 and found["model"]["grid"] == [10, 10]
    assert found["parameters"]["W"] == 0 and found["accumulate"] == 2
    assert found["hardware"]["link_gb_per_second"] == pytest.approx(0.8 * 12.5)
    assert found["gflop_per_image"]["repeated"] > 0 and "cost" not in found["run"]


def test_names_of_models() -> None:
    for name in [*PRESETS, *ENCODER_SIZES]:
        assert named_model(name).check().model.encoder in ENCODER_SIZES
    assert named_model("huge") == preset("vit-h14")
    small = named_model("vit_small_patch16_224.augreg_in21k")
    assert (small.model.encoder, small.model.patch_size, small.images.img_size) == (
        "small", 16, (224,),
    )  # fmt: skip
    gap = named_model("vit_huge_patch14_gap_224.in1k_ijepa")
    assert gap == replace(preset("vit-h14"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model hugge", "--model hugge: unknown (did you mean 'huge'?)"),
        ("--preset vit-h15", "--preset vit-h15: unknown (did you mean 'vit-h14'?)"),
        ("--model huge --preset vit-h14", "leave one of them out"),
        ("runs/x --model huge", "leave one of them out"),
        ("--gpus 8", "--gpus: only for a prediction; add --model or --preset"),
        ("--model huge --gpu h10", "--gpu h10: unknown (did you mean 'h100'?)"),
        ("--model huge --gpu t4 --precision bf16", "--precision bf16: T4 has none"),
        ("--model huge --mfu 1.5", "--mfu 1.5: must be above 0 and at most 1"),
        ("--model huge --mfu nan", "--mfu nan: must be above 0"),
        ("--model huge --network 0", "--network 0: must be above 0"),
        ("--model huge --price -1", "--price -1: must be above 0"),
        ("--model huge --gpus 0", "--gpus 0: must be at least 1"),
        ("--model huge --gpus 7", "--batch 2048 cannot be shared out equally to 7 GPUs"),
        ("--model huge --accumulate 3", "use a multiple of 3"),
        ("--model huge --images 100", "--images 100 is less than --batch 2048"),
        ("--model huge --patch-size 15", "--patch-size 15 does not divide the image"),
        ("--model huge --batch 0", "--batch 0: must be at least 1"),
    ],
)
def test_mistakes_are_named(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", *words.split()]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_presets_say_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["presets"]
    assert set(found) == set(PRESETS)
    for name, about in found.items():
        assert all(about[key] for key in ("about", "command", "hardware", "minutes", "expected"))
        assert name in about["command"] or name in ("best", "demo")
        preset(name).check()
    for name in ("vit-b16", "vit-l16", "vit-h14"):
        config = preset(name).check().check_image((224, 224))
        optim = config.optim
        assert optim.ema is not None and optim.ema < 1 and (optim.ema_final or 1) < 1


@pytest.mark.parametrize("grid", [(14, 14), (16, 16)])
def test_grids_of_the_large_presets_have_sensible_masks_and_regions(grid: tuple[int, int]) -> None:
    patches = math.prod(grid)
    sampler = MaskSampler(grid)
    assert all(0.15 <= h * w / patches <= 0.2 for h, w in sampler.target_shapes)
    assert [round(n / patches, 2) for n in sampler.context_counts] == [0.25, 0.31, 0.38]
    cells = partition_cells(grid, 16).bincount()
    assert len(cells) == 16 and cells.max() <= 2 * cells.min()


def test_operations_are_the_mean_over_the_masks() -> None:
    one = h100(batch_size=64, groups="none", beta=0.0)
    assert sum(chance for chance, _ in one.shapes) == pytest.approx(1)
    lowest, highest = (
        sum(c.flops for p, c in costs(s).items() if p != "augmentation") / 64
        for s in (min((s for _, s in one.shapes), key=lambda s: (s.context, s.target)), one.largest)
    )
    assert lowest < sum(one.flops_per_image().values()) < highest
    again = h100(batch_size=64, groups="none", beta=0.0, checkpoint_activations=True)
    extra = sum(again.flops_per_image().values()) / sum(one.flops_per_image().values())
    assert 1.05 < extra < 1.4


def test_messages_follow_from_the_parameters() -> None:
    ddp, fsdp = h100(64), h100(64, parallel="fsdp")
    trained, encoder = sum(ddp.parameters.values()), ddp.parameters["encoder"]
    assert ddp.step().sent == pytest.approx(2 * 63 / 64 * 4 * trained)
    ours = ddp.parameters["groups"] + ddp.parameters["W"]
    wanted = 63 / 64 * 4 * (3 * (trained - ours) + encoder + 2 * ours)
    assert fsdp.step().sent == pytest.approx(wanted)
    assert h100().step().sent == 0 and h100().step().exposed == 0
    # Over the network the same bytes take longer than within a machine.
    within = Prediction(preset("vit-b16"), Fleet(GPUS["h100"], 64, per_machine=64))
    assert within.step().messages < ddp.step().messages
    step = ddp.step()
    assert step.exposed <= step.messages
    assert step.seconds == step.compute + step.optimiser + step.exposed


def test_more_gpus_never_slow_a_fixed_batch_per_gpu_by_much_nor_speed_it_up() -> None:
    rates = [h100(n, batch_size=256 * n).data()["images_per_second"] / n for n in (1, 8, 64, 512)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0.7 * rates[0]


def test_data_sheets_are_dense_and_the_cpu_is_measured() -> None:
    # A tensor core's bf16 rate is 4 to 32 times that of plain fp32 units; sparse ones twice that.
    for chip in GPUS.values():
        assert chip.bf16 is None or 1.9 < chip.bf16 / chip.fp32 < 33
        assert chip.memory > 1e10 and chip.link < chip.bandwidth
    here = processor("cpu")
    assert here.fp32 > 1e9 and here.bandwidth > 1e8 and here.memory > 1e8


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "recipes" / "scaling.py"))


def test_tables_of_the_page_are_what_the_functions_give(recipe: dict[str, Any]) -> None:
    assert recipe["main"](["--check"]) == 0


def test_a_page_without_its_markers_is_named(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "docs" / "scaling.md").write_text("nothing")
    for name in ("scaling.jsonl", "efficiency.jsonl", "loading.jsonl"):
        shutil.copy(ROOT / "results" / name, tmp_path / "results" / name)
    assert recipe["main"](["--root", str(tmp_path)]) == 2
    assert "put <!-- models:begin -->" in capsys.readouterr().err


def test_predictions_are_near_what_was_measured(recipe: dict[str, Any]) -> None:
    rows = read_checked(ROOT / "results" / "scaling.jsonl")
    assert {row["name"] for row in rows} == set(recipe["measured_cases"]())
    for line in recipe["measured_table"](rows).splitlines()[2:]:
        _, _, parameters, flops, memory, *_ = (cell.strip() for cell in line.split("|"))
        assert len(set(parameters.split(" / "))) == 1
        assert len(set(flops.split(" / "))) == 1
        assert abs(float(memory.partition("(")[2].rstrip("%)"))) < 6
