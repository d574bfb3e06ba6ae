"""What a finished run leaves: the encoder, the groups with their statistics, and a summary."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from sparsejepa import version
from sparsejepa.config import Config
from sparsejepa.data.images import Batches, Images
from sparsejepa.distributed import World, gather_texts
from sparsejepa.encoders.encoder import (
    Encoder,
    group_rms,
    measure_seen,
    save_encoder,
    save_groups,
)
from sparsejepa.files import write_text
from sparsejepa.model.groups import GroupMap
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.model.vit import ViT
from sparsejepa.training.build import arm_name, build_sampler, license_of
from sparsejepa.training.monitor import MetricsLog, choose_images

MEASURED = 2048
"""Training images over which what the groups see and their units are measured, at most."""
SKIPPED = "skipped.txt"
"""File and reason, a line each, of images that could not be read while training."""


def summary_of(
    config: Config, model: SparseJEPA, total: int, seconds: float, log: MetricsLog
) -> dict[str, Any]:
    """Return what summary.json says of a run of `total` steps and its last numbers."""
    w_norms = None if model.groups is None else model.groups.block_norms()
    count = total * config.optim.batch_size
    return {
        "arm": arm_name(config),
        "seed": config.run.seed,
        "data": config.data,
        "steps": total,
        "images": count,
        "train_version": version.TRAIN_VERSION,
        "seconds": seconds,
        "images_per_second": count / max(seconds, 1e-9),
        "final": log.last,
        "alarms": log.alarms,
        "w_nonzero": 0 if w_norms is None else int((w_norms > 0).sum()),
        "w_total": 0 if w_norms is None else w_norms.numel(),
    }


def finish(
    run_dir: Path,
    config: Config,
    image_set: Images,
    images: Batches,
    encoder: ViT,
    groups: GroupMap | None,
    summary: dict[str, Any],
) -> None:
    """Write the encoder, the groups with statistics of it and, last of all, summary.json."""
    about: dict[str, Any] = {"data": config.data, "arm": arm_name(config), "seed": config.run.seed}
    if license := license_of(run_dir, config):
        about["license"] = license
    mean, std = image_set.mean, image_set.std
    save_encoder(run_dir, encoder, mean=mean, std=std, extra=about)
    if groups is not None:
        index = torch.from_numpy(choose_images(image_set, MEASURED))
        frozen = Encoder(encoder.float(), name=run_dir.name, mean=mean, std=std)
        frozen.to(groups.W.device)
        groups = copy.deepcopy(groups).eval()  # the model's keep the context encoder's statistics
        looks = index.repeat(MEASURED // len(index))  # of few images, under several masks each
        sampler = build_sampler(config, frozen.grid_size)
        mean, cov = measure_seen(frozen, groups.kind, images.batches(looks.split(64)), sampler)
        assert groups.norm.running_mean is not None and groups.norm.running_var is not None
        groups.norm.running_mean.copy_(mean)
        groups.norm.running_var.copy_(cov.diagonal())
        mean, cov = measure_seen(frozen, groups.kind, images.batches(index.split(64)))
        seen = torch.stack([mean, cov.diagonal()]).float()
        save_groups(run_dir, groups, group_rms(groups, cov), seen)
    write_text(run_dir / "summary.json", json.dumps(summary, indent=1))


def list_skipped(run_dir: Path, images: Batches, world: World) -> int:
    """Add the images that could not be read while training to `SKIPPED`; return how many it lists.

    All processes' and, after a resume, those of earlier parts of the run.
    """
    lines = [f"{name}\t{reason}" for name, reason in images.skipped]
    found = {line for text in gather_texts("\n".join(lines)) for line in text.splitlines()}
    path = run_dir / SKIPPED
    if path.exists():
        found |= set(path.read_text(encoding="utf-8").splitlines())
    if found and world.main:
        write_text(path, "".join(f"{line}\n" for line in sorted(found)))
    return len(found)
