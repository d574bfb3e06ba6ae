"""How many dimensions an embedding uses, and how far it has collapsed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rankme(x: Any) -> float:
    """Return the effective rank exp(H(p)) of embeddings x [n, D], p_k = sigma_k / sum sigma.

    RankMe (Garrido et al. 2023, equations 1 and 2): H is the entropy in nats of the normalised
    singular values of the matrix as it is, *not* centred, so that a constant embedding has rank 1.
    Between 1 and min(n, D); 0 for a matrix of zeros, NaN if x holds NaN or infinity. The paper's
    guard of 1e-7 in p is left out: it is there for float32, and this runs in float64.
    """
    matrix = torch.as_tensor(x).detach().to("cpu", torch.float64)
    if not matrix.isfinite().all():
        return float("nan")
    scale = matrix.abs().max() if matrix.numel() else 0
    if scale == 0:
        return 0.0
    matrix = matrix / scale
    # The smaller Gram matrix has the squared singular values at a fraction of the cost of an SVD.
    gram = matrix.T @ matrix if len(matrix) >= matrix.shape[1] else matrix @ matrix.T
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = sigma / sigma.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def std_per_dimension(x: Any) -> Tensor:
    """Return the population standard deviation [D] of each dimension of embeddings x [n, D]."""
    return torch.as_tensor(x).detach().float().std(0, correction=0)
