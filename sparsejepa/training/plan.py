"""What a run would do, after timing a few steps of it: the body of --dry-run."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import torch

from sparsejepa.checks import check_pattern
from sparsejepa.config import Config
from sparsejepa.data.stream import ImageStream, open_images
from sparsejepa.distributed import World
from sparsejepa.environment import resolve_device
from sparsejepa.training.build import (
    arm_name,
    build_augment,
    build_model,
    default_run_dir,
    describe_parameters,
    load_images,
    total_steps,
)
from sparsejepa.training.loop import EpochOrder, check_shares
from sparsejepa.training.monitor import METRICS
from sparsejepa.training.start import START, find_start
from sparsejepa.training.step import TrainStep


def plan(config: Config, *, timed_steps: int = 3) -> dict[str, Any]:
    """Return what a run would do, after timing a few steps of it."""
    check_shares(config.check(), World())
    check_pattern(config)
    device = torch.device(resolve_device(config.run.device))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    start = find_start(config)
    config = start.settings(config) if start else config
    image_set = load_images(config, start)
    total, batch = total_steps(config, len(image_set)), config.optim.batch_size
    model = build_model(config, image_set.img_size, total, start).to(device)
    images = open_images(image_set, device, config.run.workers)
    train_step = TrainStep(config, model, build_augment(config, image_set), total)
    blocks = image_set.blocks if isinstance(image_set, ImageStream) else None
    order = EpochOrder(len(image_set), batch, config.run.seed, images.index_device, blocks)
    times = []
    with contextlib.closing(images):
        for step in range(timed_steps + 1):
            began = time.perf_counter()
            train_step(images.take(order(0)), step).tolist()  # waits for the device
            times.append(time.perf_counter() - began)
    seconds = sorted(times[1:])[timed_steps // 2]  # the first step warms up
    memory = (
        torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _peak_rss_mb()
    )
    sampler = model.sampler
    return {
        "arm": arm_name(config),
        "data": config.data,
        "train_images": len(image_set),
        "img_size": list(image_set.img_size),
        "patches": sampler.grid_size[0] * sampler.grid_size[1],
        "steps": total,
        "epochs": total * batch / len(image_set),
        "images_seen": total * batch,
        "parameters": describe_parameters(model),
        "target_blocks": config.masks.num_targets,
        "target_shapes": [list(shape) for shape in sampler.target_shapes],
        "context_counts": list(sampler.context_counts),
        "merged_targets": sorted(set((sampler.union or {}).values())),
        "precision": train_step.precision,
        "device": str(device),
        "images_per_second": batch / seconds,
        "minutes": total * seconds / 60,
        "peak_memory_mb": memory,
        "would_write": str(default_run_dir(config)),
        "files": ["config.toml", "environment.json", *([START] if start else []), METRICS,
                  "checkpoints", "encoder.safetensors", "config.json",
                  *(["groups.safetensors"] if model.groups else []), "summary.json"],
    }  # fmt: skip


def _peak_rss_mb() -> float:
    """Return the process's peak memory so far in MiB (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
