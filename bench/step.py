"""The training step: ours beside a plain one, ours by part, and its matrix products alone.

    python bench/step.py                              # ViT-Tiny/4 at 32 x 32; minutes on two cores
    python bench/step.py --device cuda --batch-size 2048

The yardstick is the rate at which this machine does the matrix products of the step's own shapes,
each as often as the step does and nothing else: a step's share of it says how much of its time is
products. Counted are the operations that the result needs, from the shapes alone, two per
multiply-add; those of the group map, less than 1 %, are left out. Ours starts from uint8 images
(crop, flip and normalisation are in its time), the reference from normalised floats.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import median
from typing import Any, NamedTuple

import torch
from reference import NUM_TARGETS, ReferenceStep, Sizes
from timing import Contender, interleave, rates, ratios, script, show, spread, synchronize

from sparsejepa.config import ENCODER_SIZES, Config
from sparsejepa.data.augment import Augment
from sparsejepa.environment import has_bf16, resolve_device
from sparsejepa.training.build import build_model
from sparsejepa.training.step import TrainStep

STEPS = 100_000  # of the imaginary run whose steps are timed
PARTS = ("augmentation", "masks", "target", "context", "predictor", "groups", "backward",
         "optimiser", "prox + EMA", "rest")  # fmt: skip


@dataclass(frozen=True)
class Settings(Sizes):
    """Time training steps side by side, and ours by part."""

    rounds: int = 7
    """Numbers per contender: medians and quartiles are over these."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""
    compile: bool = False
    """Also time our compiled step: takes minutes more and needs a C++ compiler."""


class Product(NamedTuple):
    """[m, k] times [k, n], `count` times in a step: `kind` is forward, input or weight."""

    part: str
    kind: str
    m: int
    k: int
    n: int
    count: int

    @property
    def operations(self) -> int:
        """Of all `count` of them."""
        return 2 * self.m * self.k * self.n * self.count


def products(sizes: Sizes) -> list[Product]:
    """Return the products of the linear layers of a dense step, gradients included."""
    width, depth, _ = ENCODER_SIZES[sizes.encoder]
    batch, dim, found = sizes.batch_size, sizes.predictor_dim, list[Product]()
    asked = batch * NUM_TARGETS * prod(sizes.target_shape)
    rows = asked + batch * NUM_TARGETS * sizes.context

    def linear(part: str, rows: int, i: int, o: int, count: int = 1, first: bool = False) -> None:
        found.append(Product(part, "forward", rows, i, o, count))
        if part != "target":
            found.append(Product("backward", "weight", o, rows, i, count))
            if not first:
                found.append(Product("backward", "input", rows, o, i, count))

    def blocks(part: str, rows: int, asked: int, d: int, count: int) -> None:
        linear(part, rows, d, 3 * d, count)
        for i, o in ((d, d), (d, 4 * d), (4 * d, d)):
            linear(part, asked, i, o, count)

    for part, tokens in (("target", batch * prod(sizes.grid)), ("context", batch * sizes.context)):
        linear(part, tokens, 3 * sizes.patch_size**2, width, first=True)
        blocks(part, tokens, tokens, width, depth)
    linear("predictor", batch * sizes.context, width, dim)
    blocks("predictor", rows, rows, dim, sizes.predictor_depth - 1)
    blocks("predictor", rows, asked, dim, 1)  # the last: the context is only keys and values there
    linear("predictor", asked, dim, width)
    return found


def operations(sizes: Sizes) -> dict[str, int]:
    """Return the operations of a dense step by part: linear layers and attention."""
    width, depth, _ = ENCODER_SIZES[sizes.encoder]
    batch, asked = sizes.batch_size, prod(sizes.target_shape)
    tokens = sizes.context + asked
    pairs = NUM_TARGETS * tokens * ((sizes.predictor_depth - 1) * tokens + asked)
    found = {
        "target": 4 * batch * prod(sizes.grid) ** 2 * width * depth,
        "context": 4 * batch * sizes.context**2 * width * depth,
        "predictor": 4 * batch * pairs * sizes.predictor_dim,
    }
    found["backward"] = 2 * (found["context"] + found["predictor"])
    for product in products(sizes):
        found[product.part] += product.operations
    return found


def all_products(sizes: Sizes, bf16: bool, device: str) -> tuple[Contender, int]:
    """Return a call of a step's products, as often as the step does, and their operations."""
    random = partial(torch.randn, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    listed = products(sizes)
    operands = [
        (
            random(p.k, p.m).T if p.kind == "weight" else random(p.m, p.k),
            random(p.n, p.k).T if p.kind == "forward" else random(p.k, p.n),
        )
        for p in listed
    ]

    def run(number: int) -> None:
        for product, (a, b) in zip(listed, operands, strict=True):
            for _ in range(product.count):
                torch.mm(a, b)

    return run, sum(product.operations for product in listed)


def run_config(sizes: Sizes, **changes: Any) -> Config:
    """Return a run of these sizes; without stochastic depth, dense unless `changes` say more."""
    (rows, columns), grid = sizes.target_shape, sizes.grid
    flat = {name: getattr(sizes, name) for name in Sizes.__dataclass_fields__}
    flat |= {"target_scale": (rows * columns / max(1, prod(grid)),) * 2,
             "target_aspect_ratio": (rows / columns,) * 2, "num_targets": NUM_TARGETS,
             "context_counts": (flat.pop("context"),), "drop_path": 0.0, "groups": "none",
             "beta": 0.0}  # fmt: skip
    del flat["target_shape"]
    return Config().replace(**flat | changes).check()


def our_step(sizes: Sizes, device: str, **changes: Any) -> tuple[TrainStep, torch.Tensor]:
    """Return our training step of a run with these changes, and uint8 images for it."""
    config, side = run_config(sizes, **changes), (sizes.img_size, sizes.img_size)
    model = build_model(config.check_image(side), side, STEPS).to(device).train()
    step = TrainStep(config, model, Augment(side, mean=(0.5,) * 3, std=(0.25,) * 3), STEPS)
    pixels = torch.randint(0, 256, (sizes.batch_size, *side, 3), dtype=torch.uint8)
    return step, pixels.to(device)


def contest(settings: Settings, device: str, bf16: bool) -> None:
    """Time whole steps side by side, with the products alone."""
    kind = "bf16" if bf16 else "fp32"

    def ours(**changes: Any) -> Contender:
        step, pixels = our_step(settings, device, **{"precision": kind, **changes})
        return lambda number: step(pixels, number)

    plain: dict[str, Contender] = {"reference, fp32": ReferenceStep(settings, device, bf16=False)}
    if bf16:
        plain["reference, bf16"] = ReferenceStep(settings, device, bf16=True, fused=False)
        plain["reference, bf16, fused attention"] = ReferenceStep(settings, device, bf16=True)
    contenders = {**plain, "ours, dense, fp32": ours(precision="fp32")}
    contenders[f"ours, dense, {kind}"] = ours()
    for groups in ("region", "concept", "feature"):
        contenders[f"ours, {groups} groups, {kind}"] = ours(groups=groups, beta=0.05)
    if settings.compile:
        contenders[f"ours, compiled, {kind}"] = ours(compile=True)
    alone = f"its products alone, {kind}"
    contenders[alone], counted = all_products(settings, bf16, device)
    seconds = interleave(contenders, settings.rounds, device)
    fastest = min(plain, key=lambda name: median(seconds[name]))
    whole, rows = sum(operations(settings).values()), []
    for name, taken in seconds.items():
        done = counted if name == alone else whole
        row = {"step": name, "images/s": rates(settings.batch_size, taken)}
        row["share of the product rate"] = ratios(seconds[alone], taken, done / counted)
        for base in dict.fromkeys(("reference, fp32", fastest)):
            row[f"x {base}"] = ratios(seconds[base], taken)
        rows.append(row)
    rate = spread([counted / s / 1e9 for s in seconds[alone]])
    image = f"{whole / settings.batch_size / 1e9:.3g} GFLOP an image"
    show(f"Training steps side by side; {image}, products at {rate} GFLOP/s", rows)


def by_part(settings: Settings, device: str, bf16: bool) -> None:
    """Time the parts of the step with region groups, beside the products alone."""
    kind = "bf16" if bf16 else "fp32"
    step, pixels = our_step(settings, device, groups="region", beta=0.05, precision=kind)
    watch = Stopwatch(step, device)
    alone, counted = all_products(settings, bf16, device)
    contenders = {"step": lambda number: watch.lap(pixels, number), "products": alone}
    seconds = interleave(contenders, settings.rounds, device, min_seconds=0.0)
    laps, flops, rows = watch.laps[-settings.rounds :], operations(settings), []
    totals, whole = [sum(lap.values()) for lap in laps], sum(flops.values())
    for part in (*PARTS, "whole step"):
        taken = [lap.get(part, total) for lap, total in zip(laps, totals, strict=True)]
        row = {"part": part, "ms": spread([1000 * s for s in taken])}
        row["share of time"] = f"{median(taken) / median(totals):.3f}"
        if done := flops.get(part, whole if part == "whole step" else 0):
            row["of operations"] = f"{done / whole:.3f}"
            row["share of the product rate"] = ratios(seconds["products"], taken, done / counted)
        rows.append(row)
    show(f"Our step by part: region groups, {kind}", rows)


class Stopwatch:
    """Says how long each part of a real step takes: hooks mark its end, on a GPU with events."""

    def __init__(self, step: TrainStep, device: str) -> None:
        self.laps: list[dict[str, float]] = []
        self._step, self._device, model = step, device, step.model
        self._marks: list[tuple[str, Any]] = []
        after = {"target": model.target_encoder, "context": model.context_encoder,
                 "predictor": model.predictor, "groups": model}  # fmt: skip
        for part, module in after.items():
            module.register_forward_hook(lambda *_, part=part: self._mark(part))
        step.optimizer.register_step_pre_hook(lambda *_: self._mark("backward"))
        step.optimizer.register_step_post_hook(lambda *_: self._mark("optimiser"))
        step.augment = self._marking("augmentation", step.augment)  # type: ignore[assignment]
        model.sampler.sample = self._marking("masks", model.sampler.sample)
        model.after_step = self._marking("prox + EMA", model.after_step)

    def lap(self, pixels: torch.Tensor, number: int) -> None:
        """Take a step and add its seconds by part to `laps`."""
        synchronize(self._device)
        self._marks = [("", self._now())]
        self._step(pixels, number)
        self._mark("rest")
        synchronize(self._device)
        lap: dict[str, float] = {part: 0.0 for part in PARTS}
        for (_, began), (part, ended) in zip(self._marks, self._marks[1:], strict=False):
            on_host = isinstance(began, float)
            lap[part] += ended - began if on_host else began.elapsed_time(ended) / 1000
        self.laps.append(lap)

    def _mark(self, part: str) -> None:
        self._marks.append((part, self._now()))

    def _now(self) -> Any:
        if not self._device.startswith("cuda"):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _marking(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            self._mark(part)
            return result

        return marked


def main(settings: Settings) -> None:
    """Print both tables."""
    device = resolve_device(settings.device)
    contest(settings, device, has_bf16(device))
    by_part(settings, device, has_bf16(device))


if __name__ == "__main__":
    script(main, Settings)
