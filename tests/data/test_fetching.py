"""How a stream's images are fetched: by the row group, from shards, by how many processes."""

from __future__ import annotations

import io
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sparsejepa.data import stream as module
from sparsejepa.data.catalog import stream_dataset
from sparsejepa.data.crew import Decoder, Shared
from sparsejepa.data.readers import MEMORY, Members, Names, Rows
from sparsejepa.data.stream import ImageStream, StreamImages, block_order, open_images
from sparsejepa.model.vit import ViT
from sparsejepa.training.monitor import OnlineEvaluation, _of_few

Save = Callable[..., np.ndarray]


@pytest.fixture
def photos(tmp_path: Path, save: Save) -> Path:
    """Forty images of three classes."""
    for i in range(40):
        save(tmp_path / "photos" / "train" / "abc"[i % 3] / f"{i:02d}.png", (9, 12))
    save(tmp_path / "photos" / "test" / "a" / "0.png", (9, 12))
    return tmp_path / "photos"


@pytest.mark.parametrize(("rows", "groups"), [(100, 130), (1000, 24)])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_each_row_group_is_fetched_once(
    rows: int, groups: int, workers: int, monkeypatch: pytest.MonkeyPatch
):
    """At 110 kB an image; each of two processes, of which this is one, fetches as many."""
    fetched: list[int] = []

    def fetch(reader: Rows, shard: int, group: int) -> Any:
        fetched.append(group)
        values = [SimpleNamespace(as_py=lambda: b"")] * rows
        return type("Column", (list,), {"nbytes": rows * 110_000})(values)

    monkeypatch.setattr(Rows, "_fetch", fetch)
    readers = [Rows(["a"], "image", [[rows] * groups]) for _ in range(workers or 1)]
    for reader in readers:
        reader.memory //= len(readers)
    decoder = Decoder(readers[0], "a", (1, 1), None, False)
    monkeypatch.setattr(Decoder, "read", read_nothing)
    stream = ImageStream(
        "a", "train", Shared(decoder), np.arange(rows * groups), {}, (0, 0, 0), (1, 1, 1)
    )
    images, held = StreamImages(stream, "cpu", workers), 0
    blocks = np.full(groups, rows)
    for epoch in range(2):
        batches = [batch[:128] for batch in block_order(blocks, 0, epoch).split(256)]
        if not workers:
            own = cast(Rows, stream.decoder.reader)
            for batch in batches:
                images.take(batch)
                held = max(held, sum(c.nbytes for c in own._read.values()))
            continue
        for chunk in images._chunks(batches, 32):
            for row in chunk.positions.tolist():
                readers[chunk.worker].source(row)
            held = max(held, sum(c.nbytes for r in readers for c in r._read.values()))
    assert len(set(fetched)) == groups
    assert len(fetched) <= 1.1 * 2 * groups
    assert held <= MEMORY + len(readers) * rows * 110_000


def read_nothing(decoder: Decoder, row: int) -> np.ndarray:
    decoder.reader.source(row)
    return np.zeros((1, 1, 3), np.uint8)


def test_workers_share_the_stretches_and_keep_them():
    """Each has equally many; one more where a stretch comes in two epochs one after the other."""
    blocks, workers = np.full(24, 1000), 4
    block, owners, before = np.repeat(np.arange(24), 1000), module._Owners(workers), {}
    for epoch in range(2):
        order = block_order(blocks, 0, epoch)
        for window in order.split(8000):
            for batch in window.split(500):
                found = block[batch.numpy()]
                places = module._together(found)
                assert sorted(places.tolist()) == list(range(500))
                owner = owners(found[places])
                now = dict(zip(found[places].tolist(), owner.tolist(), strict=True))
                same = [before.get(one, worker) == worker for one, worker in now.items()]
                assert all(same) and np.diff(found[places]).astype(bool).sum() == len(now) - 1
                before |= now
            assert max(np.bincount([*before.values()])) <= 2 + epoch
            before.clear()


def test_huge_row_groups_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cells = []
    for _ in range(2):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)).save(
            buffer, "PNG"
        )
        cells.append({"bytes": buffer.getvalue(), "path": None})
    for split, count in (("train", 10), ("test", 1)):
        table = pa.table({"image": cells * count, "label": [0, 1] * count})
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet", row_group_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stream_dataset(tmp_path)
    monkeypatch.setattr(module, "MEMORY", 3000)
    with pytest.warns(UserWarning, match=r"row groups of 0 MB, of which 10 do not fit") as caught:
        stream_dataset(tmp_path)
    (text,) = [str(one.message) for one in caught if one.category is UserWarning]
    assert "\n" not in text


@pytest.mark.parametrize(
    ("environment", "own", "parent", "want"),
    [
        ({}, 6, 8, 6),
        ({"LOCAL_WORLD_SIZE": "4"}, 8, 8, 2),  # a job of 8 of 64 cores
        ({"LOCAL_WORLD_SIZE": "4"}, 2, 8, 2),  # the launcher has divided them already
        ({"LOCAL_WORLD_SIZE": "64"}, 8, 8, 1),
        ({"SLURM": "4", "SLURM_CPUS_ON_NODE": "32"}, 8, 64, 8),  # each task has its own
        ({"SLURM": "4", "SLURM_CPUS_ON_NODE": "32"}, 32, 64, 8),
        ({"SLURM": "4"}, 64, 64, 16),
    ],
)
def test_cores_are_divided_among_processes(
    environment: dict[str, str], own: int, parent: int, want: int, monkeypatch: pytest.MonkeyPatch
):
    variables = dict(environment)
    tasks = variables.pop("SLURM", None)
    if tasks:
        variables |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": tasks}
        variables |= {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_PROCID": "0"}
    elif variables:
        variables |= {"RANK": "0", "WORLD_SIZE": "64", "LOCAL_RANK": "0"}
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    affinity = {0: set(range(own)), os.getppid(): set(range(parent))}
    monkeypatch.setattr(os, "sched_getaffinity", affinity.__getitem__, raising=False)
    assert module._cores() == want
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    local = int(tasks or variables.get("LOCAL_WORLD_SIZE", 1))
    assert module._cores() == 64 // local


def test_the_evaluation_reads_a_few_stretches_in_order(
    photos: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of images without stretches it takes those it always took."""
    stream = stream_dataset(photos, img_size=(8, 8))
    plain = OnlineEvaluation(stream, open_images(stream, "cpu", 0), 20)
    assert plain._index.tolist() == np.random.default_rng(0).permutation(40)[:20].tolist()
    order = _of_few(np.full(12_000, 100), 2048, np.random.default_rng(0))
    assert len(order) == 2048 and (np.diff(order) > 0).all()
    assert len(np.unique(order // 100)) == 21
    assert len(np.unique(_of_few(np.full(900, 1000), 2048, np.random.default_rng(1)) // 1000)) == 8
    assert len(_of_few(np.array([5, 3000]), 2048, np.random.default_rng(0))) == 1029
    monkeypatch.setattr(ImageStream, "blocks", np.full(10, 4))
    images = open_images(stream, "cpu", 0)
    evaluate = OnlineEvaluation(stream, images, 20)
    asked: list[int] = []
    take = StreamImages.take

    def watched(self: StreamImages, index: torch.Tensor) -> torch.Tensor:
        asked.extend(index.tolist())
        return take(self, index)

    monkeypatch.setattr(StreamImages, "take", watched)
    encoder = ViT((8, 8), 4, embed_dim=16, depth=1, num_heads=2)
    row = evaluate(encoder, torch.autocast("cpu", torch.bfloat16, enabled=False))
    assert asked == sorted(set(asked)) and len(asked) == 20 and 0 <= row["knn"] <= 1
    assert evaluate._labels is not None and evaluate._mixed is not None
    assert (evaluate._labels.numpy() == stream.targets["class"].values[asked]).all()
    assert sorted(evaluate._mixed.tolist()) == list(range(20)) != evaluate._mixed.tolist()


def test_without_what_workers_need_threads_decode(photos: Path, monkeypatch: pytest.MonkeyPatch):
    """On Windows: no descriptors that children inherit, no waiting for pipes, no pread."""
    stream = stream_dataset(photos, img_size=(8, 8))
    whole = open_images(stream, "cpu", 0).take(torch.arange(40))
    monkeypatch.setattr(module.os, "name", "nt")
    images = open_images(stream, "cpu", 2)
    monkeypatch.undo()
    assert isinstance(images, StreamImages) and images.workers == 0
    (batch,) = images.batches([torch.arange(40)])
    assert (batch == whole).all()


@pytest.mark.parametrize("pread", [True, False])
def test_threads_read_more_shards_than_stay_open(
    pread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file that is put out while another thread reads it is not closed beneath its feet."""
    if not pread:
        monkeypatch.delattr(os, "pread")
    monkeypatch.setattr(Members, "_OPEN", 2)
    for i in range(12):
        (tmp_path / f"{i}.tar").write_bytes(bytes([i]) * 4096)
    shard = np.repeat(np.arange(12, dtype=np.int32), 20)
    place = np.tile(np.array([[0, 4096]]), (240, 1))
    shards = [str(tmp_path / f"{i}.tar") for i in range(12)]
    names = Names.of(str(i).encode() for i in range(240))
    members = pickle.loads(pickle.dumps(Members(shards, names, shard, place)))
    rows = np.random.default_rng(0).integers(0, 240, 4000).tolist()
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(members.source, rows))
    finally:
        sys.setswitchinterval(usual)
    assert all(
        content == bytes([row // 20]) * 4096 for row, content in zip(rows, found, strict=True)
    )
    assert len(members._files) == 2
