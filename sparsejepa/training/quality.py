"""How good embeddings are, in a few numbers that cost little: RankMe, spread and k-NN.

Imports torch alone, so that training can measure without scikit-learn.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07
"""Of the votes of k nearest neighbours, as in DINO (Caron et al. 2021)."""
_BLOCK = 2**23  # similarities at a time


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


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [D] of x [n, D]; the latter is 1 for constant features."""
    mean = x.mean(0)
    scale = torch.linalg.vector_norm(x - mean, dim=0) / len(x) ** 0.5
    # What rounding leaves of a constant is not to be blown up to standard deviation 1.
    constant = scale <= 1e2 * torch.finfo(x.dtype).eps * mean.abs()
    return mean, torch.where(constant | (scale == 0), 1.0, scale)


def unit_rows(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Standardise x [n, D] with `mean` and `scale` [D], then give every row length 1."""
    return F.normalize((x - mean) / scale, dim=1)


def vote(bank: Tensor, labels: Tensor, queries: Tensor, k: int, num_classes: int) -> Tensor:
    """Return the class [m] that the k nearest of `bank` [n, D] vote for, all rows of length 1.

    A vote weighs exp(cosine / `TEMPERATURE`). labels: [n] int64.
    """
    found = []
    for part in queries.split(max(1, _BLOCK // len(bank))):
        similarity, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = similarity.new_zeros(len(part), num_classes)
        votes.scatter_add_(1, labels[index], (similarity / TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def knn_accuracy(
    bank_x: Tensor, bank_y: Tensor, query_x: Tensor, query_y: Tensor, k: int = 20
) -> float:
    """Return the share of queries whose k nearest neighbours vote for their label.

    Features [n, D], labels [n] from 0 on. Never raises on NaN, which gives the accuracy of
    arbitrary neighbours.
    """
    mean, scale = moments(bank_x)
    bank, queries = (unit_rows(x, mean, scale) for x in (bank_x, query_x))
    predicted = vote(bank, bank_y.long(), queries, k, int(bank_y.max()) + 1)
    return float((predicted == query_y).double().mean())
