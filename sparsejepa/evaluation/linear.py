"""The mathematics of the linear probes, on features turned onto their principal axes.

Letters: n rows, D features, r principal axes, K classes.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsejepa.data.store import stratified
from sparsejepa.errors import UserError
from sparsejepa.training.quality import moments

VALIDATION_SHARE = 0.2
BLOCK = 2**23
"""Numbers in one block of scores or similarities: bounds memory."""
HISTORY = 30
"""Steps that L-BFGS remembers."""
SAMPLE = 4096
"""Rows that the curvature is measured on."""


class Standardized:
    """Features x [n, D], standardised and turned onto their principal axes, once for many fits.

    Each feature gets mean 0 and standard deviation 1 (a constant one is only centred), then the
    rows are rotated: ``rotated`` [n, r], r = min(n, D) at most, with ``variance`` [r], the mean
    squares of its columns. An L2 penalty does not see rotations and rows never leave the span of
    the data, so fits in these r axes equal fits in all D features.

    Raises UserError unless x is a matrix of finite numbers.
    """

    def __init__(self, x: Any, device: torch.device | str = "cpu") -> None:
        z = as_matrix(x, device)
        self.mean, self.scale = moments(z)
        z = (z - self.mean).div_(self.scale)
        n, width = z.shape
        if n < width:
            # Rotated rows from the eigenvectors of z z^T, which is the smaller matrix.
            wide = z.double()
            scatter, left = torch.linalg.eigh(wide @ wide.T)
            kept = scatter > 1e-12 * scatter[-1].clamp_min(1e-300)
            kept[-1] = True  # at least one axis, even if all features are constant
            scatter, left = scatter[kept].clamp_min(0), left[:, kept]
            root = scatter.sqrt()
            basis = wide.T @ (left / root.clamp_min(1e-150))
            self.rotated = (left * root).to(z.dtype)
        else:
            gram = torch.zeros(width, width, dtype=torch.float64, device=z.device)
            for part in z.split(max(1, BLOCK // width)):
                wide = part.double()
                gram.addmm_(wide.T, wide)
            scatter, basis = torch.linalg.eigh(gram)
            rotation = basis.to(z.dtype)
            for part in z.split(max(1, BLOCK // width)):
                part.copy_(part @ rotation)
            self.rotated = z
        self.variance, self.basis = scatter.clamp_min(0) / n, basis


def as_matrix(x: Any, device: torch.device | str = "cpu") -> Tensor:
    """Return x [n, D] as a float32 tensor (float64 stays); UserError unless it is finite."""
    with warnings.catch_warnings():
        # Of arrays that are read-only, and so is everything that is done with them here.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        x = torch.as_tensor(x)
    x = x.detach().to(device, x.dtype if x.dtype == torch.float64 else torch.float32)
    if x.ndim != 2 or not x.numel():
        shape = tuple(x.shape)
        raise UserError(
            f"features must be a matrix, got shape {shape}. Reshape your data to [n, D]"
        )
    if not x.isfinite().all():
        raise UserError("features hold NaN or infinity; check the encoder that gave them")
    return x


class LogisticDescent:
    """Minimises 1/2 ||W||^2 + C * sum of cross entropies, for one C after another.

    Full-batch L-BFGS (Nocedal and Wright 2006, algorithm 7.4) from a diagonal that makes all
    principal axes about equally steep. The unit step is nearly always good enough, so that an
    iteration is one evaluation. Two things pass from one C to the next, where only the penalty
    changes: the gradient, and the curvature met on the way, of which the penalty's part is known.

    Args:
        variance: [r], see `Standardized`.

    Attributes:
        theta: [r + 1, K], weights W and, last, the intercepts.
    """

    def __init__(self, variance: Tensor) -> None:
        self.variance = variance
        self.pairs: list[tuple[Tensor, Tensor]] = []  # steps, and how the gradient changed
        self.lam = 0.0  # the penalty that those changes include

    def place(self, rows: Tensor, labels: Tensor, theta: Tensor) -> None:
        """Stand at theta on rows [n, r], all or a part of `Standardized.rotated`, of class [n]."""
        size = max(1, BLOCK // (2 * theta.shape[1]))
        self.parts = list(zip(rows.split(size), labels.unsqueeze(1).split(size), strict=True))
        self.n, self.sample = len(rows), rows[:: max(1, len(rows) // SAMPLE)]
        self.theta = theta
        self.entropy, self.slope = self._evaluate(theta)

    def minimise(self, C: float, *, tol: float, max_iter: int) -> int:
        """Move theta to the minimum at C; return the number of iterations.

        Ends when the largest entry of the scaled gradient of the mean loss is at most tol, or when
        what is left to gain is lost in the rounding of the loss.
        """
        lam, self.lam = self.lam, 1 / (C * self.n)
        steepness, rounding = self._steepness(), torch.finfo(self.theta.dtype).eps
        for step, change in self.pairs:
            change[:-1] += (self.lam - lam) * step[:-1]
        # Where the penalty was most of a change, what is left of it is rounding.
        least = 16 * rounding * max(lam, self.lam)
        self.pairs = [
            (s, c) for s, c in self.pairs if float((s * c).sum()) > least * float((s * s).sum())
        ]
        loss, gradient = self._penalised(self.theta, self.entropy, self.slope)
        stalled = 0
        for iteration in range(max_iter):
            if stalled == 5:  # the gradient is rounding by now
                return iteration
            if self._largest(gradient, steepness) <= tol:
                steepness = self._steepness()  # less by now, if the probabilities are near 0 and 1
                if self._largest(gradient, steepness) <= tol:
                    return iteration
            direction = self._direction(gradient, steepness)
            descent = float((gradient * direction).sum(dtype=torch.float64))
            if self.pairs and not descent < 0:  # rounding has spoilt what is remembered
                self.pairs = []
                continue
            if not descent < -rounding * abs(loss):
                return iteration
            size = 1.0
            while True:
                step = size * direction
                theta = self.theta + step
                entropy, slope = self._evaluate(theta)
                new_loss, new_gradient = self._penalised(theta, entropy, slope)
                excess = new_loss - loss - size * descent
                if excess <= (1e-4 - 1) * size * descent + rounding * abs(loss):
                    break
                # The minimum of the parabola through what is known, if that is a sensible step.
                size *= min(max(-size * descent / (2 * excess), 0.1), 0.5)
                if not size >= 1e-9:  # NaN ends here too
                    return iteration
            change = new_gradient - gradient
            if float((step * change).sum()) > 0:  # but for rounding it is
                self.pairs = [*self.pairs[1 - HISTORY :], (step, change)]
            stalled = stalled + 1 if new_loss > loss - rounding * abs(loss) else 0
            self.theta, self.entropy, self.slope = theta, entropy, slope
            loss, gradient = new_loss, new_gradient
        return max_iter

    def _evaluate(self, theta: Tensor) -> tuple[float, Tensor]:
        """Return the mean cross entropy and its gradient [r + 1, K]."""
        loss = torch.zeros((), dtype=torch.float64, device=theta.device)
        gradient = torch.zeros_like(theta)
        for part, label in self.parts:
            logp = torch.addmm(theta[-1], part, theta[:-1]).log_softmax(1)
            loss -= logp.gather(1, label).sum(dtype=torch.float64)
            residual = logp.exp_()
            residual.scatter_add_(1, label, residual.new_full(label.shape, -1.0))
            gradient[:-1].addmm_(part.T, residual)
            gradient[-1] += residual.sum(0)
        return float(loss / self.n), gradient / self.n

    def _penalised(self, theta: Tensor, entropy: float, slope: Tensor) -> tuple[float, Tensor]:
        """Add the penalty to the mean cross entropy and its gradient."""
        gradient = slope.clone()
        gradient[:-1] += self.lam * theta[:-1]
        return entropy + self.lam / 2 * float(theta[:-1].double().square().sum()), gradient

    @staticmethod
    def _largest(gradient: Tensor, steepness: Tensor) -> float:
        """Return the largest entry of the scaled gradient."""
        return float((gradient / steepness.sqrt()).abs().max())

    def _steepness(self) -> Tensor:
        """Return about how the Hessian's diagonal runs over the principal axes, [r + 1, 1].

        There the Hessian is about curvature * variance + lam, the curvature the mean of p (1 - p).
        """
        p = torch.addmm(self.theta[-1], self.sample, self.theta[:-1]).softmax(1)
        curvature = max(float((p * (1 - p)).mean(dtype=torch.float64)), 1e-6)
        intercept = self.variance.new_tensor([curvature])
        steepness = torch.cat([curvature * self.variance + self.lam, intercept])
        return steepness.unsqueeze(1).to(self.theta.dtype)

    def _direction(self, gradient: Tensor, steepness: Tensor) -> Tensor:
        """Return minus the gradient times the inverse Hessian that the pairs suggest."""
        direction, shares = -gradient, []
        for step, change in reversed(self.pairs):
            share = (step * direction).sum() / (step * change).sum()
            direction = direction - share * change
            shares.append(share)
        direction = direction / steepness
        if self.pairs:
            step, change = self.pairs[-1]
            direction *= (step * change).sum() / (change * change / steepness).sum()
        for (step, change), share in zip(self.pairs, reversed(shares), strict=True):
            direction += (share - (change * direction).sum() / (step * change).sum()) * step
        return direction


def leave_one_out(
    rows: Tensor, labels: Tensor, weights: Tensor, share: Tensor, inverse: Tensor
) -> float:
    """Return the leave-one-out accuracy of ridge scores z W + share.

    Without row i its score is (score_i - h_i * onehot_i) / (1 - h_i), with the leverage
    h_i = 1/n + z_i^T (Z^T Z + alpha)^-1 z_i < 1; dividing by a positive number changes no argmax.
    """
    hits = 0
    weights, inverse = weights.to(rows.dtype), inverse.to(rows.dtype)
    size = max(1, BLOCK // max(weights.shape))
    for z, label in zip(rows.split(size), labels.split(size), strict=True):
        leverage = 1 / len(rows) + z.square() @ inverse
        scores = torch.addmm(share, z, weights)
        scores.scatter_add_(1, label.unsqueeze(1), -leverage.unsqueeze(1))
        hits += int((scores.argmax(1) == label).sum())
    return hits / len(rows)


def validation_part(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return a mask [n] of a fifth of the rows, each class in proportion and none of them whole.

    Raises UserError if that leaves no row to validate on.
    """
    rng = np.random.default_rng(seed % 2**64)
    order = rng.permutation(len(labels))
    # One row of every class, a random one, always stays in the part that is fitted.
    spare = np.delete(order, np.unique(labels[order], return_index=True)[1])
    count = min(round(VALIDATION_SHARE * len(labels)), len(spare))
    if count == 0:
        raise UserError(
            f"{len(labels)} training images of {len(np.unique(labels))} classes leave none to "
            "choose the regularisation on; use more images per class"
        )
    mask = np.zeros(len(labels), bool)
    mask[spare[stratified(labels[spare], count, rng)]] = True
    return mask
