"""Checkpoints that were damaged, and those of other numbers of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsejepa.errors import UserError
from sparsejepa.training.checkpoint import Checkpoints

from . import saving
from .saving import (
    SHARD,
    Net,
    Tensors,
    equal,
    names,
    optimizer_of,
    restored,
    tensors_of,
    train,
    write,
)


def test_the_newest_are_kept_and_restored_to_the_bit(tmp_path: Path) -> None:
    assert restored(tmp_path)[0] is None
    kept = write(tmp_path, (3, 6, 1200), keep=2)
    assert names(tmp_path) == ["step-000000006", "step-000001200"]
    progress, tensors = restored(tmp_path)
    assert progress == {"step": 1200, "seconds": 400.0, "images": "ä"}
    assert equal(tensors, kept[1200]) and "idle/step" not in tensors
    entry = tmp_path / "checkpoints" / "step-000001200"
    about = json.loads((entry / "manifest.json").read_text())
    assert about["files"][SHARD]["size"] == (entry / SHARD).stat().st_size


def test_a_restored_run_trains_on_to_the_same_bits(tmp_path: Path) -> None:
    write(tmp_path, (1, 2))
    net = Net(99)
    optimizer = optimizer_of(net)
    Checkpoints(tmp_path).restore(net, optimizer)
    train(net, optimizer, 3)
    assert equal(tensors_of(net, optimizer), write(tmp_path / "other", (1, 2, 3))[3])


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    write(tmp_path, (1,))
    net = Net(0, width=6)
    with pytest.raises(
        UserError, match=r"step-0+1 .*does not fit this model: model\.first\.weight"
    ):
        Checkpoints(tmp_path).restore(net, optimizer_of(net))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Tensors]]:
    run = tmp_path_factory.mktemp("pristine")
    return run, write(run, (10, 20, 30))


def flip(path: Path, at: float, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    path.write_bytes(data)


def cut(path: Path, at: float, bit: int) -> None:
    os.truncate(path, int(at * path.stat().st_size))


DAMAGES: dict[str, tuple[str, Callable[[Path, float, int], Any]]] = {
    "flip tensors": (SHARD, flip),
    "cut tensors": (SHARD, cut),
    "no tensors": (SHARD, lambda path, *_: path.unlink()),
    "garbage manifest": (
        "manifest.json",
        lambda path, at, bit: path.write_bytes(
            [b"[]", b"{}", b"null", b"\xff\xfe", b'{"files": {}}', b"", b"7", b'"'][bit]
        ),
    ),
    "no manifest": ("manifest.json", lambda path, *_: path.unlink()),
    "none": (SHARD, lambda path, *_: None),
}


@settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(
    damages=st.tuples(
        *[
            st.tuples(
                st.sampled_from(sorted(DAMAGES)),
                st.floats(0, 1, exclude_max=True),
                st.integers(0, 7),
            )
            for _ in range(3)
        ]
    )
)
def test_the_newest_whole_checkpoint_wins_whatever_happened_to_the_others(
    pristine: tuple[Path, dict[int, Tensors]], damages: tuple[tuple[str, float, int], ...]
) -> None:
    """Each of three checkpoints is whole or damaged in some way."""
    source, kept = pristine
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        shutil.copytree(source / "checkpoints", run / "checkpoints")
        broken: list[Path] = []
        whole = 0
        for step, (name, at, bit) in zip(kept, damages, strict=True):
            entry = run / "checkpoints" / f"step-{step:09d}"
            file, damage = DAMAGES[name]
            damage(entry / file, at, bit)
            if name == "none":
                whole, broken = step, []
            else:
                broken.insert(0, entry)
        said: list[str] = []
        if whole:
            progress, tensors = restored(run, said)
            assert progress is not None and progress["step"] == whole
            assert equal(tensors, kept[whole])
        else:
            with pytest.raises(UserError, match=r"step-0+10 cannot be resumed from .* --out"):
                restored(run, said)
        assert len(said) == len(broken)
        for entry, line in zip(broken, said, strict=True):
            assert line.startswith(f"{entry} cannot be resumed from (it is damaged, incomplete or")


def test_what_a_resume_went_past_does_not_crowd_out_what_is_whole(tmp_path: Path) -> None:
    write(tmp_path, (1, 2, 3))
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"step-{step:09d}" / SHARD).write_bytes(b"")
    assert (restored(tmp_path)[0] or {})["step"] == 1
    write(tmp_path, (2,), keep=2)
    assert names(tmp_path) == ["step-000000001", "step-000000002"]
    assert (restored(tmp_path)[0] or {})["step"] == 2


JOB = """
import contextlib, errno, importlib.util, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from sparsejepa.distributed import World, joined
from sparsejepa.errors import UserError
from sparsejepa.training import checkpoint
from sparsejepa.training.checkpoint import Checkpoints

spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec)
sys.modules["shared"] = shared
spec.loader.exec_module(shared)
root, saves, world = Path(sys.argv[2]), sys.argv[3] == "saves", World.from_environment()


def fresh(sharded):
    net = shared.Net(99)
    if sharded:
        fully_shard(net.first), fully_shard(net.second), fully_shard(net, ignored_params={net.W})
    return net, shared.optimizer_of(net, one_group_each=sharded)


def restored(name, sharded):
    net, optimizer = fresh(sharded)
    said = []
    progress = Checkpoints(root / name, world=world, say=said.append).restore(net, optimizer)
    found = shared.tensors_of(net, optimizer)
    expected = torch.load(root / f"{name}-{progress['step']}.pt")
    assert shared.equal(found, expected), (name, sharded)
    return net, optimizer, progress["step"], said


with joined(world):
    if saves:
        net, optimizer, step, _ = restored("alone", sharded=True)
        assert step == 2
        checkpoints = Checkpoints(root / "both", world=world)
        for step in (3, 4):
            shared.train(net, optimizer, step)
            checkpoints.save(net, optimizer, {"step": step})
            expected = shared.tensors_of(net, optimizer)
            if world.main:
                torch.save(expected, root / f"both-{step}.pt")
        digest = checkpoint._digest
        if not world.main:  # the disk of one machine is full

            def full(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            checkpoint._digest = full
        try:
            checkpoints.save(net, optimizer, {"step": 5})
        except UserError as error:
            assert "step-000000004; make room" in str(error), error
        else:
            raise AssertionError("all fail together")
        checkpoint._digest = digest
        dist.barrier()
        entry = root / "both" / "checkpoints" / "step-000000004"
        assert len(list(entry.glob("*.safetensors"))) == 2
        if world.main:
            (entry / "manifest.json").rename(root / "aside")
        dist.barrier()
        *_, step, said = restored("both", sharded=False)
        assert step == 3 and len(said) == (1 if world.main else 0), (step, said)
        dist.barrier()
        if world.main:
            (root / "aside").rename(entry / "manifest.json")
        dist.barrier()
    for sharded in (True, False):
        *_, step, said = restored("both", sharded)
        assert step == 4 and not said
"""


def start_job(tmp_path: Path, processes: int, what: str) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), str(script), saving.__file__, str(tmp_path), what],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("readers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_what_one_process_or_two_sharded_ones_save_others_read_to_the_bit(
    tmp_path: Path, readers: int
) -> None:
    """Also two layouts of the optimiser's groups, a rank that fails alone, and uneven shards."""
    for step, tensors in write(tmp_path / "alone", (1, 2)).items():
        torch.save(tensors, tmp_path / f"alone-{step}.pt")
    start_job(tmp_path, 2, "saves")
    progress, tensors = restored(tmp_path / "both")
    assert progress == {"step": 4} and equal(tensors, torch.load(tmp_path / "both-4.pt"))
    if readers > 1:
        start_job(tmp_path, readers, "reads")
