"""Folders of images in every layout that users have."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparsejepa.data.catalog import load_dataset
from sparsejepa.data.folders import Files, Part, in_test, make_listings, read_folder, scan
from sparsejepa.data.images import ImageSet
from sparsejepa.errors import UserError

Save = Callable[..., np.ndarray]
LABELS = np.zeros((8, 8), np.uint8)
LABELS[1:4, 2:7], LABELS[5:, 5:] = 1, 2


@pytest.fixture
def both(tmp_path: Path) -> Callable[..., tuple[ImageSet, ImageSet]]:
    """Return a function that loads train and test of a folder."""

    def load(folder: Path, **options: Any) -> tuple[ImageSet, ImageSet]:
        options = {"cache_dir": tmp_path / "cache", **options}
        return load_dataset(folder, "train", **options), load_dataset(folder, "test", **options)

    return load


def labels(images: ImageSet, key: str = "class") -> list[str]:
    target = images.targets[key]
    return [target.names[value] for value in target.values]


def test_train_and_test_with_classes(tmp_path: Path, save: Save, both):
    root = tmp_path / "pets"
    pixels = {
        f"{split}/{name}/{i}.png": save(root / split / name / f"{i}.png")
        for split, name, i in (("train", "dog", 0), ("train", "cat", 1), ("test", "fish", 2))
    }
    save(root / "val" / "cat" / "9.png")  # test/ comes first
    train, test = both(root)
    assert (train.name, train.split, test.split) == ("pets", "train", "test")
    assert train.files == ("cat/1.png", "dog/0.png") and test.files == ("fish/2.png",)
    assert labels(train) == ["cat", "dog"] and labels(test) == ["fish"]
    assert train.targets["class"].names == test.targets["class"].names == ("cat", "dog", "fish")
    assert (train.images == [pixels["train/cat/1.png"], pixels["train/dog/0.png"]]).all()
    assert test.mean == train.mean and test.std == train.std
    values = np.array(train.images).reshape(-1, 3) / 255
    np.testing.assert_allclose(train.mean, values.mean(0), rtol=1e-10)


@pytest.mark.parametrize(("train", "test"), [("train", "val"), ("TRAIN", "Valid")])
def test_split_folders_in_capitals_are_no_classes(tmp_path: Path, save: Save, both, train, test):
    for name in "ab":
        save(tmp_path / train / name / "1.png")
        save(tmp_path / test / name / "2.png")
    found = both(tmp_path)
    assert [i.files for i in found] == [("a/1.png", "b/1.png"), ("a/2.png", "b/2.png")]
    assert found[0].targets["class"].names == ("a", "b")


def test_a_folder_within_a_folder_is_seen_through(tmp_path: Path, save: Save, both):
    save(tmp_path / "pets" / "pets" / "train" / "a" / "1.png")
    save(tmp_path / "pets" / "pets" / "test" / "a" / "2.png")
    train, test = both(tmp_path / "pets")
    assert (train.files, test.files) == (("a/1.png",), ("a/2.png",))


@pytest.mark.parametrize("folder", ["", "images", "train/cat", "a/b"])
def test_a_sole_folder_is_no_class(tmp_path: Path, save: Save, both, folder: str):
    for i in range(5):
        save(tmp_path / folder / f"{i}.png")
    for images in both(tmp_path):
        assert images.targets == {} and len(images)


def test_one_split_is_divided_by_class(tmp_path: Path, save: Save, both):
    for name, count in (("a", 10), ("b", 15), ("c", 2), ("lonely", 1)):
        for i in range(count):
            save(tmp_path / "d" / name / f"{i}.png")
    train, test = both(tmp_path / "d")
    assert Counter(labels(train)) == {"a": 8, "b": 12, "c": 1, "lonely": 1}
    assert Counter(labels(test)) == {"a": 2, "b": 3, "c": 1}
    assert not set(train.files) & set(test.files)
    for i in range(10, 15):
        save(tmp_path / "d" / "a" / f"{i}.png")
    _, after = both(tmp_path / "d")
    assert len(set(test.files) - set(after.files)) <= 2  # the division hardly moves


@given(st.lists(st.tuples(st.text(max_size=5), st.integers(0, 3)), unique_by=lambda pair: pair[0]))
def test_division_is_a_fifth_of_each_class_whatever_the_order(pairs):
    names, values = [pair[0] for pair in pairs], np.array([pair[1] for pair in pairs])
    chosen = in_test(names, values)
    counts = Counter(label for _, label in pairs)
    test = Counter(label for (_, label), inside in zip(pairs, chosen, strict=True) if inside)
    for label, count in counts.items():
        assert test[label] == (max(1, round(count / 5)) if count > 1 else 0)
    backwards = in_test(names[::-1], values[::-1])
    assert (backwards[::-1] == chosen).all()


def test_nested_class_folders(tmp_path: Path, save: Save, both):
    for name in ("animal/cat", "animal/dog", "plant/tree"):
        for i in range(5):
            save(tmp_path / "d" / "train" / name / f"{i}.png")
            save(tmp_path / "d" / "test" / name / f"{i}.png")
    train, _ = both(tmp_path / "d")
    assert list(train.targets) == ["class", "superclass"]
    assert set(labels(train)) == {"animal/cat", "animal/dog", "plant/tree"}
    assert Counter(labels(train, "superclass")) == {"animal": 10, "plant": 5}


def test_a_split_without_class_folders_has_no_labels(tmp_path: Path, save: Save, both):
    for name in ("train/0.png", "train/1.png", "test/a/0.png", "test/b/0.png"):
        save(tmp_path / "d" / name)
    train, test = both(tmp_path / "d")
    assert train.targets == {} and labels(test) == ["a", "b"]


def test_images_beside_class_folders_are_left_out_and_listed(tmp_path: Path, save: Save, both):
    for i in range(4):
        save(tmp_path / "d" / "train" / "a" / f"{i}.png")
    save(tmp_path / "d" / "train" / "cover.png")
    save(tmp_path / "d" / "test" / "a" / "0.png")
    train, _ = both(tmp_path / "d")
    assert len(train) == 4
    assert train.skipped == (("cover.png", "lies beside the class folders"),)


def test_scan_passes_over_hidden_other_and_looping(tmp_path: Path, save: Save):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / ".hidden" / "2.png")
    save(tmp_path / "a" / ".3.png")
    (tmp_path / "notes.txt").write_text("not an image")
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.symlink(tmp_path / "a", tmp_path / "b")
    os.symlink(tmp_path / "gone.png", tmp_path / "a" / "dangling.png")
    os.symlink("self.png", tmp_path / "a" / "self.png")
    files = scan(tmp_path)
    names = [files.name(row) for row in range(len(files))]
    assert names == [
        f"{folder}/{name}.png" for folder in "ab" for name in ("1", "dangling", "self")
    ]


def test_unreadable_files_are_listed(tmp_path: Path, save: Save, both):
    for i in range(4):
        save(tmp_path / "d" / "train" / "a" / f"{i}.png")
        save(tmp_path / "d" / "test" / "a" / f"{i}.png")
    save(tmp_path / "d" / "test" / "b" / "0.png")
    (tmp_path / "d" / "train" / "a" / "0.png").write_bytes(b"")
    os.symlink("gone", tmp_path / "d" / "train" / "a" / "4.png")
    train, _ = both(tmp_path / "d")
    assert train.files == ("a/1.png", "a/2.png", "a/3.png")
    assert len(train.targets["class"].values) == 3
    assert dict(train.skipped) == {
        "a/0.png": "not an image",
        "a/4.png": "No such file or directory",
    }


def test_missing_empty_and_file(tmp_path: Path, save: Save):
    with pytest.raises(UserError, match="no such folder"):
        read_folder(tmp_path / "gone", "x")
    with pytest.raises(UserError, match=rf"{tmp_path}: no images in it \(.png"):
        read_folder(tmp_path, "x")
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.zip: not a folder; give the folder that holds the im"):
        load_dataset(tmp_path / "a.zip")
    save(tmp_path / "d" / "a.png")
    with pytest.raises(UserError, match="no images for the test split"):
        load_dataset(tmp_path / "d", "test", cache_dir=tmp_path / "c")


def test_changed_files_are_decoded_again(tmp_path: Path, save: Save, both):
    save(tmp_path / "d" / "train" / "a.png")
    save(tmp_path / "d" / "test" / "b.png")
    first, _ = both(tmp_path / "d")
    new = save(tmp_path / "d" / "train" / "a.png")
    os.utime(tmp_path / "d" / "train" / "a.png", ns=(1, 1))
    second, _ = both(tmp_path / "d")
    assert first.fingerprint != second.fingerprint and (second.images[0] == new).all()


def write_table(
    folder: Path, header: list[str], rows: list[Any], name: str = "factors.csv", mark: str = ","
) -> None:
    with (folder / name).open("w", newline="") as file:
        csv.writer(file, delimiter=mark).writerows([header, *rows])


def test_table_of_factors(tmp_path: Path, save: Save, both):
    for i in range(20):
        save(tmp_path / "images" / f"{i:02d}.png")
    rows = [[f"{i:02d}.png", i % 3 + 8, "rg"[i % 2], i / 2, f"id{i}"] for i in range(20)]
    write_table(tmp_path, ["file", "count", "colour", "x", "source"], rows)
    train, test = both(tmp_path)
    assert list(train.targets) == ["count", "colour"]  # the others name images
    assert train.targets["count"].names == ("8", "9", "10")  # numbers in the order of numbers
    for images in (train, test):
        for file, count, colour in zip(
            images.files, labels(images, "count"), labels(images, "colour"), strict=True
        ):
            i = int(file.removesuffix(".png"))
            assert (count, colour) == (str(i % 3 + 8), "rg"[i % 2])
    assert len(train) == 17 and len(test) == 3  # a fifth of 7, 7 and 6, rounded


def test_table_with_splits_and_gaps(tmp_path: Path, save: Save, both):
    for i in range(5):
        save(tmp_path / "images" / f"{i}.png")
    rows = [["0.png", "a", "train"], ["1.png", "b", "Train"], ["2.png", "a", "val"]]
    write_table(tmp_path, ["file", "kind", "split"], [*rows, ["9.png", "a", "test"]])
    train, test = both(tmp_path)
    assert train.files == ("0.png", "1.png") and test.files == ("2.png",)
    assert list(train.targets) == ["kind"]
    assert dict(train.skipped) == {
        "9.png": "no such file in images/",
        "3.png": "no row in factors.csv",
        "4.png": "no row in factors.csv",
    }


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_labels_beside_the_images_by_names_without_endings(tmp_path, save: Save, both, mark: str):
    for i in range(6):
        save(tmp_path / f"{i}.png")
    write_table(tmp_path, ["id", "kind"], [[i, "ab"[i % 2]] for i in range(6)], "labels.csv", mark)
    for images in both(tmp_path):
        assert labels(images, "kind") == ["ab"[int(file[0]) % 2] for file in images.files]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no rows"),
        (b"file,a\n", "no rows"),
        (b"file,a\nx.png,1\n", "names no image in images/"),
        (b"file,a\n0.png,1\n0.png\n", "row 3 has 1 cells instead of 2"),
        (b"file,split\n0.png,dev\n", "split 'dev' is neither train nor test"),
        (b"file,a\n\xff\xfe,1\n", "cannot be read as a table .*; save it as UTF-8"),
        (b"file;a\nx.png;1\n", r"names no image in images/ \('x.png' is not '0.png'\)"),
    ],
)
def test_bad_tables(tmp_path: Path, save: Save, text: bytes, message: str):
    save(tmp_path / "images" / "0.png")
    (tmp_path / "factors.csv").write_bytes(text)
    with pytest.raises(UserError, match=message) as caught:
        read_folder(tmp_path, "x")
    assert "factors.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([2, 10, 2, 1], ("1", "2", "10")),  # numbers in the order of numbers
        (["b", "a", "b", "10"], ("10", "a", "b")),
        ([0.5, -1, 0.5], ("-1", "0.5")),
        ([*range(1000), 0], ()),  # too many: bins are for factors that are asked for
        (["a", "b", "c"], ()),  # names of images
        (["a", "a", ""], ()),
        ([1, float("nan"), 1, 2], ()),
        (["a", "a"], ()),
    ],
)
def test_which_columns_are_labels(values: list[Any], names: tuple[str, ...]):
    files = Files(Path(), (b"%d" % i for i in range(len(values))), None)
    part = Part(files, np.arange(len(values)), {"c": values})
    train = make_listings("x", "x", {"train": part}, ())["train"]
    target = train.targets.get("c")
    assert (target.names if target else ()) == names
    if target:
        labels = [target.names[v] for v in target.values]
        assert labels == [str(values[row]) for row in train.rows]


# Object masks


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


def with_masks(folder: Path, split: str = "train", **options: Any) -> ImageSet:
    return load_dataset(folder, split, cache_dir=folder.parent / "cache", truth=True, **options)


def masks(images: ImageSet) -> np.ndarray:
    assert images.masks is not None
    assert images.masks.shape == (len(images), *images.img_size)
    return images.masks


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
        found = masks(with_masks(folder, split))
        assert (found == labels).all()
        assert found.dtype == (np.uint16 if labels.max() > 255 else np.uint8)


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
    images = with_masks(tmp_path / "d", img_size=(12, 12))
    assert (masks(images) == blocks[:, 2:14] * scale).all()
    shown = images.images[0, :, :, 0].astype(float)  # bicubic, so that edges blend
    assert np.corrcoef(shown.ravel(), blocks[:, 2:14].ravel())[0, 1] > 0.95


def test_class_folders_below_images(tmp_path: Path, save: Save):
    for i in range(6):
        for split in ("train", "test"):
            save(tmp_path / "d" / "images" / split / "ab"[i % 2] / f"{i}.jpg")
            write_mask(tmp_path / "d" / "masks" / split / "ab"[i % 2] / f"{i}.png", LABELS + i)
    images = with_masks(tmp_path / "d")
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
    assert (masks(with_masks(tmp_path / "d")) == LABELS[:, :6]).all()


def test_missing_and_unreadable_masks_are_background(folder: Path):
    for i in range(2, 10):
        write_mask(folder / "masks" / f"{i}.png", LABELS)
    (folder / "masks" / "1.png").write_bytes(b"x")
    with pytest.warns(match=r"masks: no readable mask for 2 of 8 images of the train.*first is 0"):
        found = masks(with_masks(folder))
    assert not found[:2].any() and (found[2:] == LABELS).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            np.zeros((8, 6), np.uint8),
            r"3\.png: 8x6 pixels, but its image has 8x8; make it the same",
        ),
        (np.zeros((8, 8, 3), np.uint8), r"3\.png: a mask is a grey or palette image.*is RGB"),
        (LABELS.astype(np.int32) * 70_000, r"3\.tif: a mask is .* values, 0 to 65535"),
    ],
)
def test_masks_that_do_not_fit(folder: Path, mask: np.ndarray, message: str):
    for i in range(10):
        ending = "tif" if i == 3 and mask.dtype == np.int32 else "png"
        write_mask(folder / "masks" / f"{i}.{ending}", mask if i == 3 else LABELS)
    with pytest.raises(UserError, match=message) as caught:
        with_masks(folder)
    assert "\n" not in str(caught.value)
