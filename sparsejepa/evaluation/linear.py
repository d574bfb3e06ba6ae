"""The mathematics of the linear probes, on features turned onto their principal axes.

Letters: n rows, D features, r principal axes, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsejepa.data.store import stratified
from sparsejepa.errors import UserError

VALIDATION_SHARE = 0.2
BLOCK = 2**23
"""Numbers in one block of scores or similarities: bounds memory."""


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
    x = torch.as_tensor(x)
    x = x.detach().to(device, x.dtype if x.dtype == torch.float64 else torch.float32)
    if x.ndim != 2 or not x.numel():
        raise UserError(f"features must be a matrix with rows, got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise UserError("features hold NaN or infinity; check the encoder that gave them")
    return x


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [D] of x [n, D]; the latter is 1 for constant features."""
    mean = x.mean(0)
    scale = torch.linalg.vector_norm(x - mean, dim=0) / len(x) ** 0.5
    # What rounding leaves of a constant is not to be blown up to standard deviation 1.
    constant = scale <= 1e2 * torch.finfo(x.dtype).eps * mean.abs()
    return mean, torch.where(constant | (scale == 0), 1.0, scale)


def minimise_logistic(
    rows: Tensor,
    labels: Tensor,
    variance: Tensor,
    C: float,
    start: Tensor,
    *,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, int]:
    """Minimise 1/2 ||W||^2 + C * sum of cross entropies over weights W [r, K] and intercepts [K].

    Full-batch L-BFGS with strong Wolfe conditions, in coordinates in which all axes are about
    equally steep: several times fewer iterations, the same minimum.

    Args:
        rows, variance: see `Standardized`; the rows may be a part of those.
        labels: int64 [n], class numbers.
        start: [r + 1, K], the intercepts last.
        tol: largest entry of the scaled gradient of the mean loss at which to stop.

    Returns the minimiser, as `start`, and the number of iterations.
    """
    lam = 1 / (C * len(rows))
    blocks = max(1, BLOCK // (2 * start.shape[1]))
    parts = list(zip(rows.split(blocks), labels.split(blocks), strict=True))
    # On the principal axes the Hessian is about curvature * variance + lam, the curvature being the
    # mean of p (1 - p); measured at the start, it makes all axes about equally steep.
    curvature = 0.0
    for part, _ in parts:
        p = torch.addmm(start[-1], part, start[:-1]).softmax(1)
        curvature += float((p * (1 - p)).sum(dtype=torch.float64))
    curvature = max(curvature / (len(rows) * start.shape[1]), 1e-6)
    steepness = torch.cat([curvature * variance + lam, variance.new_tensor([curvature])])
    scale = steepness.rsqrt().unsqueeze(1).to(rows.dtype)
    point = start / scale

    def closure() -> Tensor:
        weights = point * scale
        gradient = torch.zeros_like(weights)
        loss = torch.zeros((), dtype=torch.float64, device=rows.device)
        for part, label in parts:
            label = label.unsqueeze(1)
            logp = torch.addmm(weights[-1], part, weights[:-1]).log_softmax(1)
            loss -= logp.gather(1, label).sum(dtype=torch.float64)
            residual = logp.exp_()
            residual.scatter_add_(1, label, residual.new_full(label.shape, -1.0))
            gradient[:-1].addmm_(part.T, residual)
            gradient[-1] += residual.sum(0)
        gradient /= len(rows)
        gradient[:-1] += lam * weights[:-1]
        point.grad = gradient * scale
        return loss / len(rows) + lam / 2 * weights[:-1].double().square().sum()

    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=max_iter,
        max_eval=4 * max_iter,
        tolerance_grad=tol,
        tolerance_change=1e-9 if rows.dtype == torch.float32 else 1e-14,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # type: ignore[arg-type]
    return point.detach() * scale, optimizer.state[point]["n_iter"]


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
