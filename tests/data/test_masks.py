"""Object masks: of the built-in scenes, and files beside images."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsejepa.data import catalog, scenes
from sparsejepa.data.catalog import load_dataset
from sparsejepa.data.store import ImageSet
from sparsejepa.errors import UserError

Save = Callable[..., np.ndarray]
LABELS = np.zeros((8, 8), np.uint8)
LABELS[1:4, 2:7], LABELS[5:, 5:] = 1, 2


def write_mask(path: Path, labels: np.ndarray, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if mode == "P":
        image = Image.fromarray(labels, "L")
        image.putpalette([(7 * i) % 256 for i in range(768)])
    image.save(path)


@pytest.fixture
def folder(tmp_path: Path, save: Save) -> Path:
    """Ten images under images/, train and test by name."""
    for i in range(10):
        save(tmp_path / "d" / "images" / f"{i}.png")
    rows = "".join(f"{i}.png,{i % 2},{'train' if i < 8 else 'test'}\n" for i in range(10))
    (tmp_path / "d" / "factors.csv").write_text("file,kind,split\n" + rows)
    return tmp_path / "d"


def load(folder: Path, split: str = "train", **options: Any) -> ImageSet:
    return load_dataset(folder, split, cache_dir=folder.parent / "cache", truth=True, **options)


def masks(images: ImageSet) -> np.ndarray:
    assert images.masks is not None
    assert images.masks.shape == (len(images), *images.img_size)
    return images.masks


@pytest.mark.parametrize("name", ["scenes", "scenes:single"])
def test_built_in_masks_are_the_generators(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(catalog, "SCENE_COUNTS", {"train": 80, "test": 40})
    for split in ("train", "test"):
        images = load_dataset(name, split, img_size=(16, 16), cache_dir=tmp_path, truth=True)
        if name == "scenes":
            first = 0 if split == "train" else 80
            want = scenes.Scenes().render(np.arange(first, first + len(images)), 16)
            assert (masks(images) == want.masks).all()
        else:
            grid = scenes.SingleObjects()
            factors = np.stack([target.values for target in images.targets.values()], 1)
            assert (masks(images) == grid.masks(grid.index(factors), 16)).all()
    assert load_dataset("scenes", "test", img_size=(16, 16), cache_dir=tmp_path).masks is None


def test_masks_follow_a_subset(folder: Path):
    for i in range(10):
        write_mask(folder / "masks" / f"{i}.png", np.full((8, 8), i + 1, np.uint8))
    images = load(folder).subset(4, seed=1)
    assert [int(file[0]) + 1 for file in images.files] == masks(images)[:, 0, 0].tolist()
    assert load_dataset(folder, cache_dir=folder.parent / "cache").masks is None


@pytest.mark.parametrize(
    ("labels", "mode", "ending"),
    [
        (LABELS, "L", "png"),
        (LABELS, "P", "png"),
        (LABELS, "P", "gif"),
        (LABELS > 0, "1", "png"),
        (LABELS.astype(np.uint16) * 300, "I;16", "png"),
        (LABELS.astype(np.int32) * 300, "I", "tif"),
        (LABELS, "L", "bmp"),
    ],
)
def test_kinds_of_mask_files(folder: Path, labels: np.ndarray, mode: str, ending: str):
    for i in range(10):
        write_mask(folder / "masks" / f"{i}.{ending}", labels, mode)
    for split in ("train", "test"):
        found = masks(load(folder, split))
        assert (found == labels).all()
        assert found.dtype == (np.uint16 if labels.max() > 255 else np.uint8)


def test_png_comes_first(folder: Path):
    for i in range(10):
        write_mask(folder / "masks" / f"{i}.bmp", LABELS)
        write_mask(folder / "masks" / f"{i}.png", LABELS + 1)
    assert (masks(load(folder)) == LABELS + 1).all()


@pytest.mark.parametrize("scale", [1, 300])
def test_masks_are_resized_like_images_to_the_nearest(tmp_path: Path, scale: int):
    """An image that shows its own labels, 48 x 64 in blocks of 4 x 4, cropped to 48 x 48."""
    blocks = np.random.default_rng(0).integers(0, 3, (12, 16)).astype(np.uint16)
    labels = np.kron(blocks, np.ones((4, 4), np.uint16))
    for i in range(4):
        path = tmp_path / "d" / "images" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([labels.astype(np.uint8) * 100] * 3, 2)).save(path)
        write_mask(tmp_path / "d" / "masks" / f"{i}.png", labels * scale)
    images = load(tmp_path / "d", img_size=(12, 12))
    assert (masks(images) == blocks[:, 2:14] * scale).all()
    shown = images.images[0, :, :, 0].astype(float)  # bicubic, so that edges blend
    assert np.corrcoef(shown.ravel(), blocks[:, 2:14].ravel())[0, 1] > 0.95


def test_class_folders_below_images(tmp_path: Path, save: Save):
    for i in range(6):
        for split in ("train", "test"):
            save(tmp_path / "d" / "images" / split / "ab"[i % 2] / f"{i}.jpg")
            write_mask(tmp_path / "d" / "masks" / split / "ab"[i % 2] / f"{i}.png", LABELS + i)
    images = load(tmp_path / "d")
    assert images.targets["class"].names == ("a", "b")
    assert masks(images)[:, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]


def test_photographs_that_lie_on_their_side(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(4):
        path = tmp_path / "d" / "images" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path, exif=exif)
        write_mask(tmp_path / "d" / "masks" / f"{i}.png", LABELS[:, :6])  # 8 high, 6 wide
    assert (masks(load(tmp_path / "d")) == LABELS[:, :6]).all()


def test_no_masks_are_none_without_a_word(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(folder).masks is None


def test_missing_and_unreadable_masks_are_background(folder: Path):
    for i in range(2, 10):
        write_mask(folder / "masks" / f"{i}.png", LABELS)
    (folder / "masks" / "1.png").write_bytes(b"x")
    with pytest.warns(match=r"masks: no readable mask for 2 of 8 images of the train.*first is 0"):
        found = masks(load(folder))
    assert not found[:2].any() and (found[2:] == LABELS).all()


def test_masks_under_other_names(folder: Path):
    write_mask(folder / "masks" / "mask0.png", LABELS)
    with pytest.warns(match="no readable mask for 8 of 8 images"):
        assert load(folder).masks is None


def test_empty_masks(folder: Path):
    for i in range(10):
        write_mask(folder / "masks" / f"{i}.png", LABELS * 0)
    with pytest.warns(match="all masks are empty"):
        assert load(folder).masks is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            np.zeros((8, 6), np.uint8),
            r"3\.png: 8x6 pixels, but its image has 8x8; make it the same",
        ),
        (np.zeros((8, 8, 3), np.uint8), r"3\.png: a mask is a grey or palette image.*is RGB"),
    ],
)
def test_masks_that_do_not_fit(folder: Path, mask: np.ndarray, message: str):
    for i in range(10):
        write_mask(folder / "masks" / f"{i}.png", mask if i == 3 else LABELS)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_labels_beyond_16_bits(folder: Path):
    for i in range(10):
        write_mask(folder / "masks" / f"{i}.tif", LABELS.astype(np.int32) * 70_000)
    with pytest.raises(UserError, match="labels must be from 0 to 65535"):
        load(folder)
