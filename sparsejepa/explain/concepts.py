"""What single groups stand for: labels, likeness, the effect of silencing one, and a card of each.

Random draws are keyed on `random_state`. What is not defined is None, never NaN. Letters: n images
(m points of any kind), N patches, D latents, G groups, P group width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsejepa.data.images import ImageSet
from sparsejepa.evaluation.stats import Estimate, bootstrap_weights, from_draws
from sparsejepa.explain.readout import Column, Subject, evenly

DEAD = 1e-6
"""A group whose rms is below this share of the largest is dead."""
EXPLORED = 36
"""Images that are shown with the groups of their patches."""
SHOWN = 320
"""Images of all cards, about: the more groups there are, the fewer each shows."""
LATENTS, LABELS = 12, 5
"""What a card lists at most."""

# --- labels ---------------------------------------------------------------------------------------


def associations(
    activations: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    permutations: int = 200,
    random_state: int = 0,
) -> list[list[tuple[str, float, float]]]:
    """Return for every group (label, AUC, chance level), those furthest above chance first.

    The AUC is how often an image of the label excites the group more than another image (ties count
    half; Mann and Whitney 1947). The chance level of a label is 1/2 + c s, with s the standard
    deviation of the AUC under the null hypothesis, larger for rare labels, and c the 95 % quantile
    over permutations of the labels of the largest (AUC - 1/2) / s over *all* labels and groups:
    with no association at all, any of them exceeds its level in 5 % of cases.

    Args:
        activations: [n, G], of whole images.
        labels: int [n], indices into `names`. Labels of none or of all images are left out.
    """
    from scipy.stats import rankdata

    n = len(labels)
    counts = np.bincount(labels, minlength=len(names))
    present = np.flatnonzero((counts > 0) & (counts < n))
    if not len(present):
        return [[] for _ in activations.T]
    size = counts[present, None]
    spread = np.sqrt((n + 1) / (12 * size * (n - size)))
    ranks = rankdata(activations, axis=0)
    starts = np.cumsum(size) - size[:, 0]

    def auc(order: np.ndarray) -> np.ndarray:
        """[K, G], from the images in the order of their labels."""
        total = np.add.reduceat(ranks.take(order, axis=0), starts, axis=0)
        return (total - size * (size + 1) / 2) / (size * (n - size))

    value = auc(np.argsort(labels, kind="stable"))
    rng = np.random.default_rng(random_state)
    largest = [((auc(rng.permutation(n)) - 0.5) / spread).max() for _ in range(permutations)]
    chance = np.minimum(0.5 + np.quantile(largest, 0.95) * spread[:, 0], 1.0)
    return [
        [(str(names[int(present[i])]), float(value[i, g]), float(chance[i])) for i in order]
        for g, order in enumerate(np.argsort((0.5 - value) / spread, axis=0, kind="stable").T)
    ]


# --- likeness -------------------------------------------------------------------------------------


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


def match_groups(
    a: np.ndarray, b: np.ndarray, *, permutations: int = 100, random_state: int = 0
) -> Matching:
    """Match groups of two models one to one so that the sum of correlations is largest.

    a, b: activations [n, N, G1] and [n, N, G2] of the same patches, N may be 1. Correlations are
    Pearson's over all n N points, 0 for a constant group. Permutations keep the patches of an image
    together and in order: chance is other images at the same patches, and two groups that merely
    like the same place are no more than chance.
    """
    from scipy.optimize import linear_sum_assignment

    left, right = _standard(a), _standard(b)
    rng = np.random.default_rng(random_state)
    images = right.reshape(*b.shape[:2], -1)

    def matched(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        matrix = np.clip(left.T @ points, -1, 1)
        rows, columns = linear_sum_assignment(matrix, maximize=True)
        return matrix, np.stack([rows, columns], 1), matrix[rows, columns]

    draws = [
        matched(images[rng.permutation(len(images))].reshape(right.shape))[2].mean()
        for _ in range(permutations)
    ]
    matrix, pairs, found = matched(right)
    return Matching(pairs, found, matrix, float(np.mean(draws)), float(np.quantile(draws, 0.95)))


def _standard(activations: np.ndarray) -> np.ndarray:
    """Return points [m, G] with columns of mean 0 and norm 1; those of constant columns are 0."""
    x = activations.reshape(-1, activations.shape[-1]).astype(np.float64)
    size = np.abs(x).max(0)
    x = x - x.mean(0)
    norms = np.linalg.norm(x, axis=0)
    flat = norms <= 1e-9 * size * math.sqrt(len(x))
    return np.where(flat, 0.0, x / np.where(flat, 1.0, norms))


# --- silence --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SilenceEffect:
    """What a probe loses without one group. Drops are shares of 1, positive for a loss.

    `rank` is that of the group; `chance` is the mean drop over random subspaces of this rank;
    `draws` are the bootstrap draws of the drop.
    """

    rank: int
    drop: Estimate
    chance: float
    draws: np.ndarray


def silence_effects(
    probe: Any,
    x: np.ndarray,
    y: np.ndarray,
    W: np.ndarray,
    *,
    spaces: int = 10,
    resamples: int = 200,
    random_state: int = 0,
) -> list[SilenceEffect]:
    """Return for every group how the accuracy of a fitted probe falls when it is silenced.

    The row space of W^(g) is projected out: what group g sees becomes the mean of the latents.

    Args:
        probe: anything with `predict(x)`.
        x: [n, D], test images' standardised latents, as the probe was fitted on; y: [n].
        W: [G, P, D].
        spaces: random subspaces of each group's rank that give the chance level.
        resamples: of test images, for the interval of the drop; nothing is refitted.
    """
    right = (probe.predict(x) == y).astype(np.float64)
    rng = np.random.default_rng(random_state)
    weights = bootstrap_weights(len(x), resamples, random_state)
    chance = {0: 0.0}

    def losses(basis: np.ndarray) -> np.ndarray:
        basis = basis.astype(x.dtype)
        return right - (probe.predict(x - (x @ basis.T) @ basis) == y)

    effects = []
    for basis in map(row_space, W):
        rank = len(basis)
        if rank not in chance:
            drawn = [rng.normal(size=(x.shape[1], rank)) for _ in range(spaces)]
            chance[rank] = float(np.mean([losses(np.linalg.qr(d)[0].T).mean() for d in drawn]))
        loss = losses(basis)
        draws = weights @ loss / len(x)
        drop = from_draws(float(loss.mean()), draws, "" if rank else "a dead group")
        effects.append(SilenceEffect(rank, drop, chance[rank], draws))
    return effects


def row_space(W_g: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis [r, D] of the rows of W^(g) [P, D]; r = 0 for a dead group."""
    _, sigma, basis = np.linalg.svd(np.asarray(W_g, np.float64), full_matrices=False)
    return basis[sigma > max(W_g.shape) * np.finfo(np.float32).eps * sigma.max(initial=1e-300)]


# --- one card per group ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What is shown of one group. Images are indices of the test images."""

    index: int
    dead: bool
    on: float
    """Share of patches at which it is above its root mean square."""
    latents: Sequence[tuple[int, float]]
    """(latent, ||W_gj||), strongest first; `num_latents` counts all that are not zero."""
    num_latents: int
    labels: Sequence[tuple[str, str, float, float]]
    """(target, label, AUC, its chance level), those furthest above chance first."""
    top_patches: Sequence[tuple[int, int, float]]
    """(image, patch, activation over rms), strongest first; none of regions."""
    top_images: Sequence[int]
    drop: Estimate | None
    """Share of labels that a probe no longer gets without it; None: not measured."""
    drop_chance: float | None
    """The same for random directions of equal rank."""
    cell: Sequence[int]
    """The patches that a region group predicts, else empty."""


@dataclass(frozen=True)
class Gallery:
    """The cards of all groups and the images that they refer to."""

    cards: list[Card]
    explorer: list[int]
    """Test images whose patches are coloured by group."""
    shown: list[int]
    """All test images that the page needs, ascending."""
    activations: np.ndarray
    """[m, N, G] of those images, ||W^(g) z|| over the group's rms; [m, 1, G] of regions, which have
    one value an image."""


def patch_maps(subject: Subject, run: Column) -> np.ndarray:
    """Return the activations of test images that maps show, [n, N, G]; of regions [n, 1, G].

    A region group reads the pooled latents and predicts a fixed cell: it has no map of patches.
    """
    return run.test.activations[:, None] if subject.kind == "region" else run.patches


def make_gallery(
    subject: Subject,
    run: Column,
    test: ImageSet,
    labels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    silenced: Sequence[SilenceEffect] | None,
) -> Gallery:
    """Look at every group of a run; `labels` are the training and test images' by target."""
    G, norms, cells = len(subject.W), subject.norms, subject.cells()
    activations = patch_maps(subject, run)
    square = [np.square(activations[..., g], dtype=np.float64).mean() for g in range(G)]
    rms = np.sqrt(square)
    dead = rms <= DEAD * rms.max()
    on = [float((activations[..., g] > rms[g]).mean()) for g in range(G)]
    scaled = activations / np.where(dead, 1, rms).astype(activations.dtype)
    scaled[:, :, dead] = 0
    means = scaled.mean(1, dtype=np.float32)  # [n, G]
    associated = _associations(means, test, labels)
    each = int(np.clip(SHOWN // (4 * G), 3, 8))
    cards = []
    for g in range(G):
        fed = np.flatnonzero(norms[g])
        strongest = fed[np.argsort(-norms[g, fed], kind="stable")][:LATENTS]
        best = scaled[:, :, g].max(1).astype(np.float32)
        patches = [] if cells[g] else np.argsort(-best, kind="stable")[:each]
        card = Card(
            index=g,
            dead=bool(dead[g]),
            on=0.0 if dead[g] else on[g],
            latents=[(int(j), float(norms[g, j])) for j in strongest],
            num_latents=len(fed),
            labels=associated[g],
            top_patches=[(int(n), int(scaled[n, :, g].argmax()), float(best[n])) for n in patches],
            top_images=np.argsort(-means[:, g], kind="stable")[:each].tolist(),
            drop=silenced[g].drop if silenced else None,
            drop_chance=silenced[g].chance if silenced else None,
            cell=cells[g],
        )
        nothing = {"labels": [], "top_patches": [], "top_images": []}
        nothing |= {"drop": None, "drop_chance": None}
        cards.append(replace(card, **nothing) if dead[g] else card)
    explorer = evenly(len(test), EXPLORED).tolist()
    shown = {*explorer}.union(*(c.top_images for c in cards))
    shown |= {image for card in cards for image, _, _ in card.top_patches}
    order = sorted(shown)
    return Gallery(cards, explorer, order, scaled[order].astype(np.float32))


def _associations(
    means: np.ndarray, test: ImageSet, labels: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> list[list[tuple[str, str, float, float]]]:
    """Return each group's labels over all targets, those furthest above chance first."""
    result: list[list[tuple[str, str, float, float]]] = [[] for _ in means.T]
    for target, (_, values) in labels.items():
        found = associations(means, values, test.targets[target].names)
        for listed, mine in zip(found, result, strict=True):
            mine += [(target, name, auc, c) for name, auc, c in listed[:LABELS] if auc > c]
    return [sorted(m, key=lambda a: (a[3] - a[2]) / max(a[3] - 0.5, 1e-9))[:LABELS] for m in result]
