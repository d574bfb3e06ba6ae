"""The contest: whole training steps side by side, ours and a plain one.

All have the same masks and widths, but where a row's name says otherwise. Ours starts from uint8
images (crop, flip and normalisation are in its time), the reference from normalised floats. Counted
are the operations that the result needs; the reference also carries the context through the
predictor's last block, which nothing reads (2 to 3 % more). A row's share is its own rate of
operations over that of the step's products alone, both measured in the same rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sparsejepa.benchmarks import settings as bench
from sparsejepa.benchmarks.products import all_products, bandwidth, yardstick_dtype
from sparsejepa.benchmarks.reference import ReferenceStep
from sparsejepa.benchmarks.settings import BenchSettings, Section, available_memory
from sparsejepa.benchmarks.timing import Contender, Timing, entries, interleave, ratios, spread
from sparsejepa.model.costs import FP32, Sizes, costs, parameters, products, total
from sparsejepa.model.memory import peak_memory
from sparsejepa.training.step import TrainStep

RECIPE = (128, 192)
"""Widths of the recipe's predictor, 4 deep."""

Made = tuple[Contender, Sizes]


def section(settings: BenchSettings) -> Section:
    """Time the contenders in turn."""
    device, dtype = settings.device, yardstick_dtype(settings.device)
    result = Section("steps", "Training steps side by side")
    if dtype == "fp32":
        result.notes.append("no bf16 instructions on this machine: bf16 contenders left out")
    plain = bench.sizes(settings, bench.config(settings))
    makers = _contenders(settings, dtype, result.notes.append)
    # Weights, gradient, two moments and the target encoder of each; the activations of one.
    each = 5 * FP32 * sum(parameters(plain).values())
    needed, room = len(makers) * each + 2 * peak_memory(plain, FP32), available_memory(device)
    if needed > room:
        makers = {name: makers[name] for name in ("reference, fp32", f"ours, dense, {dtype}")}
        result.notes.append(
            f"all contenders need {needed / 2**30:.1f} GiB and {room / 2**30:.1f} are free: only "
            "two of them"
        )
    made = {name: make() for name, make in makers.items()}
    alone = f"its products alone, {dtype}"
    contenders = {name: call for name, (call, _) in made.items()}
    contenders[alone] = all_products(products(plain), dtype, device)
    timings = interleave(
        contenders, rounds=settings.rounds, device=device, warmup=1 if settings.quick else 2
    )
    if any(note.startswith("--compile") for note in result.notes):  # they were not compiled
        timings = {name: t for name, t in timings.items() if "compiled" not in name}
    flops = {name: total(costs(sizes)).flops for name, (_, sizes) in made.items()}
    flops[alone] = sum(p.flops for p in products(plain))
    bases = {kind: _fastest_reference(timings, kind) for kind in ("fp32", "bf16")}
    for name, timing in timings.items():
        row = _rates(timing, settings.batch, flops[name])
        scale = flops[name] / flops[alone]
        row |= entries("share", [scale * x for x in ratios(timings[alone], timing)])
        for kind, base in bases.items():
            row |= entries(f"x_reference_{kind}", ratios(base, timing) if base else None)
        result.rows.append(row)
    result.notes += _overheads(timings, dtype)
    result.notes.append(_roofs(settings, plain, dtype, flops[alone] / timings[alone].median))
    return result


def our_step(settings: BenchSettings, say: Callable[[str], None] = print, **changes: Any) -> Made:
    """Return a call of our training step, and the sizes of its work.

    `changes` are settings of the run; `say` gets the line about a compilation that failed.
    """
    of = bench.config(settings, **changes)
    model = bench.model(settings, of)
    step = TrainStep(of, model, bench.augmentation(settings), bench.STEPS, say)
    pixels = bench.images(settings)
    masks = model.sampler.sample(2, seed=0, step=0)
    return lambda number: step(pixels, number), bench.sizes(settings, of, masks)


def _contenders(
    settings: BenchSettings, dtype: str, say: Callable[[str], None]
) -> dict[str, Callable[[], Made]]:
    """Return what makes each contender, by name; in bf16 only where `dtype` is."""
    plain = bench.sizes(settings, bench.config(settings))

    def reference(**how: bool) -> Callable[[], Made]:
        return lambda: (ReferenceStep(settings, **how), plain)

    def ours(settings: BenchSettings = settings, **changes: Any) -> Callable[[], Made]:
        return lambda: our_step(settings, say, **{"precision": dtype, **changes})

    makers = {
        "reference, fp32": reference(bf16=False),
        "reference, bf16": reference(bf16=True, fused=False),
        "reference, bf16, fused attention": reference(bf16=True),
        "ours, dense, fp32": ours(precision="fp32"),
        f"ours, dense, {dtype}": ours(),
    }
    if dtype == "fp32":
        makers = {name: make for name, make in makers.items() if "bf16" not in name}
    for groups in ("region", "concept", "feature"):
        makers[f"ours, {groups} groups, {dtype}"] = ours(groups=groups, beta=0.05)
    for way in ("packed", "union"):
        makers[f"ours, {way} predictor, {dtype}"] = ours(predictor_pass=way)
    for width in RECIPE:
        recipe = dataclasses.replace(settings, predictor_dim=width, predictor_depth=4)
        makers[f"ours, predictor {width} x 4, {dtype}"] = ours(recipe)
    if settings.compile:
        makers[f"ours, compiled, {dtype}"] = ours(compile=True)
        makers[f"ours, compiled, packed, {dtype}"] = ours(compile=True, predictor_pass="packed")
    return makers


def _fastest_reference(timings: dict[str, Timing], kind: str) -> Timing | None:
    """Return the reference's timing with the faster of the two forms of attention."""
    found = [t for name, t in timings.items() if name.startswith(f"reference, {kind}")]
    return min(found, key=lambda t: t.median, default=None)


def _rates(timing: Timing, batch: int, flops: float) -> dict[str, Any]:
    rates = entries("images_per_second", spread([batch / s for s in timing.seconds]))
    return timing.row(**rates, gflops=flops / timing.median / 1e9)


def _overheads(timings: dict[str, Timing], dtype: str) -> list[str]:
    """Say what each kind of group map costs on top of the dense step."""
    dense, found = timings[f"ours, dense, {dtype}"], []
    for kind in ("region", "concept", "feature"):
        if sparse := timings.get(f"ours, {kind} groups, {dtype}"):
            more = [100 * (x - 1) for x in ratios(sparse, dense)]
            text = f"{more[0]:+.1f} % ({more[1]:+.1f} to {more[2]:+.1f})"
            found.append(f"{kind} groups, KL and prox on top of the dense step: {text}")
    return found


def _roofs(settings: BenchSettings, plain: Sizes, dtype: str, rate: float) -> str:
    """Say how many images a second the products and the memory would allow."""
    step = total(costs(plain, 2 if dtype == "bf16" else FP32))
    moved = bandwidth(settings.device, settings.quick)
    return (
        f"per image {step.flops / settings.batch / 1e9:.2f} GFLOP and "
        f"{step.bytes / settings.batch / 1e6:.1f} MB moved; roofs: products at "
        f"{rate / 1e9:.0f} GFLOP/s {settings.batch * rate / step.flops:.0f} images/s, memory at "
        f"{moved / 1e9:.0f} GB/s {settings.batch * moved / step.bytes:.0f} images/s (if no cache "
        "held anything)"
    )
