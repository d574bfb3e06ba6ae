"""Groups of a frozen encoder's latents, found after training by masked prediction.

The group map of `model.groups` is fitted to tokens that stay as they are: from the tokens of a
visible context, the tokens of hidden patches (fitting a token from itself would have trivial
disjoint solutions). So any vision transformer gets groups, and the held-out R^2, beside that of
random zero patterns of equal density, says whether the pattern means anything.

Expect a clear answer from `feature` groups only. Where groups add their predictions up (`concept`)
and are together as wide as the latents, nearly any pattern passes all that the context tells, and
learned and random patterns predict about equally well.

Letters: n images, N patches, D latents, G groups, P group width, B images of a batch, T hidden
patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from sparsejepa.encoders.encoder import save_groups
from sparsejepa.errors import UserError
from sparsejepa.model.groups import (
    TRAVEL,
    DensityController,
    GroupMap,
    Kind,
    Phase,
    group_norms,
    mean_momentum,
    ramp,
    random_pattern,
)
from sparsejepa.model.jepa import gather_tokens
from sparsejepa.model.masks import Masks, MaskSampler
from sparsejepa.rng import derive_seed, generator

LEAST_IMAGES = 16
BLOCK = 256
"""Images whose tokens are worked on at once."""
CONTEXT = 0.25, 0.325, 0.4
"""Shares of the patches that the context is given."""

_LR, _WEIGHT_DECAY = 3e-3, 0.05
# Shares of the steps in which learning rates rise, and fall to 0 at the end.
_WARMUP, _DECAY = 0.05, 0.4
# Width of the group networks: as good as the 64 of training here, at half the cost.
_HIDDEN = 32
# Latents whose spread is below this share of the largest are constant.
_FLAT = 1e-6
# A score takes each image as often as gives about so many.
_SCORED = 2048


class PostHocGroups(TransformerMixin, BaseEstimator):
    """Group map fitted to frozen tokens [n, N, D], a transformer of scikit-learn's.

    Tokens are an array or a tensor on any device; the fit is in double precision where they are,
    otherwise in single. A hidden token is the target: per dimension, less the mean token of its
    patch, in units of the standard deviation of what remains. So an R^2 of 0 is what the place
    alone tells, and every dimension counts alike. The latents that enter W are the context tokens
    standardised per dimension. W takes proximal gradient steps on the unit spheres, everything else
    AdamW.

    A first fit under the penalty finds the zero pattern; a second from new weights keeps it and has
    no penalty, so that what a pattern predicts does not depend on how it was found. With lam = 0
    and no density there is only the second, without zeros.

    Args:
        num_groups: G, at most D.
        group_dim: P; D / G if None.
        lam: group-lasso penalty, see `GroupMap.proximal_step`: 0.001, 0.01 and 0.1 leave about 16,
            4 to 11 and 1 to 2 of 16 groups per latent; 0 fits without zeros.
        density: steer lam towards this share of non-zero blocks (g, j) instead of fixing it, and
            bring it there exactly in the last step of the first fit (at least one per latent).
        kind: what a group is, see `GroupMap`.
        steps, batch_size: of each of the two fits.
        grid_size: rows and columns of patches; a square if None.
        random_state: seed of weights, batches and masks.

    Attributes:
        map_: the `GroupMap`, in evaluation mode; its input is the tokens as they come.
        W_: [G, P, D], for standardised tokens; block_norms_: [G, D]; density_: share of non-zeros.
        rms_: [G], root mean square of ||W^(g) z|| over the tokens of the fit; 0 for a dead group.
        mean_, scale_: [D], which standardise tokens (a constant latent has scale 1).
        loss_curve_: [steps], mean squared error of each step of the second fit, about 1 - R^2.
    """

    map_: GroupMap

    def __init__(
        self,
        num_groups: int = 16,
        group_dim: int | None = None,
        lam: float = 0.01,
        density: float | None = None,
        kind: Kind = "concept",
        steps: int = 600,
        batch_size: int = 64,
        grid_size: tuple[int, int] | None = None,
        random_state: int = 0,
    ) -> None:
        self.num_groups, self.group_dim = num_groups, group_dim
        self.lam, self.density = lam, density
        self.kind: Kind = kind
        self.steps, self.batch_size = steps, batch_size
        self.grid_size, self.random_state = grid_size, random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the map to tokens X [n, N, D].

        Raises UserError for tokens that are too few, not finite or the same for every image, and
        for arguments that do not suit them; ValueError for another shape.
        """
        return self._fit(X, None)

    def transform(self, X: Any) -> np.ndarray:
        """Return the activations ||W^(g) z|| / rms_ of tokens X [n, N, D], float32 [n, N, G].

        z is the standardised token (also for kind region, whose map sees only their mean). A dead
        group's activation is 0.
        """
        x = self._check(X)
        rms = torch.as_tensor(self.rms_, device=x.device).clamp_min(1e-30)
        parts = [self._activations(part) / rms for part in x.split(BLOCK)]
        return torch.cat(parts).float().cpu().numpy()

    @torch.no_grad()
    def score(self, X: Any, y: Any = None) -> float:
        """Return the R^2 of hidden tokens of X [n, N, D]: 1 - squared error / squared target.

        Targets and masks as in the fit, the masks always the same for one number of images. 0 is
        as good as the mean token of each patch in the fit.

        Raises ValueError if the tokens are those means exactly, so that there is nothing to tell.
        """
        x = self._check(X)
        error = torch.zeros((), dtype=torch.float64, device=x.device)
        total = error.clone()
        index = torch.arange(len(x)).repeat(max(1, -(-_SCORED // len(x))))
        for part, masks in self._batches(x, index.split(self.batch_size), "posthoc-score"):
            predicted, target = self._predict(x[part], masks)
            error += (predicted - target).square().sum()
            total += target.square().sum()
        if not total > 0:
            raise ValueError("tokens equal the mean token of each patch; R^2 is not defined")
        return 1 - float(error / total)

    def save(self, folder: Path | str) -> None:
        """Write the map to a folder, groups.safetensors as a run directory has it."""
        check_is_fitted(self)
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_groups(Path(folder), self.map_, self._unit)

    def random_pattern_scores(
        self, tokens_train: Any, tokens_test: Any, repeats: int = 3
    ) -> dict[str, Any]:
        """Return what the held-out R^2 of the learned pattern is to be compared with.

        Each is the same fit to `tokens_train` with another seed of the weights, scored on
        `tokens_test` with the same masks: `unpenalised` with lam = 0, `random` (`repeats` times)
        with fixed random zeros, as many for each latent and each group as the learned pattern has,
        so that only which goes with which has changed.

        Returns {"learned": R^2 of this fit, "unpenalised": R^2, "random": [R^2, ...]}.
        """
        learned = torch.as_tensor(self.block_norms_ > 0)
        groups, latents = learned.shape

        def other(number: int) -> float:
            params = {**self.get_params(), "lam": 0.0, "density": None}
            params["random_state"] = seed = derive_seed(self.random_state, number, "random-pattern")
            pattern = None
            if number:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed)
                    pattern = random_pattern(groups, latents, self.density_, learned)
            fitted = type(self)(**params)._fit(tokens_train, pattern)
            fitted.random_state = self.random_state  # for the masks of the score
            return fitted.score(tokens_test)

        return {
            "learned": self.score(tokens_test),
            "unpenalised": other(0),
            "random": [other(i + 1) for i in range(repeats)],
        }

    def _fit(self, tokens: Any, pattern: Tensor | None) -> Self:
        """Fit with the zero pattern bool [G, D]; without one, search for it unless lam is 0."""
        x = _as_tokens(tokens)
        x = x if x.dtype == torch.float64 else x.float()
        self._check_arguments(x)
        self._measure(x)
        if pattern is None and (self.lam > 0 or self.density is not None):
            self._start(x, "posthoc-search")
            self._train(x, searching=True)
            pattern = self.map_.block_norms() > 0
        self._start(x, "posthoc")
        if pattern is not None:
            with torch.no_grad():
                self.map_.W.mul_(pattern.to(x.device)[:, None])
        self.loss_curve_ = self._train(x, searching=False)
        self.map_.requires_grad_(False)
        self.W_ = self.map_.W.cpu().numpy()
        self.block_norms_ = np.linalg.norm(self.W_, axis=1)
        self.density_ = float((self.block_norms_ > 0).mean())
        squares = torch.zeros(self.num_groups, dtype=torch.float64, device=x.device)
        for part in x.split(BLOCK):
            squares += self._activations(part).double().square().sum((0, 1))
        self.rms_ = (squares / (len(x) * x.shape[1])).sqrt().to(x.dtype).cpu().numpy()
        self._unit = torch.as_tensor(self.rms_)
        if self.kind == "region":  # groups that read the mean token are measured on it
            pooled = torch.cat([part.mean(1, keepdim=True) for part in x.split(BLOCK)])
            self._unit = self.map_.group_activations(pooled).square().mean((0, 1)).sqrt().cpu()
        return self

    def _start(self, x: Tensor, purpose: str) -> None:
        """Set `map_` to a fresh map whose normalisation has the statistics of what it sees."""
        width = self.group_dim or max(1, x.shape[2] // self.num_groups)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.random_state, 0, purpose))
            self.map_ = GroupMap(
                self.kind, x.shape[2], self._grid, self.num_groups, width, hidden=_HIDDEN
            )
        norm = self.map_.eval().to(x.device, x.dtype).norm
        mean, scale = (torch.as_tensor(v, device=x.device) for v in (self.mean_, self.scale_))
        if self.kind == "region":  # it sees the mean over the context
            parts = self._batches(x, torch.arange(len(x)).split(self.batch_size), "posthoc-norm")
            pooled = torch.cat([gather_tokens(x[i], masks.context).mean(1) for i, masks in parts])
            mean, spread = pooled.mean(0), pooled.std(0, correction=0)
            scale = torch.where(spread > _FLAT * scale, spread, 1.0)
        norm.eps = torch.finfo(torch.float32).tiny  # as 0, which torch 2.11 refuses: it rounds away
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(scale.square())

    def _train(self, x: Tensor, *, searching: bool) -> np.ndarray:
        """Train `map_`, and return the loss of each step. While searching, lam and density act."""
        groups = self.map_
        matrices = groups.networks.weights()
        rest = [p for p in groups.networks.parameters() if not any(p is m for m in matrices)]
        parts = [
            {"params": matrices, "weight_decay": _WEIGHT_DECAY},
            {"params": rest, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(parts, betas=(0.9, 0.98))
        steer = searching and self.density is not None
        controller = DensityController(self.steps).to(x.device) if steer else None
        # Up, constant, down to 0.
        share = np.arange(1, self.steps + 1) / self.steps
        rates = np.minimum(np.minimum(share / _WARMUP, 1), (1 + 1 / self.steps - share) / _DECAY)
        losses = []
        for step, (index, masks) in enumerate(self._batches(x, self._shuffled(len(x)))):
            for part in optimizer.param_groups:
                part["lr"] = _LR * rates[step]
            predicted, target = self._predict(x[index], masks)
            loss = (predicted - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w_rate, way = TRAVEL * float(rates[step] / rates.sum()), ramp(step / self.steps)
            last = step == self.steps - 1
            phase: Phase = "frozen" if not searching else "freeze" if last else "penalised"
            final = 1.0 if self.density is None else self.density
            density = final if last else 1 + (final - 1) * way
            momentum = mean_momentum(step, self.steps)
            groups.steered_step(w_rate, self.lam * way, momentum, phase, controller, density)
            losses.append(loss.detach())
        return torch.stack(losses).cpu().numpy()

    def _predict(self, tokens: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """Return predictions and targets [B, T, D] of the hidden patches of tokens [B, N, D]."""
        hidden = masks.targets[:, 0]
        context = gather_tokens(tokens, masks.context)
        target = gather_tokens((tokens - self._patch_mean) / self._patch_scale, hidden)
        return self.map_(context, masks.context, hidden), target

    def _batches(
        self, x: Tensor, parts: Iterable[Tensor], purpose: str = "posthoc-fit"
    ) -> Iterator[tuple[Tensor, Masks]]:
        """Yield parts of the images, int64 [B], with their masks: hidden patches are one set."""
        counts = {max(1, round(math.prod(self._grid) * share)) for share in CONTEXT}
        try:
            sampler = MaskSampler(self._grid, context_counts=sorted(counts), merge=True)
        except UserError:
            grid = "{}x{}".format(*self._grid)
            raise UserError(f"{grid} patches are too few; use an encoder with more") from None
        seed = derive_seed(self.random_state, 0, purpose)
        for step, part in enumerate(parts):
            masks = sampler.sample(len(part), seed=seed, step=step, device=x.device)
            yield part.to(x.device), masks

    def _shuffled(self, n: int) -> Iterator[Tensor]:
        """Yield the images of each step: whole batches of one random order after another."""
        size = min(self.batch_size, n)
        for step in range(self.steps):
            epoch, place = divmod(step, n // size)
            if place == 0:
                draw = generator(self.random_state, epoch, "posthoc-order")
                batches = torch.randperm(n, generator=draw).split(size)
            yield batches[place]

    def _activations(self, tokens: Tensor) -> Tensor:
        """Return ||W^(g) z|| [B, N, G] of tokens [B, N, D]."""
        mean, scale = (torch.as_tensor(v, device=tokens.device) for v in (self.mean_, self.scale_))
        return group_norms(self.map_.W.detach(), (tokens - mean) / scale)

    def _measure(self, x: Tensor) -> None:
        """Set the moments that standardise latents and targets."""
        mean = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
        power = mean.clone()
        for part in x.split(BLOCK):
            mean += part.double().sum(0) / len(x)
            power += part.double().square().sum(0) / len(x)
        within = (power - mean.square()).clamp_min(0).mean(0).sqrt()
        std = (power.mean(0) - mean.mean(0).square()).clamp_min(0).sqrt()
        size = power.mean(0).sqrt().max()
        if not within.max() > _FLAT * size:
            raise UserError(
                "tokens are the same for every image, so there is nothing to predict; "
                "check the encoder and its images"
            )
        # What rounding leaves of a constant is not to be blown up.
        self._patch_mean = mean.to(x.dtype)
        self._patch_scale = within.masked_fill(within <= _FLAT * size, math.inf).to(x.dtype)
        self.mean_ = mean.mean(0).to(x.dtype).cpu().numpy()
        self.scale_ = std.masked_fill(std <= _FLAT * size, 1.0).to(x.dtype).cpu().numpy()

    def _check_arguments(self, x: Tensor) -> None:
        """Set the grid; UserError or ValueError if arguments and tokens do not fit."""
        n, patches, width = x.shape
        if n < LEAST_IMAGES:
            raise UserError(f"{n} images are too few to fit groups; use at least {LEAST_IMAGES}")
        if not 1 <= self.num_groups <= width:
            raise UserError(f"num_groups {self.num_groups}: {width} latents allow 1 to {width}")
        if min(self.steps, self.batch_size, 1 if self.group_dim is None else self.group_dim) < 1:
            raise UserError("steps, batch_size and group_dim must be at least 1")
        if self.kind not in get_args(Kind):
            raise UserError(f"kind '{self.kind}' is not one of {', '.join(get_args(Kind))}")
        density = 1.0 if self.density is None else self.density
        if self.lam < 0 or not 1 / self.num_groups <= density <= 1:
            raise UserError(
                f"lam must not be negative, and density lie between 1/{self.num_groups} (each "
                "latent keeps at least one group) and 1"
            )
        side = math.isqrt(patches)
        rows, cols = self._grid = self.grid_size or (side, side)
        if rows * cols != patches:
            raise ValueError(f"{patches} patches are no grid of {rows}x{cols}; give grid_size")

    def _check(self, tokens: Any) -> Tensor:
        """Return tokens to be seen by the fitted map."""
        check_is_fitted(self, msg="%(name)s is not fitted yet; call fit first")
        x = _as_tokens(tokens)
        wanted = (math.prod(self._grid), len(self.mean_))
        if tuple(x.shape[1:]) != wanted:
            raise ValueError(f"tokens [n, N, D] of shape {tuple(x.shape)}; the fit had {wanted}")
        return x.to(self.map_.W)


def _as_tokens(tokens: Any) -> Tensor:
    x = torch.as_tensor(tokens).detach()
    if x.ndim != 3 or not x.numel():
        raise ValueError(f"tokens must be [n, N, D], got shape {tuple(x.shape)}")
    if not all(part.isfinite().all() for part in x.split(BLOCK)):
        raise UserError("tokens hold NaN or infinity; check the encoder that gave them")
    return x
