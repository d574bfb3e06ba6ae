"""What single groups stand for: statistics, labels, likeness, and the effect of silencing one.

Pure functions over arrays; random draws are keyed on `random_state`. What is not defined is None,
never NaN. Letters: n images (m points of any kind), N patches, D latents, G groups, P group width,
K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsejepa.evaluation.stats import Estimate, bootstrap_weights, from_draws

BLOCK = 2**22
"""Numbers worked on at once: bounds memory."""
DEAD = 1e-6
"""A group whose rms is below this share of the largest is dead."""


@dataclass(frozen=True)
class GroupStatistics:
    """Per group [G]: root mean square, share of patches above it, and whether it is dead."""

    rms: np.ndarray
    on: np.ndarray
    dead: np.ndarray


@dataclass(frozen=True)
class Association:
    """A label that goes with a group: the AUC of the activation, and what chance reaches."""

    label: int
    name: str
    value: float
    chance: float

    @property
    def exceeds(self) -> bool:
        """Whether the AUC is above the chance level."""
        return self.value > self.chance


@dataclass(frozen=True)
class Matching:
    """Groups of two models matched one to one: `pairs` [k, 2] with their `correlations` [k].

    `matrix` [G1, G2] holds all correlations. `chance` is the mean correlation of matched pairs
    that permuted images give, `chance_high` its 95 % quantile over permutations.
    """

    pairs: np.ndarray
    correlations: np.ndarray
    matrix: np.ndarray
    chance: float
    chance_high: float


@dataclass(frozen=True)
class SilenceEffect:
    """What a probe loses without one group. Drops are shares of 1, positive for a loss.

    `rank` is that of the group; `chance` and `chance_high` are the mean and the largest drop over
    random subspaces of this rank; `draws` are the bootstrap draws of the drop.
    """

    rank: int
    drop: Estimate
    chance: float
    chance_high: float
    draws: np.ndarray


def sparsity(norms: Any) -> dict[str, float | int]:
    """Return how sparse a latent-to-group map is, from its block norms ||W_gj|| [G, D].

    * ``density``: the share of blocks that are not zero; ``groups_per_latent``: the mean number of
      groups that a latent feeds, SparseJEPA's ||W_.j||_0.
    * ``latents_per_group_min`` and ``_max``; ``dead_groups``, which no latent feeds.
    * ``max_usage``: the largest share of the total squared norm that one group has;
      ``usage_entropy``: the entropy of these shares over log G, 1 if all groups are used alike.
    * ``hoyer``: (sqrt G - l1 / l2) / (sqrt G - 1) of a latent's G norms, averaged over the latents
      in use: 1 where each feeds one group, 0 where it feeds all equally (Hoyer 2004, section 3.1);
      0 for a single group.

    Raises ValueError unless the norms are a finite matrix without negative numbers.
    """
    norms = torch.as_tensor(norms).detach().double().cpu()
    if norms.ndim != 2 or not norms.numel():
        raise ValueError(f"block norms must be [G, D], got shape {tuple(norms.shape)}")
    if not norms.isfinite().all() or norms.min() < 0:
        raise ValueError("block norms must be finite and not negative")
    feeds = norms > 0
    # The largest entry is divided out so that squares neither overflow nor vanish.
    energy = (norms / norms.max().clamp_min(1e-300)).square().sum(1)
    share = energy / energy.sum().clamp_min(1e-300)
    per_group = feeds.sum(1)
    entropy = -torch.special.xlogy(share, share).sum() / math.log(max(2, len(norms)))
    used = norms[:, feeds.any(0)]
    used = used / used.amax(0, keepdim=True)
    root = math.sqrt(len(norms))
    hoyer = (root - used.sum(0) / used.norm(dim=0)) / max(root - 1, 1e-300)
    return {
        "density": float(feeds.double().mean()),
        "groups_per_latent": float(feeds.sum(0).double().mean()),
        "latents_per_group_min": int(per_group.min()),
        "latents_per_group_max": int(per_group.max()),
        "dead_groups": int((per_group == 0).sum()),
        "max_usage": float(share.max()),
        "usage_entropy": float(entropy) + 0.0,  # never -0.0
        "hoyer": float(hoyer.mean()) if len(norms) > 1 and used.numel() else 0.0,
    }


def group_statistics(activations: Any) -> GroupStatistics:
    """Return the statistics of activations [n, N, G] >= 0 (any leading shape).

    A dead group (rms below 1e-6 of the largest, or 0) is never on.
    """
    a = np.asarray(activations)
    flat = a.reshape(-1, a.shape[-1])
    if not flat.size:
        raise ValueError(f"activations of shape {a.shape} hold nothing")
    square = sum(np.square(part.astype(np.float64)).sum(0) for part in _blocks(flat))
    rms = np.sqrt(square / len(flat))
    dead = rms <= DEAD * rms.max()
    on = sum((part > rms).sum(0) for part in _blocks(flat)) / len(flat)
    return GroupStatistics(rms, np.where(dead, 0.0, on), dead)


def monosemanticity(a: Any, embeddings: Any) -> list[float | None]:
    """Return per group the mean cosine of pairs of images, weighted by how both excite the group.

    sum_{n != m} a_n a_m <e_n, e_m> / sum_{n != m} a_n a_m in O(n E) (Pach et al. 2025, section 3):
    1 if all images that excite the group look alike in an independent view, None if fewer than two
    excite it. Compare with the level of a constant group, `monosemanticity(np.ones((n, 1)), e)`.

    Args:
        a: [n, G] >= 0, activations of whole images.
        embeddings: [n, E] from another view; rows are scaled to norm 1 (a zero row is like none).
            Centre them first, or their common mean makes all images alike.
    """
    a, e = np.asarray(a, np.float64), np.asarray(embeddings, np.float64)
    if a.ndim != 2 or e.ndim != 2 or len(a) != len(e):
        raise ValueError(f"activations [n, G] {a.shape} and embeddings [n, E] {e.shape} do not fit")
    if not (np.isfinite(a).all() and np.isfinite(e).all()) or (a < 0).any():
        raise ValueError("activations must be finite and not negative, embeddings finite")
    e = _unit(e)
    a = a / np.maximum(a.max(0, initial=0), 1e-300)  # so that squares do not vanish
    own = np.square(a).sum(0)
    # A zero row has norm 0, not 1, and so no share in the first sum's diagonal.
    diagonal = (np.square(a) * np.square(e).sum(1)[:, None]).sum(0)
    pairs = np.square(a.T @ e).sum(1) - diagonal
    weights = np.square(a.sum(0)) - own
    enough = (a > 0).sum(0) >= 2
    return [
        float(np.clip(p / w, -1, 1)) if some and w > 1e-12 * o else None
        for p, w, o, some in zip(pairs, weights, own, enough, strict=True)
    ]


def associations(
    activations: Any,
    labels: Any,
    names: Sequence[str],
    *,
    permutations: int = 200,
    top: int | None = 5,
    random_state: int = 0,
) -> list[list[Association]]:
    """Return for every group the labels that it goes with, those furthest above chance first.

    The value is the AUC: how often an image of the label excites the group more than another image
    (ties count half; Mann and Whitney 1947). The chance level of a label is 1/2 + c s, with s the
    standard deviation of the AUC under the null hypothesis, larger for rare labels, and c the 95 %
    quantile over permutations of the labels of the largest (AUC - 1/2) / s over *all* labels and
    groups: with no association at all, any of them exceeds its level in 5 % of cases.

    Args:
        activations: [n, G], of whole images.
        labels: int [n], indices into `names`. Labels of none or of all images are left out.
        top: labels listed per group; all if None.
    """
    from scipy.stats import rankdata

    a, labels = np.asarray(activations), np.asarray(labels)
    n = len(labels)
    if a.ndim != 2 or len(a) != n or labels.ndim != 1:
        raise ValueError(f"activations [n, G] {a.shape} and labels [n] {labels.shape} do not fit")
    counts = np.bincount(labels, minlength=len(names))
    if len(counts) > len(names):
        raise ValueError(f"label {labels.max()}, but there are {len(names)} names")
    present = np.flatnonzero((counts > 0) & (counts < n))
    if not len(present):
        return [[] for _ in range(a.shape[1])]
    size = counts[present, None]
    spread = np.sqrt((n + 1) / (12 * size * (n - size)))
    ranks = rankdata(a, axis=0)
    starts = np.cumsum(size) - size[:, 0]

    def auc(order: np.ndarray) -> np.ndarray:
        """[K, G], from the images in the order of their labels."""
        total = np.add.reduceat(ranks[order], starts, axis=0)
        return (total - size * (size + 1) / 2) / (size * (n - size))

    value = auc(np.argsort(labels, kind="stable"))
    rng = np.random.default_rng(random_state)
    largest = [((auc(rng.permutation(n)) - 0.5) / spread).max() for _ in range(permutations)]
    level = np.quantile(largest, 0.95) if permutations else 0.0
    chance = np.minimum(0.5 + level * spread[:, 0], 1.0)
    listed = np.argsort((0.5 - value) / spread, axis=0, kind="stable")[:top].T
    return [
        [
            Association(k, str(names[k]), float(value[i, g]), float(chance[i]))
            for i, k in zip(order, present[order].tolist(), strict=True)
        ]
        for g, order in enumerate(listed)
    ]


def correlations(a: Any, b: Any) -> np.ndarray:
    """Return Pearson's correlation [G1, G2] of a [m, G1] and b [m, G2]; 0 for constants."""
    a, b = (np.asarray(x) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or not len(a):
        raise ValueError(f"activations [m, G] of shapes {a.shape} and {b.shape} do not fit")
    return np.clip(_standard(a).T @ _standard(b), -1, 1)


def duplicate_groups(activations: Any, *, threshold: float = 0.95) -> list[int | None]:
    """Return for each group the earlier group that it repeats, None if it is one of its own.

    A repeat correlates at least `threshold` over activations [m, G] with an earlier group that is
    no repeat itself (the most alike, if several).
    """
    found = correlations(activations, activations)
    repeats: list[int | None] = []
    for g in range(len(found)):
        originals = [h for h in range(g) if repeats[h] is None]
        best = max(originals, key=lambda h: found[g, h], default=None)
        repeats.append(best if best is not None and found[g, best] >= threshold else None)
    return repeats


def match_groups(
    a: Any, b: Any, *, block: int = 1, permutations: int = 100, random_state: int = 0
) -> Matching:
    """Match groups of two models one to one so that the sum of correlations is largest.

    Args:
        a, b: activations [m, G1] and [m, G2] over the same points.
        block: consecutive points that permutations keep together and in order. With points
            [n * N] give N: then chance is other images at the same patches, and two groups that
            merely like the same place are no more than chance.
    """
    a, b = np.asarray(a), np.asarray(b)
    matrix = correlations(a, b)
    if block < 1 or len(a) % block:
        raise ValueError(f"{len(a)} points are no multiple of block {block}")
    pairs = _assign(matrix)
    left = _standard(a)
    right = _standard(b).reshape(-1, block, b.shape[1])
    rng = np.random.default_rng(random_state)
    draws = []
    for _ in range(permutations):
        shuffled = left.T @ right[rng.permutation(len(right))].reshape(b.shape)
        found = _assign(shuffled)
        draws.append(shuffled[found[:, 0], found[:, 1]].mean())
    chance, high = (np.mean(draws), np.quantile(draws, 0.95)) if draws else (0.0, 0.0)
    return Matching(pairs, matrix[pairs[:, 0], pairs[:, 1]], matrix, float(chance), float(high))


def row_space(W_g: Any) -> np.ndarray:
    """Return an orthonormal basis [r, D] of the rows of W^(g) [P, D]; r = 0 for a dead group."""
    _, sigma, basis = np.linalg.svd(np.asarray(W_g, np.float64), full_matrices=False)
    return basis[sigma > max(W_g.shape) * np.finfo(np.float32).eps * sigma.max(initial=1e-300)]


def silence_effects(
    probe: Any,
    x_test: Any,
    y_test: Any,
    W: Any,
    *,
    draws: int = 10,
    resamples: int = 200,
    random_state: int = 0,
) -> list[SilenceEffect]:
    """Return for every group how the accuracy of a fitted probe falls when it is silenced.

    The row space of W^(g) is projected out: what group g sees becomes the mean of the latents.

    Args:
        probe: anything with `predict(x)`.
        x_test: [n, D], the standardised latents that the probe was fitted on; y_test: [n].
        W: [G, P, D].
        draws: random subspaces of each group's rank that give the chance level.
        resamples: of test images, for the interval of the drop; nothing is refitted.
    """
    x, y, W = np.asarray(x_test), np.asarray(y_test), np.asarray(W)
    if x.ndim != 2 or W.ndim != 3 or x.shape[1] != W.shape[2] or len(x) != len(y) or not len(x):
        raise ValueError(f"x {x.shape}, y {y.shape} and W {W.shape} do not fit")
    right = (probe.predict(x) == y).astype(np.float64)
    rng = np.random.default_rng(random_state)
    weights = bootstrap_weights(len(x), resamples, random_state)
    levels: dict[int, list[float]] = {0: [0.0]}

    def losses(basis: np.ndarray) -> np.ndarray:
        return right - (probe.predict(_without(x, basis)) == y)

    effects = []
    for basis in map(row_space, W):
        rank = len(basis)
        if rank not in levels:
            spaces = (np.linalg.qr(rng.normal(size=(x.shape[1], rank)))[0].T for _ in range(draws))
            levels[rank] = [float(losses(space).mean()) for space in spaces] or [0.0]
        loss = losses(basis)
        drawn = weights @ loss / len(x)
        drop = from_draws(float(loss.mean()), drawn, "" if rank else "a dead group")
        level = levels[rank]
        effects.append(SilenceEffect(rank, drop, float(np.mean(level)), max(level), drawn))
    return effects


def _without(x: np.ndarray, basis: np.ndarray) -> np.ndarray:
    basis = basis.astype(x.dtype)
    return x - (x @ basis.T) @ basis


def _unit(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1.0)


def _standard(x: np.ndarray) -> np.ndarray:
    """Return x [m, G] with columns of mean 0 and norm 1; those of constant columns are 0."""
    x = x.astype(np.float64)
    size = np.abs(x).max(0)
    x = x - x.mean(0)
    norms = np.linalg.norm(x, axis=0)
    flat = norms <= 1e-9 * size * math.sqrt(len(x))
    return np.where(flat, 0.0, x / np.where(flat, 1.0, norms))


def _assign(matrix: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    return np.stack(linear_sum_assignment(matrix, maximize=True), 1)


def _blocks(flat: np.ndarray) -> Iterator[np.ndarray]:
    size = max(1, BLOCK // flat.shape[1])
    for start in range(0, len(flat), size):
        yield flat[start : start + size]
