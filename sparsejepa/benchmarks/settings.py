"""What a benchmark measures, and the form of what it finds."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsejepa.config import Config
from sparsejepa.data.augment import Augment
from sparsejepa.errors import UserError
from sparsejepa.model.costs import Sizes
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.model.masks import Masks, MaskSampler
from sparsejepa.training.build import build_model

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
STEPS = 100_000
"""Of the imaginary run whose steps are timed."""


@dataclass(frozen=True)
class BenchSettings:
    """One model and batch. One target shape and one context count: all steps do the same work."""

    encoder: str = "tiny"
    patch_size: int = 4
    img_size: int = 32
    batch: int = 128
    predictor_dim: int = 96
    predictor_depth: int = 6
    target_shape: tuple[int, int] = (3, 4)
    context: int = 20
    rounds: int = 7
    device: str = "cpu"
    threads: int = 1
    compile: bool = False
    """Also time our compiled step."""
    quick: bool = False
    """Only show that everything works."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.img_size // self.patch_size
        return side, side


@dataclass
class Section:
    """What a section found. A row is flat JSON: name, median_s, low_s, high_s and more."""

    name: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def config(settings: BenchSettings, **changes: Any) -> Config:
    """Return the settings of a run whose every step has the masks' sizes of `settings`.

    Without stochastic depth, and dense unless `changes` say otherwise.
    """
    share = math.prod(settings.target_shape) / max(1, math.prod(settings.grid))
    aspect = settings.target_shape[0] / settings.target_shape[1]
    flat = {
        "encoder": settings.encoder,
        "patch_size": settings.patch_size,
        "img_size": settings.img_size,
        "batch_size": settings.batch,
        "predictor_dim": settings.predictor_dim,
        "predictor_depth": settings.predictor_depth,
        "drop_path": 0.0,
        "target_scale": (share, share),
        "target_aspect_ratio": (aspect, aspect),
        "context_counts": (settings.context,),
        "device": settings.device,
        "groups": "none",
        "beta": 0.0,
    }
    return Config().replace(**flat | changes)


def sizes(settings: BenchSettings, of: Config, masks: Masks | None = None) -> Sizes:
    """Return the sizes of a step of the run `of`, made by `config`, with masks like `masks`."""
    targets = (of.masks.num_targets, math.prod(settings.target_shape))
    if masks is not None:
        targets = (masks.targets.shape[1], masks.targets.shape[2])
    return Sizes.of(of, settings.grid, settings.context, *targets)


def check(settings: BenchSettings) -> BenchSettings:
    """Return the settings. Raises UserError for sizes that do not fit each other."""
    of = config(settings).check_image((settings.img_size, settings.img_size)).check()
    try:
        MaskSampler(settings.grid, **vars(of.masks))
    except UserError as error:  # where a run has a list, the benchmark has one number
        raise UserError(str(error).replace("--context-counts", "--context")) from None
    return settings


def model(settings: BenchSettings, of: Config) -> SparseJEPA:
    """Build the model of the run `of`."""
    built = build_model(of, (settings.img_size, settings.img_size), STEPS)
    return built.to(settings.device).train()


def images(settings: BenchSettings) -> torch.Tensor:
    """Return random images, uint8 [B, H, W, 3]."""
    shape = (settings.batch, settings.img_size, settings.img_size, 3)
    keyed = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, shape, dtype=torch.uint8, generator=keyed)
    return drawn.to(settings.device)


def augmentation(settings: BenchSettings) -> Augment:
    """Return crop and flip as a run has them by default."""
    return Augment((settings.img_size, settings.img_size), mean=MEAN, std=STD)


def available_memory(device: str) -> float:
    """Return the bytes that a process can still have; infinity where the system does not tell."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    free = math.inf
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, if it has one
        group = Path("/sys/fs/cgroup")
        limit, used = (float((group / f"memory.{x}").read_text()) for x in ("max", "current"))
        free = min(free, limit - used)
    return free
