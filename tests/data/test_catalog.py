"""Names of data sets, the built-in scenes, and the list."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from sparsejepa.cli import main
from sparsejepa.data import scenes
from sparsejepa.data.catalog import corrupt, describe, list_datasets, load_dataset
from sparsejepa.data.images import ImageSet, Target
from sparsejepa.errors import UserError

Save = Callable[..., np.ndarray]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scenes, "SCENE_COUNTS", {"train": 80, "test": 40})


def test_scenes_are_the_generators(tmp_path: Path):
    train = load_dataset("scenes", "train", cache_dir=tmp_path)
    test = load_dataset("scenes", "test", cache_dir=tmp_path, truth=True)
    assert train.img_size == (32, 32) and (len(train), len(test)) == (80, 40)
    assert next(iter(train.targets)) == "count" and train.primary is train.targets["count"]
    want = scenes.Scenes().render(np.arange(80, 120), 32)
    assert (test.images == want.images).all() and (test.masks == want.masks).all()
    assert train.masks is None
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
        factors = tuple(target.values for target in images.targets.values())
        chosen.append(np.ravel_multi_index(factors, grid.LEVELS))
        assert (grid.render(chosen[-1], 32).images == images.images).all()
    assert len(set(np.concatenate(chosen).tolist())) == 120


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


def test_splits_of_different_sizes(tmp_path: Path, save: Save):
    save(tmp_path / "d" / "train" / "0.png", (8, 8))
    save(tmp_path / "d" / "test" / "0.png", (8, 6))
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache"}
    assert load_dataset(tmp_path / "d", "train", **options).img_size == (8, 8)
    with pytest.raises(UserError, match=r"8x8 pixels and test images 8x6; set --img-size"):
        load_dataset(tmp_path / "d", "test", **options)
    assert load_dataset(tmp_path / "d", "test", img_size=(6, 6), **options).img_size == (6, 6)


def test_describe_is_plain(tmp_path: Path, save: Save, capsys: pytest.CaptureFixture[str]):
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
    skipped = splits["train"]["skipped"] + splits["test"]["skipped"]
    assert skipped == [["a/broken.png", "not an image"]]
    assert result["img_size"] == [8, 8] and len(result["mean"]) == len(result["std"]) == 3
    assert main(["data", "check", str(tmp_path / "d")]) == 0
    out = capsys.readouterr().out
    assert "a: 4, b: 4" in out and "a/broken.png (not an image)" in out


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
    assert list(rows)[:5] == names
    others = {"hub:someone/pictures", "hub:a/b", "flat", "photos", "shards"}
    assert set(list(rows)[5:]) == others
    assert rows["scenes"].found == "built in" and rows["svhn"].found == ""
    assert rows["cifar100"].found == str(tmp_path / "uoft-cs" / "cifar100")
    assert rows["photos"].source == "folder in the data root"
    assert [row.name for row in list_datasets(None)] == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "tests"}, r"split 'tests'.*did you mean 'test'"),
        ({"img_size": (32, 64)}, "square"),
        ({"img_size": 15}, "--img-size 15 is too small"),
        ({"img_size": (4, 4, 4)}, r"img_size .*: must be one whole number, or height"),
        ({"factors": ["colr"]}, r"scenes: no factor 'colr'.*did you mean 'colour'"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        load_dataset("scenes", cache_dir=tmp_path, **settings)
    train = load_dataset("scenes", img_size=64, factors=["shape"], cache_dir=tmp_path)
    assert train.img_size == (64, 64) and list(train.targets) == ["shape"]


def test_importing_the_catalog_loads_no_readers():
    """pyarrow and the hub's client cost seconds; only parquet data needs them."""
    code = (
        "import sys, sparsejepa.data.catalog;"
        "sys.exit(any(m in sys.modules for m in ('pyarrow', 'huggingface_hub', 'torchvision')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Noise and shuffled patches in place of the true images


def true_images(count: int) -> ImageSet:
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 24, 3), np.uint8)
    labels = {"class": Target(np.arange(count) % 3, ("a", "b", "c"))}
    moments = ((0.5, 0.4, 0.3), (0.1, 0.15, 0.2))
    return ImageSet("set", "train", images, labels, *moments, (("x", "damaged"),), "f")


def patches(image: np.ndarray, side: int = 4) -> list[bytes]:
    rows, columns = (range(0, size, side) for size in image.shape[:2])
    return [image[y : y + side, x : x + side].tobytes() for y in rows for x in columns]


def test_noise_has_the_moments_of_a_clipped_normal(tmp_path: Path):
    images = true_images(120)
    made = corrupt(images, "noise", patch_size=4, cache_dir=tmp_path)
    pixels = made.images.reshape(-1, 3).astype(float)
    level = np.arange(256)
    edges = np.concatenate([[-np.inf], level[:-1] + 0.5, [np.inf]]) / 255
    for channel, values in enumerate(pixels.T):
        share = np.diff(norm.cdf(edges, images.mean[channel], images.std[channel]))
        mean = share @ level  # rounded and clipped
        std = np.sqrt(share @ (level - mean) ** 2)
        error = std / np.sqrt(len(values))
        assert abs(values.mean() - mean) < 4 * error and abs(values.std() - std) < 4 * error
    flat = ((pixels - pixels.mean(0)) / pixels.std(0)).reshape(120, -1)
    assert abs(np.corrcoef(pixels.T) - np.eye(3)).max() < 0.02, "channels are independent"
    assert abs(np.corrcoef(flat) - np.eye(120)).max() < 0.1, "images are independent"


def test_each_image_is_shuffled_in_an_order_of_its_own(tmp_path: Path):
    images = true_images(40)
    made = corrupt(images, "shuffle", patch_size=4, cache_dir=tmp_path)
    orders = set()
    for before, after in zip(images.images, made.images, strict=True):
        was = patches(before)
        assert sorted(patches(after)) == sorted(was)
        orders.add(tuple(was.index(patch) for patch in patches(after)))
    assert len(orders) == 40


@pytest.mark.parametrize("kind", ["noise", "shuffle"])
def test_of_a_corrupted_set_everything_but_the_images_stays(kind: Any, tmp_path: Path):
    images = true_images(20)
    made = corrupt(images, kind, patch_size=4, cache_dir=tmp_path)
    assert (made.images != images.images).any((1, 2, 3)).all()
    assert made.targets["class"].values.tolist() == images.targets["class"].values.tolist()
    assert (made.mean, made.std) == (images.mean, images.std)
    assert made.skipped == images.skipped and made.fingerprint != images.fingerprint
    part = replace(images, images=images.images[:7], targets={}, fingerprint="part")
    again = corrupt(part, kind, patch_size=4, cache_dir=tmp_path)
    assert (again.images == made.images[:7]).all()  # each depends on its position alone
