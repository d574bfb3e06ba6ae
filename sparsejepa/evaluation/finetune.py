"""Fine-tuning: encoder and linear head trained on labels together, what a probe cannot show.

The usual recipe for a pretrained ViT (He et al. 2022, appendix A.1: AdamW, layer-wise decay of the
learning rate, cosine with warm-up, label smoothing), at a budget that suits small sets. One fixed
recipe for all encoders, pretrained or not: nothing is chosen per encoder. Images are cropped
lightly and mirrored; labels that change then (left and right, how many) suffer from it.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsejepa.data.augment import Augment
from sparsejepa.data.images import DeviceImages, ImageSet
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.environment import has_bf16
from sparsejepa.errors import UserError
from sparsejepa.evaluation.features import embed
from sparsejepa.rng import derive_seed, generator


@dataclass(frozen=True)
class Recipe:
    """The settings of fine-tuning; the budget is `passes` over the images within the two bounds."""

    lr: float = 4e-3
    """Peak learning rate, of the head; a layer below has `layer_decay` times that above it."""
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    """Of matrices only."""
    passes: int = 20
    least_steps: int = 200
    most_steps: int = 8_000
    batch_size: int = 128
    warmup: float = 0.1
    """Share of the steps."""
    label_smoothing: float = 0.1
    crop_scale: tuple[float, float] = (0.6, 1.0)
    clip: float = 1.0

    def steps(self, n: int) -> int:
        """Return the optimiser steps on n images."""
        wanted = self.passes * n // min(self.batch_size, n)
        return min(max(wanted, self.least_steps), self.most_steps)


class FineTune:
    """A classifier that is an encoder and a linear head on its average-pooled last layer.

    Trained in bf16 where the hardware has it. Everything random is keyed on `random_state`, so that
    two encoders of one architecture see the same batches. The head starts at 0.

    Attributes after `fit`:
        encoder_: the tuned copy; the one that was given stays as it was.
        head_: the linear layer, D to K; classes_: the K labels met, sorted; settings_: for tables.
    """

    def __init__(
        self, encoder: Encoder, *, random_state: int = 0, recipe: Recipe | None = None
    ) -> None:
        self.encoder, self.random_state = encoder, random_state
        self.recipe = recipe or Recipe()

    def fit(self, images: ImageSet, y: np.ndarray, rows: np.ndarray | None = None) -> FineTune:
        """Train on the `rows` [n] of images, all if None, with labels y [n].

        Raises UserError for a single class, or if a loss is not finite.
        """
        recipe, seed, device = self.recipe, self.random_state, self.encoder.device
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise UserError("the labels name one class only; fine-tuning needs two or more")
        self.encoder_ = encoder = _copy(self.encoder)
        # By way of no device: the usual start would draw from torch's own generator.
        head = nn.Linear(encoder.embed_dim, len(self.classes_), device="meta")
        self.head_ = head.to_empty(device=device)
        nn.init.zeros_(self.head_.weight)
        nn.init.zeros_(self.head_.bias)
        model = encoder.model.train()
        groups = layer_groups(model, self.head_, encoder.depth, recipe)
        trained = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups)
        augment = Augment(
            encoder.img_size, mean=encoder.mean, std=encoder.std, crop_scale=recipe.crop_scale
        )
        source = DeviceImages(images, device)
        where = torch.arange(len(images)) if rows is None else torch.from_numpy(rows)
        labels = torch.from_numpy(index.astype(np.int64))
        total, batch = recipe.steps(len(y)), min(recipe.batch_size, len(y))
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(str(device)))
        losses = torch.zeros(total, device=device)
        rise = max(1, round(recipe.warmup * total))
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 1 / rise, total_iters=rise),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - rise),
            ],
            [rise],
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for step in range(total):
                # Layers of foreign models may draw from torch's own generator.
                torch.manual_seed(derive_seed(seed, step, "finetune-layers"))
                chosen = self._batch(step, len(y), batch)
                draws = generator(seed, step, "finetune-augment", device)
                pixels = augment(source.take(where[chosen]), draws)
                with bf16:
                    scores = self.head_(model(pixels).mean(1))
                loss = F.cross_entropy(
                    scores.float(),
                    labels[chosen].to(device),
                    label_smoothing=recipe.label_smoothing,
                )
                optimizer.zero_grad()
                loss.backward()
                losses[step] = loss.detach()
                nn.utils.clip_grad_norm_(trained, recipe.clip)
                optimizer.step()
                schedule.step()
        bad = losses.isfinite().logical_not().nonzero()  # once, as it waits for the device
        if len(bad):
            raise UserError(f"finetune: loss is not finite at step {int(bad[0])}")
        model.eval()
        self.settings_ = {"lr": recipe.lr, "steps": total, "batch_size": batch, "pool": "mean"}
        return self

    @torch.no_grad()
    def predict(self, images: ImageSet) -> np.ndarray:
        """Return a label for every image, seen whole."""
        pooled = torch.from_numpy(embed(self.encoder_, images).x).to(self.encoder_.device)
        return self.classes_[self.head_(pooled).argmax(1).cpu().numpy()]

    def score(self, images: ImageSet, y: np.ndarray) -> float:
        """Return the share of images whose label is predicted."""
        return float(np.mean(self.predict(images) == y))

    def _batch(self, step: int, n: int, size: int) -> Tensor:
        """Return the images of a step: the next `size` of a new order for every pass."""
        per_pass = n // size
        order = torch.randperm(
            n, generator=generator(self.random_state, step // per_pass, "finetune-order")
        )
        start = step % per_pass * size
        return order[start : start + size]


def layer_groups(
    model: nn.Module, head: nn.Module, depth: int, recipe: Recipe
) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: a learning rate per layer, decay of weights for matrices.

    The head and the final norm have `lr`; the last of the `depth` blocks `lr * layer_decay`, and so
    on down to the patches and what is added to them.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    named = [*model.named_parameters(), *((f"head.{k}", p) for k, p in head.named_parameters())]
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        block = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
        top = re.search(r"(?:^|\.)(norm|fc_norm|head)\.", name)
        below = depth - int(block[1]) if block else 0 if top else depth + 1
        key = below, parameter.ndim > 1
        decay = recipe.weight_decay if key[1] else 0.0
        rate = recipe.lr * recipe.layer_decay**below
        groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay})
        groups[key]["params"].append(parameter)
    return list(groups.values())


def _copy(encoder: Encoder) -> Encoder:
    return Encoder(
        copy.deepcopy(encoder.model),
        name=f"{encoder.name} (fine-tuned)",
        mean=encoder.mean,
        std=encoder.std,
        precision=encoder.precision,
    )
