"""Groups of a frozen encoder's latents, found after training by masked prediction.

The group map of `model.groups` is fitted to tokens that stay as they are: from the tokens of a
visible context, the tokens of hidden patches (fitting a token from itself would have trivial
disjoint solutions). So any vision transformer gets groups, and the held-out R^2, beside that of
random zero patterns of equal density, says whether the pattern means anything.

Expect a clear answer from `feature` groups only. Where groups add their predictions up (`concept`)
and are together as wide as the latents, nearly any pattern passes all that the context tells, and
learned and random patterns predict about equally well.

Letters: n images, N patches, D latents, G groups, P group width, B images of a batch, C context and
T hidden patches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from sparsejepa.encoders.encoder import GROUPS, load_groups, save_groups
from sparsejepa.errors import UserError
from sparsejepa.files import load_tensors, read_json, save_tensors, write_text
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

_LR, _WEIGHT_DECAY = 3e-3, 0.05
# Shares of the steps in which learning rates rise, and fall to 0 at the end.
_WARMUP, _DECAY = 0.05, 0.4
# Width of the group networks: as good as the 64 of training here, at half the cost.
_HIDDEN = 32
# Latents whose spread is below this share of the largest are constant.
_FLAT = 1e-6
# A score takes each image as often as gives about so many.
_SCORED = 2048
# What `save` writes beside the map.
ABOUT, STATE = "posthoc.json", "posthoc.safetensors"
# The attributes that posthoc.safetensors holds.
_STATE = {
    "unit": "_unit", "rms": "rms_", "mean": "mean_", "scale": "scale_",
    "patch_mean": "_patch_mean", "patch_scale": "_patch_scale", "loss_curve": "loss_curve_",
}  # fmt: skip


class PostHocGroups(TransformerMixin, BaseEstimator):
    """Group map fitted to frozen tokens [n, N, D], a transformer of scikit-learn's.

    Tokens are an array or a tensor on any device; the fit is in double precision where they are,
    otherwise in single. Tables are taken too: each row [N * D] is an
    image, the tokens of its patches side by side, and activations come as a table [n, N * G] then.

    A hidden token is the target: per dimension, less the mean token of its patch, in units of
    the standard deviation of what remains. So an R^2 of 0 is what the place alone tells, and
    every dimension counts alike. The latents that enter W are the context tokens standardised per
    dimension. W takes proximal gradient steps on the unit spheres, everything else AdamW.

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
        context: smallest and largest share of the patches that the context is given.
        grid_size: rows and columns of patches; a square if None, and to be given for tables.
        random_state: seed of weights, batches and masks.

    Attributes:
        map_: the `GroupMap`, in evaluation mode; its input is the tokens as they come.
        W_: [G, P, D], for standardised tokens; block_norms_: [G, D]; density_: share of non-zeros.
        rms_: [G], root mean square of ||W^(g) z|| over the tokens of the fit; 0 for a dead group.
        mean_, scale_: [D], which standardise tokens (a constant latent has scale 1).
        loss_curve_: [steps], mean squared error of each step of the second fit, about 1 - R^2.
        n_features_in_: D; of a table N * D.
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
        context: tuple[float, float] = (0.25, 0.4),
        grid_size: tuple[int, int] | None = None,
        random_state: int = 0,
    ) -> None:
        self.num_groups, self.group_dim = num_groups, group_dim
        self.lam, self.density = lam, density
        self.kind: Kind = kind
        self.steps, self.batch_size, self.context = steps, batch_size, context
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
        rms = torch.as_tensor(self.rms_, device=x.device)
        parts = [self._activations(part) / rms.clamp_min(1e-30) for part in x.split(BLOCK)]
        found = torch.cat(parts).float().cpu().numpy()
        return found.reshape(len(found), -1) if _is_table(X) else found

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the columns that a table's activations have: patch0_group0, ..."""
        check_is_fitted(self)
        patches, groups = range(math.prod(self._grid)), range(self.num_groups)
        return np.array([f"patch{p}_group{g}" for p in patches for g in groups], object)

    @torch.no_grad()
    def score(self, X: Any, y: Any = None) -> float:
        """Return the R^2 of hidden tokens of X [n, N, D]: 1 - squared error / squared target.

        Targets and masks as in the fit, the masks always the same for one number of images. 0 is
        as good as the mean token of each patch in the fit.

        Raises ValueError if the tokens are those means exactly, so that there is nothing to tell.
        """
        x = self._check(X)
        passes = max(1, -(-_SCORED // len(x)))
        error = torch.zeros((), dtype=torch.float64, device=x.device)
        total = error.clone()
        parts = torch.arange(len(x)).repeat(passes).split(self.batch_size)
        for index, masks in self._batches(x, parts, "posthoc-score"):
            predicted, target = self._predict(x[index], masks)
            error += (predicted - target).square().sum()
            total += target.square().sum()
        if not total > 0:
            raise ValueError("tokens equal the mean token of each patch; R^2 is not defined")
        return 1 - float(error / total)

    def save(self, folder: Path | str) -> None:
        """Write the fit to a folder: groups.safetensors, as a run directory has it, and the rest in
        posthoc.safetensors and posthoc.json."""
        check_is_fitted(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_groups(folder, self.map_, self._unit)
        tensors = {key: torch.as_tensor(getattr(self, name)) for key, name in _STATE.items()}
        save_tensors(folder / STATE, tensors, {})
        about = {
            "params": self.get_params(),
            "grid_size": self._grid,
            "n_features": self.n_features_in_,
        }
        # A search may have set numbers of numpy's.
        text = json.dumps(about, indent=1, default=lambda number: number.item())
        write_text(folder / ABOUT, text + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Return the fitted groups that `save` wrote.

        Raises UserError for files that are missing, damaged or of two fits.
        """
        folder = Path(folder)
        about, (tensors, _) = read_json(folder / ABOUT), load_tensors(folder / STATE)
        try:
            params: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in about["params"].items()
            }
            rows, cols = about["grid_size"]
            model = cls(**params)
            model._grid, model.n_features_in_ = (rows, cols), int(about["n_features"])
            for key, name in _STATE.items():
                value = tensors[key]
                setattr(model, name, value if name.startswith("_") else value.numpy())
            latents = len(model.mean_)
            if model._patch_mean.shape != (rows * cols, latents):
                raise ValueError(f"a grid of {rows}x{cols} is that of another fit")
            groups = load_groups(folder, (rows, cols))
            if groups is None or groups.W.shape[::2] != (model.num_groups, latents):
                raise ValueError(f"{GROUPS} is missing or that of another fit")
            model._sampler = model._masks()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / ABOUT}: damaged ({error}); fit the groups again") from None
        model.map_ = groups.requires_grad_(False)
        model._describe()
        return model

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
        density = float(learned.float().mean())

        def other(number: int) -> float:
            params = {**self.get_params(), "lam": 0.0, "density": None}
            params["random_state"] = seed = derive_seed(self.random_state, number, "random-pattern")
            pattern = None
            if number:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed)
                    pattern = random_pattern(len(learned), learned.shape[1], density, learned)
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
        x = self._read(tokens, reset=True)
        self._grid = self._check_arguments(x)
        self._sampler = self._masks()
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
        self._describe()
        squares = torch.zeros(self.num_groups, dtype=torch.float64, device=x.device)
        for part in x.split(BLOCK):
            squares += self._activations(part).double().square().sum((0, 1))
        self.rms_ = (squares / (len(x) * x.shape[1])).sqrt().to(_precision(x)).cpu().numpy()
        self._unit = torch.as_tensor(self.rms_)
        if self.kind == "region":  # groups that read the mean token are measured on it
            pooled = torch.cat(
                [part.to(_precision(x)).mean(1, keepdim=True) for part in x.split(BLOCK)]
            )
            self._unit = self.map_.group_activations(pooled).square().mean((0, 1)).sqrt().cpu()
        return self

    def _describe(self) -> None:
        """Set the attributes that follow from the map."""
        self.W_ = self.map_.W.cpu().numpy()
        self.block_norms_ = np.linalg.norm(self.W_, axis=1)
        self.density_ = float((self.block_norms_ > 0).mean())

    def _start(self, x: Tensor, purpose: str) -> None:
        """Set `map_` to a fresh map whose normalisation has the statistics of the tokens."""
        width = self.group_dim or max(1, x.shape[2] // self.num_groups)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.random_state, 0, purpose))
            self.map_ = GroupMap(
                self.kind, x.shape[2], self._grid, self.num_groups, width, hidden=_HIDDEN
            )
        self.map_.eval().to(x.device, _precision(x))
        self._place_norm(x)

    def _train(self, x: Tensor, *, searching: bool) -> np.ndarray:
        """Train `map_`, and return the loss of each step. While searching, lam and density act."""
        groups = self.map_
        matrices = groups.networks.weights()
        rest = [p for p in groups.networks.parameters() if not any(p is m for m in matrices)]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": _WEIGHT_DECAY},
                {"params": rest, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
        )
        steer = searching and self.density is not None
        controller = DensityController(self.steps).to(x.device) if steer else None
        # Up, constant, down to 0.
        share = np.arange(1, self.steps + 1) / self.steps
        rates = np.minimum(np.minimum(share / _WARMUP, 1), (1 + 1 / self.steps - share) / _DECAY)
        batches = self._batches(x, self._shuffled(len(x)), "posthoc-fit")
        losses = []
        for step, (index, masks) in enumerate(batches):
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
            groups.steered_step(
                w_rate,
                self.lam * way,
                mean_momentum(step, self.steps),
                phase,
                controller,
                final if last else 1 + (final - 1) * way,
            )
            losses.append(loss.detach())
        return torch.stack(losses).cpu().numpy()

    def _predict(self, tokens: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """Return predictions and targets [B, T, D] of the hidden patches of tokens [B, N, D]."""
        tokens = tokens.to(self.map_.W.dtype)
        hidden = masks.targets[:, 0]
        context = gather_tokens(tokens, masks.context)
        target = gather_tokens((tokens - self._patch_mean) / self._patch_scale, hidden)
        return self.map_(context, masks.context, hidden), target

    def _batches(
        self, x: Tensor, parts: Iterable[Tensor], purpose: str
    ) -> Iterator[tuple[Tensor, Masks]]:
        """Yield parts of the images, int64 [B], with their masks."""
        seed = derive_seed(self.random_state, 0, purpose)
        for step, part in enumerate(parts):
            masks = self._sampler.sample(len(part), seed=seed, step=step, device=x.device)
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
        scale = torch.as_tensor(self.scale_, device=tokens.device)
        z = (
            tokens.to(self.map_.W.dtype) - torch.as_tensor(self.mean_, device=tokens.device)
        ) / scale
        return group_norms(self.map_.W.detach(), z)

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
        kind = _precision(x)
        self._patch_mean = mean.to(kind)
        self._patch_scale = within.masked_fill(within <= _FLAT * size, math.inf).to(kind)
        self.mean_ = mean.mean(0).to(kind).cpu().numpy()
        self.scale_ = std.masked_fill(std <= _FLAT * size, 1.0).to(kind).cpu().numpy()

    def _place_norm(self, x: Tensor) -> None:
        """Give the map's normalisation the statistics of what it sees: tokens, or context means."""
        norm = self.map_.norm
        mean, scale = (torch.as_tensor(v, device=x.device) for v in (self.mean_, self.scale_))
        if self.kind == "region":
            parts = torch.arange(len(x)).split(self.batch_size)
            pooled = torch.cat([
                gather_tokens(x[index].to(_precision(x)), masks.context).mean(1)
                for index, masks in self._batches(x, parts, "posthoc-norm")
            ])  # fmt: skip
            mean, spread = pooled.mean(0), pooled.std(0, correction=0)
            scale = torch.where(spread > _FLAT * scale, spread, 1.0)
        norm.eps = torch.finfo(torch.float32).tiny  # as 0, which torch 2.11 refuses: it rounds away
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(scale.square())

    def _masks(self) -> MaskSampler:
        """Return the sampler: hidden patches as one set, since queries do not see each other."""
        low, high = self.context
        patches = math.prod(self._grid)
        counts = {max(1, round(patches * share)) for share in (low, (low + high) / 2, high)}
        try:
            return MaskSampler(self._grid, context_counts=sorted(counts), merge=True)
        except UserError:
            rows, cols = self._grid
            raise UserError(
                f"context {low:g} to {high:g} of {rows}x{cols} patches leaves no room for hidden "
                "blocks; use a smaller context, or an encoder with more patches"
            ) from None

    def _check_arguments(self, x: Tensor) -> tuple[int, int]:
        """Return the grid; UserError or ValueError if arguments and tokens do not fit."""
        n, patches, width = x.shape
        if n < LEAST_IMAGES:
            raise UserError(f"{n} images are too few to fit groups; use at least {LEAST_IMAGES}")
        if not 1 <= self.num_groups <= width:
            raise UserError(f"num_groups {self.num_groups}: {width} latents allow 1 to {width}")
        if min(self.steps, self.batch_size, 1 if self.group_dim is None else self.group_dim) < 1:
            raise UserError("steps, batch_size and group_dim must be at least 1")
        if self.lam < 0 or not 0 < (1 if self.density is None else self.density) <= 1:
            raise UserError("lam must not be negative, and density lie above 0 and at most at 1")
        if self.density is not None and self.density < 1 / self.num_groups:
            raise UserError(
                f"density {self.density:g} is below 1/{self.num_groups}: each latent keeps at "
                "least one group"
            )
        if self.kind not in ("region", "concept", "feature"):
            raise UserError(f"kind '{self.kind}' is not one of region, concept, feature")
        if not 0 < self.context[0] <= self.context[1] < 1:
            raise UserError("context: two shares of the patches above 0 and below 1, smaller first")
        if self.grid_size is None:
            side = math.isqrt(patches)
            grid = (side, side)
        else:
            grid = (int(self.grid_size[0]), int(self.grid_size[1]))
        if math.prod(grid) != patches:
            rows, cols = grid
            raise ValueError(f"{patches} patches are no grid of {rows}x{cols}; give grid_size")
        return grid

    def _read(self, tokens: Any, *, reset: bool) -> Tensor:
        """Return tokens [n, N, D]; with `reset` they say how many features later ones have."""
        if not _is_table(tokens):
            x = _as_tokens(tokens)
            if reset:
                self.n_features_in_ = x.shape[2]
            return x
        rows: Any = validate_data(self, tokens, reset=reset, ensure_min_samples=2 if reset else 1)
        return _as_tokens(self._patches(rows))

    def _patches(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens [n, N, D] of a table's rows [n, N * D]."""
        patches = math.prod(self.grid_size or (0,))
        if not patches or rows.shape[1] % patches:
            raise ValueError(
                f"tokens must be [n, N, D], got shape {rows.shape}; a table [n, N * D] needs "
                "grid_size, rows and columns of its N patches"
            )
        return rows.reshape(len(rows), patches, -1)

    def _check(self, tokens: Any) -> Tensor:
        """Return tokens to be seen by the fitted map."""
        check_is_fitted(self, msg="%(name)s is not fitted yet; call fit first")
        x = self._read(tokens, reset=False)
        wanted = (math.prod(self._grid), len(self.mean_))
        if tuple(x.shape[1:]) != wanted:
            raise ValueError(f"tokens [n, N, D] of shape {tuple(x.shape)}; the fit had {wanted}")
        return x.to(self.map_.W.device)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = []  # activations are float32 always
        return tags


def _is_table(tokens: Any) -> bool:
    """Whether tokens come as a matrix, or as what scikit-learn is to judge: lists, sparse ones."""
    return getattr(tokens, "ndim", 2) == 2


def _precision(x: Tensor) -> torch.dtype:
    """Return what a fit to tokens x is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _as_tokens(tokens: Any) -> Tensor:
    x = torch.as_tensor(tokens).detach()
    if x.ndim != 3 or not x.numel():
        shape = tuple(x.shape)
        raise ValueError(f"tokens must be [n, N, D], got shape {shape}. Reshape your data")
    if not all(part.isfinite().all() for part in x.split(BLOCK)):
        raise UserError("tokens hold NaN or infinity; check the encoder that gave them")
    return x
