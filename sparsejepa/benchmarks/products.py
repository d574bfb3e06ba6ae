"""The yardstick: how fast this machine multiplies matrices of the model's own shapes.

The rate of a step's products is their operations over the sum of their times, so that a shape
counts for what it weighs. A step's share of that rate says how much of its time is products.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsejepa.benchmarks import settings as bench
from sparsejepa.benchmarks.settings import BenchSettings, Section
from sparsejepa.benchmarks.timing import Timing, interleave
from sparsejepa.environment import has_bf16
from sparsejepa.model.costs import Kind, Product, products

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def section(settings: BenchSettings) -> Section:
    """Time large squares and the model's products one by one, and a large copy."""
    device, quick = settings.device, settings.quick
    listed = products(bench.sizes(settings, bench.config(settings)))
    side = 256 if quick else 8192 if device.startswith("cuda") else 2048
    square = Product(f"square of {side}", side, side, side, 1, "forward")
    timings = interleave(
        {
            f"{p.name}, {p.kind}, {dtype}": multiply(p, dtype, device)
            for dtype in DTYPES
            for p in (square, *listed)
        },
        rounds=settings.rounds,
        device=device,
        min_seconds=0.0 if quick else 0.02,
    )
    result = Section("products", "Matrix products of the model's shapes")

    def together(name: str, some: list[Product], dtype: str) -> dict[str, Any]:
        """Return the row of some products, each taken as often as a step takes it."""
        rounds = zip(*(timings[f"{p.name}, {p.kind}, {dtype}"].seconds for p in some), strict=True)
        counts = [p.count for p in some]
        seconds = tuple(sum(map(operator.mul, counts, times)) for times in rounds)
        timing, flops = Timing(f"{name}, {dtype}", seconds), sum(p.flops for p in some)
        numbers = {"count": sum(counts), "gflop": flops / 1e9}
        return timing.row(**numbers, gflops=flops / timing.median / 1e9)

    for dtype in DTYPES:
        result.rows.append(together("a step's products", listed, dtype))
        for kind in get_args(Kind):
            some = [p for p in listed if p.kind == kind]
            result.rows.append(together(f"a step's products, {kind}", some, dtype))
        result.rows.append(together(square.name, [square], dtype))
    for dtype in DTYPES:
        for p in listed:
            shape = {"m": p.m, "k": p.k, "n": p.n, "detail": True}
            result.rows.append(together(f"{p.name}, {p.kind}", [p], dtype) | shape)
    moved = bandwidth(device, quick)
    result.notes.append(f"a large copy reads and writes {moved / 1e9:.1f} GB/s")
    if not has_bf16(device):
        result.notes.append("no bf16 instructions on this machine: fp32 is the yardstick")
    return result


def yardstick_dtype(device: str) -> str:
    """Return the type whose product rate is the yardstick: bf16 where the hardware has it."""
    return "bf16" if has_bf16(device) else "fp32"


def multiply(product: Product, dtype: str, device: str) -> Callable[[int], Tensor]:
    """Return a call that takes `product` once, its operands lying as they do in a linear layer."""

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device).to(DTYPES[dtype])

    m, k, n, kind = product.m, product.k, product.n, product.kind
    if kind == "forward":
        x, weight = random(m, k), random(n, k)
        return lambda _: F.linear(x, weight)
    if kind == "input gradient":
        gradient, weight = random(m, k), random(k, n)
        return lambda _: gradient @ weight
    gradient, x = random(k, m), random(k, n)
    return lambda _: gradient.T @ x


def all_products(listed: list[Product], dtype: str, device: str) -> Callable[[int], None]:
    """Return a call that takes every product of a step, as often as the step does."""
    calls = [(multiply(product, dtype, device), product.count) for product in listed]

    def call(number: int) -> None:
        for multiplied, count in calls:
            for _ in range(count):
                multiplied(number)

    return call


def bandwidth(device: str, quick: bool = False) -> float:
    """Return the bytes per second that a copy, larger than any cache, reads and writes."""
    size = 2**22 if quick else 2**32 if device.startswith("cuda") else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda _: target.copy_(source)}, rounds=5, device=device)
    return 2 * size / timing["copy"].median
