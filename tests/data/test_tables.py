"""Tables of labels beside images, under any name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsejepa.data.folders import read_folder
from sparsejepa.data.sources import Listing
from sparsejepa.data.tables import match

Save = Callable[..., np.ndarray]


@pytest.fixture
def photos(tmp_path: Path, save: Save) -> Callable[..., Path]:
    """Return a function that writes ten images, named from 0a to 9a, into a folder."""

    def write(*folder: str, first: int = 0) -> Path:
        for i in range(first, first + 10):
            save(tmp_path.joinpath(*folder) / f"{i}a.jpg")
        return tmp_path

    return write


def table(path: Path, ending: str = ".jpg", first: int = 0, mark: str = ",") -> None:
    rows = [f"{i}a{ending}{mark}{'cat' if i % 2 else 'dog'}" for i in range(first, first + 10)]
    path.write_text("\n".join([f"id{mark}label", *rows]))


def labels(listing: Listing) -> dict[str, str]:
    """Return the label of each file."""
    target = listing.targets["label"]
    files = [Path(listing.reader.name(row)).name for row in listing.rows.tolist()]
    return dict(zip(files, (target.names[v] for v in target.values), strict=True))


def check(root: Path) -> None:
    """Check that a folder of the ten images is read with their labels, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_folder(root, "x")
    assert list(found["train"].targets) == ["label"]
    assert found["test"].about == "a fifth, by a hash of the name"
    assert labels(found["train"]) | labels(found["test"]) == {
        f"{i}a.jpg": "cat" if i % 2 else "dog" for i in range(10)
    }


@pytest.mark.parametrize("folder", [(), ("images",), ("pets", "photos")], ids="/".join)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train.csv", {}),
        ("labels.csv", {"ending": ""}),
        ("some.tsv", {"mark": "\t"}),
        ("x.csv", {"mark": ";"}),
    ],
)
def test_any_table_that_names_the_images(
    photos: Callable[..., Path], folder: tuple[str, ...], name: str, options: dict[str, Any]
):
    root = photos(*folder)
    table(root / name, **options)
    (root / "test.csv").write_text("id\n0a\n1a\n")  # without labels
    check(root)


def test_a_table_among_the_images_and_within_an_unpacked_folder(photos: Callable[..., Path]):
    root = photos("unpacked", "images")
    table(root / "unpacked" / "images" / "labels.csv")
    check(root)
    (root / "unpacked" / "images" / "labels.csv").rename(root / "unpacked" / "labels.csv")
    check(root)


def test_a_table_in_parquet(photos: Callable[..., Path]):
    root = photos()
    columns = {"id": [f"{i}a" for i in range(10)], "label": ["dog", "cat"] * 5}
    pq.write_table(pa.table(columns), root / "train.parquet")
    pq.write_table(pa.table({"image": [b"x"] * 10, "label": [1] * 10}), root / "images.parquet")
    check(root)  # the images of another set are not even read


@pytest.mark.parametrize(("ending", "mark"), [(".jpg", ","), ("", ","), (".jpg", ";")])
def test_factors_beside_flat_images(photos: Callable[..., Path], ending: str, mark: str):
    root = photos()
    table(root / "factors.csv", ending, mark=mark)
    check(root)


def unused(root: Path) -> str:
    """Return the warning about a folder whose tables are of no use."""
    with pytest.warns(UserWarning, match="tables not used") as caught:
        found = read_folder(root, "x")
    assert found["train"].targets == {} and len(found["train"].rows)
    (message,) = {str(one.message) for one in caught}
    assert "\n" not in message
    return message


def test_several_tables_are_named_and_not_used(photos: Callable[..., Path]):
    root = photos("images")
    table(root / "a.csv")
    table(root / "b.csv")
    assert "a.csv (not the only one), b.csv (not the only one); put one" in unused(root)


def test_tables_that_do_not_fit_are_named(photos: Callable[..., Path]):
    root = photos()
    table(root / "a.csv", first=50)
    (root / "b.csv").write_bytes(b"id,label\n\xff,1\n")
    (root / "c.csv").write_text("id,box\n" + "0a,1\n1a,1\n" * 5)
    message = unused(root)
    assert "a.csv (its first column does not name the images: '50a.jpg' is not '0a.jpg')" in message
    assert "b.csv (cannot be read as a table" in message
    assert "c.csv (its first column names images several times)" in message


def test_a_table_of_one_of_two_splits_is_named(photos: Callable[..., Path]):
    root = photos("train")
    photos("test", first=10)
    table(root / "train.csv")
    assert "train.csv (the labels of one split only); put one table" in unused(root)


def test_class_folders_come_before_tables(photos: Callable[..., Path]):
    root = photos("cat")
    photos("dog", first=10)
    table(root / "labels.csv")
    assert list(read_folder(root, "x")["train"].targets) == ["class"]


def test_names_without_endings():
    files = {"a.png", "b.png", "b.jpg", "c/d.png"}
    assert match(["a", "b", "c/d", "e"], files) == ["a.png", "b", "c/d.png", "e"]
    assert match(["a.png", "c/d"], files) == ["a.png", "c/d"]
