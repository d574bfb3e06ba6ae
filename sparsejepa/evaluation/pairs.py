"""Pairs of patches within one object against pairs across objects, at equal distance.

The mechanism that SparseJEPA claims (Hartman and Varshney 2025, section 3): patches of one object
share information, and so come to share a group. Near patches share more anyway, so pairs are
compared offset by offset (rows and columns apart), and both kinds get the same weights over
offsets: the smaller of the two numbers of pairs. Letters: n images, N patches, D latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsejepa.evaluation.information import gaussian_mutual_information, normal_scores
from sparsejepa.evaluation.stats import Estimate, undefined

FOLDS = 20
"""Parts of the images that the jackknife leaves out in turn.

Not a bootstrap: images drawn twice would be information that is not there.
"""


@dataclass(frozen=True)
class _Pairs:
    """Pairs of one offset: image, first and second patch [k] each, and the fold of the image."""

    image: np.ndarray
    first: np.ndarray
    second: np.ndarray
    fold: np.ndarray

    def take(self, index: np.ndarray) -> _Pairs:
        return _Pairs(*(x[index] for x in vars(self).values()))


def pair_information(
    tokens: Any,
    objects: Any,
    grid: tuple[int, int],
    *,
    components: int = 8,
    reach: int = 2,
    least: int = 200,
    most: int = 20_000,
    random_state: int = 0,
) -> dict[str, Estimate]:
    """Return the information of the two tokens of a pair: `within`, `across` and their `gap`.

    Gaussian-copula mutual information in nats. Undefined where no offset has enough pairs.

    Args:
        tokens: [n, N, D]. The mean token of each patch is taken out, so that place alone is no
            information, and `components` principal axes are kept.
        objects: int [n, N], the object of each patch, 0 for background.
        grid: rows and columns of patches.
        reach: largest offset in rows and columns.
        least: pairs of each kind that an offset needs to count.
        most: pairs of each kind and offset that are measured, a random choice.
    """
    tokens, objects = np.asarray(tokens), np.asarray(objects)
    if tokens.ndim != 3 or objects.shape != tokens.shape[:2]:
        raise ValueError(f"tokens [n, N, D] {tokens.shape} and objects {objects.shape} do not fit")
    axes = _principal(tokens, components)
    rng = np.random.default_rng(random_state)

    def information(pairs: _Pairs) -> np.ndarray:
        some = pairs.take(rng.permutation(len(pairs.image))[:most])
        x, y = axes[some.image, some.first], axes[some.image, some.second]
        return _information_over_folds(x, y, some.fold)

    offsets = _offsets(objects, grid, reach, least, rng)
    return _averaged(offsets, {"within": (0, information), "across": (1, information)}, least)


def pair_sharing(
    objects: Any,
    groups: Any,
    grid: tuple[int, int],
    *,
    reach: int = 2,
    least: int = 200,
    random_state: int = 0,
) -> dict[str, Estimate]:
    """Return the probability that a pair is in one group: `within`, `across`, `gap`, `chance`.

    `chance` is that of the pairs within, had each patch its group from another image. Undefined
    where no offset has enough pairs.

    Args:
        objects, groups: int [n, N], the object (0 for background) and the group of each patch.
        grid, reach, least: as for `pair_information`.
    """
    objects, groups = np.asarray(objects), np.asarray(groups)
    if objects.ndim != 2 or groups.shape != objects.shape:
        raise ValueError(f"objects {objects.shape} and groups {groups.shape} do not fit")
    labels, groups = np.unique(groups, return_inverse=True)
    groups = groups.reshape(objects.shape)
    usage = np.stack([(groups == g).mean(0) for g in range(len(labels))], 1)  # [N, G]

    def shared(pairs: _Pairs) -> np.ndarray:
        same = groups[pairs.image, pairs.first] == groups[pairs.image, pairs.second]
        return _over_folds(same, pairs.fold)

    def chance(pairs: _Pairs) -> np.ndarray:
        return _over_folds((usage[pairs.first] * usage[pairs.second]).sum(1), pairs.fold)

    offsets = _offsets(objects, grid, reach, least, np.random.default_rng(random_state))
    return _averaged(
        offsets, {"within": (0, shared), "across": (1, shared), "chance": (0, chance)}, least
    )


def _averaged(
    offsets: Iterator[tuple[_Pairs, _Pairs]],
    measures: dict[str, tuple[int, Callable[[_Pairs], np.ndarray]]],
    least: int,
) -> dict[str, Estimate]:
    """Average measures of pairs (0 within, 1 across) over offsets, and add their gap."""
    found, weights = [], []
    for kinds in offsets:
        found.append([measure(kinds[kind]) for kind, measure in measures.values()])
        weights.append(min(len(pairs.image) for pairs in kinds))
    if not found:
        reason = undefined(f"no offset has {least} pairs of both kinds")
        return dict.fromkeys([*measures, "gap"], reason)
    means = dict(zip(measures, np.average(np.array(found), axis=0, weights=weights), strict=True))
    means["gap"] = means["within"] - means["across"]
    return {name: _jackknife(values) for name, values in means.items()}


def _offsets(
    objects: np.ndarray, grid: tuple[int, int], reach: int, least: int, rng: np.random.Generator
) -> Iterator[tuple[_Pairs, _Pairs]]:
    """Yield the pairs within and across objects of each offset that has `least` of both."""
    n, patches = objects.shape
    if math.prod(grid) != patches:
        raise ValueError(f"{patches} patches are no grid of {grid[0]}x{grid[1]}")
    folds = rng.permutation(np.arange(n) % FOLDS)
    for first, second in _patches_apart(grid, reach):
        seen = (objects[:, first] > 0) & (objects[:, second] > 0)
        same = objects[:, first] == objects[:, second]
        within, across = (
            _Pairs(image, first[k], second[k], folds[image])
            for image, k in (np.nonzero(seen & same), np.nonzero(seen & ~same))
        )
        if min(len(within.image), len(across.image)) >= least:
            yield within, across


def _patches_apart(grid: tuple[int, int], reach: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the two patches [k] of all pairs at one offset, each unordered pair once."""
    patches = np.arange(math.prod(grid)).reshape(grid)
    for down in range(min(reach, grid[0] - 1) + 1):
        for right in range(-reach if down else 1, reach + 1):
            if abs(right) >= grid[1]:
                continue
            left, cut = max(0, -right), max(0, right)
            first = patches[: grid[0] - down, left : grid[1] - cut]
            second = patches[down:, cut : grid[1] - left]
            yield first.ravel(), second.ravel()


def _principal(tokens: np.ndarray, components: int) -> np.ndarray:
    """Return tokens [n, N, D] less each patch's mean on their first principal axes [n, N, c]."""
    centred = tokens.astype(np.float32) - tokens.mean(0, dtype=np.float64).astype(np.float32)
    flat = centred.reshape(-1, tokens.shape[2])
    _, axes = np.linalg.eigh((flat.T @ flat).astype(np.float64))
    return (flat @ axes[:, ::-1][:, :components]).reshape(*tokens.shape[:2], -1)


def _over_folds(values: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Return the mean of values [k], then the means without each fold, [1 + FOLDS]."""
    total = np.bincount(folds, values, FOLDS)
    count = np.bincount(folds, minlength=FOLDS)
    left = np.maximum(count.sum() - count, 1)
    return np.concatenate([[values.mean()], (total.sum() - total) / left])


def _information_over_folds(x: np.ndarray, y: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Return I(x; y) of x, y [k, c], then without each fold (ranks kept); NaN where undefined."""
    x, y = normal_scores(x), normal_scores(y)

    def value(kept: np.ndarray) -> float:
        found = gaussian_mutual_information(x[kept], y[kept], copula=False, resamples=0).value
        return math.nan if found is None else found

    return np.array([value(folds != f) for f in range(-1, FOLDS)])


def _jackknife(values: np.ndarray) -> Estimate:
    """Return values[0] with the interval that the values without each fold give."""
    if not np.isfinite(values[0]):
        return undefined("too few pairs for the information of these tokens")
    left = values[1:]
    error = math.sqrt((FOLDS - 1) / FOLDS * np.square(left - left.mean()).sum())
    if not math.isfinite(error):
        return Estimate(float(values[0]), note="no interval: too few images")
    return Estimate(
        float(values[0]), float(values[0] - 1.96 * error), float(values[0] + 1.96 * error)
    )
