"""Do the groups follow objects? Patches as segments, against true object masks.

A group of a token-level map is a segment: the patches on which it is stronger, for its own scale,
than all others. Large smooth segments score by geometry alone, so that beside the model's stand
k-means on the tokens, blocks that see only positions, and the same patches in random order.

Masks are whole numbers from 0 to 65,535, [n, H, W]; in true masks 0 is the background and every
other number one object. Predicted masks have no background: every number is a segment. A measure
is NaN on images where it is not defined; `object_scores` leaves these out and says how many.

Letters: n images, N patches on a grid of rows x columns, H x W pixels, G groups, D latents,
T different labels of a true mask, P segments.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sparsejepa.evaluation.information import gaussian_mutual_information, normal_scores
from sparsejepa.evaluation.stats import FOLDS, NORMAL, Estimate, mean_estimate, undefined

MAX_LABEL = 65_535
KMEANS_POINTS = 20_000
"""k-means is fitted on so many tokens at most."""

_CELLS = 2**20  # of the arrays that are worked on at once


def assign_patches(activations: np.ndarray, rms: np.ndarray | None = None) -> np.ndarray:
    """Return the group of each patch, int64 [n, N]: the largest activation over its rms.

    activations: [n, N, G] >= 0, ||W^(g) z||; rms: [G], each group's root mean square over the data
    (by default over these activations). A group whose rms is 0 never wins; ties go to the lower
    index, so that without any living group all patches are in group 0.

    Raises ValueError: other shapes, values that are not finite, a negative rms.
    """
    activations = np.asarray(activations)
    if activations.ndim != 3 or not activations.shape[2]:
        raise ValueError(f"activations must be [n, N, G], got shape {activations.shape}")
    if rms is None:
        flat = activations.reshape(-1, activations.shape[2])
        rms = np.sqrt(np.einsum("mg,mg->g", flat, flat, dtype=np.float64) / max(1, len(flat)))
    rms = np.asarray(rms, np.float64)
    if rms.shape != activations.shape[2:]:
        raise ValueError(f"rms must be [{activations.shape[2]}], got shape {rms.shape}")
    if not (np.isfinite(rms).all() and np.isfinite(activations).all() and (rms >= 0).all()):
        raise ValueError("activations and rms must be finite, rms not negative")
    alive = rms > 0
    strength = activations / np.where(alive, rms, 1)
    return np.where(alive, strength, -np.inf).argmax(2)


def upsample(labels: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return labels [n, H, W] of pixels from those of patches [n, N], N = rows x columns.

    A pixel gets the label of the patch in which its centre lies. Raises ValueError: another N.
    """
    labels = _patches(labels, grid)
    rows, columns = _patch_of(grid, size)
    return labels.reshape(-1, *grid)[:, rows[:, None], columns]


def patch_labels(
    masks: np.ndarray, grid: tuple[int, int], *, background: bool = True
) -> np.ndarray:
    """Return the label int64 [n, N] that most pixels of each patch have; of equals the lowest.

    masks: [n, H, W]. The way back of `upsample`, and about the best that whole patches can do: for
    mBO as it is, for FG-ARI without `background`, where a patch is an object's if it shows any.
    Raises ValueError: a patch without a pixel.
    """
    masks, labels = np.asarray(masks), _compact(masks, "masks")
    if masks.shape[1] < grid[0] or masks.shape[2] < grid[1]:
        raise ValueError(f"masks of {masks.shape[1]}x{masks.shape[2]} pixels on a grid {grid}")
    rows, columns = _patch_of(grid, masks.shape[1:])
    patch = np.broadcast_to(rows[:, None] * grid[1] + columns, masks.shape)
    patches = _compact(patch, "patches")
    result = np.empty((len(masks), grid[0] * grid[1]), np.int64)
    for part, counts in _tables(patches, labels):
        counts[..., 0] *= background
        result[part] = labels.values[counts.argmax(2)]
    return result


def fg_ari(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the adjusted Rand index over the foreground pixels of each image, float64 [n].

    1 is agreement up to names, 0 the expectation for segments drawn at random with the same sizes
    (Hubert and Arabie 1985), which may be undercut. Only pixels of objects count (Greff et al.
    2019, IODINE). With a single object the index is 1 if one segment has all of it and else 0, as
    in the reference code (multi_object_datasets) and scikit-learn: there it says little. NaN with
    fewer than two foreground pixels.
    """
    result = np.full(len(true), np.nan)
    for part, counts in _tables(*_both(true, predicted)):
        counts = counts[:, 1:].astype(np.float64)  # without the background
        pixels = counts.sum((1, 2))
        pairs = pixels * (pixels - 1)
        together = (counts * (counts - 1)).sum((1, 2))
        in_true, in_predicted = (_ordered_pairs(counts.sum(axis)) for axis in (2, 1))
        defined = pairs > 0
        chance = in_true * (in_predicted / np.where(defined, pairs, 1))
        best = (in_true + in_predicted) / 2
        # Where the largest value is the expected one both sides agree: one segment, or all apart.
        same = best == chance
        index = np.where(same, 1, (together - chance) / np.where(same, 1, best - chance))
        result[part] = np.where(defined, index, np.nan)
    return result


def mean_best_overlap(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the mean over an image's objects of the best IoU with a segment, float64 [n].

    IoU is pixels in both over pixels in either, with the whole segment, background included
    (Pont-Tuset et al. 2017; used so by DINOSAUR, Seitzer et al. 2023). One segment may serve
    several objects. NaN where an image has no object.
    """
    result = np.full(len(true), np.nan)
    for part, counts in _tables(*_both(true, predicted)):
        objects = counts.sum(2)[:, 1:]
        either = objects[:, :, None] + counts.sum(1)[:, None] - counts[:, 1:]
        best = (counts[:, 1:] / np.maximum(either, 1)).max(2)
        number = (objects > 0).sum(1)
        result[part] = np.where(number, best.sum(1) / np.maximum(number, 1), np.nan)
    return result


def object_scores(
    true: np.ndarray,
    labels: np.ndarray,
    grid: tuple[int, int],
    *,
    resamples: int = 200,
    random_state: int = 0,
) -> dict[str, Estimate]:
    """Return fg_ari and mbo of an assignment of patches, averaged over the images.

    true: masks [n, H, W]; labels: [n, N]. The interval resamples images. Both grow towards 1.
    FG-ARI is averaged over images with two objects or more: of a single one it would say only that
    it is whole, and everything in one group would be perfect.
    """
    predicted = upsample(labels, grid, true.shape[1:])
    several = np.array([len(np.unique(mask[mask > 0])) > 1 for mask in np.asarray(true)], bool)
    values = {
        "fg_ari": np.where(several, fg_ari(true, predicted), np.nan),
        "mbo": mean_best_overlap(true, predicted),
    }
    return {
        name: mean_estimate(value, resamples=resamples, random_state=random_state)
        for name, value in values.items()
    }


def kmeans_patches(
    train_tokens: np.ndarray, tokens: np.ndarray, k: int, random_state: int = 0
) -> np.ndarray:
    """Return the nearest of k means for each patch, int64 [n, N]: the baseline for groups.

    train_tokens: [m, D], of which at most `KMEANS_POINTS` are used, drawn at random; tokens:
    [n, N, D]. The means are shared by all images, as groups are. Tokens that have fewer than k
    different values make fewer clusters.

    Raises ValueError: other shapes, values that are not finite, fewer than k training tokens.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    train_tokens, tokens = np.asarray(train_tokens), np.asarray(tokens)
    if train_tokens.ndim != 2 or tokens.ndim != 3 or train_tokens.shape[1] != tokens.shape[2]:
        raise ValueError(
            f"tokens must be [m, D] and [n, N, D], got shapes {train_tokens.shape}, {tokens.shape}"
        )
    if not 1 <= k <= len(train_tokens):
        raise ValueError(f"k = {k}: there are {len(train_tokens)} training tokens")
    if not (np.isfinite(train_tokens).all() and np.isfinite(tokens).all()):
        raise ValueError("tokens must be finite")
    if len(train_tokens) > KMEANS_POINTS:
        rng = np.random.default_rng(random_state)
        train_tokens = train_tokens[rng.choice(len(train_tokens), KMEANS_POINTS, replace=False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different values than k
        means = KMeans(k, n_init="auto", random_state=random_state).fit(train_tokens)
    found = np.asarray(means.predict(tokens.reshape(-1, tokens.shape[2])), np.int64)
    return found.reshape(tokens.shape[:2])


def position_blocks(grid: tuple[int, int], n: int, k: int, random_state: int = 0) -> np.ndarray:
    """Return labels int64 [n, N] of k compact blocks, the same on all images.

    k-means on the patches' positions: what an assignment scores that knows nothing of the image.
    With fewer than k patches each is a block of its own.
    """
    where = np.indices(grid, float).reshape(2, -1).T
    blocks = kmeans_patches(where, where[None], min(k, len(where)), random_state)
    return np.repeat(blocks, n, 0)


def permuted_patches(labels: np.ndarray, random_state: int = 0) -> np.ndarray:
    """Return labels [n, N] with each image's patches in random order: segments of equal sizes."""
    return np.random.default_rng(random_state).permuted(np.asarray(labels), axis=1)


class _Labels(NamedTuple):
    """Masks whose labels are counted off from 0; label 0 stays, whether it occurs or not."""

    masks: np.ndarray  # [n, H, W]
    values: np.ndarray  # the labels that occur, ascending
    position: np.ndarray  # of a label in `values`


def _compact(masks: np.ndarray, what: str) -> _Labels:
    masks = np.asarray(masks)
    if masks.dtype == bool:
        masks = masks.astype(np.uint8)
    if masks.ndim != 3 or not np.issubdtype(masks.dtype, np.integer):
        raise ValueError(f"{what} must be whole numbers [n, H, W], got {masks.dtype} {masks.shape}")
    if masks.size and not 0 <= masks.min() <= masks.max() <= MAX_LABEL:
        raise ValueError(f"{what} must be from 0 to {MAX_LABEL}")
    seen = np.zeros(MAX_LABEL + 1, bool)
    seen[0] = True
    seen[masks] = True
    return _Labels(masks, np.flatnonzero(seen), seen.cumsum() - 1)


def _both(true: np.ndarray, predicted: np.ndarray) -> tuple[_Labels, _Labels]:
    if np.shape(true) != np.shape(predicted):
        raise ValueError(f"true masks {np.shape(true)} and predicted masks {np.shape(predicted)}")
    return _compact(true, "true masks"), _compact(predicted, "predicted masks")


def _parts(first: _Labels, second: _Labels) -> Iterator[slice]:
    """Some images at a time, as memory allows."""
    n, height, width = first.masks.shape
    cells = max(height * width, len(first.values) * len(second.values), 1)
    step = max(1, _CELLS // cells)
    return (slice(start, start + step) for start in range(0, n, step))


def _tables(first: _Labels, second: _Labels) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield which images, and how many pixels have which two labels, int64 [m, T, P]."""
    shape = len(first.values), len(second.values)
    for part in _parts(first, second):
        pair = first.position[first.masks[part]] * shape[1] + second.position[second.masks[part]]
        m = len(pair)
        pair += np.arange(m)[:, None, None] * (shape[0] * shape[1])
        counts = np.bincount(pair.ravel(), minlength=m * shape[0] * shape[1])
        yield part, counts.reshape(m, *shape)


def _ordered_pairs(sizes: np.ndarray) -> np.ndarray:
    """Pairs of pixels within clusters of the sizes [m, clusters], summed: [m]."""
    return (sizes * (sizes - 1)).sum(1)


def _patches(labels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"labels of patches must be [n, {grid[0]}x{grid[1]}], got {labels.shape}")
    return labels


def _patch_of(grid: tuple[int, int], size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The row of patches of each row of pixels [H], and the column of each column [W]."""
    rows, columns = (
        (2 * np.arange(pixels) + 1) * patches // (2 * pixels)
        for patches, pixels in zip(grid, size, strict=True)
    )
    return rows, columns


# --- pairs of patches: the mechanism that SparseJEPA claims ---------------------------------------
#
# Patches of one object share information, and so come to share a group (Hartman and Varshney 2025,
# section 3). Near patches share more anyway, so pairs are compared offset by offset (rows and
# columns apart), and both kinds get the same weights over offsets: the smaller of the two numbers
# of pairs. Intervals leave out parts of the images in turn.


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
    spread = NORMAL * error
    return Estimate(float(values[0]), float(values[0] - spread), float(values[0] + spread))
