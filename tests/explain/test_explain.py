"""explain and compare from end to end on tiny runs, and their error paths."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsejepa import cli
from sparsejepa.encoders.load import load
from sparsejepa.errors import UserError
from sparsejepa.evaluation.features import find_groups
from sparsejepa.explain.measures import independent
from sparsejepa.explain.options import Options
from sparsejepa.explain.readout import CEILING, PCA, PLACES, RANDOM, RUN, SHUFFLED, UNTRAINED
from sparsejepa.explain.run import ACTIVATIONS, METRICS, REPORT, run_explain, run_folder
from sparsejepa.files import load_tensors, save_tensors


def rows_of(metrics: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["section"], row["name"]): row["values"] for row in metrics["measures"]}


@pytest.fixture(scope="module")
def explained(runs: dict[str, Path], folder: Path) -> dict[str, Any]:
    """The concept run, everything measured."""
    return run_explain(runs["concept"], str(folder))


def test_every_measure_stands_beside_its_floors(explained: dict[str, Any]) -> None:
    rows = rows_of(explained)
    sections = {section for section, _ in rows}
    assert sections == {
        "Sparsity of W", "Information", "Masked prediction", "Disentanglement, latents as units",
        "Disentanglement, groups as units", "Groups and factors", "Groups and objects",
    }  # fmt: skip
    latents = rows["Disentanglement, latents as units", "MIG"]
    assert list(latents) == [RUN, UNTRAINED, PCA]
    groups = rows["Disentanglement, groups as units", "DCI: disentanglement"]
    assert list(groups) == [RUN, UNTRAINED, PCA]
    objects = rows["Groups and objects", "mBO"]
    floors = {UNTRAINED, PCA, "k-means", PLACES, SHUFFLED, CEILING}
    assert set(objects) == {RUN, *floors}
    assert objects[CEILING]["value"] > objects[RUN]["value"]
    assert objects[RUN]["low"] < objects[RUN]["value"] < objects[RUN]["high"]
    assert set(rows["Sparsity of W", "density"]) == {RUN}
    assert SHUFFLED in rows["Groups and factors", "I(group; count)"]
    # Random zeros on its own encoder are no null for a run that was trained with its groups.
    assert not any(RANDOM in values for values in rows.values())
    assert any("trained with --pattern random" in remark for remark in explained["remarks"])


def test_no_value_is_nan_and_each_gap_has_a_reason(explained: dict[str, Any]) -> None:
    json.dumps(explained, allow_nan=False)
    for row in explained["measures"]:
        for estimate in row["values"].values():
            assert estimate["value"] is not None or estimate["note"], row["name"]


def test_files_hold_what_was_returned(explained: dict[str, Any], runs: dict[str, Path]) -> None:
    run = runs["concept"]
    assert json.loads((run / METRICS).read_text()) == explained
    html = (run / REPORT).read_text()
    assert explained["verdict"].split("(")[0] in html
    assert "&lt;b&gt;" in html and "<b>1" not in html  # names of files are text
    tensors, about = load_tensors(run / ACTIVATIONS)
    assert tensors["activations"].shape == (60, 16, 6)
    assert about["fingerprint"] == explained["fingerprint"]


def test_the_same_call_gives_the_same_numbers(
    explained: dict[str, Any], runs: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    options = Options(quick=True, out=tmp_path)
    again = rows_of(run_explain(runs["concept"], str(folder), options=options))
    first = rows_of(explained)
    assert set(first) - set(again) == {key for key in first if key[1].startswith("DCI")}
    for key, values in again.items():
        for name, estimate in values.items():
            expected = first[key][name]["value"]
            assert estimate["value"] == pytest.approx(expected, abs=1e-3), (key, name)


def test_a_dense_run_gets_fitted_groups_and_says_so(
    runs: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    options = Options(num_groups=4, fit_steps=5, limit=100, test_limit=40, out=tmp_path)
    found = run_explain(runs["dense"], str(folder), options=options)
    assert found["groups"] == {"kind": "feature", "post_hoc": True}
    r2 = rows_of(found)["Masked prediction", "held-out R² of fitted groups"]
    assert set(r2) == {RUN, RANDOM, "all connections"} and r2[RANDOM]["low"] <= r2[RANDOM]["high"]
    assert "fitted to the frozen encoder" in " ".join(found["remarks"])
    assert len(found["group_list"]) == 4 and found["images"] == {"train": 100, "test": 40}
    # The fit is kept for embed and export, apart from what a run's own groups would be.
    encoder = load(runs["dense"])
    assert find_groups(str(tmp_path), "auto", encoder) is None
    activations = find_groups(str(runs["dense"]), str(tmp_path), encoder)
    assert activations is not None and activations.kind == "feature" and len(activations.W) == 4


def test_regions_say_which_patches_they_predict(
    runs: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    found = run_explain(runs["region"], str(folder), options=Options(quick=True, out=tmp_path))
    cells = [group["cell"] for group in found["group_list"]]
    assert sorted(patch for cell in cells for patch in cell) == list(range(16))
    assert list(rows_of(found)["Groups and objects", "mBO"]) == ["k-means", PLACES, CEILING]
    assert not any(name.startswith("DCI") for _, name in rows_of(found))  # quick


def test_images_without_labels_or_masks_are_enough(
    runs: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "images", tmp_path / "plain")
    options = Options(quick=True, out=tmp_path / "out")
    found = run_explain(runs["concept"], str(tmp_path / "plain"), options=options)
    sections = {section for section, _ in rows_of(found)}
    assert sections == {"Sparsity of W", "Information", "Masked prediction"}
    assert "without labels" in found["verdict"]


def test_compare_matches_a_run_with_itself_and_with_its_other_seed(
    explained: dict[str, Any], runs: dict[str, Path], folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    copy = tmp_path / "twin"
    shutil.copytree(runs["concept"], copy)
    status = cli.main(
        ["compare", str(runs["concept"]), str(copy), "--out", str(tmp_path / "a.html")]
    )
    assert status == 0
    # Each group that has latents is matched with itself; without any it correlates with nothing.
    W = load_tensors(copy / "groups.safetensors")[0]["W"]
    alive = int(W.flatten(1).any(1).sum())
    assert alive > 1
    assert f"Their 6 matched groups correlate {alive / 6:.2f} on" in capsys.readouterr().out
    assert "No measure sets the runs clearly apart" in (tmp_path / "a.html").read_text()
    run_explain(runs["concept-s1"], str(folder), options=Options(quick=True))
    assert cli.main(["compare", str(runs["concept"]), str(runs["concept-s1"])]) == 0
    assert (runs["concept"] / "compare-concept-s1.html").exists()
    options = Options(quick=True, test_limit=30, out=copy)
    run_explain(runs["concept-s1"], str(folder), options=options)
    capsys.readouterr()
    assert cli.main(["compare", str(runs["concept"]), str(copy)]) == 2
    assert "same --data and --test-limit" in capsys.readouterr().err
    (copy / METRICS).write_text('{"run": "a"}')
    assert cli.main(["compare", str(runs["concept"]), str(copy)]) == 2
    assert "a damaged report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("explain", "Missing from sparsejepa explain: RUN"),
        ("explain {run}", "Missing from sparsejepa explain: --data"),
        ("explain {run} --data {data} --factors colour", "no factor 'colour'"),
        ("explain nowhere --data {data}", "nowhere: no such run directory"),
        ("explain {dense} --data {data} --num-groups 97", "has 96 latents; take 1 to 96"),
        ("explain {dense} --data {data} --num-groups 7", "does not divide the 96 latents"),
        ("explain {dense} --data {data} --density 0", "--density 0: must be above 0"),
        ("explain {run} --data {data} --limit 0", "--limit 0: must be at least 1"),
        ("explain {run} --data {data} --img-size 1 2 3", "--img-size"),
        ("explain {run} --data {data} --limit 8", "8 train images are too few"),
        ("compare {run}", "Expected 2 values"),
        ("compare {run} {run}", "the same folder"),
        ("compare {region} {dense}", "run sparsejepa explain first"),
    ],
)
def test_mistakes_get_one_line(
    command: str, says: str, runs: dict[str, Path], folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    paths = {name: shlex.quote(str(path)) for name, path in runs.items()}
    words = command.format(
        run=paths["concept"],
        dense=paths["dense"],
        region=paths["region"],
        data=shlex.quote(str(folder)),
    )
    if "--data" in words and "explain" in words:
        words += f" --out {shlex.quote(str(tmp_path))}"
    assert cli.main(shlex.split(words)) == 2
    err = capsys.readouterr().err.strip()
    assert says in err and len(err.splitlines()) == 1


def test_a_dead_encoder_is_refused(runs: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(runs["concept"], tmp_path / "dead")
    path = tmp_path / "dead" / "encoder.safetensors"
    tensors, _ = load_tensors(path)
    save_tensors(path, {k: torch.zeros_like(v) for k, v in tensors.items()}, {})
    with pytest.raises(UserError, match="a dead encoder"):
        options = Options(quick=True, out=tmp_path / "out")
        run_explain(tmp_path / "dead", str(folder), options=options)
    assert not (tmp_path / "out" / METRICS).exists()


def test_factors_that_follow_from_another_are_left_out_and_named() -> None:
    fine = np.arange(40) % 8
    other = np.random.default_rng(0).permutation(fine) % 3
    targets = {"fine": (fine, fine), "coarse": (fine // 2, fine // 2), "other": (other, other)}
    kept, left_out = independent(targets)
    assert list(kept) == ["fine", "other"]
    assert len(left_out) == 1 and "'coarse' follows from 'fine'" in left_out[0]


def test_the_report_of_a_foreign_checkpoint_does_not_go_into_it(tmp_path: Path) -> None:
    path = tmp_path / "IN1K-vit.h.14-300e.pth.tar"
    path.write_bytes(b"")
    assert run_folder(str(path)) == Path("runs/explain-IN1K-vit.h.14-300e.pth.tar")
    assert run_folder(str(tmp_path)) == tmp_path
