"""The verb that measures this machine: bench."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import FlagCreatePairsOff

from sparsejepa.verbs.base import Verb, check_counts

if TYPE_CHECKING:
    from rich.console import Console

_BATCH, _GPU_BATCH = 128, 2048


@dataclass(frozen=True)
class Bench(Verb):
    """Measure this machine: matrix products, our step beside others', data, probe, memory."""

    sections: tuple[str, ...] = ()
    """Of products, parts, steps, peers, data, loading, probe, memory and growth; all if not
    given."""
    encoder: str = "tiny"
    """Size of the vision transformer."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    img_size: int = 32
    """Side of the images in pixels."""
    batch_size: int | None = None
    """Images per step; 128 on the CPU and 2048 on a GPU if not given."""
    predictor_dim: int = 96
    """Width of the predictor."""
    predictor_depth: int = 6
    """Blocks of the predictor."""
    context: int | None = None
    """Context patches per image; 5/16 of all if not given."""
    rounds: int = 7
    """Numbers per contender: medians and quartiles are over these."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads; all cores if not given."""
    compile: FlagCreatePairsOff[bool] = False
    """Also time our compiled step: takes minutes more and needs a C++ compiler."""
    quick: FlagCreatePairsOff[bool] = False
    """One round: shows that everything works, and measures nothing."""
    out: Path = Path("runs/bench")
    """Folder for bench.jsonl and bench.png."""


def bench(args: Bench, console: Console) -> dict[str, Any]:
    """Measure and print one table per section."""
    check_counts(args, "rounds", "threads", "batch_size", "img_size", "patch_size", "context")
    import torch

    from sparsejepa.benchmarks.run import run_bench
    from sparsejepa.benchmarks.settings import BenchSettings, check
    from sparsejepa.environment import resolve_device

    device = resolve_device(args.device)
    side = args.img_size // args.patch_size
    settings = BenchSettings(
        encoder=args.encoder,
        patch_size=args.patch_size,
        img_size=args.img_size,
        batch=args.batch_size or (_BATCH if device == "cpu" else _GPU_BATCH),
        predictor_dim=args.predictor_dim,
        predictor_depth=args.predictor_depth,
        # About 3/16 of the patches, the middle of a run's default range.
        target_shape=(max(1, round(side * 3 / 8)), max(1, round(side / 2))),
        context=args.context or max(1, side * side * 5 // 16),
        rounds=1 if args.quick else args.rounds,
        device=device,
        threads=args.threads or torch.get_num_threads(),
        compile=args.compile,
        quick=args.quick,
    )
    command = shlex.join(["sparsejepa", *sys.argv[1:]])
    return run_bench(check(settings), args.sections, args.out, command, console)
