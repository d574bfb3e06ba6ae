"""Measures of sparsity of a latent-to-group map, as pure functions of its block norms.

Everywhere `norms` is [G, D], norms[g, j] = ||W_gj|| >= 0, a numpy array or a torch tensor; a latent
"feeds" a group if the norm is not zero. All functions accept an all-zero map. They raise ValueError
for input that is not two-dimensional, or has negative or non-finite entries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def density(norms: Any) -> float:
    """Return the share of the G x D blocks that are not zero."""
    return float((_checked(norms) > 0).mean())


def groups_per_latent(norms: Any) -> float:
    """Return the mean number of groups that a latent feeds (SparseJEPA's ||W_.j||_0)."""
    return float((_checked(norms) > 0).sum(0).mean())


def latents_per_group(norms: Any) -> np.ndarray:
    """Return the number of latents that feed each group, int64 [G]."""
    return (_checked(norms) > 0).sum(1)


def dead_groups(norms: Any) -> int:
    """Return the number of groups that no latent feeds."""
    return int((latents_per_group(norms) == 0).sum())


def usage(norms: Any) -> np.ndarray:
    """Return each group's share of the total squared norm, [G], summing to 1 (0 if all is zero)."""
    norms = _checked(norms)
    # The largest entry is divided out so that squares neither overflow nor vanish.
    energy = np.square(norms / (norms.max() or 1.0)).sum(1)
    return energy / (energy.sum() or 1.0)


def usage_entropy(norms: Any, *, normalized: bool = False) -> float:
    """Return the entropy of `usage` in nats: log G when all groups are used alike, 0 for one group.

    With `normalized` it is divided by log G (a single group counts as 1; an all-zero map is 0).
    """
    share = usage(norms)
    used = share[share > 0]
    entropy = float(-(used * np.log(used)).sum()) + 0.0  # + 0.0: never -0.0
    if not normalized:
        return entropy
    return entropy / math.log(len(share)) if len(share) > 1 else float(share.sum())


def hoyer(norms: Any) -> float:
    """Return Hoyer's sparseness of a latent's G norms, averaged over the latents in use.

    (sqrt G - l1 / l2) / (sqrt G - 1): 1 when each latent feeds one group, 0 when it feeds all
    equally (Hoyer 2004, section 3.1). 0 for a single group or an all-zero map.
    """
    used = _used(norms)
    if used is None:
        return 0.0
    root = np.sqrt(len(used))
    return float(((root - used.sum(0) / np.sqrt(np.square(used).sum(0))) / (root - 1)).mean())


def gini(norms: Any) -> float:
    """Return the Gini index of a latent's G norms, averaged over the latents in use.

    Scaled by G / (G - 1), so that one group gives 1 and equal norms give 0 (Hurley and Rickard
    2009, eq. 7, before scaling). 0 for a single group or an all-zero map.
    """
    used = _used(norms)
    if used is None:
        return 0.0
    count = len(used)
    ascending = np.sort(used, axis=0)
    rank = np.arange(1, count + 1)[:, None]
    index = ((2 * rank - count - 1) * ascending).sum(0) / (count * ascending.sum(0))
    return float(index.mean() * count / (count - 1))


def treves_rolls(norms: Any) -> float:
    """Return the Treves-Rolls sparseness of a latent's G norms, averaged over the latents in use.

    (1 - a) / (1 - 1 / G) with a = (mean r)^2 / mean(r^2): 1 when each latent feeds one group, 0
    when it feeds all equally (Treves and Rolls 1991; scaled as in Vinje and Gallant 2000). 0 for a
    single group or an all-zero map.
    """
    used = _used(norms)
    if used is None:
        return 0.0
    activity = np.square(used.mean(0)) / np.square(used).mean(0)
    return float(((1 - activity) / (1 - 1 / len(used))).mean())


def summary(norms: Any) -> dict[str, float | int]:
    """Return all measures by name, ready for JSON.

    `w_nonzero` of `w_total` are blocks; `single_group_latents` is the share of latents that feed
    exactly one group, `dead_latents` the number that feed none, `max_usage` the largest share.
    """
    norms = _checked(norms)
    feeds = norms > 0
    per_group = feeds.sum(1)
    return {
        "num_groups": norms.shape[0],
        "num_latents": norms.shape[1],
        "w_nonzero": int(feeds.sum()),
        "w_total": norms.size,
        "density": density(norms),
        "groups_per_latent": groups_per_latent(norms),
        "single_group_latents": float((feeds.sum(0) == 1).mean()),
        "dead_latents": int((feeds.sum(0) == 0).sum()),
        "latents_per_group_min": int(per_group.min()),
        "latents_per_group_max": int(per_group.max()),
        "dead_groups": dead_groups(norms),
        "max_usage": float(usage(norms).max()),
        "usage_entropy": usage_entropy(norms),
        "usage_entropy_normalized": usage_entropy(norms, normalized=True),
        "hoyer": hoyer(norms),
        "gini": gini(norms),
        "treves_rolls": treves_rolls(norms),
    }


def _checked(norms: Any) -> np.ndarray:
    if hasattr(norms, "detach"):
        norms = norms.detach().double().cpu()
    array = np.asarray(norms, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"block norms must be [G, D], got shape {array.shape}")
    if not np.isfinite(array).all() or array.min() < 0:
        raise ValueError("block norms must be finite and not negative")
    return array


def _used(norms: Any) -> np.ndarray | None:
    """Return the latents in use, scaled to a largest norm of 1; None if no measure applies."""
    norms = _checked(norms)
    largest = norms.max(0)
    if len(norms) == 1 or not largest.any():
        return None
    return norms[:, largest > 0] / largest[largest > 0]
