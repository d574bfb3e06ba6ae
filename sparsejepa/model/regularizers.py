"""Terms on the pooled embedding that the study sets against the KL and the group lasso.

Pure functions of samples z [B, D], in fp32 (fp64 for fp64 input) whatever the autocast. All that is
random comes in as `Draws`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsejepa.model.losses import full
from sparsejepa.rng import generator

SLICES = 256  # random directions per step, as in LeJEPA's listing
# Knots of the Epps-Pulley integral on [0, 5]: the integrand is below 1e-5 from there on, and steps
# of 5/16 are exact to 1e-5 for values within 10 standard deviations of each other.
_KNOTS, _RANGE = 17, 5.0


class Draws(NamedTuple):
    """What a step draws for the regularisers, standard and unscaled; None where not needed."""

    directions: Tensor | None
    """[D, SLICES], unit columns."""
    laplace: Tensor | None
    """[B, D], Laplace samples of location 0 and scale 1."""


@dataclass(frozen=True)
class Regularizers:
    """The weights of the terms; a term of weight 0 is not computed.

    `vicreg` has two, of variance and covariance; `rectified_share` is the share of non-zero values
    that `rectified_match` asks for.
    """

    vicreg: tuple[float, float] = (0.0, 0.0)
    sigreg: float = 0.0
    activation_l1: float = 0.0
    rectified: float = 0.0
    rectified_share: float = 0.25

    def draw(self, like: Tensor, dim: int, *, seed: int, step: int, batch: int = 0) -> Draws:
        """Draw for `batch` embeddings of width `dim`, a function of (seed, step).

        The draws have the type and device of `like`; `batch` is len(like) if not given.
        """

        def fresh(purpose: str, *shape: int) -> tuple[Tensor, torch.Generator]:
            return like.new_empty(shape), generator(seed, step, purpose, like.device)

        directions = laplace = None
        if self.sigreg or self.rectified:
            empty, keyed = fresh("directions", dim, SLICES)
            directions = F.normalize(empty.normal_(generator=keyed), dim=0)
        if self.rectified:
            empty, keyed = fresh("laplace", 2, batch or len(like), dim)
            # The difference of two exponential variables; 1 - u is never 0.
            up, down = -torch.log1p(-empty.uniform_(generator=keyed))
            laplace = up - down
        return Draws(directions, laplace)

    @property
    def active(self) -> bool:
        """Whether there is a term at all."""
        return any((*self.vicreg, self.sigreg, self.activation_l1, self.rectified))

    def __call__(self, z: Tensor, draws: Draws) -> Tensor | None:
        """Return the weighted sum of the terms for z [B, D], None if there are none."""
        terms = []
        variance, covariance = self.vicreg
        if variance:
            terms.append(variance * variance_hinge(z))
        if covariance:
            terms.append(covariance * covariance_penalty(z))
        if self.sigreg:
            assert draws.directions is not None
            terms.append(self.sigreg * sigreg(z, draws.directions))
        if self.activation_l1:
            terms.append(self.activation_l1 * activation_l1(z))
        if self.rectified:
            assert draws.directions is not None and draws.laplace is not None
            wanted = rectified_laplace(draws.laplace, self.rectified_share)
            terms.append(self.rectified * rectified_match(z, wanted, draws.directions))
        return torch.stack(terms).sum() if terms else None


def variance_hinge(z: Tensor, *, wanted: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Return VICReg's variance term, mean_j max(0, wanted - sqrt(Var(z_j) + eps)).

    Bardes et al. 2022 (arXiv 2105.04906), eqs. 1 and 2; with I-JEPA as in C-JEPA (arXiv
    2410.19560). Var is the unbiased variance over the batch.
    """
    return F.relu(wanted - (full(z).var(0) + eps).sqrt()).mean()


def covariance_penalty(z: Tensor) -> Tensor:
    """Return VICReg's covariance term, sum_{i != j} C_ij^2 / D with C the covariance over B - 1.

    Bardes et al. 2022, eqs. 3 and 4.
    """
    z = full(z)
    with torch.autocast(z.device.type, enabled=False):
        # Scaled before the product: compiled together with the KL's covariance, which is the same
        # product but for a factor, the other order had a wrong gradient (torch 2.15).
        centred = (z - z.mean(0)) * (len(z) - 1) ** -0.5
        cov = centred.T @ centred
        return (cov.square().sum() - cov.diagonal().square().sum()) / z.shape[1]


def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """Return SIGReg: how far random projections of z are from N(0, 1), averaged over directions.

    LeJEPA (Balestriero and LeCun 2025, arXiv 2511.08544): the statistic of Epps and Pulley (1983)
    with the weight exp(-t^2 / 2),

        B * integral |mean_b exp(i t x_b) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt,

    by the trapezoid rule, twice the half with t > 0. It does not grow with B while the projections
    are standard normal: its mean is then sqrt(2 pi) (1 - 1 / sqrt(3)), about 1.06.

    Args:
        z: [B, D].
        directions: [D, M], unit columns.
    """
    x = _project(z, directions)
    t = torch.linspace(0, _RANGE, _KNOTS, dtype=x.dtype, device=x.device)
    angle = x[..., None] * t  # [B, M, T]
    normal = (-0.5 * t.square()).exp()
    gap = (angle.cos().mean(0) - normal).square() + angle.sin().mean(0).square()
    half = torch.trapezoid(gap * normal, dx=_RANGE / (_KNOTS - 1))
    return 2 * len(x) * half.mean()


def activation_l1(z: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return the mean absolute value of z [B, D] after normalising each dimension over the batch.

    Normalised as in a batch norm, so that the term asks for few large values and not for small
    ones: sqrt(2 / pi) for Gaussian dimensions, 0 in the limit of one value apart from the rest.
    """
    z = full(z)
    variance, mean = torch.var_mean(z, 0, correction=0)
    return ((z - mean) * (variance + eps).rsqrt()).abs().mean()


def rectified_laplace(laplace: Tensor, share: float) -> Tensor:
    """Return samples of the rectified Laplace distribution of which `share` are not 0.

    Rectified LpJEPA (arXiv 2602.01456): ReLU(mu + x) with x from the generalised Gaussian of p = 1
    scaled to variance 1, and mu such that P(mu + x > 0) is `share`.

    Args:
        laplace: samples of the Laplace distribution of location 0 and scale 1, any shape.
        share: between 0 and 1, exclusive.
    """
    quantile = math.log(2 * share) if share < 0.5 else -math.log(2 * (1 - share))
    return F.relu(full(laplace) + quantile) / math.sqrt(2)


def rectified_match(z: Tensor, wanted: Tensor, directions: Tensor) -> Tensor:
    """Return the squared sliced 2-Wasserstein distance of ReLU(z) to as many samples `wanted`.

    Rectified LpJEPA's distribution matching: mean over the directions of the mean squared
    difference of the sorted projections (Bonneel et al. 2015).

    Args:
        z, wanted: [B, D].
        directions: [D, M], unit columns.
    """
    ours = _project(F.relu(full(z)), directions).sort(dim=0).values
    theirs = _project(wanted, directions).sort(dim=0).values
    return (ours - theirs).square().mean()


def _project(z: Tensor, directions: Tensor) -> Tensor:
    """Return z @ directions [B, M], outside autocast, which would take the product in bf16."""
    with torch.autocast(z.device.type, enabled=False):
        return full(z) @ full(directions)
