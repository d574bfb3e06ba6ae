"""Efficiency: what is left of a probe's accuracy when only some groups are kept.

Letters: n images, D latents, G groups, P width of a group's latent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsejepa.evaluation.classifiers import LogisticProbe
from sparsejepa.evaluation.linear import Standardized
from sparsejepa.evaluation.sparsity import usage

BYTES = 2
"""Of a stored latent, in bf16."""


@dataclass(frozen=True)
class Labelled:
    """Features x [n, D] of images with labels y [n]."""

    x: np.ndarray
    y: np.ndarray


def kept_curve(
    train: Labelled,
    test: Labelled,
    W: Tensor | None,
    *,
    random_state: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return the accuracy of the logistic probe on ever fewer latents, and what they cost.

    With W [G, P, D] groups go from the least used on (by their share of ||W||^2), and a latent
    stays while a kept group reads it; without W (None) the latents of least variance go. Each row
    of the curve, from all to few:

    * ``groups`` (None without W) and ``latents`` kept, and the ``accuracy`` of a probe fitted on
      the latents; None if there is none left;
    * ``random_latents``, ``pca``: on as many latents drawn at random, and on as many principal
      components of all standardised latents (scaled as they are: all of them are the latents);
    * ``feature_bytes`` of an image's kept latents in bf16, and ``map_flops`` of the kept groups'
      W z, two for each non-zero element (None without W).

    The encoder computes all latents whatever is kept. `random_state` is the seed of the random
    latents (each row's lie within those of the row before) and of the probes.
    """
    space = Standardized(train.x, device)
    width = train.x.shape[1]
    order = np.random.default_rng([random_state % 2**64, width]).permutation(width)
    found: dict[tuple[int, ...], float] = {}

    def probed(latents: np.ndarray) -> float | None:
        """Return the accuracy on these latents."""
        key = tuple(np.sort(latents).tolist())
        if key and key not in found:
            x = space if len(key) == width else train.x[:, key]
            probe = LogisticProbe(random_state=random_state, device=device).fit(x, train.y)
            found[key] = probe.score(test.x[:, key], test.y)
        return found.get(key)

    def principal(count: int) -> float | None:
        if not count:
            return None
        probe = LogisticProbe(random_state=random_state, device=device)
        return probe.fit(leading(space, count), train.y).score(test.x, test.y)

    curve, components = [], {}
    for groups, latents, operations in _selections(train.x, W):
        count = len(latents)
        if count not in components:
            components[count] = principal(count)
        curve.append(
            {
                "groups": groups,
                "latents": count,
                "accuracy": probed(latents),
                "random_latents": probed(order[:count]),
                "pca": components[count],
                "feature_bytes": BYTES * count,
                "map_flops": operations,
            }
        )
    return {"order": "variance" if W is None else "groups", "curve": curve}


def kept_latents(W: Tensor, groups: int) -> tuple[np.ndarray, Tensor]:
    """Return the latents, ascending, that the `groups` most used groups of W [G, P, D] read.

    And those groups' part of W, [groups, P, D].
    """
    share = usage(torch.linalg.vector_norm(W, dim=1).numpy())
    part = W[np.argsort(-share, kind="stable")[:groups].copy()]
    return np.flatnonzero((part != 0).any(0).any(0).numpy()), part


def leading(space: Standardized, count: int) -> Standardized:
    """Return the `count` principal axes of largest variance of `space`, all if it has fewer."""
    part = copy.copy(space)
    part.rotated = space.rotated[:, -count:].contiguous()
    part.variance, part.basis = space.variance[-count:], space.basis[:, -count:]
    return part


def _selections(
    x: np.ndarray, W: Tensor | None
) -> Iterator[tuple[int | None, np.ndarray, int | None]]:
    """Yield groups, latents and operations of the map, from all to few."""
    if W is None:
        ranked = np.argsort(-x.var(0, dtype=np.float64), kind="stable")
        for count in _halving(len(ranked), least=max(1, len(ranked) // 32)):
            yield None, ranked[:count], None
        return
    for count in _halving(len(W)):
        latents, part = kept_latents(W, count)
        yield count, latents, 2 * int((part != 0).sum())


def _halving(most: int, least: int = 1) -> list[int]:
    """Return `most`, 3/4, 1/2, 3/8, 1/4 ... of it in whole numbers, down to `least`."""
    counts, whole = set(), float(most)
    while whole >= least:
        counts |= {int(whole), int(0.75 * whole)}
        whole /= 2
    return sorted((c for c in counts if c >= least), reverse=True)
