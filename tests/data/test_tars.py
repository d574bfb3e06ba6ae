"""Tar shards in webdataset's convention."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsejepa.config import preset
from sparsejepa.data.catalog import load_dataset, load_images, stream_dataset
from sparsejepa.data.stream import ImageStream
from sparsejepa.data.tars import _expand, list_tars
from sparsejepa.errors import UserError

RNG = np.random.default_rng(0)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def shard(path: Path, count: int, first: int = 0, **fields: list[Any]) -> np.ndarray:
    """Write `count` samples with images and other fields; return the images."""
    images = RNG.integers(0, 256, (count, 6, 5, 3), np.uint8)
    members: list[tuple[str, bytes]] = []
    for i, image in enumerate(images):
        key = f"s{first + i:04d}"
        sample = [(f"{key}.{field}", str(values[i]).encode()) for field, values in fields.items()]
        sample.insert(i % 2, (f"{key}.png", png(image)))  # before or behind its label
        members += sample
    write(path, members)
    return images


def all_images(stream: ImageStream, workers: int = 0) -> np.ndarray:
    images = stream.open("cpu", workers)
    (batch,) = images.batches([torch.arange(len(stream))])
    return batch.numpy()


def test_a_folder_of_shards(tmp_path: Path):
    root = tmp_path / "set"
    parts = [shard(root / f"train-{i:03d}.tar", 5, 5 * i, cls=[3, 10, 3, 0, 10]) for i in range(3)]
    val = shard(root / "val-000.tar", 2, cls=[10, 11])
    shard(root / "extra-000.tar", 1, cls=[5])
    train, test = (stream_dataset(root, split) for split in ("train", "test"))
    for workers in (0, 2):
        assert (all_images(train, workers) == np.concatenate(parts)).all()
    assert (all_images(test) == val).all()
    assert train.targets["class"].names == test.targets["class"].names == ("0", "3", "10", "11")
    assert train.targets["class"].values.tolist() == [1, 2, 1, 0, 2] * 3
    assert test.targets["class"].values.tolist() == [2, 3]
    assert train.files[5] == "train-001/s0005.png"
    assert test.mean == train.mean and train.name == "set"
    cached = load_dataset(root, cache_dir=tmp_path / "cache")
    assert (cached.images == np.concatenate(parts)).all() and cached.files == tuple(train.files)
    config = preset("nano").replace(data=str(root), batch_size=4, img_size=16, upscale=True)
    assert isinstance(load_images(config), ImageStream)  # unasked


@pytest.mark.parametrize("layout", ["pattern", "single", "folders", "data root"])
def test_other_places(tmp_path: Path, layout: str):
    root = tmp_path / "set"
    if layout == "folders":
        train = shard(root / "train" / "0.tar", 6)
        shard(root / "validation" / "0.tar", 2)
        assert (all_images(stream_dataset(root)) == train).all()
        assert len(stream_dataset(root, "test")) == 2
        return
    parts = [shard(root / f"x-{i}.tar", 5, 5 * i, cls=[0, 1, 0, 1, 1]) for i in (8, 9, 10)]
    name: Any = root / ("x-{8..10}.tar" if layout == "pattern" else "x-8.tar")
    streams = [stream_dataset(name, split) for split in ("train", "test")]
    if layout == "data root":
        streams = [stream_dataset("set", split, data_root=tmp_path) for split in ("train", "test")]
    count = 5 if layout == "single" else 15
    assert sum(map(len, streams)) == count and len(streams[1]) == count // 5 + (count == 5)
    assert not set(streams[0].files) & set(streams[1].files)
    if layout == "pattern":
        row = int(streams[0].rows[-1])
        assert (all_images(streams[0])[-1] == np.concatenate(parts)[row]).all()


def test_patterns():
    assert _expand("a-{000..012}.tar") == [f"a-{i:03d}.tar" for i in range(13)]
    assert _expand("{a,b}-{1..2}.tar") == ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]
    assert _expand("plain.tar") == ["plain.tar"]
    for wrong in ("{5..1}.tar", "{0..999999999}.tar"):
        with pytest.raises(UserError, match="must count upwards, to few enough files"):
            _expand(wrong)


def test_json_and_text(tmp_path: Path):
    infos = [json.dumps({"label": n, "pose": [i, i % 2], "size": i / 7, "url": "http"})
             for i, n in enumerate(["cat", "dog", "cat", "cat", "dog", "cat", "dog"])]  # fmt: skip
    shard(tmp_path / "train-0.tar", 7, json=infos, txt=[f"caption {i % 6}" for i in range(7)])
    shard(tmp_path / "test-0.tar", 2, json=infos[:2], txt=["caption 0", "caption 1"])
    train = stream_dataset(tmp_path)
    assert list(train.targets) == ["label"]
    assert train.targets["label"].names == ("cat", "dog")
    assert train.targets["label"].values.tolist() == [0, 1, 0, 0, 1, 0, 1]
    asked = stream_dataset(tmp_path, factors=["pose", "label", "text"])
    assert list(asked.targets) == ["pose_0", "pose_1", "label", "text"]
    assert asked.targets["pose_1"].values.tolist() == [0, 1, 0, 1, 0, 1, 0]
    with pytest.raises(UserError, match=r"no factor 'poze' \(did you mean"):
        stream_dataset(tmp_path, factors=["poze"])


def test_what_is_no_sample(tmp_path: Path):
    """Members of all kinds; names that would escape a folder are just names."""
    image = png(RNG.integers(0, 256, (4, 4, 3), np.uint8))
    names = ["../../a.png", "/etc/b.png", "d\n.png", "e.é.png", "e.jpg", "\udcff.png", "f/./g.png"]
    members = [(name, image) for name in names]
    members += [("alone.cls", b"1"), ("h.PNG", image), (".hidden.png", image), ("x.json", b"{")]
    members += [("long/" * 60 + "i.png", image)]
    write(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    listings = list_tars(str(tmp_path / "a.tar"), "a")
    files = [listing.reader.name(r) for listing in listings.values() for r in listing.rows]
    assert len(files) == 8 and all(file.startswith("a/") for file in files)
    assert [name for name, _ in listings["train"].unusable] == ["a/alone", "a/x"]
    streams = [stream_dataset(tmp_path / "a.tar", split) for split in ("train", "test")]
    assert all((all_images(s) == np.asarray(Image.open(io.BytesIO(image)))).all() for s in streams)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.tar", "none.tar: no such file"),
        ("x-{0..2}.tar", "x-1.tar: no such file"),
        ("x.tar.gz", r"x\.tar\.gz: not a folder; give the folder that holds the images, unpacked"),
        ("text.tar", r"text\.tar: damaged tar file"),
        ("cut.tar", r"cut\.tar: damaged tar file"),
        ("empty.tar", "no images in the shards of the train split"),
    ],
)
def test_bad_shards_are_one_line(tmp_path: Path, name: str, message: str):
    shard(tmp_path / "x-0.tar", 3)
    write(tmp_path / "x.tar.gz", [("a.png", b"x")], "w:gz")
    write(tmp_path / "empty.tar", [("a.cls", b"1")])
    (tmp_path / "text.tar").write_text("no tar at all\n" * 100)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "x-0.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=message) as caught:
        stream_dataset(tmp_path / name)
    assert "\n" not in str(caught.value)


@settings(max_examples=60)
@given(
    st.integers(0, 20_000),
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=6),
)
def test_mutated_shards_are_read_or_named(tmp_path_factory: pytest.TempPathFactory, cut, edits):
    folder = tmp_path_factory.getbasetemp() / "mutants"
    if not (folder / "whole.tar").exists():
        shard(folder / "whole.tar", 8, cls=[0, 1] * 4, json=['{"label": 1}'] * 8)
    data = bytearray((folder / "whole.tar").read_bytes())
    for place, value in edits:
        data[place % len(data)] = value
    (folder / "mutant.tar").write_bytes(data[: len(data) - cut] if cut else data)
    try:
        stream = stream_dataset(folder / "mutant.tar", img_size=(4, 4))
        assert all_images(stream).shape == (len(stream), 4, 4, 3)
    except UserError as error:
        assert "mutant.tar" in str(error) and "\n" not in str(error)
