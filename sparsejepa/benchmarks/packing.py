"""How many runs should share a machine: images/s of several processes side by side, all together.

One process rarely fills a GPU with a small encoder, nor two cores with two threads. Each process
does whole training steps of one configuration, on random images.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from sparsejepa.config import Config
from sparsejepa.errors import UserError

TOLERANCE = 0.03
"""Of the numbers of processes within this share of the best rate, the smallest is chosen."""

MOST = 8
"""Processes at most: more rarely gain anything, and take long to start."""


@dataclass(frozen=True)
class Packing:
    """`processes` side by side, with `threads` each, and their images per second together."""

    processes: int
    threads: int
    images_per_second: float


def measure(config: Config, cores: int, seconds: float = 4.0) -> list[Packing]:
    """Measure 1, 2, 4, 8 processes until it gets slower, or cores or GPU memory are used up.

    Args:
        config: of the runs; `config.run.device` is where they are.
        cores: CPU cores that the processes share evenly.
        seconds: for which steps are counted, after two that are not.

    Raises UserError for settings or data that cannot work.
    """
    found: list[Packing] = []
    processes = 1
    while processes <= min(cores, MOST):
        results = _side_by_side(config, processes, cores // processes, seconds)
        rate = sum(result["rate"] for result in results)
        best = max((packing.images_per_second for packing in found), default=0.0)
        found.append(Packing(processes, cores // processes, rate))
        processes *= 2
        full = processes * max(r["bytes"] for r in results) > min(r["free"] for r in results)
        if full or rate < (1 - TOLERANCE) * best:
            break
    return found


def choose(packings: Sequence[Packing]) -> Packing:
    """Return the smallest number of processes that comes close to the best rate."""
    best = max(packing.images_per_second for packing in packings)
    good = [p for p in packings if p.images_per_second >= (1 - TOLERANCE) * best]
    return min(good, key=lambda packing: packing.processes)


def _side_by_side(
    config: Config, processes: int, threads: int, seconds: float
) -> list[dict[str, Any]]:
    """Run `processes` at a time; return each one's rate, and the GPU memory it took and found."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(processes)
    pipes = [spawn.Pipe(duplex=False) for _ in range(processes)]
    running = [
        spawn.Process(target=_steps, args=(config, threads, seconds, barrier, end), daemon=True)
        for _, end in pipes
    ]
    try:
        for process, (_, end) in zip(running, pipes, strict=True):
            process.start()
            end.close()  # so that a process that dies ends the wait below
        waiting, results = [here for here, _ in pipes], []
        while waiting:
            for here in wait(waiting):
                assert isinstance(here, Connection)
                waiting.remove(here)
                results.append(here.recv())
                if isinstance(results[-1], UserError):
                    raise results[-1]
        return results
    except EOFError:
        raise UserError(
            f"--jobs auto: one of {processes} processes ended too early, perhaps for want of "
            "memory; give --jobs a number"
        ) from None
    finally:
        for process in running:
            process.terminate()
            process.join()


def _steps(config: Config, threads: int, seconds: float, barrier: Any, pipe: Connection) -> None:
    """Send how fast steps are between a common start and the end of `seconds`, or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent, which ends this process
    import torch

    from sparsejepa.benchmarks.settings import available_memory
    from sparsejepa.benchmarks.timing import synchronize
    from sparsejepa.environment import resolve_device
    from sparsejepa.training.build import build_augment, build_model, load_images, total_steps
    from sparsejepa.training.step import TrainStep

    torch.set_num_threads(threads)
    try:
        device = resolve_device(config.run.device)
        images = load_images(config)
        total = total_steps(config, len(images))
        model = build_model(config, images.img_size, total).to(device).train()
        step = TrainStep(config, model, build_augment(config, images), total)
    except UserError as error:
        pipe.send(error)
        return
    free = available_memory(device)
    shape = (config.optim.batch_size, *images.img_size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    for number in range(2):
        step(pixels, number)
    synchronize(device)
    barrier.wait()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        step(pixels, done % total)
        done += 1
        if done % config.run.log_every == 0:
            synchronize(device)  # as often as a run does
    synchronize(device)
    rate = done * config.optim.batch_size / (time.perf_counter() - began)
    on_gpu = device.startswith("cuda")
    taken = torch.cuda.max_memory_reserved(device) if on_gpu else 0
    pipe.send({"rate": rate, "bytes": taken, "free": free})
