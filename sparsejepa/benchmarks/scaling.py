"""What working together costs: two processes that train one model against two that train two.

Each process has one thread, one model and equally many images a step; together they also exchange
gradients and what the terms over the batch need, and draw for the global batch. `python -m
sparsejepa.benchmarks.scaling --json OUT` measures both side by side, in turn, so that whatever the
machine does meanwhile hits both. Efficiency is the time of a step alone over that of one together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sparsejepa.benchmarks.timing import spread
from sparsejepa.config import Config, preset
from sparsejepa.data.augment import Augment
from sparsejepa.distributed import World, joined
from sparsejepa.environment import environment
from sparsejepa.files import write_text
from sparsejepa.training.build import build_model
from sparsejepa.training.step import TrainStep

CASES: dict[str, dict[str, Any]] = {
    "nano/8": {"encoder": "nano", "patch_size": 8, "batch_size": 64},
    "tiny/4": {"encoder": "tiny", "patch_size": 4, "batch_size": 32},
}
"""Batch per process; images are 32 x 32 pixels."""

SIDE, STEPS = 32, 1000


def measure(case: str, *, size: int = 2, rounds: int = 20, parallel: str = "ddp") -> dict[str, Any]:
    """Return the median seconds of a step alone and together, and the efficiency.

    Args:
        case: of `CASES`.
        size: processes, one thread each.
        rounds: in each, steps of about half a second alone and as many together.
        parallel: how they work together, ddp or fsdp.
    """
    crews = {
        "alone": _start(CASES[case], size, None),
        "together": _start(CASES[case], size, parallel),
    }
    seconds: dict[str, list[float]] = {name: [] for name in crews}
    try:
        for crew in crews.values():
            _run(crew, 3)  # to warm up
        repeats = max(1, round(0.5 / _run(crews["alone"], 2)))
        for number in range(rounds):
            for name in sorted(crews, reverse=bool(number % 2)):
                seconds[name].append(_run(crews[name], repeats))
    finally:
        for process, pipe in [member for crew in crews.values() for member in crew]:
            pipe.close()
            process.join(10)
            process.terminate()
    pairs = zip(seconds["alone"], seconds["together"], strict=True)
    efficiency, low, high = spread([alone / together for alone, together in pairs])
    return {
        "case": case,
        "parallel": parallel,
        "processes": size,
        "batch": CASES[case]["batch_size"],
        "alone_s": spread(seconds["alone"])[0],
        "together_s": spread(seconds["together"])[0],
        "efficiency": efficiency,
        "efficiency_low": low,
        "efficiency_high": high,
    }


Crew = list[tuple[Any, Connection]]
"""Processes, and the pipes that tell them how many steps to take."""


def _start(case: dict[str, Any], size: int, parallel: str | None) -> Crew:
    """Start processes that train one model in parallel, or if None one each."""
    spawn, crew = multiprocessing.get_context("spawn"), []
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    for rank in range(size):
        here, there = spawn.Pipe()
        words = (rank, size, case, parallel, port, there)
        process = spawn.Process(target=_work, args=words, daemon=True)
        process.start()
        there.close()  # so that a process that dies ends the wait for it
        crew.append((process, here))
    return crew


def _run(crew: Crew, steps: int) -> float:
    """Return the seconds per step until the last of the processes has taken `steps`."""
    began = time.perf_counter()
    for _, pipe in crew:
        pipe.send(steps)
    for _, pipe in crew:
        pipe.recv()
    return (time.perf_counter() - began) / steps


def _work(
    rank: int, size: int, case: dict[str, Any], parallel: str | None, port: int, pipe: Connection
) -> None:
    """Take as many steps as the pipe says, again and again until it is closed."""
    torch.set_num_threads(1)
    config = preset("nano").replace(device="cpu", **case)
    if parallel:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
        config = config.replace(parallel=parallel, batch_size=size * case["batch_size"])
    world, done = World.from_environment(), 0
    pixels = torch.randint(0, 256, (case["batch_size"], SIDE, SIDE, 3), dtype=torch.uint8)
    with joined(world), contextlib.suppress(EOFError):
        step = _step(config, world)
        while True:
            for _ in range(pipe.recv()):
                step(pixels, done % STEPS)
                done += 1
            pipe.send(done)


def _step(config: Config, world: World) -> TrainStep:
    model = build_model(config, (SIDE, SIDE), STEPS).train()
    augment = Augment((SIDE, SIDE), mean=(0.5,) * 3, std=(0.25,) * 3)
    return TrainStep(config, model, augment, STEPS, world=world)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write, of one line")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    args = parser.parse_args()
    rows = []
    for case in args.cases:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        rows.append(measure(case, rounds=args.rounds, parallel=args.parallel) | {"load": load})
        print(json.dumps(rows[-1]), file=sys.stderr)
    found = {"environment": environment() | {"threads": 1}, "scaling": rows}
    if args.json:
        write_text(args.json, json.dumps(found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
