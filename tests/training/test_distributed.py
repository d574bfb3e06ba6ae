"""Several processes against one: the same weights, the same files, and how a job ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsejepa.config import Config
from sparsejepa.distributed import Share, World, own_rows
from sparsejepa.errors import UserError
from sparsejepa.study import pretrain
from sparsejepa.training.loop import check_shares

from .processes import MORE, VARIANTS, check_collectives, config_of, steps

SCRIPT = Path(__file__).with_name("processes.py")
ROOT = SCRIPT.parent.parent.parent
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-9}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def by_hand(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def start(words: Sequence[str | Path], size: int = 2) -> list[subprocess.Popen[str]]:
    """Start the processes of one job: `python` with these words, each told who it is."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            | by_hand(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def end(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for all; return status, output and errors of each."""
    found = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=240)
            found.append((process.returncode, out, errors))
    finally:
        for process in processes:
            process.kill()
    return found


def run(words: Sequence[str | Path], size: int = 2) -> None:
    for status, _, errors in end(start(words, size)):
        assert status == 0, errors


def assert_equal_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found: the exchanges, and every variant of training."""
    folder = tmp_path_factory.mktemp("together")
    run([SCRIPT, ",".join(["collectives", *VARIANTS]), folder])
    return folder


def test_exchanges_have_the_gradients_of_one_process(together: Path) -> None:
    alone = check_collectives(World())
    for rank in range(2):
        found = torch.load(together / f"collectives.{rank}")
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_as_one(together: Path, name: str) -> None:
    alone = steps(World(), **VARIANTS[name])
    zeros = (alone["groups.W"] == 0).double().mean()
    assert 0.1 < zeros < 0.7  # of at most 0.75: the prox has something to decide
    assert alone["groups.mean_gradient"].all()  # and the mean gradient is compared as well
    found = [torch.load(together / f"{name}.{rank}") for rank in range(2)]
    for theirs in found:
        assert_equal_weights(alone, theirs)
    assert torch.equal(found[0]["groups.W"], found[1]["groups.W"])


@pytest.mark.slow
def test_two_processes_train_as_one_whatever_the_terms(tmp_path: Path) -> None:
    run([SCRIPT, ",".join(MORE), tmp_path])
    for name, settings in MORE.items():
        alone = steps(World(), **settings)
        for rank in range(2):
            assert_equal_weights(alone, torch.load(tmp_path / f"{name}.{rank}"))


def test_parts_add_up_where_no_term_is_over_the_batch() -> None:
    settings = {"beta": 0.0, "groups": "none"}
    assert_equal_weights(steps(World(), **settings), steps(World(), accumulate=2, **settings))


def test_recomputed_activations_give_the_same_weights() -> None:
    assert_equal_weights(steps(World()), steps(World(), checkpoint_activations=True))


def command(config: Config, out: Path, *words: str) -> list[str | Path]:
    """The words that start a run with the settings of `config`."""
    out.parent.mkdir(exist_ok=True)
    file = out.with_suffix(".toml")
    if not file.exists():
        import tomli_w

        file.write_text(tomli_w.dumps(config.to_dict()))
    return ["-m", "sparsejepa", "pretrain", "--config", file, "--out", out, *words]


def small(folder: Path, **settings: Any) -> Config:
    # At a low rate, so that rounding grows little over more steps.
    usual = {"checkpoint_every": 5, "lr": 2e-4}
    return config_of(data=str(folder), **{**usual, **settings})


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    """Both have equal weights; what was measured of these afterwards, in fp32, is equal in that."""
    for file in ("encoder.safetensors", "groups.safetensors"):
        a, b = load_file(ours / file), load_file(theirs / file)
        for name in ("norm.running_mean", "norm.running_var", "seen", "rms"):
            if file.startswith("groups"):
                torch.testing.assert_close(a.pop(name), b.pop(name), rtol=1e-6, atol=1e-6)
        assert_equal_weights(a, b)


def stopped(config: Config, out: Path, words: Sequence[str] = (), **how: Any) -> list[Any]:
    """Start a run, send SIGTERM to the last process alone after some steps, wait for all."""
    metrics = out / "metrics.jsonl"

    def lines() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    before = lines()
    processes = start(command(config, out, *words), **how)
    while lines() < before + 2 and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    processes[-1].send_signal(signal.SIGTERM)
    return end(processes)


def test_a_signal_to_one_process_ends_all_and_one_process_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    config = small(folder, steps=60)
    found = stopped(config, tmp_path / "run")
    assert [status for status, _, _ in found] == [143, 143]
    assert "interrupted; continue with: the same command again with --resume\n" in found[0][2]
    assert found[1][1] == "" and "interrupted" not in found[1][2]
    assert not (tmp_path / "run" / "summary.json").exists()
    pretrain(config, out=tmp_path / "run", resume=True)
    pretrain(config, out=tmp_path / "whole")
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_run_goes_on_with_any_number_of_processes(
    folder: Path, tmp_path: Path, first: str, then: str
) -> None:
    config, out = small(folder, steps=120), tmp_path / "run"
    for kind, size in ((first, 2), (then, 4), (first, 1), (then, 2)):
        words = ["--parallel", kind, *(["--resume"] if out.exists() else [])]
        found = stopped(config, out, words, size=size)
        assert {status for status, _, _ in found} <= {143, 0}, found
    run(command(config, out, "--parallel", then, "--resume"))
    pretrain(config, out=tmp_path / "whole")
    assert_equal_runs(tmp_path / "whole", out)


def test_torchrun_starts_one_run_that_speaks_once(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = command(small(folder, steps=4, parallel="fsdp"), out, "--json")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, words)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["steps"] == 4  # one object
    assert done.stderr.count("finished: ") == 1
    files = {path.name for path in out.iterdir()}
    assert {"encoder.safetensors", "groups.safetensors", "summary.json", "metrics.jsonl"} <= files
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    pretrain(small(folder, steps=4), out=tmp_path / "alone")
    alone = (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()
    for ours, theirs in zip(rows, map(json.loads, alone), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"images_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_an_error_of_one_process_names_it_and_ends_all(folder: Path, tmp_path: Path) -> None:
    settings = json.dumps(small(folder).to_dict())
    code = f"import sys; sys.argv = ['', 'fail', {str(tmp_path)!r}, '3', {settings!r}]\n" + (
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import processes, sparsejepa.cli as cli\n"
        "cli._run = lambda words, world: processes.main()\n"
        "sys.exit(cli.main(['pretrain']))"
    )
    found = end(start(["-c", code]))
    assert [status for status, _, _ in found] == [2, 2]
    line = "sparsejepa: error: process 1 of 2: something is wrong with this process"
    assert line in found[1][2] and "error:" not in found[0][2]
    assert not (tmp_path / "run" / ".lock").exists()


def test_an_error_of_all_is_said_once(folder: Path, tmp_path: Path) -> None:
    found = end(start(command(small(folder, batch_size=9), tmp_path / "run")))
    assert [status for status, _, _ in found] == [2, 2]
    assert "--batch-size 9: 2 processes" in found[0][2] and "use 8" in found[0][2]
    assert found[1][1:] == ("", "")


def test_verbs_for_one_process_refuse_several() -> None:
    found = end(start(["-m", "sparsejepa", "info"]))
    assert [status for status, _, _ in found] == [2, 2]
    assert found[0][2].count("\n") == 1 and "error: info" in found[0][2]
    assert "for one process and 2 were started" in found[0][2] and found[1][2] == ""


@pytest.mark.slow
def test_torchrun_starts_anew_and_goes_on(folder: Path, tmp_path: Path) -> None:
    """A process kills itself at a step; restarted, the run ends as if nothing had happened."""
    config = small(folder, steps=20)
    settings = json.dumps({**config.to_dict(), "how": "kill"})
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--max-restarts", "1", str(SCRIPT), "fail", str(tmp_path), "12", settings]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pretrain(config, out=tmp_path / "whole")
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_probing_and_embedding_together(tiny_images: Path, tmp_path: Path) -> None:
    config = small(tiny_images / "train", steps=4, precision="fp32")
    out = pretrain(config, out=tmp_path / "run").path
    wanted = {}
    for size in (1, 2):
        probe = ["-m", "sparsejepa", "probe", out, "--data", tiny_images, "--json"]
        file = tmp_path / f"features-{size}.npz"
        embed = ["-m", "sparsejepa", "embed", out, "--data", tiny_images, "--out", file]
        found = end(start([*probe, "--device", "cpu"], size))
        assert [status for status, _, _ in found] == [0] * size, found
        assert all(printed == "" for _, printed, _ in found[1:])
        run([*embed, "--device", "cpu"], size)
        rows = json.loads(found[0][1])["probes"]
        wanted[size] = [row["accuracy"] for row in rows], np.load(file)["x"]
    assert wanted[1][0] == wanted[2][0]
    np.testing.assert_allclose(wanted[2][1], wanted[1][1], rtol=1e-4, atol=1e-5)


def test_who_a_process_is() -> None:
    assert World.from_environment({}) == World()
    assert World.from_environment(by_hand(1, 4, 1)) == World(1, 4, 1, 4)
    restarted = {**by_hand(0, 2, 1), "TORCHELASTIC_RESTART_COUNT": "2"}
    assert World.from_environment(restarted).restarts == 2
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        World.from_environment({"RANK": "0", "WORLD_SIZE": "two"})
    with pytest.raises(UserError, match="--device cuda:1"):
        World(0, 2).place("cuda:1")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU on this machine; use --device cpu"):
            World(0, 2).place("cuda")


def test_shares_are_all_rows_once_and_in_order() -> None:
    rows = np.arange(12)
    shares = [Share(rank, 3, part, 2) for part in range(2) for rank in range(3)]
    assert np.concatenate([rows[share.rows(12)] for share in shares]).tolist() == rows.tolist()
    assert rows[Share(2, 3, 1, 2).part_rows(12)].tolist() == [6, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="does not divide"):
        shares[0].rows(10)
    parts = np.concatenate([own_rows(np.arange(7), World(rank, 3)) for rank in range(3)])
    assert parts[:7].tolist() == list(range(7)) and len(parts) == 9
    check_shares(config_of(batch_size=8), World(0, 4))
    with pytest.raises(UserError, match=r"--batch-size 8: 3 processes .* use 9"):
        check_shares(config_of(batch_size=8), World(0, 3))
