"""SparseJEPA: context encoder, EMA target encoder, predictor and group map together.

I-JEPA (Assran et al. 2023) predicts the target encoder's embeddings of masked blocks from the
visible context. SparseJEPA (Hartman and Varshney 2025) adds a map from latent dimensions to groups
under a group lasso, and a KL term. The objective is

    prediction + group_weight * group + beta * KL + lam * sum_gj ||W_gj||

The last term is no part of `Losses.total`: an exact proximal step on W applies it (`after_step`),
in units of W's mean gradient. Without a predictor the group map's loss is the prediction.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from sparsejepa.config import LossConfig
from sparsejepa.distributed import Share, gather, local
from sparsejepa.model.groups import DensityController, GroupMap, Phase, largest
from sparsejepa.model.losses import (
    RunningMoments,
    aggregate_kl,
    full,
    normalize_pixels,
    normalize_targets,
    posterior_kl,
    prediction_loss,
)
from sparsejepa.model.masks import Masks, MaskSampler
from sparsejepa.model.vit import ViT, patchify
from sparsejepa.rng import generator

RIDGE = 1e-3
"""Weight of the squared weights of the group networks in the plain form, which pins the scale."""


class Rates(Protocol):
    """The schedules that a step of the model reads: pure functions of the step."""

    def ema(self, step: int) -> float: ...
    def w_rate(self, step: int) -> float: ...
    def w_momentum(self, step: int) -> float: ...
    def lam(self, step: int) -> float: ...
    def wanted_density(self, step: int) -> float: ...
    def phase(self, step: int) -> Phase: ...


@dataclass
class Losses:
    """The loss terms of one step, scalar tensors; `total` is what is minimised.

    All but `total` are unweighted; `kl` is the sum of its parts.
    """

    total: Tensor
    prediction: Tensor
    group: Tensor
    kl: Tensor
    kl_marginal: Tensor
    kl_correlation: Tensor
    penalty: Tensor

    def stacked(self) -> Tensor:
        """Return the detached terms as one fp32 vector in field order."""
        return torch.stack([getattr(self, f.name).detach().float() for f in fields(self)])


class SparseJEPA(nn.Module):
    """The model of one run. ``groups=None`` is the dense JEPA.

    One step of one's own loop::

        losses = model(images, step=step)
        losses.total.backward()
        optimizer.step()          # over model.network_parameters()
        model.after_step(step)    # W: gradient and proximal step; target encoder: EMA
    """

    def __init__(
        self,
        encoder: ViT,
        predictor: nn.Module | None,
        sampler: MaskSampler,
        groups: GroupMap | None,
        *,
        rates: Rates,
        loss: LossConfig = LossConfig(),  # noqa: B008  (it is frozen)
        total_steps: int = 1000,
        steer_density: bool = False,
        random_pattern: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.context_encoder = encoder
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = predictor
        self.groups = groups
        self.sampler = sampler
        self.rates = rates
        self.loss = loss
        self.seed = seed
        self.moments = RunningMoments(encoder.embed_dim)
        self.controller = DensityController(total_steps) if groups and steer_density else None
        # In a control with random zeros, the order [G, D] in which blocks are kept along the path
        # of the density: those of the final pattern first.
        zeros = random_pattern
        self.order: Tensor | None
        self.register_buffer("order", None if zeros is None else zeros + torch.rand(zeros.shape))
        # oi-VAE's sigma. Without a group map nothing reads the sample, and the term is left out.
        posterior = groups is not None and loss.kl == "posterior"
        self.log_variance = nn.Linear(encoder.embed_dim, encoder.embed_dim) if posterior else None

    def forward(
        self, images: Tensor, *, step: int, masks: Masks | None = None, share: Share | None = None
    ) -> Losses:
        """Return the loss terms for normalised `images` [n, 3, H, W].

        Args:
            step: what is drawn is a function of (seed, step).
            masks: of these images; drawn if not given.
            share: which rows of the global batch they are; all if not given. Everything is drawn
                for the global batch.
        """
        share = share or Share()
        batch, dim = len(images) * share.count, self.context_encoder.embed_dim
        rows, noise = share.rows(batch), None
        if masks is None:
            masks = self.draw_masks(batch, step, share, images.device)
        if self.log_variance is not None:
            noise = torch.empty(batch, dim, dtype=images.dtype, device=images.device)
            noise.normal_(generator=generator(self.seed, step, "posterior", images.device))
            noise = noise[rows]
        kept = self.context_encoder.draw_kept(batch)
        return self.losses(images, masks, noise, None if kept is None else kept[..., rows])

    def draw_masks(
        self, batch: int, step: int, share: Share, device: torch.device | str = "cpu"
    ) -> Masks:
        """Return the masks of a share of a global batch at a step."""
        masks = self.sampler.sample(batch, seed=self.seed, step=step, device=device)
        rows = share.rows(batch)
        return Masks(masks.context[rows], masks.targets[rows])

    def losses(
        self, images: Tensor, masks: Masks, noise: Tensor | None = None, kept: Tensor | None = None
    ) -> Losses:
        """Return the loss terms given all that is drawn: a function that can be compiled.

        Args:
            images: [B, 3, H, W], normalised.
            noise: standard normal [B, D] for the posterior's sample, None where there is none.
            kept: stochastic depth, see `ViT.forward`.
        """
        weights = self.loss
        self.target_encoder.eval()  # the target has no stochastic depth
        targets = make_targets(self.target_encoder, images, weights.predict)
        context = self.context_encoder(images, masks.context, kept)  # [B, C, D]
        zero = targets.new_zeros((), dtype=torch.float32)
        prediction = group = penalty = kl = marginal = correlation = zero
        if self.predictor is not None:
            predicted = self.predictor(context, masks.context, masks.targets)  # [B, M, K, D']
            wanted = gather_tokens(targets, masks.targets.flatten(1)).view_as(predicted)
            prediction = prediction_loss(predicted, wanted, weights.loss)
        latent, pooled = context, full(context).mean(1)  # [B, D], before any normalisation
        if weights.kl == "aggregate" and weights.beta:
            # Of the batch of all processes.
            marginal, correlation = aggregate_kl(*self.moments(gather(pooled)))
            kl = marginal + correlation
        elif self.log_variance is not None and noise is not None:
            logvar = full(self.log_variance(pooled))
            kl = posterior_kl(pooled, logvar)
            # One sample per image, added to each of its tokens: their mean is mu + sigma * eps.
            latent = context + ((0.5 * logvar).exp() * noise)[:, None]
        total = weights.beta * kl
        if self.groups is not None:
            query = self._queries(masks, targets.shape[1])
            grouped = self.groups(latent, masks.context, query)  # [B, T, D']
            group = prediction_loss(grouped, gather_tokens(targets, query), weights.loss)
            penalty = self.groups.penalty()
            if self.predictor is None:
                prediction = group
            else:
                total = total + weights.group_weight * group
            if not self.groups.sphere:
                total = total + RIDGE * self.groups.ridge()
        return Losses(prediction + total, prediction, group, kl, marginal, correlation, penalty)

    def _queries(self, masks: Masks, num_patches: int) -> Tensor:
        """Return the patches that the groups predict, [B, T]: the target blocks, or for `region`
        all that are hidden from the context, so that every cell has its share."""
        assert self.groups is not None
        if self.groups.kind != "region":
            return masks.targets.flatten(1)
        batch, count = masks.context.shape
        seen = torch.zeros(batch, num_patches, dtype=torch.uint8, device=masks.context.device)
        seen.scatter_(1, masks.context, 1)
        return seen.argsort(dim=1, stable=True)[:, : num_patches - count]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take the proximal gradient step on W and the EMA step of the target encoder."""
        rates, groups = self.rates, self.groups
        if groups is not None:
            rate, momentum = rates.w_rate(step), rates.w_momentum(step)
            lam, density = rates.lam(step), rates.wanted_density(step)
            if self.order is not None:
                keep = largest(self.order, density)
                groups.proximal_step(rate, 0.0, momentum=momentum, keep=keep)
            else:
                phase = rates.phase(step)
                groups.steered_step(rate, lam, momentum, phase, self.controller, density)
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [local(p) for p in self.target_encoder.parameters()],
            [local(p) for p in self.context_encoder.parameters()],
            1 - rates.ema(step),
        )

    def network_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return (matrices, the rest) of all that AdamW trains: everything but W and the target.

        Weight decay is for the matrices: weights of linear and convolution layers and the group
        networks' own. Biases, norms, tokens and positions are the rest.
        """
        matrices = [m.weight for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        matrices += [] if self.groups is None else self.groups.networks.weights()
        decays = {id(p) for p in matrices}
        w = None if self.groups is None else self.groups.W
        trained = [p for p in self.parameters() if p.requires_grad and p is not w]
        rest = [p for p in trained if id(p) not in decays]
        return [p for p in trained if id(p) in decays], rest


@torch.no_grad()
def make_targets(
    encoder: ViT, images: Tensor, predict: Literal["embeddings", "pixels"] = "embeddings"
) -> Tensor:
    """Return what is predicted of each patch of normalised `images` [B, 3, H, W].

    With `encoder` the target encoder in evaluation mode: its layer-normalised tokens [B, N, D], or
    the patches' own pixels [B, N, 3 p^2], normalised per patch (MAE).
    """
    if predict == "pixels":
        return normalize_pixels(patchify(images, encoder.patch_size).flatten(1, 2).flatten(2))
    return normalize_targets(encoder(images))


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the tokens [B, T, D] at `index` [B, T] of `tokens` [B, N, D]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
