"""What the scripts of this folder share: contenders timed in turn, ratios, tables.

A number of its own says little on a machine that has other work: contenders are timed round by
round and compared within a round. Reported are medians and, in brackets, quartiles over the rounds.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from sparsejepa.environment import environment
from sparsejepa.errors import UserError

Contender = Callable[[int], object]
"""Is called with the number of its call, counted from 0."""
Seconds = dict[str, list[float]]
"""Seconds per call by contender, one number a round."""


def interleave(
    contenders: Mapping[str, Contender], rounds: int, device: str = "cpu", min_seconds: float = 0.05
) -> Seconds:
    """Time contenders round by round, each in turn; return the seconds per call.

    Their order is drawn anew each round (always the same draw): what one leaves behind, in caches
    and allocator, then does not always hit the same other one. Two calls of each go before. Short
    ones are called for `min_seconds` a round.
    """
    calls = dict.fromkeys(contenders, 0)

    def run(name: str, repeats: int) -> float:
        first, call = calls[name], contenders[name]
        calls[name] += repeats
        synchronize(device)
        began = time.perf_counter()
        for number in range(first, first + repeats):
            call(number)
        synchronize(device)
        return (time.perf_counter() - began) / repeats

    once = {name: min(run(name, 1), run(name, 1)) for name in contenders}
    repeats = {name: max(1, math.ceil(min_seconds / max(once[name], 1e-7))) for name in contenders}
    seconds: Seconds = {name: [] for name in contenders}
    order, draw = list(contenders), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            seconds[name].append(run(name, repeats[name]))
    return seconds


def synchronize(device: str) -> None:
    """Wait until `device` has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ratios(slow: Sequence[float], fast: Sequence[float], scale: float = 1.0) -> str:
    """Return, round by round, how many times faster the second is, times `scale`, as text."""
    return spread([scale * a / b for a, b in zip(slow, fast, strict=True)])


def rates(count: float, seconds: Sequence[float]) -> str:
    """Return how many of `count` things a second were done, as text."""
    return spread([count / s for s in seconds])


def spread(values: Sequence[float]) -> str:
    """Return the median and the quartiles as text."""
    low, median, high = (f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"
                         for x in np.quantile(values, (0.25, 0.5, 0.75)).tolist())  # fmt: skip
    return f"{median} [{low}, {high}]"


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table: a column for each key, empty where a row has none."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table, "")


def script(main: Callable[[Any], None], settings: type) -> None:
    """Say what is measured on, then call `main` with the settings from the command line."""
    args, here = tyro.cli(settings), environment()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    print(
        f"sparsejepa {here['sparsejepa']} at {here['commit']}, torch {here['torch']}, "
        f"{', '.join(here['gpus']) or here['cpu']}, {torch.get_num_threads()} threads\n"
    )
    try:
        main(args)
    except UserError as error:
        sys.exit(f"{sys.argv[0]}: error: {error}")
