"""Kills and signals at real runs of ``sparsejepa pretrain ... --resume``: nothing is lost.

A chain of runs is killed (SIGKILL) again and again, each time at another moment of start-up, steps
or save, and in the end has the weights of one that nobody disturbed. A new Python process with
torch would take most of the time, so a server imports everything once and forks a child for each
run, which then does what the command line does. ``pytest -m slow -k kills -s`` prints the table.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SERVER = """
import os, shlex, signal, sys
import sparsejepa.training.loop, sparsejepa.verbs.training, sklearn.neighbors, scipy.linalg
from sparsejepa.cli import main

pid = None
for line in sys.stdin:
    if pid:
        os.waitpid(pid, 0)
    log, *words = shlex.split(line)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(target, 1), os.dup2(target, 2)
        sys.argv = ["sparsejepa", *words]
        status = main()
        sys.stdout.flush()
        os._exit(status)
    print(pid, flush=True)
    # Not reaped before the next one: its number cannot become another process's meanwhile.
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)
"""


class Server:
    """Starts runs in forked children, one at a time."""

    def __init__(self) -> None:
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | alone,
        )  # fmt: skip
        self.pid = 0

    def start(self, words: list[str], log: Path) -> None:
        assert self._process.stdin
        self._process.stdin.write(" ".join(f"'{word}'" for word in [str(log), *words]) + "\n")
        self._process.stdin.flush()
        self.pid = int(self._line())

    def running(self) -> bool:
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert found is None, "the server has died"
        return self._state() != "Z"

    def hold(self) -> None:
        """Stop the run where it is, unless it has ended."""
        os.kill(self.pid, signal.SIGSTOP)
        while self._state() not in "TZ":
            time.sleep(0.0005)

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def status(self) -> int:
        """Wait for the end of the run; a signal's number is negative."""
        return int(self._line())

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not hasattr(os, "waitid") or not Path("/proc/self/stat").exists():
        pytest.skip("needs fork and /proc")
    server = Server()
    yield server
    server.close()


STEPS = 30
"""Of the runs that are not marked slow."""


@pytest.fixture(scope="module")
def undisturbed(server: Server, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_undisturbed(server, folder, tmp_path_factory.mktemp("undisturbed"), STEPS)


def run_undisturbed(server: Server, folder: Path, at: Path, steps: int) -> Path:
    server.start(words_of(folder, at / "whole", steps), at / "log")
    assert server.status() == 0, (at / "log").read_text()
    return at / "whole"


@dataclass
class Toll:
    """What the kills did."""

    kills: int = 0
    in_saves: int = 0
    before_first_step: int = 0
    resumes: int = 0
    lost: list[int] = field(default_factory=list)
    """Steps that had been taken and had to be taken again, for each kill."""
    seconds: float = 0.0

    def table(self) -> str:
        rows = {
            "kills (SIGKILL)": self.kills,
            "  of them during a save": self.in_saves,
            "  of them before the first step of a run": self.before_first_step,
            "runs that went on from a checkpoint": self.resumes,
            "steps lost, all kills together": sum(self.lost),
            "steps lost, at most in one kill": max(self.lost),
            "seconds": round(self.seconds),
        }
        return "\n" + "\n".join(f"{name:<44}{value:>6}" for name, value in rows.items())


def words_of(folder: Path, out: Path, steps: int) -> list[str]:
    """Return a command with all that draws: stochastic depth, groups, steering, augmentation."""
    given = f"""--preset nano --steps {steps} --batch-size 16 --predictor-dim 32
        --predictor-depth 1 --num-groups 4 --threads 1 --device cpu --groups concept --density 0.5
        --drop-path 0.2 --checkpoint-every 2 --log-every 3"""
    return ["pretrain", str(folder), "--out", str(out), "--resume", *given.split()]


def checkpoints_of(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def in_save(out: Path) -> bool:
    return any((out / "checkpoints").glob(".step-*.tmp"))


def steps_logged(out: Path) -> list[int]:
    """Return the steps of metrics.jsonl in the order of its lines."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["step"] for row in rows if "loss" in row]


def assert_same(whole: Path, killed: Path, steps: int) -> None:
    last = f"checkpoints/step-{steps:09d}"
    assert [path.name for path in checkpoints_of(killed)][-1:] == [Path(last).name]
    shards = [path.name for path in (whole / last).glob("*.safetensors")]
    for name in ("encoder.safetensors", "groups.safetensors", *(f"{last}/{s}" for s in shards)):
        a, b = load_file(whole / name), load_file(killed / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert steps_logged(whole) == steps_logged(killed) == list(dict.fromkeys(steps_logged(whole)))
    assert not in_save(killed)


def kill_again_and_again(
    server: Server, folder: Path, tmp_path: Path, whole: Path, *, kills: int, steps: int
) -> Toll:
    """Kill a chain of runs `kills` times, let it end, and compare with the undisturbed `whole`."""
    killed, log = tmp_path / "killed", tmp_path / "log"
    rng, toll, began = random.Random(0), Toll(), time.monotonic()
    while toll.kills < kills:
        resumed_at = int(checkpoints_of(killed)[-1].name[5:]) if checkpoints_of(killed) else 0
        left = in_save(killed)  # by the kill before; the run removes it when it starts
        server.start(words_of(folder, killed, steps), log)
        if toll.kills % 2:  # at any moment from the start of the process on
            until = time.monotonic() + rng.uniform(0, 2)
            while time.monotonic() < until and server.running():
                time.sleep(0.002)
        else:  # from the beginning of the first, second, ... save on, 80 ms long
            for _ in range(rng.randint(1, 3)):
                while server.running() and (left or not in_save(killed)):
                    left = left and in_save(killed)
                    time.sleep(0.0005)
                moment = time.monotonic() + rng.uniform(0, 0.08)
                while server.running() and time.monotonic() < moment:
                    time.sleep(0.0005)
            # Every other one certainly within a save, however busy the machine is.
            while toll.kills % 4 == 0 and server.running():
                server.hold()
                if in_save(killed):
                    break
                os.kill(server.pid, signal.SIGCONT)
                while server.running() and not in_save(killed):
                    time.sleep(0.0005)
        os.kill(server.pid, signal.SIGKILL)
        status = server.status()
        assert status == -signal.SIGKILL, f"status {status}: {log.read_text()}"
        toll.kills += 1
        toll.in_saves += in_save(killed)
        toll.resumes += resumed_at > 0
        saved = int(checkpoints_of(killed)[-1].name[5:]) if checkpoints_of(killed) else 0
        assert saved >= resumed_at, "a kill never takes back what was saved"
        done = (steps_logged(killed) or [-1])[-1] + 1
        toll.before_first_step += done <= resumed_at
        toll.lost.append(max(0, done - saved))
    server.start(words_of(folder, killed, steps), log)
    assert server.status() == 0, log.read_text()
    toll.seconds = time.monotonic() - began
    assert_same(whole, killed, steps)
    return toll


def test_a_few_kills_lose_nothing(
    server: Server, folder: Path, tmp_path: Path, undisturbed: Path
) -> None:
    toll = kill_again_and_again(server, folder, tmp_path, undisturbed, kills=5, steps=STEPS)
    assert toll.kills == 5 and toll.in_saves >= 2 and max(toll.lost) <= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_kills_lose_nothing(server: Server, folder: Path, tmp_path: Path) -> None:
    whole = run_undisturbed(server, folder, tmp_path, 600)
    toll = kill_again_and_again(server, folder, tmp_path, whole, kills=100, steps=600)
    print(toll.table())
    assert toll.kills == 100 and toll.in_saves >= 34 and max(toll.lost) <= 2
    assert toll.resumes >= 90


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_ends_with_its_status_and_the_rest_follows_to_the_bit(
    server: Server, folder: Path, tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    stopped, log = tmp_path / "stopped", tmp_path / "log"
    words = [*words_of(folder, stopped, STEPS), "--checkpoint-every", "1000"]
    server.start(words, log)
    while server.running() and not steps_logged(stopped):
        time.sleep(0.002)
    os.kill(server.pid, number)
    assert server.status() == 128 + number, log.read_text()
    assert "--resume" in log.read_text()
    (saved,) = checkpoints_of(stopped)
    assert 0 < int(saved.name[5:]) < STEPS and not (stopped / ".lock").exists()
    server.start(words, log)
    assert server.status() == 0, log.read_text()
    for name in ("encoder.safetensors", "groups.safetensors"):
        a, b = load_file(undisturbed / name), load_file(stopped / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert steps_logged(stopped) == sorted(set(steps_logged(stopped)))
