"""Our training step against a straightforward reference-style one, side by side in one run.

    python benchmarks/step.py [--encoder tiny] [--batch 128] [--rounds 5] [--out FILE.jsonl]

The reference is written from the published description of I-JEPA: fp32, masks drawn for one image
after another in Python, one predictor pass for each of the four target blocks, AdamW and EMA one
tensor at a time. Both steps use the same encoder and predictor widths, the same target shape and
the same number of context patches, and both start from uint8 images in memory. The two are timed in
turn, round by round; the table shows medians and the ratio with its spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparsejepa.config import Config, preset
from sparsejepa.data.augment import Augment
from sparsejepa.environment import environment
from sparsejepa.model.masks import Masks, MaskSampler
from sparsejepa.rng import generator
from sparsejepa.training.build import build_model, build_optimizer
from sparsejepa.training.loop import build_autocast

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SHAPE, CONTEXT = (3, 4), 20  # one shape, so that both steps do the same work every time


def reference_masks(batch: int, side: int, rng: np.random.Generator) -> Masks:
    """Draw four 3x4 blocks and `CONTEXT` visible patches for one image after another."""
    contexts, targets = [], []
    for _ in range(batch):
        free = np.ones((side, side), bool)
        blocks = []
        for _ in range(4):
            top = rng.integers(side - SHAPE[0] + 1)
            left = rng.integers(side - SHAPE[1] + 1)
            block = np.zeros((side, side), bool)
            block[top : top + SHAPE[0], left : left + SHAPE[1]] = True
            free &= ~block
            blocks.append(torch.from_numpy(np.flatnonzero(block)))
        visible = np.flatnonzero(free)
        # A few draws leave fewer free patches than asked for: these contexts reuse some.
        chosen = rng.choice(visible, CONTEXT, replace=len(visible) < CONTEXT)
        contexts.append(torch.from_numpy(np.sort(chosen)))
        targets.append(torch.stack(blocks))
    return Masks(torch.stack(contexts), torch.stack(targets))


def reference_step(config: Config, images: torch.Tensor) -> Callable[[int], float]:
    """Return a step in the manner of the published reference code."""
    model = build_model(config, (32, 32), 1000)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False, fused=False
    )
    rng = np.random.default_rng(0)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))

    def step(index: int) -> float:
        x = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        masks = reference_masks(len(x), 32 // config.model.patch_size, rng)
        with torch.no_grad():
            target = model.target_encoder(x)
            target = F.layer_norm(target, target.shape[-1:])
        context = model.context_encoder(x, masks.context)
        loss = torch.zeros(())
        for block in masks.targets.unbind(1):
            wanted = torch.stack([t[i] for t, i in zip(target, block, strict=True)])
            predicted = model.predictor(context, masks.context, block[:, None])[:, 0]
            loss = loss + F.smooth_l1_loss(predicted, wanted) / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            pairs = zip(
                model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True
            )
            for slow, fast in pairs:
                slow.mul_(0.996).add_(fast, alpha=0.004)
        return float(loss.detach())

    return step


def our_step(config: Config, images: torch.Tensor) -> Callable[[int], float]:
    """Return the step of training/loop.py: crops and flips, masks, bf16 where there is any."""
    model = build_model(config, (32, 32), 1000)
    side = 32 // config.model.patch_size
    share, ratio = SHAPE[0] * SHAPE[1] / side**2, SHAPE[0] / SHAPE[1]
    model.sampler = MaskSampler(
        (side, side),
        target_scale=(share, share),
        target_aspect_ratio=(ratio, ratio),
        context_counts=(CONTEXT,),
    )
    optimizer = build_optimizer(config, model)
    augment = Augment((32, 32), mean=MEAN, std=STD)
    autocast = build_autocast(config, torch.device("cpu"))
    trained: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]

    def step(index: int) -> float:
        x = augment(images, generator(0, index, "augment"))
        with autocast:
            losses = model(x, step=index)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(index)
        return float(losses.total.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", default="tiny")
    parser.add_argument("--predictor-dim", type=int, default=96)
    parser.add_argument("--predictor-depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    parser.add_argument("--out", type=Path, help="append one JSON line")
    args = parser.parse_args()

    base = preset("best").replace(
        encoder=args.encoder,
        predictor_dim=args.predictor_dim,
        predictor_depth=args.predictor_depth,
        drop_path=0.0,
        batch_size=args.batch,
    )
    images = torch.randint(0, 256, (args.batch, 32, 32, 3), dtype=torch.uint8)
    dense = base.replace(groups="none", beta=0.0)
    contenders = {
        "reference, fp32": reference_step(dense, images),
        "ours dense, fp32": our_step(dense.replace(precision="fp32"), images),
        "ours dense": our_step(dense, images),
        "ours sparse (region, KL, prox)": our_step(base, images),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        step(0)
    for index in range(1, args.rounds + 1):
        for name, step in contenders.items():
            began = time.perf_counter()
            for repeat in range(args.steps):
                step(index * args.steps + repeat)
            times[name].append((time.perf_counter() - began) / args.steps)
    rates = {name: args.batch / statistics.median(t) for name, t in times.items()}
    reference = times["reference, fp32"]
    print(f"ViT-{args.encoder}/4 at 32x32, batch {args.batch}, {torch.get_num_threads()} threads")
    rows = []
    for name, rate in rates.items():
        ratios = sorted(r / t for r, t in zip(reference, times[name], strict=True))
        ratio = statistics.median(ratios)
        rows.append({"step": name, "images_per_second": rate, "ratio": ratio,
                     "ratio_low": ratios[0], "ratio_high": ratios[-1]})  # fmt: skip
        print(
            f"{name:32} {rate:8.1f} images/s  {ratio:5.2f} x  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    if args.out:
        line = {"benchmark": "step", "settings": {k: str(v) for k, v in vars(args).items()},
                "environment": environment(), "rows": rows}  # fmt: skip
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
