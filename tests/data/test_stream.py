"""Streams: the same images as the cache, in any order, on any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparsejepa.config import preset
from sparsejepa.data import stream as module
from sparsejepa.data.catalog import load_dataset, load_images, stream_dataset
from sparsejepa.data.stream import StreamImages
from sparsejepa.data.tars import Members
from sparsejepa.errors import UserError
from sparsejepa.study import pretrain

Save = Callable[..., np.ndarray]


@pytest.fixture
def photos(tmp_path: Path, save: Save) -> Path:
    """Forty images of three classes, in two sizes."""
    for i in range(40):
        save(tmp_path / "photos" / "train" / "abc"[i % 3] / f"{i:02d}.png", (9 + i % 2, 12))
    save(tmp_path / "photos" / "test" / "a" / "0.png", (9, 12))
    return tmp_path / "photos"


@pytest.fixture
def opened() -> Iterator[Callable[..., StreamImages]]:
    """Return a function that opens a stream; its workers are ended afterwards."""
    streams: list[StreamImages] = []

    def open_it(images: Any, workers: int = 2) -> StreamImages:
        streams.append(images.open("cpu", workers))
        return streams[-1]

    yield open_it
    for images in streams:
        images.close()


def numbers(*parts: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(part) for part in parts]


def test_a_stream_is_the_cached_set(photos: Path, tmp_path: Path, opened):
    cached = load_dataset(photos, img_size=(8, 8), cache_dir=tmp_path / "cache")
    stream = stream_dataset(photos, img_size=(8, 8))
    assert (len(stream), stream.img_size) == (40, (8, 8))
    assert (stream.name, stream.split) == (cached.name, cached.split)
    assert tuple(stream.files) == cached.files and stream.files[3:5] == cached.files[3:5]
    assert (stream.mean, stream.std) == (cached.mean, cached.std)  # so few that all were read
    assert stream.targets["class"].names == cached.targets["class"].names
    assert (stream.targets["class"].values == cached.targets["class"].values).all()
    order = [torch.randperm(40)[: 7 + i % 3] for i in range(10)]
    order += [torch.arange(0), torch.arange(200) % 40]
    for workers in (0, 1, 3):
        images = opened(stream, workers)
        assert list(images.batches([])) == []
        batches = list(images.batches(iter(order)))
        assert len(batches) == 12 and not images.skipped
        for index, batch in zip(order, batches, strict=True):
            assert batch.dtype == torch.uint8
            assert (batch.numpy() == cached.images[index.numpy()]).all()
        assert (images.take(order[0]) == batches[0]).all()


def test_only_what_fits_is_decoded_ahead(photos: Path, opened):
    """However long the order is, and however slowly it is read."""
    asked = []

    def order() -> Iterator[torch.Tensor]:
        for i in range(1000):
            asked.append(i)
            yield torch.arange(8)

    batches = opened(stream_dataset(photos, img_size=(8, 8)), 2).batches(order())
    for _ in range(5):
        next(batches)
    assert len(asked) < 20
    batches.close()


def test_own_size_and_mixed_sizes(photos: Path, tmp_path: Path, save: Save, opened):
    for i in range(4):
        save(tmp_path / "same" / "train" / f"{i}.png", (6, 5))
    save(tmp_path / "same" / "val" / "x.png", (6, 5))
    stream = stream_dataset(tmp_path / "same")
    assert stream.img_size == (6, 5) and len(stream_dataset(tmp_path / "same", "test")) == 1
    with pytest.raises(UserError, match=r"different sizes \(a/00.png has 9x12 .* set --img-size"):
        stream_dataset(photos)
    with pytest.raises(UserError, match=r"--img-size 10x10; use .* or --upscale"):
        stream_dataset(photos, img_size=(10, 10))
    assert stream_dataset(photos, img_size=(10, 10), upscale=True).img_size == (10, 10)
    for workers in (0, 2):  # met only while streaming: a file that is not in the sample
        images = opened(stream, workers)
        save(tmp_path / "same" / "train" / "2.png", (7, 5))
        with pytest.raises(UserError, match=r"0.png has 6x5 pixels, 2.png has 7x5.*--img-size"):
            list(images.batches(numbers([0, 1, 2, 3])))


def test_parts_of_a_stream(photos: Path, tmp_path: Path, opened):
    options: dict[str, Any] = {"img_size": (8, 8)}
    cached = load_dataset(photos, cache_dir=tmp_path / "cache", **options)
    stream = stream_dataset(photos, **options)
    for part in ("subset", "aside", "rest"):
        if part == "subset":
            ours, theirs = stream.subset(12, 3), cached.subset(12, 3)
        else:
            place = ["rest", "aside"].index(part)
            ours, theirs = stream.split_off(9)[place], cached.split_off(9)[place]
        assert tuple(ours.files) == theirs.files and ours.mean == theirs.mean
        assert (ours.targets["class"].values == theirs.targets["class"].values).all()
        assert ours.fingerprint not in (stream.fingerprint, theirs.fingerprint)
        index = torch.arange(len(ours))
        (batch,) = opened(ours).batches([index])
        assert (batch.numpy() == theirs.images).all()
    assert stream.subset(40) is stream


def test_mean_and_std_of_many_images_are_those_of_a_fixed_sample(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
):
    for i in range(60):
        save(tmp_path / "d" / "train" / f"{i:02d}.png")
    save(tmp_path / "d" / "test" / "0.png")
    exact = stream_dataset(tmp_path / "d")
    monkeypatch.setattr(module, "SAMPLE", 20)
    first, again = stream_dataset(tmp_path / "d"), stream_dataset(tmp_path / "d", "test")
    assert first.mean == again.mean and first.std == again.std and first.mean != exact.mean
    np.testing.assert_allclose(first.mean, exact.mean, atol=0.03)


@pytest.fixture
def holes(tmp_path: Path, save: Save) -> Path:
    """Twenty images of which 3, 4 and 19 cannot be read."""
    for i in range(20):
        save(tmp_path / "holes" / "train" / f"{i:02d}.png")
    for i in (3, 4, 19):
        (tmp_path / "holes" / "train" / f"{i:02d}.png").write_bytes(b"x" * i)
    save(tmp_path / "holes" / "test" / "0.png")
    return tmp_path / "holes"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_unreadable_images_are_replaced_by_the_next(holes: Path, opened, workers: int):
    stream = stream_dataset(holes)
    assert [name for name, _ in stream.skipped] == ["03.png", "04.png", "19.png"]
    images = opened(stream, workers)
    whole = [i for i in range(20) if i not in (3, 4, 19)]
    batches = list(images.batches(numbers([4, 0, 3], [19, 7], [3, 3], whole)))
    want = [images.take(torch.tensor(index)) for index in ([5, 0, 5], [0, 7], [5, 5], whole)]
    assert all((a == b).all() for a, b in zip(batches, want, strict=True))
    reasons = dict(images.skipped)
    assert len(images.skipped) == 3
    assert reasons == dict.fromkeys(["03.png", "04.png", "19.png"], "not an image")


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop(holes: Path, opened, workers: int):
    order, stream = [torch.arange(20)], stream_dataset(holes)
    for i in range(5, 12):
        (holes / "train" / f"{i:02d}.png").write_bytes(b"")
    assert len(list(opened(stream, workers).batches(order)))  # a half
    (holes / "train" / "12.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"11 of 20 images cannot be read, .*\(not an image\)"):
        list(opened(stream, workers).batches(order))
    with pytest.raises(UserError, match=r"holes: 11 of 20 images cannot be read, the first is 03"):
        stream_dataset(holes)


def test_a_dead_worker_is_one_line(photos: Path, opened):
    images = opened(stream_dataset(photos, img_size=(8, 8)))
    batches = images.batches(iter(lambda: torch.arange(8), None))
    next(batches)
    worker = multiprocessing.active_children()[-1]
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(UserError, match=r"decodes images died .*--workers") as caught:
        for _ in range(1000):
            next(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("small", ["before", "while"])
def test_too_little_shared_memory_is_one_line(
    photos: Path, opened, small: str, monkeypatch: pytest.MonkeyPatch
):
    images = opened(stream_dataset(photos, img_size=(8, 8)))
    if small == "before":
        # Three batches of eight for each of two processes.
        usage = SimpleNamespace(free=2 * 3 * 8 * 8 * 8 * 3 - 1)
        two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        for variable, value in two.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    else:  # the workers are forked and have this as well

        def full(tensor: torch.Tensor) -> None:
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

        monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"^/dev/shm: .*--workers") as caught:
        list(images.batches([torch.arange(8)]))
    assert "\n" not in str(caught.value)
    assert len(list(opened(images.stream, 0).batches([torch.arange(8)]))) == 1


def test_no_worker_outlives_its_trainer(photos: Path):
    """A trainer that is killed leaves nobody behind; nor does one that forgets to close."""
    code = f"""
import os, signal, torch
from sparsejepa.data.catalog import stream_dataset
import multiprocessing
images = stream_dataset({str(photos)!r}, img_size=(8, 8)).open("cpu", 2)
batches = images.batches(iter(lambda: torch.arange(8), None))
next(batches)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pids = list(map(int, done.stdout.split()))
    assert done.returncode == -signal.SIGKILL and len(pids) == 2
    for pid in pids:
        for _ in range(1000):  # PyTorch's workers look after their parent every five seconds
            if not _alive(pid):
                break
            os.sched_yield()
            subprocess.run(["sleep", "0.02"], check=True)
        assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


TINY: dict[str, Any] = {
    "steps": 9, "batch_size": 16, "encoder": "nano", "predictor_depth": 1, "num_groups": 4,
    "device": "cpu", "checkpoint_every": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARSEJEPA_CACHE", str(tmp_path / "cache"))


def encoder_of(run: Path) -> bytes:
    return (run / "encoder.safetensors").read_bytes()


def test_a_streamed_run_equals_a_cached_one_and_resumes_at_the_next_image(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Interrupted in the middle of an epoch: 96 images are six batches."""
    config = preset("nano").replace(data=str(tiny_images), **TINY)
    pretrain(config, out=tmp_path / "cached")
    streamed = config.replace(stream=True, workers=2)
    pretrain(streamed, out=tmp_path / "streamed")
    assert encoder_of(tmp_path / "streamed") == encoder_of(tmp_path / "cached")

    taken: list[int] = []
    batches = StreamImages.batches

    def watched(images: StreamImages, indices: Any) -> Iterator[torch.Tensor]:
        for number, batch in enumerate(batches(images, indices)):
            if taken and number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(StreamImages, "batches", watched)
    taken.append(1)
    with pytest.raises(KeyboardInterrupt):
        pretrain(streamed, out=tmp_path / "twice")
    taken.clear()
    pretrain(streamed.replace(workers=1), out=tmp_path / "twice", resume=True)
    assert encoder_of(tmp_path / "twice") == encoder_of(tmp_path / "cached")


def test_settings_of_a_stream(tiny_images: Path, tmp_path: Path):
    config = preset("nano").replace(data=str(tiny_images), stream=True, **TINY)
    with pytest.raises(UserError, match="--corruption noise: not for streamed images"):
        load_images(config.replace(corruption="noise"))
    assert len(load_images(config.replace(limit=20, holdout=30))) == 20
    with pytest.raises(UserError, match="--stream: the images of scenes are drawn"):
        load_images(config.replace(data="scenes"))
    with pytest.raises(UserError, match=r"--batch-size 16 is more than the 10"):
        pretrain(config.replace(limit=10), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("local", "own", "parent", "want"),
    [
        (1, 6, 8, 6),
        (4, 8, 8, 2),  # a job of 8 of 64 cores
        (4, 2, 8, 2),  # the launcher has divided them already
        (64, 8, 8, 1),
    ],
)
def test_cores_are_divided_among_processes(
    local: int, own: int, parent: int, want: int, monkeypatch: pytest.MonkeyPatch
):
    variables = {"RANK": "0", "WORLD_SIZE": "64", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(local)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    affinity = {0: range(own), os.getppid(): range(parent)}
    monkeypatch.setattr(os, "sched_getaffinity", affinity.__getitem__, raising=False)
    assert module._cores() == want
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert module._cores() == 64 // local


def test_threads_read_more_shards_than_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that is put out while another thread reads it is not closed beneath its feet."""
    monkeypatch.setattr(Members, "_OPEN", 2)
    for i in range(12):
        (tmp_path / f"{i}.tar").write_bytes(bytes([i]) * 4096)
    shard = np.repeat(np.arange(12, dtype=np.int32), 20)
    place = np.tile(np.array([[0, 4096]]), (240, 1))
    shards = [str(tmp_path / f"{i}.tar") for i in range(12)]
    names = [str(i).encode() for i in range(240)]
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
