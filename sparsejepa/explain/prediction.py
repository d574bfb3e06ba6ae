"""How much of hidden patches the groups predict: the task that they were trained on, held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparsejepa.data.store import DeviceImages, ImageSet
from sparsejepa.evaluation.stats import Estimate, bootstrap_weights, from_draws
from sparsejepa.explain.subject import Subject
from sparsejepa.model.jepa import make_targets
from sparsejepa.training.build import build_sampler


@torch.no_grad()
def masked_r2(
    subject: Subject, images: ImageSet, *, batch_size: int = 128, resamples: int = 200
) -> tuple[Estimate, list[Estimate]]:
    """Return R^2 of the groups' predictions of hidden patches: of all, and of each region's own.

    As in training, the groups see the latents of the context alone and predict the run's targets,
    by default the normalised tokens of the whole image; the EMA encoder serves as context and as
    target encoder. SST is around the mean token of each *place*: to know where a patch lies scores
    0. Intervals resample images. The second list is empty unless groups are regions.

    Raises ValueError for a subject whose groups were fitted post hoc (see `Subject.fitted`).
    """
    if subject.groups is None or subject.config is None:
        raise ValueError("the groups were fitted post hoc and are scored there")
    encoder, device = subject.encoder, subject.encoder.device
    model: Any = encoder.model
    groups = subject.groups.to(device)
    source = DeviceImages(images, device)
    sampler = build_sampler(subject.config, encoder.grid_size)
    N = encoder.grid_size[0] * encoder.grid_size[1]

    targets, errors = [], []
    for step, index in enumerate(torch.arange(len(images)).split(batch_size)):
        pixels = encoder.pixels(source.take(index))
        masks = sampler.sample(len(index), seed=0, step=step, device=device)
        hidden = torch.ones(len(index), N, device=device).scatter_(1, masks.context, 0)
        query = hidden.argsort(dim=1, descending=True, stable=True)
        query = query[:, : N - masks.context.shape[1]]
        target = make_targets(model, pixels, subject.config.loss.predict)
        wanted = target.gather(1, query[..., None].expand(-1, -1, target.shape[-1]))
        predicted = groups(model(pixels, masks.context), masks.context, query)
        error = (predicted - wanted).square().sum(-1)
        errors.append(torch.full_like(hidden, torch.nan).scatter_(1, query, error).cpu())
        targets.append(target.half().cpu())
    x = torch.cat(targets).float()
    error = torch.cat(errors)  # [n, N], NaN where the context is
    spread = (x - x.mean(0)).square().sum(-1).masked_fill(error.isnan(), 0).double().numpy()
    error = error.nan_to_num().double().numpy()
    weights = bootstrap_weights(len(images), resamples)

    def r2(places: Any) -> Estimate:
        top, bottom = error[:, places].sum(1), spread[:, places].sum(1)
        draws = 1 - weights @ top / np.maximum(weights @ bottom, 1e-12)
        return from_draws(1 - top.sum() / max(bottom.sum(), 1e-12), draws)

    return r2(slice(None)), [r2(cell) for cell in subject.cells() if cell]
