"""Two classifiers on frozen features, for scikit-learn: pipelines, searches, cross-validation.

Both standardise features with the statistics of what they are fitted on, and work in torch.
Letters: n images, D features, r principal axes, K classes.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from sparsejepa.data.images import stratified
from sparsejepa.errors import UserError
from sparsejepa.training.monitor import TEMPERATURE, moments, unit_rows, vote

VALIDATION_SHARE = 0.2
BLOCK = 2**23
"""Numbers in one block of scores: bounds memory."""
HISTORY = 30
"""Steps that L-BFGS remembers."""
SAMPLE = 4096
"""Rows that the curvature is measured on."""


class Probe(ClassifierMixin, BaseEstimator, ABC):
    """What the probes share; features are what scikit-learn takes, or a tensor on any device.

    Attributes:
        n_features_in_: D; feature_names_in_, where the features came with names.
        classes_: the K labels met in `fit`, sorted; `predict` gives no others.
        settings_: the chosen hyperparameters, for tables.
        mean_, scale_: [D], what `fit` standardises features with.
    """

    classes_: np.ndarray
    settings_: dict[str, Any]
    mean_: Tensor
    scale_: Tensor

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device

    @abstractmethod
    def fit(self, X: Any, y: Any) -> Self:
        """Fit features X [n, D] to labels y [n] of any kind.

        Raises UserError unless X is a matrix of finite numbers and y names two classes or more.
        """

    def predict(self, X: Any) -> np.ndarray:
        """Return a label for every row of X [n, D]."""
        x = self._new_rows(X)
        parts = [self._predict(part) for part in x.split(max(1, BLOCK // x.shape[1]))]
        return self.classes_[torch.cat(parts).cpu().numpy()]

    @abstractmethod
    def _predict(self, x: Tensor) -> Tensor:
        """Return a class number for every row of x."""

    def _rows(self, x: Any, *, reset: bool) -> Tensor:
        """Return x as a matrix [n, D] on the device; with `reset` it says what later ones have."""
        if not isinstance(x, Tensor) and getattr(x, "ndim", 2) == 2:
            try:
                # What is not finite is looked for below, in tensors too.
                x = validate_data(self, x, reset=reset, ensure_all_finite=False)
            except ValueError as error:
                raise UserError(str(error)) from None
        x = as_matrix(x, self.device)
        if reset:
            self.n_features_in_ = x.shape[1]
        elif x.shape[1] != self.n_features_in_:
            raise UserError(
                f"X has {x.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        return x

    def _new_rows(self, x: Any) -> Tensor:
        """Return x [n, D] in the precision of the fit."""
        check_is_fitted(self)
        return self._rows(x, reset=False).to(self.mean_.dtype)

    def _labels(self, y: Any, n: int) -> Tensor:
        """Set `classes_` and return the class numbers [n] of the labels y."""
        if y is None:
            words = "requires y to be passed, but the target y is None"  # scikit-learn's
            raise UserError(f"{type(self).__name__} {words}")
        y = np.asarray(y)
        y = column_or_1d(y, warn=True) if y.shape == (n, 1) else y
        if y.shape != (n,):
            raise UserError(f"labels must be one per row, got shape {y.shape} for {n} rows")
        if y.dtype.kind == "f" and not (np.isfinite(y) & (np.floor(y) == y)).all():
            raise UserError("Unknown label type: continuous; a probe tells classes apart")
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise UserError("the labels name one class only; a probe needs two or more")
        return torch.from_numpy(index.astype(np.int64)).to(self.device)


class LogisticProbe(Probe):
    """Multinomial logistic regression with an L2 penalty, the primary probe (METHOD section 6).

    Minimises 1/2 ||W||^2 + C * sum of cross entropies, the intercepts free: scikit-learn's
    `LogisticRegression` at the same C (for two classes at 2 C, as scikit-learn keeps one row then).
    Full-batch L-BFGS, see `minimise_logistic`.

    Args:
        C: inverse strength of the penalty; several to choose from; or, if None, 1 / (n lambda) for
            lambda = 1, 0.1, ..., 1e-7. The choice is made by accuracy on a stratified fifth of the
            training rows (a tie goes to the stronger penalty), then all rows are fitted. The values
            are tried from the strongest penalty on, each from the solution before it and to ten
            times `tol`, and the search ends when two in a row fall below the best.
        tol: largest entry of the scaled gradient of the mean loss at which to stop.
        max_iter: L-BFGS iterations per value of C.
        random_state: seed of the validation part.

    Attributes:
        coef_: [K, D], intercept_: [K]: scores are coef_ @ ((x - mean_) / scale_) + intercept_.
        C_, validation_score_ (None if C was given), n_iter_ (of the last fit).
    """

    coef_: Tensor
    intercept_: Tensor

    def __init__(
        self,
        C: float | Sequence[float] | None = None,
        *,
        tol: float = 1e-4,
        max_iter: int = 500,
        random_state: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(device)
        self.C, self.tol, self.max_iter, self.random_state = C, tol, max_iter, random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Fit features X [n, D], or a `Standardized` of them, to labels y [n].

        Raises UserError as `Probe.fit`, and for too few images to choose C on.
        """
        if isinstance(X, Standardized):
            space, self.n_features_in_ = X, len(X.mean)
        else:
            space = Standardized(self._rows(X, reset=True))
        rows = space.rotated
        labels = self._labels(y, len(rows))
        theta = rows.new_zeros(rows.shape[1] + 1, len(self.classes_))
        theta[-1] = (labels.bincount() / len(labels)).log()  # the intercepts
        self.validation_score_: float | None = None
        if isinstance(self.C, int | float):
            self.C_ = float(self.C)
        else:
            self.C_, theta = self._choose(space, labels, theta)
        theta, self.n_iter_ = minimise_logistic(
            rows, labels, space.variance, theta, self.C_, tol=self.tol, max_iter=self.max_iter
        )
        # From the principal axes back to the features.
        self.mean_, self.scale_ = space.mean, space.scale
        self.coef_ = (space.basis @ theta[:-1].double()).T.to(space.mean.dtype).contiguous()
        self.intercept_ = theta[-1].to(space.mean.dtype)
        self.settings_ = {"C": self.C_}
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities [n, K] of the classes."""
        return self._scores(self._new_rows(X)).softmax(1).cpu().numpy()

    def _scores(self, x: Tensor) -> Tensor:
        return torch.addmm(self.intercept_, (x - self.mean_) / self.scale_, self.coef_.T)

    def _predict(self, x: Tensor) -> Tensor:
        return self._scores(x).argmax(1)

    def _choose(self, space: Standardized, labels: Tensor, theta: Tensor) -> tuple[float, Tensor]:
        """Return the best C on the validation part, and the weights found there."""
        rows = space.rotated
        default = [10.0**power / len(rows) for power in range(8)]
        grid = sorted(default if self.C is None else self.C)  # type: ignore[arg-type]
        chosen = validation_part(labels.cpu().numpy(), self.random_state)
        held = torch.from_numpy(chosen).to(rows.device)
        fit: dict[str, Any] = {"tol": 10 * self.tol, "max_iter": self.max_iter}
        fitted, held_rows, held_labels = (rows[~held], labels[~held]), rows[held], labels[held]
        best, best_score, behind = (grid[0], theta), -1.0, 0
        for C in grid:
            theta, _ = minimise_logistic(*fitted, space.variance, theta, C, **fit)
            predicted = torch.addmm(theta[-1], held_rows, theta[:-1]).argmax(1)
            score = float((predicted == held_labels).double().mean())
            behind += 1
            if score > best_score:
                best, best_score, behind = (C, theta), score, 0
            if behind == 2:
                break
        self.validation_score_ = best_score
        return best


class KNNProbe(Probe):
    """The k nearest training images by cosine of standardised features, votes exp(cosine / 0.07).

    Temperature-weighted votes as in DINO (Caron et al. 2021); standardised first, because tokens
    share a large common mean that would make all cosines alike. With fewer than k training images
    all of them vote.
    """

    def __init__(self, k: int = 20, *, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.k = k

    def fit(self, X: Any, y: Any) -> Self:
        """Keep features X [n, D] and labels y [n]. Raises UserError as `Probe.fit`."""
        if self.k < 1:
            raise UserError(f"k {self.k}: a vote needs at least one neighbour")
        x = self._rows(X, reset=True)
        self._bank_labels = self._labels(y, len(x))
        self.mean_, self.scale_ = moments(x)
        self._bank = unit_rows(x, self.mean_, self.scale_)
        self.settings_ = {"k": self.k, "temperature": TEMPERATURE}
        return self

    def _predict(self, x: Tensor) -> Tensor:
        queries = unit_rows(x, self.mean_, self.scale_)
        return vote(self._bank, self._bank_labels, queries, self.k, len(self.classes_))


# --- the mathematics -----------------------------------------------------------------------------


class Standardized:
    """Features x [n, D], standardised and turned onto their principal axes, once for many fits.

    Each feature gets mean 0 and standard deviation 1 (a constant one is only centred), then the
    rows are rotated: ``rotated`` [n, r], r = min(n, D) at most, with ``variance`` [r], the mean
    squares of its columns. Fits with an L2 penalty in these r axes equal fits in all D features.

    Raises UserError unless x is a matrix of finite numbers.
    """

    def __init__(self, x: Any, device: torch.device | str = "cpu") -> None:
        z = as_matrix(x, device)
        self.mean, self.scale = moments(z)
        z = (z - self.mean).div_(self.scale)
        n, width = z.shape
        parts = z.split(max(1, BLOCK // width))
        if n < width:  # rotated rows from the eigenvectors of z z^T, which is the smaller matrix
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
            for part in parts:
                gram.addmm_(part.double().T, part.double())
            scatter, basis = torch.linalg.eigh(gram)
            for part in parts:
                part.copy_(part @ basis.to(z.dtype))
            self.rotated = z
        self.variance, self.basis = scatter.clamp_min(0) / n, basis


def as_matrix(x: Any, device: torch.device | str = "cpu") -> Tensor:
    """Return x [n, D] as a float32 tensor (float64 stays); UserError unless it is finite."""
    with warnings.catch_warnings():  # of a read-only array; nothing is written to it here
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        x = torch.as_tensor(x)
    x = x.detach().to(device, x.dtype if x.dtype == torch.float64 else torch.float32)
    if x.ndim != 2 or not x.numel():
        shape = tuple(x.shape)
        raise UserError(f"features must be a matrix [n, D], got {shape}. Reshape your data")
    if not x.isfinite().all():
        raise UserError("features hold NaN or infinity; check the encoder that gave them")
    return x


def minimise_logistic(
    rows: Tensor,
    labels: Tensor,
    variance: Tensor,
    theta: Tensor,
    C: float,
    *,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, int]:
    """Minimise 1/2 ||W||^2 + C * sum of cross entropies by L-BFGS.

    In coordinates in which all principal axes are about equally steep: the Hessian is about
    curvature * variance + 1 / (n C) along them, the curvature the mean of p (1 - p). This changes
    the path but not the minimum. Ends when the largest entry of the gradient of the mean loss in
    these coordinates is at most tol, the curvature measured anew, or when nothing is left to gain.

    Args:
        rows: [n, r], all or a part of `Standardized.rotated`; labels: [n], of classes 0..K-1.
        variance: [r], see `Standardized`.
        theta: [r + 1, K], the start: weights W and, last, the intercepts.

    Returns (the minimum [r + 1, K], number of iterations).
    """
    n, lam = len(rows), 1 / (C * len(rows))
    size = max(1, BLOCK // (2 * theta.shape[1]))
    parts = list(zip(rows.split(size), labels.unsqueeze(1).split(size), strict=True))
    sample, iterations = rows[:: max(1, n // SAMPLE)], 0
    for _ in range(3):
        p = torch.addmm(theta[-1], sample, theta[:-1]).softmax(1)
        curvature = max(float((p * (1 - p)).mean(dtype=torch.float64)), 1e-6)
        steepness = torch.cat([curvature * variance + lam, variance.new_tensor([curvature])])
        scale = steepness.rsqrt().unsqueeze(1).to(theta.dtype)
        scaled = torch.nn.Parameter(theta / scale)
        optimizer = torch.optim.LBFGS(
            [scaled],
            max_iter=max_iter - iterations,
            tolerance_grad=tol,
            tolerance_change=1e-15,
            history_size=HISTORY,
            line_search_fn="strong_wolfe",
        )

        def loss(scaled: Tensor = scaled, scale: Tensor = scale) -> Tensor:
            theta = scale * scaled.detach()
            total = 0.5 * lam * theta[:-1].double().square().sum()
            gradient = torch.zeros_like(theta)
            for part, label in parts:
                logp = torch.addmm(theta[-1], part, theta[:-1]).log_softmax(1)
                total -= logp.gather(1, label).sum(dtype=torch.float64) / n
                residual = logp.exp_()
                residual.scatter_add_(1, label, residual.new_full(label.shape, -1.0))
                gradient[:-1].addmm_(part.T, residual)
                gradient[-1] += residual.sum(0)
            gradient /= n
            gradient[:-1] += lam * theta[:-1]
            scaled.grad = scale * gradient
            return total

        with torch.no_grad():
            optimizer.step(loss)  # type: ignore[arg-type]
            theta = scale * scaled.detach()
        made = optimizer.state[scaled]["n_iter"]
        iterations += made
        if made == 0 or iterations >= max_iter:
            break
    return theta, iterations


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
