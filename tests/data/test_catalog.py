"""Names of data sets, the built-in scenes, and the list."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsejepa.cli import main
from sparsejepa.data import catalog, scenes
from sparsejepa.data.catalog import describe, list_datasets, load_dataset, stream_dataset
from sparsejepa.data.facts import counts_text, one_sided, skipped_lines
from sparsejepa.errors import UserError

Save = Callable[..., np.ndarray]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "SCENE_COUNTS", {"train": 80, "test": 40})


def test_scenes_are_the_generators(tmp_path: Path):
    train = load_dataset("scenes", "train", cache_dir=tmp_path)
    test = load_dataset("scenes", "test", cache_dir=tmp_path)
    assert train.img_size == (32, 32) and (len(train), len(test)) == (80, 40)
    assert next(iter(train.targets)) == "count" and train.primary is train.targets["count"]
    want = scenes.Scenes().render(np.arange(80, 120), 32)
    assert (test.images == want.images).all()
    counts = [int(test.targets["count"].names[v]) for v in test.targets["count"].values]
    assert counts == want.count.tolist()
    assert list(test.targets) == list(scenes.Scenes.FACTORS)
    assert test.mean == train.mean


def test_single_objects_have_every_factor_and_disjoint_splits(tmp_path: Path):
    train = load_dataset("scenes:single", "train", cache_dir=tmp_path)
    test = load_dataset("scenes:single", "test", cache_dir=tmp_path)
    grid = scenes.SingleObjects()
    assert list(train.targets) == list(grid.FACTORS)
    chosen = []
    for images in (train, test):
        factors = np.stack([target.values for target in images.targets.values()], 1)
        chosen.append(grid.index(factors))
        assert (grid.render(chosen[-1], 32) == images.images).all()
    assert len(set(np.concatenate(chosen).tolist())) == 120


def test_scenes_in_other_sizes(tmp_path: Path):
    assert load_dataset("scenes", img_size=(64, 64), cache_dir=tmp_path).img_size == (64, 64)
    with pytest.raises(UserError, match="square"):
        load_dataset("scenes", img_size=(32, 64), cache_dir=tmp_path)


def test_a_folder_by_path_and_by_name_in_the_data_root(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
):
    for i in range(5):
        save(tmp_path / "photos" / f"{i}.png")
    options: dict[str, Any] = {"data_root": tmp_path, "cache_dir": tmp_path / "cache"}
    by_path = load_dataset(tmp_path / "photos", cache_dir=tmp_path / "cache")
    assert load_dataset("photos", **options).fingerprint == by_path.fingerprint
    monkeypatch.chdir(tmp_path)
    assert load_dataset("./photos", cache_dir=tmp_path / "cache").name == "photos"
    os.rename("photos", "svhn")
    assert len(load_dataset("svhn", **options)) == 4  # a copy as image files will do


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar1000", r"unknown data set 'cifar1000' \(did you mean 'cifar100'\?\)"),
        ("scene", r"did you mean 'scenes'"),
        ("", "unknown data set ''"),
        ("./nowhere", "./nowhere: no such folder"),
        ("~/nowhere/at/all", "no such folder"),
        ("uoft-cs/cifar100", "for a data set of the hub write hub:uoft-cs/cifar100"),
        ("hub:cifar100", "write hub:OWNER/NAME"),
        ("hub:a b/c", "write hub:OWNER/NAME"),
    ],
)
def test_names_that_are_none(tmp_path: Path, name: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(name, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_split(tmp_path: Path):
    with pytest.raises(UserError, match=r"split 'tests'.*did you mean 'test'"):
        load_dataset("scenes", "tests", cache_dir=tmp_path)


def test_splits_of_different_sizes(tmp_path: Path, save: Save):
    save(tmp_path / "d" / "train" / "0.png", (8, 8))
    save(tmp_path / "d" / "test" / "0.png", (8, 6))
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache"}
    assert load_dataset(tmp_path / "d", "train", **options).img_size == (8, 8)
    with pytest.raises(UserError, match=r"8x8 pixels and test images 8x6; set --img-size"):
        load_dataset(tmp_path / "d", "test", **options)
    assert load_dataset(tmp_path / "d", "test", img_size=(6, 6), **options).img_size == (6, 6)


def test_describe_is_plain(tmp_path: Path, save: Save):
    for i in range(10):
        save(tmp_path / "d" / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "d" / "a" / "broken.png").write_bytes(b"x")
    result = describe(tmp_path / "d", cache_dir=tmp_path / "cache")
    assert json.loads(json.dumps(result)) == result
    splits = result["splits"]
    assert splits["train"]["images"] + splits["test"]["images"] == 10
    assert splits["train"]["targets"] == {"class": 2}
    assert splits["train"]["classes"] == {"class": {"a": 4, "b": 4}}
    assert result["test_split"] == "a fifth of each class, by a hash of the name"
    assert result["sizes"] == {"smallest": [8, 8], "largest": [8, 8]} and result["notes"] == []
    skipped = splits["train"]["skipped"] + splits["test"]["skipped"]
    assert skipped == [["a/broken.png", "not an image"]]
    assert result["img_size"] == [8, 8] and len(result["mean"]) == len(result["std"]) == 3


def test_list_of_data_sets(tmp_path: Path, save: Save):
    for path in (
        "uoft-cs/cifar100/cifar100/train-00000-of-00001.parquet",
        "uoft-cs/cifar100/cifar100/test-00000-of-00001.parquet",
        "someone/pictures/data/train-00000-of-00001.parquet",
        "datasets--a--b/snapshots/123/data/train.parquet",
        "flat/train.parquet",
        ".hidden/x/y/train.parquet",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    save(tmp_path / "photos" / "train" / "1.png")
    save(tmp_path / "photos" / "val" / "1.png")
    for shard in ("train-0.tar", "val-0.tar"):
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / shard).touch()
    rows = {row.name: row for row in list_datasets(tmp_path)}
    names = ["scenes", "scenes:single", "cifar100", "cifar10", "svhn"]
    official = ["inaturalist2018", "places365", "imagenet", "clevr-count"]
    assert list(rows)[:5] == names and set(official) <= rows.keys()
    others = {"hub:someone/pictures", "hub:a/b", "flat", "photos", "shards"}
    assert set(list(rows)[5:]) == {*official, *others}
    assert rows["scenes"].found == "built in" and rows["svhn"].found == ""
    assert rows["cifar100"].found == str(tmp_path / "uoft-cs" / "cifar100")
    assert rows["cifar100"].splits == ("train", "test")
    assert rows["photos"].splits == ("train", "val") and rows["flat"].splits == ("all",)
    assert (rows["shards"].source, rows["shards"].splits) == ("tar shards", ("train", "val"))
    assert [row.name for row in list_datasets(None)] == names + official


def test_importing_the_catalog_loads_no_readers():
    """pyarrow and the hub's client cost seconds; only parquet data needs them."""
    code = (
        "import sys, sparsejepa.data.catalog;"
        "sys.exit(any(m in sys.modules for m in ('pyarrow', 'huggingface_hub', 'torchvision')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("size", [16, (16, 16)])
def test_sizes_as_one_number_or_two(tmp_path: Path, save: Save, size: Any):
    for i in range(5):
        save(tmp_path / "d" / f"{i}.jpg", (20 + i, 30))
    assert load_dataset(tmp_path / "d", img_size=size, cache_dir=tmp_path).img_size == (16, 16)
    assert stream_dataset(tmp_path / "d", img_size=size).img_size == (16, 16)
    for wrong in (0, (4, 4, 4), "16", 1.5):
        with pytest.raises(UserError, match=r"img_size .*: must be one whole number, or height"):
            load_dataset(tmp_path / "d", img_size=wrong, cache_dir=tmp_path)  # type: ignore


@pytest.fixture
def mixed(tmp_path: Path, save: Save) -> Path:
    """Images of several sizes; train has a class that test has not, and the other way round."""
    for i in range(4):
        save(tmp_path / "d" / "train" / "ab"[i % 2] / f"{i}.jpg", (20, 100 + i))
        save(tmp_path / "d" / "val" / "bd"[i % 2] / f"{i}.png", (200, 150))
    return tmp_path / "d"


def test_check_tells_of_images_that_are_too_small(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = "smallest 20x100, largest 200x150; 4 of 8 are smaller than 64: --upscale or "
    found = describe(mixed, img_size=64, cache_dir=tmp_path / "c")
    assert found["notes"][0] == f"{small}--img-size 20"
    assert found["mean"] is None and found["splits"]["train"]["images"] == 4
    several = "smallest 20x100, largest 200x150: set --img-size, at most 20 (more with --upscale)"
    assert describe(mixed)["notes"][0] == several
    assert describe(mixed, stream=True)["notes"][0] == several
    for size, upscale in ((20, False), (64, True)):
        found = describe(mixed, img_size=size, upscale=upscale, cache_dir=tmp_path / "c")
        assert (
            found["notes"] == ["class: only in train: a (2 images); only in test: d (2 images)"]
            and found["mean"]
        )
    assert found["test_split"] == "val/"
    assert main(["data", "check", str(mixed), "--img-size", "64"]) == 0
    out = capsys.readouterr().out
    assert small in " ".join(out.split()) and "a 2, b 2" in out and "val/" in out
    assert main(["data", "get", str(mixed), "--img-size", "64"]) == 2
    assert "are smaller than 64" in capsys.readouterr().err


def test_turned_photos_are_measured_as_they_are_shown(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(5):
        Image.new("RGB", (40, 20)).save(tmp_path / f"{i}.jpg", exif=exif)
    assert describe(tmp_path, cache_dir=tmp_path / "c")["sizes"]["smallest"] == [40, 20]


def test_one_image_is_too_few(tmp_path: Path, save: Save):
    save(tmp_path / "d" / "a.png")
    with pytest.raises(UserError, match="1 image: too few to train on; add some"):
        describe(tmp_path / "d", cache_dir=tmp_path / "c")


def test_lines_about_many_classes_and_files():
    counts = {f"c{i}": i + 1 for i in range(12)}
    assert counts_text(counts).endswith("c9 10, and 2 more")
    (line,) = one_sided({"train": {"class": counts}, "test": {"class": {"c0": 1}}})
    assert line.startswith("class: only in train: c1, ")
    assert line.endswith("c10, and 1 more (77 images)")
    skipped = [[f"{i}.png", "no row in factors.csv"] for i in range(2000)]
    assert skipped_lines([*skipped, ["x.png", "not an image"]]) == [
        "skipped 2000 files: no row in factors.csv; the first is 0.png",
        "skipped x.png: not an image",
    ]
