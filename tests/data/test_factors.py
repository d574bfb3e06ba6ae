"""Columns asked for by name: from a table beside images, and from the hub's files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparsejepa.data.catalog import load_dataset
from sparsejepa.data.folders import BINS, MAX_LEVELS, factor_target
from sparsejepa.data.images import ImageSet
from sparsejepa.errors import UserError

Save = Callable[..., np.ndarray]
N = 80


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., tuple[ImageSet, ImageSet]]:
    """Return a function that loads train and test with some factors."""

    def both(name: str | Path, *factors: str, **options: Any) -> tuple[ImageSet, ImageSet]:
        options |= {"cache_dir": tmp_path / "cache", "factors": factors}
        return load_dataset(name, "train", **options), load_dataset(name, "test", **options)

    return both


def names(images: ImageSet, key: str) -> list[str]:
    target = images.targets[key]
    return [target.names[value] for value in target.values]


COLUMNS: dict[str, list[Any]] = {
    "kind": ["ab"[i % 2] for i in range(N)],
    "turn": [(i * 7 % N) / 4 for i in range(N)],
    "size": [0.5 + 0.1 * (i % 3) for i in range(N)],
    "whole": [i % 2 == 0 for i in range(N)],
    "pose": [[i % 4, i % 5] for i in range(N)],
    "empty": [None if i == 3 else 1.5 * i for i in range(N)],
    "nan": [float("nan") if i == 3 else 1.5 * i for i in range(N)],
    "flat": [7] * N,
    "name": [f"n{i}" for i in range(N)],
    "ragged": [[0] * (1 + i % 2) for i in range(N)],
}
PLAIN = [key for key, values in COLUMNS.items() if not isinstance(values[0], list)]


def write_folder(folder: Path, save: Save) -> Path:
    """A folder of images 00.png.. with COLUMNS as a table; images are numbered in the names."""
    files = [f"{i:02d}.png" for i in range(N)]
    for file in files:
        save(folder / "images" / file, (4, 4))
    with (folder / "factors.csv").open("w", newline="") as out:
        rows = zip(files, *(COLUMNS[key] for key in PLAIN), strict=True)
        csv.writer(out).writerows([["file", *PLAIN], *rows])
    return folder


def write_hub(path: Path, rows: slice, features: bytes | None = None, **columns: Any) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(picture, "PNG")
    count = len(range(N)[rows])
    images = pa.array([{"bytes": picture.getvalue(), "path": None}] * count)
    table = {key: pa.array(values[rows]) for key, values in COLUMNS.items()} | columns
    built = pa.table({"image": images, **table})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(built.replace_schema_metadata({"huggingface": features or b"{}"}), path)


def test_columns_of_a_folder_in_the_order_asked_for(tmp_path: Path, save: Save, load):
    folder = write_folder(tmp_path / "d", save)
    plain = load(folder)
    asked = load(folder, "size", "turn", "kind")
    for images, default in zip(asked, plain, strict=True):
        assert images.files == default.files  # the division does not depend on the factors
        assert list(images.targets) == ["size", "turn", "kind"]
        rows = [int(file.removesuffix(".png")) for file in images.files]
        assert names(images, "kind") == [COLUMNS["kind"][i] for i in rows]
        assert [float(n) for n in names(images, "size")] == pytest.approx(
            [COLUMNS["size"][i] for i in rows]
        )


def test_many_numbers_are_cut_into_bins_of_equal_count(tmp_path: Path, save: Save, load):
    folder = write_folder(tmp_path / "d", save)
    for _ in range(2):  # also from the cache
        train, test = load(folder, "turn", "kind")
        target = train.targets["turn"]
        assert target.note == "80 different numbers, cut into 20 bins of equal count"
        assert train.targets["kind"].note == "" and len(target.names) == BINS
        counts = np.bincount(target.values, minlength=BINS)
        assert counts.min() >= 3 and counts.max() <= 4  # 64 images
        assert train.subset(20).targets["turn"].note == target.note
        for images in (train, test):
            rows = [int(file.removesuffix(".png")) for file in images.files]
            for i, name in zip(rows, names(images, "turn"), strict=True):
                low, high = map(float, name.split(" to "))
                assert low <= COLUMNS["turn"][i] <= high
        assert test.targets["turn"].names == target.names


def test_hub_columns_and_lists(tmp_path: Path, load):
    write_hub(tmp_path / "train.parquet", slice(0, 60))
    write_hub(tmp_path / "test.parquet", slice(60, N))
    train, test = load(tmp_path, "pose", "whole", "size")
    assert list(train.targets) == ["pose_0", "pose_1", "whole", "size"]
    assert names(test, "pose_1") == [str(i % 5) for i in range(60, N)]
    assert names(train, "pose_0") == [str(i % 4) for i in range(60)]
    assert names(train, "whole") == [str(i % 2 == 0) for i in range(60)]
    assert list(load(tmp_path, "pose_1")[0].targets) == ["pose_1"]


def test_hub_with_one_split_is_divided_as_without_factors(tmp_path: Path, load):
    write_hub(tmp_path / "train.parquet", slice(0, N), label=pa.array([i % 3 for i in range(N)]))
    plain, asked = load(tmp_path), load(tmp_path, "turn", "kind")
    for images, default in zip(asked, plain, strict=True):
        rows = [int(file.rpartition(" ")[2]) for file in images.files]
        assert images.files == default.files and list(default.targets) == ["label"]
        assert names(images, "kind") == [COLUMNS["kind"][i] for i in rows]
    assert np.bincount(asked[0].targets["turn"].values).min() >= 2


def test_class_labels_of_the_hub_keep_their_names(tmp_path: Path, load):
    features = (
        b'{"info": {"features": {"image": {"_type": "Image"}, "fine": {"_type": "ClassLabel", '
    )
    features += b'"names": ["x", "y", "z"]}}}}'
    labels = [i % 2 for i in range(N)]
    write_hub(tmp_path / "train.parquet", slice(0, N), features, fine=pa.array(labels))
    train, _ = load(tmp_path, "fine")
    assert train.targets["fine"].names == ("x", "y", "z")
    write_hub(tmp_path / "train.parquet", slice(0, N), features, fine=pa.array([2] * N))
    with pytest.raises(UserError, match=r"factor 'fine' has one value only \(z\)"):
        load(tmp_path, "fine")
    labels[5] = -1
    write_hub(tmp_path / "train.parquet", slice(0, N), features, fine=pa.array(labels))
    with pytest.raises(UserError, match="factor 'fine' has no value in 1 of 80 rows"):
        load(tmp_path, "fine")


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        ("knd", r"no factor 'knd' \(did you mean 'kind'\?\); there are .*turn"),
        ("empty", "factor 'empty' has no value in 1 of 80 rows; fill them in, or leave it out"),
        ("nan", "factor 'nan' has no value in 1 of 80 rows"),
        ("flat", r"factor 'flat' has one value only \(7\); leave it out"),
        ("name", "factor 'name' has 80 different texts in 80 rows, too many"),
        ("ragged", "no factor 'ragged'"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "hub"])
def test_unusable_factors(tmp_path: Path, save: Save, load, kind: str, factor: str, message: str):
    if kind == "hub":
        write_hub(tmp_path / "d" / "train.parquet", slice(0, N))
    else:
        write_folder(tmp_path / "d", save)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "d", factor)
    assert "\n" not in str(caught.value) and str(tmp_path / "d") in str(caught.value)


@given(
    st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 3)), min_size=1, max_size=200),
    st.data(),
)
def test_numbers_keep_their_order(values, data):
    train = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    try:
        target = factor_target("x", values, train, "t")
    except UserError as error:
        assert len(set(values)) < 2 or "nearly all rows" in str(error)
        return
    order = np.argsort(values)
    assert (np.diff(target.values[order]) >= 0).all()
    assert target.values.min() >= 0 and target.values.max() < len(target.names)
    if len(set(values)) <= MAX_LEVELS:
        assert target.note == "" and sorted(set(values)) == [float(name) for name in target.names]
    elif train.any():
        assert set(target.values[train]) == set(range(len(target.names)))  # no bin is empty


def test_bins_when_one_value_dominates():
    values = [0.0] * 900 + list(range(1, 101))
    target = factor_target("x", values, np.ones(1000, bool), "t")
    assert 2 <= len(target.names) <= 3 and (target.values[:900] == 0).all()
    with pytest.raises(UserError, match="one value in nearly all rows"):
        factor_target("x", [0.0] * 9900 + list(range(1, 101)), np.ones(10_000, bool), "t")
