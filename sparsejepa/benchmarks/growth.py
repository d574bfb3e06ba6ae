"""How time and memory of our step grow with batch, tokens, depth, width and groups.

A point's exponent is the slope of a straight line, in logarithms, from its neighbour before it: 1
is linear. Points are small, so that the whole takes about a minute; the memory is what torch has
allocated at the step's peak.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsejepa.benchmarks import settings as bench
from sparsejepa.benchmarks.products import yardstick_dtype
from sparsejepa.benchmarks.settings import BenchSettings, Section, available_memory
from sparsejepa.benchmarks.timing import interleave
from sparsejepa.config import Config
from sparsejepa.model.costs import costs, total
from sparsejepa.model.memory import peak_memory
from sparsejepa.training.step import TrainStep


@dataclass(frozen=True)
class Shaped(Config):
    """A run whose encoder has another width and depth than the named ones."""

    shape: tuple[int, int, int] = (0, 0, 0)

    @property
    def encoder_shape(self) -> tuple[int, int, int]:
        return self.shape


@dataclass(frozen=True)
class Point:
    """Where a step is timed: `x` of what grows, the settings, width and depth, groups."""

    axis: str
    x: int
    settings: BenchSettings
    width: int = 96
    depth: int = 4
    groups: str = "none"
    num_groups: int = 16


def section(settings: BenchSettings) -> Section:
    """Time the points in turn, and measure the memory of each."""
    result = Section("growth", "How time and memory grow")
    dtype = yardstick_dtype(settings.device)
    made: dict[str, tuple[Point, Callable[[int], object], float]] = {}
    for point in _points(settings):
        name = f"{point.axis} {point.x}"
        config, sizes = _config(point, dtype)
        needed, room = 2 * peak_memory(sizes, 4), available_memory(settings.device)
        if needed > room:
            result.notes.append(
                f"{name} left out: it needs about {needed / 2**30:.1f} GiB, {room / 2**30:.1f} free"
            )
            continue
        step = TrainStep(
            config, bench.model(point.settings, config), bench.augmentation(point.settings),
            bench.STEPS,
        )  # fmt: skip
        pixels = bench.images(point.settings)
        made[name] = (point, lambda i, s=step, p=pixels: s(p, i), total(costs(sizes)).flops)
    memory = {name: _peak_memory(call, settings.device) for name, (_, call, _) in made.items()}
    timings = interleave(
        {name: call for name, (_, call, _) in made.items()},
        rounds=settings.rounds,
        device=settings.device,
        warmup=1,
    )
    before: dict[str, Any] = {}
    for name, (point, _, flops) in made.items():
        row = timings[name].row(
            axis=point.axis, x=point.x, gflop=flops / 1e9, memory_mb=memory[name] / 1e6
        )
        last = before if before.get("axis") == point.axis else {}
        for measure in ("gflop", "median_s", "memory_mb"):
            row[f"exponent_{measure}"] = (
                math.log(row[measure] / last[measure]) / math.log(row["x"] / last["x"])
                if last else None
            )  # fmt: skip
        result.rows.append(row)
        before = row
    return result


def _points(settings: BenchSettings) -> Iterator[Point]:
    small = dataclasses.replace(
        settings, encoder="nano", patch_size=4, img_size=32, batch=64, target_shape=(3, 4),
        context=20, predictor_dim=64, predictor_depth=2,
    )  # fmt: skip
    if settings.quick or settings.device.startswith("cuda"):
        small = dataclasses.replace(small, batch=16 if settings.quick else 512)
    scale = range(2 if settings.quick else 4)
    for i in scale:
        grown = dataclasses.replace(small, batch=small.batch // 4 * 2**i)
        yield Point("batch", grown.batch, grown)
    for i in scale:
        side = (4, 8, 12, 16)[i]  # patches; a target block is 3/16 of them, the context 5/16
        shape = (max(1, round(side * 3 / 8)), side // 2)
        grown = dataclasses.replace(
            small, img_size=4 * side, target_shape=shape, context=side * side * 5 // 16
        )
        yield Point("tokens", side * side, grown)
    for i in scale:
        yield Point("depth", 2 * 2**i, small, depth=2 * 2**i)
    for i in scale:
        yield Point("width", 48 * 2**i, small, width=48 * 2**i)
    for kind in ("region", "concept"):
        for i in scale:
            yield Point(f"{kind} groups", 4 * 2**i, small, groups=kind, num_groups=4 * 2**i)


def _config(point: Point, dtype: str) -> tuple[Config, Any]:
    flat = bench.config(
        point.settings, precision=dtype, groups=point.groups, num_groups=point.num_groups,
        beta=0.05 if point.groups != "none" else 0.0,
    )  # fmt: skip
    sections = {f.name: getattr(flat, f.name) for f in dataclasses.fields(Config)}
    heads = max(1, point.width // 32)
    heads = next(h for h in range(heads, 0, -1) if point.width % h == 0)
    config = Shaped(**sections, shape=(point.width, point.depth, heads))
    return config, bench.sizes(point.settings, config)


def _peak_memory(call: Callable[[int], object], device: str) -> float:
    """Return the bytes that torch has allocated at the peak of a call, weights included."""
    call(0)  # the optimiser's state comes into being
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        there = torch.cuda.memory_allocated(device)  # the other points' weights among it
        call(1)
        return float(torch.cuda.max_memory_allocated(device) - there)
    with PeakMemory() as memory:
        call(1)
    return float(memory.peak)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, result)):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                storage = value.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        return result

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
