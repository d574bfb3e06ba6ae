"""Our step by part: where the time goes, and what share of the product rate each part reaches.

The parts are those of a real `TrainStep`: a stopwatch is told by hooks when each is done. They add
up to the step; nothing is run apart from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from sparsejepa.benchmarks import settings as bench
from sparsejepa.benchmarks.products import all_products, yardstick_dtype
from sparsejepa.benchmarks.settings import BenchSettings, Section
from sparsejepa.benchmarks.timing import Timing, interleave, ratios, spread, synchronize
from sparsejepa.model.costs import Cost, costs, products, total
from sparsejepa.training.step import TrainStep

PARTS = (
    "augmentation", "masks", "target", "context", "predictor", "groups", "backward", "optimiser",
    "prox + EMA", "rest",
)  # fmt: skip


def section(settings: BenchSettings) -> Section:
    """Time the parts of the sparse step (region groups), and the step as a whole."""
    dtype = yardstick_dtype(settings.device)
    of = bench.config(settings, groups="region", beta=0.05, precision=dtype)
    model = bench.model(settings, of)
    step = TrainStep(of, model, bench.augmentation(settings), bench.STEPS)
    pixels, sizes = bench.images(settings), bench.sizes(settings, of)
    listed = products(sizes)
    watch = Stopwatch(step, settings.device)

    def watched(number: int) -> None:
        watch.start()
        step(pixels, number)
        watch.stop()

    alone = all_products(listed, dtype, settings.device)
    timings = interleave(
        {"step": watched, "products": alone},
        rounds=settings.rounds,
        device=settings.device,
        min_seconds=0.0,
    )
    laps = watch.laps[-settings.rounds :]
    cost = costs(sizes, 2 if dtype == "bf16" else 4)
    yardstick = sum(p.flops for p in listed) / timings["products"].median
    result = Section("parts", f"Our step by part: region groups, {dtype}")
    whole = spread([sum(lap.values()) for lap in laps])[0]
    for part in PARTS:
        timing = Timing(part, tuple(lap[part] for lap in laps))
        result.rows.append(_row(timing, cost.get(part, Cost(0, 0)), total(cost), whole, yardstick))
    everything = Timing("whole step", tuple(sum(lap.values()) for lap in laps))
    result.rows.append(_row(everything, total(cost), total(cost), whole, yardstick))
    share = ratios(timings["products"], timings["step"])
    share = [x * total(cost).flops / sum(p.flops for p in listed) for x in share]
    result.notes.append(
        f"the whole step reaches {share[0]:.2f} ({share[1]:.2f} to {share[2]:.2f}) of the "
        f"{dtype} rate of its products, {yardstick / 1e9:.0f} GFLOP/s"
    )
    return result


class Stopwatch:
    """Says how long each part of a step takes; on a GPU with events, which nothing waits for.

    Args:
        step: gets hooks at the end of each of its parts.
        device: what it runs on.
    """

    def __init__(self, step: TrainStep, device: str) -> None:
        self.laps: list[dict[str, float]] = []
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        model = step.model
        after = {
            "target": model.target_encoder, "context": model.context_encoder,
            "predictor": model.predictor, "groups": model,
        }  # fmt: skip
        for part, module in after.items():
            module.register_forward_hook(lambda *_, part=part: self.mark(part))
        step.optimizer.register_step_pre_hook(lambda *_: self.mark("backward"))
        step.optimizer.register_step_post_hook(lambda *_: self.mark("optimiser"))
        step.augment = self._marking("augmentation", step.augment)  # type: ignore[assignment]
        model.sampler.sample = self._marking("masks", model.sampler.sample)
        model.after_step = self._marking("prox + EMA", model.after_step)

    def mark(self, part: str) -> None:
        """The time since the last mark was that of `part`."""
        self._marks.append((part, self._now()))

    def start(self) -> None:
        """Begin a step."""
        synchronize(self._device)
        self._marks = [("", self._now())]

    def stop(self) -> None:
        """End a step: add its laps, in seconds by part."""
        self.mark("rest")
        synchronize(self._device)
        lap: dict[str, float] = {part: 0.0 for part in PARTS}
        for (_, began), (part, ended) in zip(self._marks, self._marks[1:], strict=False):
            lap[part] += _seconds(began, ended)
        self.laps.append(lap)

    def _now(self) -> Any:
        if not self._device.startswith("cuda"):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _marking(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            self.mark(part)
            return result

        return marked


def _seconds(began: Any, ended: Any) -> float:
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000


def _row(timing: Timing, cost: Cost, step: Cost, whole: float, yardstick: float) -> dict[str, Any]:
    rate = cost.flops / timing.median if timing.median else 0.0
    return timing.row(
        share_of_time=timing.median / whole,
        share_of_flops=cost.flops / step.flops,
        gflop=cost.flops / 1e9,
        mbytes=cost.bytes / 1e6,
        gflops=rate / 1e9,
        share=rate / yardstick,
        gbytes_per_second=cost.bytes / timing.median / 1e9 if timing.median else 0.0,
    )
