"""What embeddings share among their dimensions and with labels.

Letters: n points, D dimensions, G groups, P group width; information is in nats. Every interval
resamples points and refits nothing: each estimator here is, to first order, the mean of one term
per point, and the terms are drawn again (the linear bootstrap, Davison and Hinkley 1997, section
2.7.4). Points that are drawn twice would lower the determinant of a covariance and fill a histogram
unevenly, by more than the interval is wide where D is large.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsejepa.evaluation.stats import Estimate, bootstrap_weights, from_draws, undefined

SINGULAR = 1e-10
"""Eigenvalue of a correlation matrix below which its direction counts as absent."""


def wishart_bias(n: int, d: int) -> float:
    """Return what -1/2 log det of a sample correlation matrix is too large by, in nats.

    Exact for n independent Gaussian points in d dimensions, whatever their correlations, from the
    expected log determinant of a Wishart matrix with n - 1 degrees of freedom:
    1/2 [d psi((n-1)/2) - sum over i = 1..d of psi((n-i)/2)], for n > d.
    """
    from scipy.special import digamma

    return float((digamma((n - 1) / 2) - digamma((n - np.arange(1, d + 1)) / 2)).sum() / 2)


def total_correlation(
    x: Any,
    *,
    blocks: Any = None,
    copula: bool = True,
    resamples: int = 200,
    random_state: int = 0,
) -> Estimate:
    """Return the Gaussian total correlation (multi-information) of the dimensions of x [n, D].

    With a covariance S it is 1/2 [sum_j log S_jj - log det S]: no data with normal margins and
    these correlations have less. With ``copula`` each dimension is ranked first and takes normal
    scores, so that no monotone change of a dimension matters. The exact bias (`wishart_bias`) is
    subtracted, so a value near 0 can come out negative.

    Args:
        blocks: [D] labels; the total correlation *between* the blocks of equal label,
            1/2 [sum_b log det S_bb - log det S]. A block may be rank-deficient: it counts with the
            dimensions that it spans.

    The interval draws jackknife pseudo-values again (ranks kept). It has the right width where
    dimensions depend on each other and is about 1.3 times too wide where they do not, more where n
    is only a few times D. Constant dimensions are left out, with a note. Undefined, with a note, if
    fewer than two dimensions (blocks) vary, if points are too few, or if a dimension is a linear
    function of others in other blocks: the true value is infinite then.

    Raises ValueError if the shapes do not fit or x is not finite.
    """
    x = _matrix(x)
    n, width = x.shape
    blocks = np.arange(width) if blocks is None else np.asarray(blocks)
    if blocks.shape != (width,):
        raise ValueError(f"blocks must label {width} dimensions, got shape {blocks.shape}")
    varies = np.ptp(x, 0) > 100 * np.finfo(x.dtype).eps * np.abs(x).max(0)  # more than rounding
    left_out = int(width - varies.sum())
    note = f"{left_out} of {width} dimensions are constant and left out" if left_out else ""
    x, blocks = x[:, varies], blocks[varies]
    names = np.unique(blocks)
    if len(names) < 2:
        return undefined(f"{len(names)} of {width} dimensions or blocks vary, two are needed")
    if copula:
        x = normal_scores(x)
    parts = [_whiten(x[:, blocks == name]) for name in names]
    sizes = [part.shape[1] for part in parts]
    d = sum(sizes)
    if n <= d:
        return undefined(f"{n} points are too few for {d} dimensions")
    white = np.concatenate(parts, 1)
    eigenvalues, axes = np.linalg.eigh(white.T @ white / n)
    if eigenvalues[0] < SINGULAR:
        return undefined("infinite: a dimension is a linear function of the others")
    value = -np.log(eigenvalues).sum() / 2
    value -= wishart_bias(n, d) - sum(wishart_bias(n, size) for size in sizes)
    # Without point i, log det of the scatter falls by -log(1 - leverage of i): nothing is refitted.
    starts = np.cumsum([0, *sizes[:-1]])
    whole = 1 - ((white @ axes) ** 2 / eigenvalues).sum(1) / (n - 1)
    if whole.min() < SINGULAR:
        reason = "no interval: without one of the points the covariance is singular"
        return Estimate(float(value), note="; ".join(filter(None, [note, reason])))
    within = 1 - np.add.reduceat(white**2, starts, axis=1) / (n - 1)
    terms = (n - 1) / 2 * (np.log(whole) - np.log(within).sum(1))
    return _from_terms(value, terms, resamples, random_state, note)


def gaussian_mutual_information(x: Any, y: Any, **settings: Any) -> Estimate:
    """Return I(x; y) in nats of x [n, a] and y [n, b], Gaussian after ranking each dimension.

    `total_correlation` between the two blocks, with its settings, bias correction, interval, notes
    and errors; x and y may be vectors [n]. Ince et al. 2017, Human Brain Mapping 38, equation 31.
    """
    x, y = (_matrix(part) for part in (x, y))
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} points and y has {len(y)}")
    blocks = np.repeat([0, 1], [x.shape[1], y.shape[1]])
    return total_correlation(np.concatenate([x, y], 1), blocks=blocks, **settings)


def normal_scores(x: Any) -> np.ndarray:
    """Return x [n, D] with each dimension ranked and put on the quantiles of N(0, 1)."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    return ndtri(rankdata(x, axis=0) / (len(x) + 1))


def overlap_information(W: Any, covariance: Any = None, noise: float = 0.1) -> float:
    """Return the total correlation in nats of the groups G_g = W^(g) z + noise, in closed form.

    z ~ N(0, covariance) and independent Gaussian noise of standard deviation ``noise`` on every
    entry: what the overlap of the groups' rows alone creates, 0 for disjoint latents.

    Args:
        W: [G, P, D].
        covariance: [D, D] of the latents; the identity if None.
    """
    W = np.asarray(W, float)
    groups, P, D = W.shape
    covariance = np.eye(D) if covariance is None else np.asarray(covariance, float)
    rows = W.reshape(-1, D)
    joint = rows @ covariance @ rows.T + noise**2 * np.eye(len(rows))
    g = np.arange(groups)
    own = joint.reshape(groups, P, groups, P)[g, :, g]
    return float((np.linalg.slogdet(own)[1].sum() - np.linalg.slogdet(joint)[1]) / 2)


def mutual_information(
    a: Any, y: Any, bins: int = 20, *, resamples: int = 200, random_state: int = 0
) -> Estimate:
    """Return I(a; y) in nats between a [n] and labels y [n] by a histogram, Miller-Madow corrected.

    Integers, and floats with at most ``bins`` distinct values, are categories as they are; other
    floats are cut into ``bins`` parts of equal count, ties together. Miller 1955: each entropy
    gains (occupied cells - 1) / 2n. Near 0 the result can be negative. Undefined, with a note,
    where a or y has one value only.

    Raises ValueError if the shapes do not fit, a is not finite, or y are not integers.
    """
    from scipy.stats import rankdata

    a, y = np.asarray(a), np.asarray(y)
    if a.ndim != 1 or a.shape != y.shape or not np.isfinite(a).all() or y.dtype.kind not in "iub":
        raise ValueError("expected two vectors of equal length, finite values and integer labels")
    values, code = np.unique(a, return_inverse=True)
    if a.dtype.kind == "f" and len(values) > bins:
        code = np.unique(np.ceil(rankdata(a) * bins / len(a)), return_inverse=True)[1]
    label = np.unique(y, return_inverse=True)[1]
    if min(code.max(), label.max()) == 0:
        return undefined("one value only")
    cell = code * (label.max() + 1) + label
    counts = [np.bincount(numbers) for numbers in (code, label, cell)]
    of_a, of_y, joint = (np.count_nonzero(count) for count in counts)
    ratio = len(a) * counts[2][cell] / (counts[0][code] * counts[1][label])
    terms = np.log(ratio) + (of_a + of_y - joint - 1) / (2 * len(a))
    return _from_terms(float(terms.mean()), terms, resamples, random_state)


def _matrix(x: Any) -> np.ndarray:
    """x as finite floats [n, D]; a vector [n] becomes [n, 1]."""
    x = np.asarray(x)
    x = x if x.dtype.kind == "f" else x.astype(float)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not x.size:
        raise ValueError(f"expected points in rows [n, D], got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("the points hold NaN or infinity; check the encoder that gave them")
    return x


def _whiten(x: np.ndarray) -> np.ndarray:
    """The standardised principal axes of x [n, d] that carry variance, [n, rank]."""
    z = (x - x.mean(0, dtype=float)) / x.std(0, dtype=float)
    eigenvalues, axes = np.linalg.eigh(z.T @ z / len(z))
    kept = eigenvalues > SINGULAR
    return z @ (axes[:, kept] / np.sqrt(eigenvalues[kept]))


def _from_terms(
    value: float, terms: np.ndarray, resamples: int, random_state: int, note: str = ""
) -> Estimate:
    """`value` with the interval of the mean of one term per point [n], the terms drawn again."""
    weights = bootstrap_weights(len(terms), resamples, random_state)
    return from_draws(value, value + weights @ (terms - terms.mean()) / len(terms), note)
