"""Checkpoints are whole or not there: damage, full disks, kills, other numbers of processes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsejepa.errors import UserError
from sparsejepa.training import checkpoint
from sparsejepa.training.checkpoint import SINGLE_FILE, Checkpoints, has_checkpoint

Tensors = dict[str, torch.Tensor]
SHARD = "shard-00001-model-00001-of-00001.safetensors"


class Net(nn.Module):
    """What a model may hold: 0-d, int64, float64 and frozen tensors, an idle one, and W."""

    def __init__(self, seed: int, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(width, 7), nn.Linear(7, 3, bias=False).double()
        self.narrow, self.idle = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(3, 2), requires_grad=False)
        self.W = nn.Parameter(torch.randn(3, 2, 5))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("rate", torch.tensor(0.1 + seed, dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).double()) * self.narrow


def optimizer_of(net: Net, one_group_each: bool = False) -> torch.optim.AdamW:
    trained = [p for p in net.parameters() if p.requires_grad and p is not net.W]
    groups = [[p] for p in trained] if one_group_each else [trained[::2], trained[1::2]]
    return torch.optim.AdamW([{"params": group} for group in groups], lr=0.1, fused=True)


def train(net: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(4, net.first.in_features, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        net.W.mul_(0.9)
        net.count += 1  # type: ignore[operator]


def tensors_of(net: Net, optimizer: torch.optim.Optimizer) -> Tensors:
    """Return copies of all that must survive, whole also where it is sharded."""
    names = {p: name for name, p in net.named_parameters()}
    found = dict(net.state_dict())
    for p, state in optimizer.state.items():
        found |= {f"{names[p]}/{key}": t for key, t in state.items()}  # type: ignore[index]
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()  # type: ignore
        for name, t in found.items()
    }


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def restored(run: Path, said: list[str] | None = None) -> tuple[dict[str, Any] | None, Tensors]:
    """Restore into a model that was never trained."""
    net = Net(99)
    optimizer = optimizer_of(net, one_group_each=True)
    lines = [] if said is None else said
    progress = Checkpoints(run, say=lines.append).restore(net, optimizer)
    return progress, tensors_of(net, optimizer)


def write(run: Path, steps: tuple[int, ...], keep: int = 3) -> dict[int, Tensors]:
    """Save after each of `steps`; return what was saved."""
    net = Net(0)
    optimizer, kept = optimizer_of(net), {}
    checkpoints = Checkpoints(run, keep=keep)
    for step in steps:
        train(net, optimizer, step)
        checkpoints.save(net, optimizer, {"step": step, "seconds": step / 3, "images": "ä"})
        kept[step] = tensors_of(net, optimizer)
    return kept


def names(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def test_the_newest_are_kept_and_restored_to_the_bit(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path) and not Checkpoints(tmp_path)
    assert restored(tmp_path)[0] is None
    kept = write(tmp_path, (3, 6, 1200), keep=2)
    assert names(tmp_path) == ["step-000000006", "step-000001200"]
    assert has_checkpoint(tmp_path) and Checkpoints(tmp_path)
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


def test_what_a_resume_went_past_does_not_crowd_out_what_is_whole(tmp_path: Path) -> None:
    write(tmp_path, (1, 2, 3))
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"step-{step:09d}" / SHARD).write_bytes(b"")
    assert (restored(tmp_path)[0] or {})["step"] == 1
    write(tmp_path, (2,), keep=2)
    assert names(tmp_path) == ["step-000000001", "step-000000002"]
    assert (restored(tmp_path)[0] or {})["step"] == 2


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    write(tmp_path, (1,))
    net = Net(0, width=6)
    with pytest.raises(
        UserError, match=r"step-0+1 .*does not fit this model: model\.first\.weight"
    ):
        Checkpoints(tmp_path).restore(net, optimizer_of(net))


def test_a_checkpoint_of_the_first_format_is_named(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).touch()
    assert has_checkpoint(tmp_path)
    with pytest.raises(UserError, match=rf"{SINGLE_FILE} has format 1, this .* 2; .* --out"):
        restored(tmp_path)


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


def older(path: Path, at: float, bit: int) -> None:
    path.write_text(path.read_text().replace('{"format": 2', '{"format": 1'))


ANY_MANIFEST = r"manifest\.json is damaged|has format \d"  # a flip may hit the format's digit
DAMAGES: dict[str, tuple[str, Callable[[Path, float, int], Any], str | None]] = {
    "flip tensors": (SHARD, flip, "checksum differs"),
    "cut tensors": (SHARD, cut, r"has [\d,]+ bytes instead of [\d,]+"),
    "empty tensors": (SHARD, lambda path, *_: path.write_bytes(b""), "has 0 bytes instead of"),
    "no tensors": (SHARD, lambda path, *_: path.unlink(), f"{SHARD} is missing"),
    "flip manifest": ("manifest.json", flip, ANY_MANIFEST),
    "cut manifest": ("manifest.json", cut, r"manifest\.json is damaged"),
    "empty manifest": (
        "manifest.json", lambda path, *_: path.write_bytes(b""), r"manifest\.json is damaged"
    ),
    "garbage manifest": (
        "manifest.json",
        lambda path, at, bit: path.write_bytes(
            [b"[]", b"{}", b"null", b"\xff\xfe", b'{"format": 2}', b"[" * 9999, b"7", b'"']
            [bit]
        ),
        r"manifest\.json is damaged",
    ),
    "no manifest": ("manifest.json", lambda path, *_: path.unlink(), r"has no manifest\.json"),
    "older": ("manifest.json", older, "has format 1, this version reads 2"),
    "extra tensors": (
        "shard-00002.safetensors",
        lambda path, *_: shutil.copy(path.with_name(SHARD), path),
        r"shard-00002\.safetensors is not one of its files",
    ),
    "extra file": (".nfs0001", lambda path, *_: path.write_text("x"), None),
    "none": (SHARD, lambda path, *_: None, None),
}  # fmt: skip


@settings(
    max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
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
    """500 cases: each of three checkpoints whole or damaged in one of twelve ways."""
    source, kept = pristine
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        shutil.copytree(source / "checkpoints", run / "checkpoints")
        reasons: dict[Path, str] = {}
        whole = 0
        for step, (name, at, bit) in zip(kept, damages, strict=True):
            entry = run / "checkpoints" / f"step-{step:09d}"
            file, damage, reason = DAMAGES[name]
            before = (entry / "manifest.json").read_text()
            damage(entry / file, at, bit)
            if name == "flip manifest":
                with contextlib.suppress(ValueError):  # "1e-05" and "1E-05" are the same number
                    after = json.loads((entry / file).read_bytes())
                    reason = None if after == json.loads(before) else reason
            if reason is None:
                whole, reasons = step, {}
            else:
                reasons[entry] = reason
        said: list[str] = []
        if whole:
            progress, tensors = restored(run, said)
            assert progress is not None and progress["step"] == whole
            assert equal(tensors, kept[whole])
            assert len(said) == len(reasons)
        else:
            with pytest.raises(UserError, match="nor can the 2 before it") as error:
                restored(run, said)
            newest, reason = list(reasons.items())[-1]
            assert str(error.value).startswith(f"{newest} cannot be resumed from")
            assert re.search(reason, str(error.value)) and "--out" in str(error.value)
            assert said == []
        for (entry, reason), line in zip(reversed(reasons.items()), said, strict=False):
            assert line.startswith(f"{entry}: ") and "\n" not in line
            assert line.endswith(f"going on from step-{whole:09d}")
            assert re.search(reason, line), (reason, line)


class Faults:
    """Counts the moments of a save at which the system is asked for something, and can act there.

    Such a moment is every open, write, sync, rename, mkdir and removal.
    """

    def __init__(self, act: Callable[[int, str], None]) -> None:
        self.count, self._act = 0, act

    def _moment(self, name: str) -> None:
        self.count += 1
        self._act(self.count, name)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Faults]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
                patch.setattr(os, name, self._before(name, getattr(os, name)))
            patch.setattr(io, "open", self._opened(io.open))
            yield self

    def _before(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self._moment(name)
            return call(*args, **options)

        return wrapped

    def _opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if "r" in mode:
                return call(path, mode, *args, **options)
            self._moment("open")
            file = call(path, mode, *args, **options)
            return _Writing(file, self._moment)

        return wrapped


class _Writing:
    """A file of which one write in two halves is seen, as by a disk that fills up in between."""

    def __init__(self, file: Any, moment: Callable[[str], None]) -> None:
        self._file, self._moment = file, moment

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._moment("write")
        return half + self._file.write(data[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def moments() -> int:
    """Return how many moments a third save with two checkpoints kept has."""
    with tempfile.TemporaryDirectory() as folder:
        net, optimizer, checkpoints, _ = two_saved(Path(folder))
        with Faults(lambda number, name: None)() as faults:
            checkpoints.save(net, optimizer, {"step": 3})
        return faults.count


def two_saved(run: Path) -> tuple[Net, torch.optim.Optimizer, Checkpoints, dict[int, Tensors]]:
    """Save steps 1 and 2; return what step 3 is to be saved with, and all states by step."""
    net = Net(0)
    optimizer, checkpoints, kept = optimizer_of(net), Checkpoints(run), {}
    for step in (1, 2, 3):
        train(net, optimizer, step)
        kept[step] = tensors_of(net, optimizer)
        if step < 3:
            checkpoints.save(net, optimizer, {"step": step})
    return net, optimizer, checkpoints, kept


@pytest.mark.parametrize(
    ("code", "lasting", "remedy"),
    [
        (errno.ENOSPC, False, "make room there"),
        (errno.EDQUOT, False, "quota"),
        (errno.EROFS, True, "make it writable"),
        (errno.EIO, True, "see to that"),
    ],
    ids=lambda value: errno.errorcode.get(value) if type(value) is int else None,
)
def test_a_save_that_fails_at_any_moment_leaves_the_state_before_and_says_so(
    tmp_path: Path, code: int, lasting: bool, remedy: str
) -> None:
    """At each moment of a save once; `lasting`: nothing at all can be written from then on."""
    total = moments()
    assert total > 15
    failed = 0
    for moment in range(1, total + 1):
        run = tmp_path / str(moment)
        net, optimizer, checkpoints, kept = two_saved(run)

        def act(number: int, name: str, moment: int = moment) -> None:
            if number == moment or (lasting and number > moment):
                raise OSError(code, os.strerror(code))

        with Faults(act)():
            try:
                checkpoints.save(net, optimizer, {"step": 3})
            except UserError as error:
                failed += 1
                assert re.fullmatch(
                    rf"{run}/checkpoints: the checkpoint of step 3 could not be written "
                    rf"\({os.strerror(code)}\), the last good one is step-000000002; "
                    rf".*{remedy}.*, then go on with --resume",
                    str(error),
                )
        progress, tensors = restored(run)
        assert progress is not None and equal(tensors, kept[progress["step"]])
        assert progress["step"] in (2, 3), moment
        assert not [name for name in names(run) if name.startswith(".")]
        checkpoints.save(net, optimizer, {"step": 3})
        assert equal(restored(run)[1], kept[3])
        assert names(run) == ["step-000000002", "step-000000003"]
    # Nothing is lost any more once the new one has its name and only old ones are removed.
    assert failed >= total - 8


def test_a_kill_at_any_moment_of_a_save_loses_nothing_saved(tmp_path: Path) -> None:
    """SIGKILL at each moment once, in a child of this process."""
    found = []
    for moment in range(1, moments() + 1):
        run = tmp_path / str(moment)
        net, optimizer, checkpoints, kept = two_saved(run)

        def act(number: int, name: str, moment: int = moment) -> None:
            if number == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            with Faults(act)():
                checkpoints.save(net, optimizer, {"step": 3})
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        progress, tensors = restored(run)
        assert progress is not None and equal(tensors, kept[progress["step"]])
        assert not [name for name in names(run) if name.startswith(".")]
        found.append(progress["step"])
    assert found == sorted(found) and set(found) == {2, 3}


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    net, optimizer, checkpoints, kept = two_saved(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"File too large\), the last good one is step-0+2;"):
            checkpoints.save(net, optimizer, {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert equal(restored(tmp_path)[1], kept[2])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    where = tmp_path / "disk"
    where.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)]
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", *options], capture_output=True).returncode
    ):
        pytest.skip("mounting a file system is not permitted here")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_disk_that_fills_up_and_one_that_turns_read_only(small_disk: Path) -> None:
    run = small_disk / "run"
    net, optimizer, checkpoints, kept = two_saved(run)
    (small_disk / "other").write_bytes(b"x" * 100_000)
    with pytest.raises(OSError, match="No space"):
        for number in range(99):
            (small_disk / f"more{number}").write_bytes(b"x" * 4096)
    with pytest.raises(UserError, match=r"No space left .* step-0+2; make room there, then"):
        checkpoints.save(net, optimizer, {"step": 3})
    assert equal(restored(run)[1], kept[2])
    assert names(run) == ["step-000000001", "step-000000002"]
    (small_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"Read-only .* step-0+2; make it writable, then"):
        checkpoints.save(net, optimizer, {"step": 3})
    assert equal(restored(run)[1], kept[2])
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    checkpoints.save(net, optimizer, {"step": 3})
    assert equal(restored(run)[1], kept[3])


def test_another_failure_is_not_taken_for_one_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> str:
        raise KeyboardInterrupt

    net, optimizer, checkpoints, _ = two_saved(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "_digest", interrupted)
        checkpoints.save(net, optimizer, {"step": 3})
    assert names(tmp_path) == ["step-000000001", "step-000000002"]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("safetensors.torch.save", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        checkpoints.save(net, optimizer, {"step": 3})
    assert names(tmp_path) == ["step-000000001", "step-000000002"]


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
         str(processes), str(script), __file__, str(tmp_path), what],
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
