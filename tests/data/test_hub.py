"""Parquet files in the hub's layout, found locally or fetched."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sparsejepa.data.catalog import load_dataset, stream_dataset
from sparsejepa.data.hub import choose_shards, fetch
from sparsejepa.errors import UserError

RNG = np.random.default_rng(0)
NAMES = ["apple", "bear", "clock"]
FEATURES = {
    "img": {"_type": "Image"},
    "fine_label": {"_type": "ClassLabel", "names": NAMES},
    "coarse_label": {"_type": "Value", "dtype": "int64"},
}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(
    path: Path, count: int, features: dict | None = FEATURES, side: int = 6, **columns: list
) -> tuple[np.ndarray, np.ndarray]:
    """Write one shard; return its images and fine labels."""
    images = RNG.integers(0, 256, (count, side, side, 3), np.uint8)
    fine = RNG.integers(0, 3, count)
    table: dict[str, object] = {
        "img": pa.array(
            [{"bytes": png(image), "path": None} for image in images],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "fine_label": pa.array(fine, pa.int64()),
        "coarse_label": pa.array(fine // 2 + 5, pa.int64()),
    }
    table |= {key: pa.array(values) for key, values in columns.items()}
    built = pa.table(table)
    if features is not None:
        text = json.dumps({"info": {"features": features}})
        built = built.replace_schema_metadata({"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(built, path)
    return images, fine


@pytest.mark.parametrize(
    "layout",
    [
        "uoft-cs/cifar100/cifar100/{split}-{shard}.parquet",
        "uoft-cs/cifar100/data/{split}-{shard}.parquet",
        "cifar100/{split}-{shard}.parquet",
        "datasets--uoft-cs--cifar100/snapshots/abc/cifar100/{split}-{shard}.parquet",
    ],
)
def test_layouts_of_the_data_root(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "root"
    shards = [
        write(root / layout.format(split="train", shard=f"0000{i}-of-00002"), 4 + i)
        for i in range(2)
    ]
    test_images, test_labels = write(root / layout.format(split="test", shard="00000-of-00001"), 3)
    options: dict[str, Any] = {"data_root": root, "cache_dir": tmp_path / "cache"}
    train = load_dataset("cifar100", "train", **options)
    test = load_dataset("cifar100", "test", **options)
    assert (train.images == np.concatenate([images for images, _ in shards])).all()
    assert (test.images == test_images).all()
    fine = np.concatenate([labels for _, labels in shards])
    assert list(train.targets) == ["fine_label", "coarse_label"]
    assert train.targets["fine_label"].names == tuple(NAMES)
    assert (train.targets["fine_label"].values == fine).all()
    assert (test.targets["fine_label"].values == test_labels).all()
    coarse = train.targets["coarse_label"]
    assert [coarse.names[v] for v in coarse.values] == [str(v) for v in fine // 2 + 5]
    assert test.targets["coarse_label"].names == coarse.names
    assert test.mean == train.mean
    monkeypatch.setenv("SPARSEJEPA_DATA", str(root))
    assert load_dataset("cifar100", cache_dir=tmp_path / "cache").files == train.files
    monkeypatch.setenv("SPARSEJEPA_DATA", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"gone: no such folder; set --data-root"):
        load_dataset("cifar10")


def test_without_the_hubs_metadata(tmp_path: Path):
    write(tmp_path / "o" / "n" / "train.parquet", 9, None, text_label=list("aabbaabba"))
    write(tmp_path / "o" / "n" / "test.parquet", 3, None, text_label=list("acc"))
    options: dict[str, Any] = {"data_root": tmp_path, "cache_dir": tmp_path / "cache"}
    train = load_dataset("hub:o/n", "train", **options)
    test = load_dataset("hub:o/n", "test", **options)
    assert list(train.targets) == ["fine_label", "coarse_label", "text_label"]
    assert train.targets["text_label"].names == test.targets["text_label"].names == ("a", "b", "c")
    assert test.targets["text_label"].values.tolist() == [0, 2, 2]


def test_missing_labels_make_no_target(tmp_path: Path):
    write(tmp_path / "o" / "n" / "train.parquet", 3)
    write(tmp_path / "o" / "n" / "test.parquet", 3, fine_label=[-1, -1, -1])
    options: dict[str, Any] = {"data_root": tmp_path, "cache_dir": tmp_path / "cache"}
    assert "fine_label" in load_dataset("hub:o/n", "train", **options).targets
    assert "fine_label" not in load_dataset("hub:o/n", "test", **options).targets


def test_a_copy_named_by_its_path(tmp_path: Path):
    images, _ = write(tmp_path / "o" / "n" / "c" / "train-00000-of-00001.parquet", 4)
    write(tmp_path / "o" / "n" / "c" / "test-00000-of-00001.parquet", 4)
    for folder in (tmp_path / "o" / "n", tmp_path / "o" / "n" / "c"):
        train = load_dataset(folder, cache_dir=tmp_path / "cache")
        assert (train.images == images).all() and train.name == folder.name


def test_parquet_files_among_images_are_passed_over(tmp_path: Path):
    write(tmp_path / "features.parquet", 4)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    assert len(load_dataset(tmp_path, cache_dir=tmp_path / "cache")) == 4


def test_rows_without_an_image_are_listed(tmp_path: Path):
    path = tmp_path / "o" / "n" / "train.parquet"
    images = [{"bytes": png(np.zeros((4, 4, 3), np.uint8)), "path": "a"}] * 10
    images[3] = {"bytes": None, "path": "elsewhere.png"}
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"image": pa.array(images)}), path)
    options: dict[str, Any] = {"data_root": tmp_path, "cache_dir": tmp_path / "cache"}
    both = [load_dataset("hub:o/n", split, **options) for split in ("train", "test")]
    skipped = [entry for images in both for entry in images.skipped]
    assert skipped == [("train.parquet row 3", "no image data")]
    assert [images.targets for images in both] == [{}, {}]


@pytest.mark.parametrize("keep", [0.3, 0.99])
def test_damaged_parquet(tmp_path: Path, keep: float):
    path = tmp_path / "o" / "n" / "train.parquet"
    write(path, 20)
    data = bytearray(path.read_bytes())
    if keep < 0.5:
        data = data[: int(len(data) * keep)]
    else:  # the footer is whole, the pixels are not
        data[100:2000] = bytes(1900)
    path.write_bytes(data)
    try:
        images = load_dataset("hub:o/n", data_root=tmp_path, cache_dir=tmp_path / "cache")
    except UserError as error:
        assert "damaged parquet file" in str(error) or "cannot be read" in str(error)
        assert str(tmp_path) in str(error) and "\n" not in str(error)
    else:
        assert images.skipped


def test_choose_shards():
    files = ["README.md", "a/train-00000-of-00001.parquet", "a/extra-00000-of-00002.parquet"]
    files += ["b/test/0000.parquet", "b/train/0000.parquet", "b/train/0001.parquet"]
    files += [".cache/x/train-00000-of-00001.parquet"]
    assert choose_shards(files, "b", "d") == {
        "test": ["b/test/0000.parquet"],
        "train": ["b/train/0000.parquet", "b/train/0001.parquet"],
    }
    assert choose_shards(files, "a", "d")["train"] == ["a/train-00000-of-00001.parquet"]
    with pytest.raises(UserError, match="several configurations; add one of /a, /b"):
        choose_shards(files, None, "d")
    with pytest.raises(UserError, match=r"no configuration 'aa' \(did you mean 'a'"):
        choose_shards(files, "aa", "d")
    with pytest.raises(UserError, match="no parquet files"):
        choose_shards(["README.md"], None, "d")
    with pytest.raises(UserError, match="1 of 3 parquet files of the train split"):
        choose_shards(["data/train-00001-of-00003-ab12.parquet"], None, "d")
    assert "train" in choose_shards(["x/train.parquet", "data/train.parquet"], None, "d")


class FakeHub:
    """Stands in for huggingface_hub: a cache that may be filled from a folder."""

    def __init__(self, cached: Path | None, remote: Path | None) -> None:
        self.cached, self.remote = cached, remote
        self.asked: list[str] = []

    def snapshot_download(
        self, repo: str, *, repo_type: str, local_files_only: bool = False, **options: object
    ) -> str:
        assert repo_type == "dataset"
        if local_files_only:
            if self.cached is None:
                raise FileNotFoundError("not cached")
            return str(self.cached)
        self.asked = sorted(options["allow_patterns"])  # type: ignore[call-overload]
        return str(self.remote)

    def HfApi(self) -> FakeHub:
        return self

    def dataset_info(self, repo: str, timeout: float) -> SimpleNamespace:
        if self.remote is None:
            raise RuntimeError("Name or service not known\nsecond line")
        files = [p.relative_to(self.remote).as_posix() for p in self.remote.rglob("*.*")]
        siblings = [SimpleNamespace(rfilename=file) for file in files]
        return SimpleNamespace(siblings=siblings, sha="a")


def shards(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = shards(tmp_path / "whole", "c/train.parquet", "c/test.parquet", "c/extra.parquet")
    half = shards(tmp_path / "half", "c/train.parquet")

    def use(cached: Path | None, remote: Path | None) -> FakeHub:
        hub = FakeHub(cached, remote)
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
        return hub

    hub = use(whole, None)
    assert fetch("o/n", "c") == whole and not hub.asked
    for cached in (None, half):
        hub = use(cached, whole)
        assert fetch("o/n", "c") == whole
        assert hub.asked == ["c/test.parquet", "c/train.parquet"]
    use(half, None)  # all that can be had
    assert fetch("o/n", "c") == half
    use(None, None)
    with pytest.raises(UserError, match=r"hub:o/n: .*\(Name or service not known\); either") as no:
        fetch("o/n", "c")
    assert "DIR/o/n" in str(no.value) and "--data-root" in str(no.value)
    use(None, whole)
    with pytest.raises(UserError, match=r"hub:o/n: no configuration 'd'"):
        fetch("o/n", "d")


def test_a_local_copy_streams_as_it_is_cached(tmp_path: Path):
    root = tmp_path / "o" / "n"
    for i in range(2):
        write(root / "data" / f"train-0000{i}-of-00002.parquet", 5 + i)
    write(root / "data" / "test-00000-of-00001.parquet", 3)
    options: dict[str, Any] = {"data_root": tmp_path}
    for split in ("train", "test"):
        cached = load_dataset("hub:o/n", split, cache_dir=tmp_path / "cache", **options)
        stream = stream_dataset("hub:o/n", split, **options)
        assert tuple(stream.files) == cached.files and stream.mean == cached.mean
        assert stream.targets.keys() == cached.targets.keys()
        for key, target in stream.targets.items():
            assert (target.values == cached.targets[key].values).all()
        for workers in (0, 2):
            (batch,) = stream.open("cpu", workers).batches([torch.arange(len(stream))])
            assert (batch.numpy() == cached.images).all()
