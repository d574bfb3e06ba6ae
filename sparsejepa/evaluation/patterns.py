"""Zero patterns of a group map: which latents feed which groups. Letters: G groups, D latents."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def shuffle_pattern(pattern: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random bool [G, D] with the row and column sums of `pattern` [G, D].

    Pairs of latents pool the groups that only one of them feeds and deal them out again at random,
    each as many as before (the curveball algorithm, Strona et al. 2014).
    """
    pattern = np.array(pattern, bool)
    if pattern.shape[1] < 2:
        return pattern
    for _ in range(10 * pattern.shape[1]):
        a, b = rng.choice(pattern.shape[1], 2, replace=False)
        differ = np.flatnonzero(pattern[:, a] != pattern[:, b])
        mine = rng.permutation(differ)[: pattern[differ, a].sum()]
        pattern[differ, a], pattern[differ, b] = False, True
        pattern[mine, a], pattern[mine, b] = True, False
    return pattern


def strongest(norms: Tensor, density: float) -> Tensor:
    """Return the share `density` of the blocks with the largest norms [G, D], bool [G, D].

    Every latent keeps its largest; blocks of norm 0 never count.
    """
    ranked = norms.scatter(0, norms.argmax(0, keepdim=True), math.inf).flatten()
    count = max(norms.shape[1], round(density * norms.numel()))
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    kept[ranked.topk(count).indices] = True
    return kept.view_as(norms) & (norms > 0)
