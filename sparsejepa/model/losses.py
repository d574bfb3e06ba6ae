"""The loss terms: pure functions, in fp32 (fp64 for fp64 input) whatever the autocast."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalize_targets(x: Tensor) -> Tensor:
    """Layer-normalise target tokens [..., D] without affine parameters (I-JEPA's targets)."""
    return F.layer_norm(full(x), x.shape[-1:])


def normalize_pixels(x: Tensor) -> Tensor:
    """Give each patch [..., P] mean 0 and variance 1 (MAE's targets, He et al. 2022, section 4.1).

    The variance is over P - 1, plus 1e-6.
    """
    variance, mean = torch.var_mean(full(x), -1, keepdim=True)
    return (full(x) - mean) * (variance + 1e-6).rsqrt()


def prediction_loss(
    prediction: Tensor, target: Tensor, kind: Literal["smooth_l1", "l2"] = "smooth_l1"
) -> Tensor:
    """Return the mean distance of prediction and target [..., D], per token and dimension.

    ``smooth_l1`` (I-JEPA's code; quadratic within 1) or ``l2``, the squared distance (SparseJEPA
    section 3, without its factor D).
    """
    distance = F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss
    return distance(full(prediction), full(target))


class KLParts(NamedTuple):
    """KL(N(mu, S) || N(0, I)) / D in nats per dimension; the whole is the sum of the two parts."""

    marginal: Tensor
    total_correlation: Tensor


def aggregate_kl(
    mu: Tensor, cov: Tensor, *, jitter: float = 1e-4, variance_floor: float = 1e-6
) -> KLParts:
    """Split the divergence of a Gaussian from N(0, I) into marginals and total correlation.

    marginal = 1/2 sum_j (S_jj + mu_j^2 - 1 - log S_jj), total correlation = -1/2 log det R, with R
    the correlation matrix of S. Both are divided by D. Exact without `jitter` and `variance_floor`.

    Args:
        mu, cov: mean [D] and covariance S [D, D].
        jitter: correlations are shrunk by 1 / (1 + jitter), so that a singular S gives a large but
            finite value and gradient.
        variance_floor: added to the variances, so that a dead dimension costs a finite amount.
    """
    mu, cov = full(mu), full(cov)
    with torch.autocast(mu.device.type, enabled=False):
        variance = cov.diagonal() + variance_floor
        marginal = 0.5 * (variance + mu.square() - 1 - variance.log()).mean()
        scale = variance.rsqrt()
        correlation = cov * scale[:, None] * scale / (1 + jitter)
        # The diagonal of a correlation matrix is 1, that of a dead dimension included.
        correlation = correlation - torch.diag(correlation.diagonal() - 1)
        # _ex: the checked form waits for the device at every step.
        factor = torch.linalg.cholesky_ex(correlation).L
        return KLParts(marginal, -factor.diagonal().log().mean())


def posterior_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return oi-VAE's KL(N(mu, exp(logvar)) || N(0, I)) / D, averaged over samples [..., D]."""
    mu, logvar = full(mu), full(logvar)
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()


class RunningMoments(nn.Module):
    """Mean and covariance of a batch, helped by earlier batches when it is too small.

    A covariance from fewer than about 4D samples is singular or worthless. Then the value is a
    moving average over batches with the weight n / 4D for the newest (about 4D samples in effect,
    corrected for the start), while the gradient is that of the batch's own moments
    (straight-through). From n = 4D on, the batch alone is used. Covariances are divided by n.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.cov: Tensor
        self.weight: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("cov", torch.zeros(dim, dim))
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean [D], covariance [D, D]) for samples x [n, D].

        In training a small batch also updates the running moments; in evaluation nothing does.
        """
        x = full(x)
        with torch.autocast(x.device.type, enabled=False):
            mean = x.mean(0)
            centred = x - mean
            cov = centred.T @ centred / len(x)
            if len(x) >= 4 * x.shape[1]:
                return mean, cov
            with torch.no_grad():
                mixed_mean, mixed_cov = self._mix(mean, cov, len(x) / (4 * x.shape[1]))
            return mixed_mean + (mean - mean.detach()), mixed_cov + (cov - cov.detach())

    def _mix(self, mean: Tensor, cov: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
        weight = (1 - momentum) * self.weight + momentum
        share = momentum / weight  # 1 for the first batch
        shift = mean - self.mean
        # Law of total covariance: no second moments, which would cancel badly in fp32.
        mixed_cov = torch.lerp(self.cov.to(cov.dtype), cov, share.to(cov.dtype))
        mixed_cov = mixed_cov + share * (1 - share) * torch.outer(shift, shift)
        mixed_mean = self.mean + share * shift
        if self.training:
            self.mean.copy_(mixed_mean)
            self.cov.copy_(mixed_cov)
            self.weight.copy_(weight)
        return mixed_mean, mixed_cov


def full(x: Tensor) -> Tensor:
    """Return x in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()
