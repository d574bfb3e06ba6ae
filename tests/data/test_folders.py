"""Folders of images in every layout that users have."""

from __future__ import annotations

import csv
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsejepa.data.catalog import load_dataset
from sparsejepa.data.folders import read_folder, scan
from sparsejepa.data.sources import category_names, in_test
from sparsejepa.data.store import ImageSet
from sparsejepa.errors import UserError

Save = Callable[..., np.ndarray]


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


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_names_of_the_test_folder(tmp_path: Path, save: Save, both, name: str):
    save(tmp_path / "d" / "train" / "a.png")
    save(tmp_path / "d" / name / "b.png")
    train, test = both(tmp_path / "d")
    assert (train.files, test.files) == (("a.png",), ("b.png",))
    assert train.targets == {} and test.targets == {}


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAIN", "Validation")])
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


@pytest.mark.parametrize("folder", ["images", "train/cat", "a/b"])
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
    chosen = in_test(*map(list, zip(*pairs, strict=True))) if pairs else in_test([], [])
    counts = Counter(label for _, label in pairs)
    test = Counter(label for (_, label), inside in zip(pairs, chosen, strict=True) if inside)
    for label, count in counts.items():
        assert test[label] == (max(1, round(count / 5)) if count > 1 else 0)
    backwards = in_test(*map(list, zip(*pairs[::-1], strict=True))) if pairs else in_test([], [])
    assert (backwards[::-1] == chosen).all()


def test_flat_folder_is_unlabelled(tmp_path: Path, save: Save, both):
    for i in range(10):
        save(tmp_path / "d" / f"{i}.JPG")
    train, test = both(tmp_path / "d")
    assert len(train) == 8 and len(test) == 2 and train.targets == {}


def test_train_folder_alone_is_divided(tmp_path: Path, save: Save, both):
    for i in range(10):
        save(tmp_path / "d" / "train" / "x" / f"{i}.png")
    train, test = both(tmp_path / "d")
    assert len(train) == 8 and len(test) == 2


def test_nested_class_folders(tmp_path: Path, save: Save, both):
    for name in ("animal/cat", "animal/dog", "plant/tree"):
        for i in range(5):
            save(tmp_path / "d" / "train" / name / f"{i}.png")
            save(tmp_path / "d" / "test" / name / f"{i}.png")
    train, _ = both(tmp_path / "d")
    assert list(train.targets) == ["class", "superclass"]
    assert set(labels(train)) == {"animal/cat", "animal/dog", "plant/tree"}
    assert Counter(labels(train, "superclass")) == {"animal": 10, "plant": 5}


def test_images_beside_class_folders_are_left_out_and_listed(tmp_path: Path, save: Save, both):
    for i in range(4):
        save(tmp_path / "d" / "train" / "a" / f"{i}.png")
    save(tmp_path / "d" / "train" / "cover.png")
    save(tmp_path / "d" / "test" / "a" / "0.png")
    train, _ = both(tmp_path / "d")
    assert len(train) == 4
    assert train.skipped == (("cover.png", "lies beside the class folders"),)


def test_few_images_in_subfolders_of_a_flat_folder(tmp_path: Path, save: Save, both):
    for i in range(8):
        save(tmp_path / "d" / f"{i}.png")
    save(tmp_path / "d" / "thumbnails" / "0.png")
    train, test = both(tmp_path / "d")
    assert train.targets == {} and len(train) + len(test) == 8
    assert train.skipped[0][0] == "thumbnails/0.png"


def test_scan_passes_over_hidden_other_and_looping(tmp_path: Path, save: Save):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / ".hidden" / "2.png")
    save(tmp_path / "a" / ".3.png")
    (tmp_path / "notes.txt").write_text("not an image")
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.symlink(tmp_path / "a", tmp_path / "b")
    os.symlink(tmp_path / "gone.png", tmp_path / "a" / "dangling.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")  # to open one would wait for ever
    os.symlink("self.png", tmp_path / "a" / "self.png")
    files = scan(tmp_path).files
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


@settings(max_examples=40)
@given(
    form=st.sampled_from(["png", "jpg", "gif", "bmp", "webp", "tif", "ppm"]),
    mutants=st.lists(
        st.tuples(
            st.integers(0, 300), st.lists(st.tuples(st.integers(0, 299), st.integers(0, 255)))
        ),
        max_size=3,
    ),
)
def test_folders_with_mutated_files_lose_only_those(form, mutants):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "d"
        (root / "train" / "x").mkdir(parents=True)
        (root / "test" / "x").mkdir(parents=True)
        pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
        (root / "test" / "y").mkdir()
        Image.fromarray(pixels).save(root / "test" / "x" / f"0.{form}")
        data = (root / "test" / "x" / f"0.{form}").read_bytes()
        (root / "test" / "y" / f"0.{form}").write_bytes(data)
        for i in range(4):
            (root / "train" / "x" / f"good{i}.{form}").write_bytes(data)
        for i, (length, edits) in enumerate(mutants):
            mutant = bytearray(data[:length])
            for place, value in edits:
                if place < len(mutant):
                    mutant[place] = value
            (root / "train" / "x" / f"mutant{i}.{form}").write_bytes(mutant)
        train = load_dataset(root, img_size=(8, 8), cache_dir=Path(folder) / "c", upscale=True)
        assert len(train) + len(train.skipped) == 4 + len(mutants)
        assert train.files[:4] == tuple(f"x/good{i}.{form}" for i in range(4))
        assert (train.images[:4] == train.images[0]).all()
        assert len(train.targets["class"].values) == len(train)


def test_mostly_unreadable_names_the_folder(tmp_path: Path, both):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{tmp_path}: 2 of 2 images cannot be read"):
        both(tmp_path)


def test_missing_empty_and_file(tmp_path: Path, save: Save):
    with pytest.raises(UserError, match="no such folder"):
        read_folder(tmp_path / "gone", "x")
    with pytest.raises(UserError, match=rf"{tmp_path}: no images in it \(.png"):
        read_folder(tmp_path, "x")
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match="not a folder; give the folder"):
        read_folder(tmp_path / "a.png", "x")
    for name, remedy in (
        ("a.zip", "a zip file; unpack it first"),
        ("a.CSV", "a table of labels; give its folder"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=remedy):
            load_dataset(tmp_path / name)


def test_single_image_trains_but_has_no_test(tmp_path: Path, save: Save):
    save(tmp_path / "d" / "a.png")
    assert len(load_dataset(tmp_path / "d", "train", cache_dir=tmp_path / "c")) == 1
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


def write_table(folder: Path, header: list[str], rows: list[Any]) -> None:
    with (folder / "factors.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


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


def test_table_without_images_folder(tmp_path: Path):
    (tmp_path / "factors.csv").write_text("file,a\n0.png,1\n")
    with pytest.raises(UserError, match="images: No such file"):
        read_folder(tmp_path, "x")


@given(st.lists(st.one_of(st.integers(-50, 50), st.sampled_from(["a", "nan", "1.5", "", None]))))
def test_category_names(values):
    names = category_names(values)
    texts = ["" if value is None else str(value) for value in values]
    if {"", "nan"} & set(texts) or len(set(texts)) == len(texts):  # missing, or names of images
        assert names == ()
    else:
        assert sorted(names) == sorted(set(texts))
        if "a" not in texts:
            assert list(map(float, names)) == sorted(map(float, names))


def test_too_many_categories_are_no_target():
    assert category_names([*range(1001), 0]) == ()
    assert len(category_names([*range(1000), 0])) == 1000
