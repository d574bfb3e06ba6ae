"""Do the groups follow objects? Patches as segments, against true object masks.

A group of a token-level map is a segment: the patches on which it is stronger, for its own scale,
than all others. Large smooth segments score by geometry alone, so that beside the model's stand
k-means on the tokens, blocks that see only positions, and the same patches in random order.

Masks are whole numbers [n, H, W]; in true masks 0 is the background and every other number one
object. Predicted masks have no background: every number is a segment.

Letters: n images, N patches on a grid of rows x columns, H x W pixels, G groups, D latents.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np

from sparsejepa.evaluation.information import gaussian_mutual_information, normal_scores
from sparsejepa.evaluation.stats import FOLDS, NORMAL, Estimate, mean_estimate, undefined

KMEANS_POINTS = 20_000
"""k-means is fitted on so many tokens at most."""

Grid = tuple[int, int]


def assign_patches(activations: np.ndarray) -> np.ndarray:
    """Return the group of each patch, int64 [n, N]: the largest activation over its rms.

    activations: [n, N, G] >= 0, ||W^(g) z||; each group's root mean square is over all of them. A
    group whose rms is 0 never wins; ties go to the lower index, so that without any living group
    all patches are in group 0.
    """
    flat = activations.reshape(-1, activations.shape[2])
    rms = np.sqrt(np.einsum("mg,mg->g", flat, flat, dtype=np.float64) / max(1, len(flat)))
    strength = activations / np.where(rms > 0, rms, 1)
    return np.where(rms > 0, strength, -np.inf).argmax(2)


def upsample(labels: np.ndarray, grid: Grid, size: tuple[int, int]) -> np.ndarray:
    """Return labels [n, H, W] of pixels from those of patches [n, N], N = rows x columns.

    A pixel gets the label of the patch in which its centre lies.
    """
    return labels[:, _patch_of(grid, size)]


def patch_labels(masks: np.ndarray, grid: Grid, *, background: bool = True) -> np.ndarray:
    """Return the label int64 [n, N] that most pixels of each patch have; of equals the lowest.

    masks: [n, H, W], each patch with a pixel at least. The way back of `upsample`, and about the
    best that whole patches can do: for mBO as it is, for FG-ARI without `background`, where a patch
    is an object's if it shows any.
    """
    patches, patch = grid[0] * grid[1], _patch_of(grid, masks.shape[1:])
    values = np.union1d([0], masks)
    result = np.empty((len(masks), patches), np.int64)
    for labels, mask in zip(result, masks, strict=True):
        cells = patch * len(values) + np.searchsorted(values, mask)
        counts = np.bincount(cells.ravel(), minlength=patches * len(values)).reshape(patches, -1)
        counts[:, 0] *= background
        labels[:] = values[counts.argmax(1)]
    return result


def _patch_of(grid: Grid, size: tuple[int, ...]) -> np.ndarray:
    """Return the patch of each pixel [H, W]."""
    rows, columns = (
        (2 * np.arange(pixels) + 1) * patches // (2 * pixels)
        for patches, pixels in zip(grid, size, strict=True)
    )
    return rows[:, None] * grid[1] + columns


def fg_ari(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the adjusted Rand index over the foreground pixels of each image, float64 [n].

    1 is agreement up to names, 0 the expectation for segments drawn at random with the same sizes
    (Hubert and Arabie 1985), which may be undercut. Only pixels of objects count (Greff et al.
    2019, IODINE). With a single object the index is 1 if one segment has all of it and else 0:
    there it says little. NaN with fewer than two foreground pixels.
    """
    from sklearn.metrics import adjusted_rand_score

    found = np.full(len(true), np.nan)
    for i, (t, p) in enumerate(zip(true, predicted, strict=True)):
        if np.count_nonzero(t) > 1:
            found[i] = adjusted_rand_score(t[t > 0], p[t > 0])
    return found


def mean_best_overlap(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the mean over an image's objects of the best IoU with a segment, float64 [n].

    IoU is pixels in both over pixels in either, with the whole segment, background included
    (Pont-Tuset et al. 2017; used so by DINOSAUR, Seitzer et al. 2023). One segment may serve
    several objects. NaN where an image has no object.
    """
    from sklearn.metrics.cluster import contingency_matrix

    found = np.full(len(true), np.nan)
    for i, (t, p) in enumerate(zip(true, predicted, strict=True)):
        both = np.asarray(contingency_matrix(t.ravel(), p.ravel()))
        overlap = both / (both.sum(1, keepdims=True) + both.sum(0) - both)
        best = overlap.max(1)[np.unique(t) > 0]
        if len(best):
            found[i] = best.mean()
    return found


def object_scores(true: np.ndarray, labels: np.ndarray, grid: Grid) -> dict[str, Estimate]:
    """Return FG-ARI and mBO of an assignment of patches, averaged over the images.

    true: masks [n, H, W]; labels: [n, N]. The interval resamples images. Both grow towards 1.
    FG-ARI is averaged over images with two objects or more: of a single one it would say only that
    it is whole, and everything in one group would be perfect.
    """
    predicted = upsample(labels, grid, true.shape[1:])
    several = np.array([len(np.unique(mask[mask > 0])) > 1 for mask in true], bool)
    ari = np.where(several, fg_ari(true, predicted), np.nan)
    values = {"FG-ARI": ari, "mBO": mean_best_overlap(true, predicted)}
    return {name: mean_estimate(value, resamples=200) for name, value in values.items()}


def kmeans_patches(
    train_tokens: np.ndarray, tokens: np.ndarray, k: int, random_state: int = 0
) -> np.ndarray:
    """Return the nearest of k means for each patch, int64 [n, N]: the baseline for groups.

    train_tokens: [m, D], of which at most `KMEANS_POINTS` are used, drawn at random; tokens:
    [n, N, D]. The means are shared by all images, as groups are. Tokens that have fewer than k
    different values make fewer clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(train_tokens) > KMEANS_POINTS:
        rng = np.random.default_rng(random_state)
        train_tokens = train_tokens[rng.choice(len(train_tokens), KMEANS_POINTS, replace=False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different values than k
        means = KMeans(k, n_init="auto", random_state=random_state).fit(train_tokens)
    found = np.asarray(means.predict(tokens.reshape(-1, tokens.shape[2])), np.int64)
    return found.reshape(tokens.shape[:2])


def position_blocks(grid: Grid, n: int, k: int, random_state: int = 0) -> np.ndarray:
    """Return labels int64 [n, N] of k compact blocks, the same on all images.

    k-means on the patches' positions: what an assignment scores that knows nothing of the image.
    With fewer than k patches each is a block of its own.
    """
    where = np.indices(grid, float).reshape(2, -1).T
    blocks = kmeans_patches(where, where[None], min(k, len(where)), random_state)
    return np.repeat(blocks, n, 0)


# --- pairs of patches: the mechanism that SparseJEPA claims ---------------------------------------
#
# Patches of one object share information, and so come to share a group (Hartman and Varshney 2025,
# section 3). Near patches share more anyway, so pairs are compared offset by offset (rows and
# columns apart), and both kinds get the same weights over offsets: the smaller of the two numbers
# of pairs. Intervals leave out parts of the images in turn.

REACH = 2
"""Largest offset, in rows and in columns."""
LEAST, MOST = 200, 20_000
"""Pairs of either kind that an offset needs to count, and those whose information is measured."""
AXES = 8
"""Principal axes of the tokens whose information is measured."""


def pair_information(
    tokens: np.ndarray, objects: np.ndarray, grid: Grid, random_state: int = 0
) -> dict[str, Estimate]:
    """Return the information that the two tokens of a pair share, of pairs within and across.

    Gaussian-copula mutual information in nats: of pairs within `one object`, of pairs across
    `two objects`, and their `gap`. Undefined where no offset has enough pairs.

    Args:
        tokens: [n, N, D]. The mean token of each patch is taken out, so that place alone is no
            information, and `AXES` principal axes are kept.
        objects: int [n, N], the object of each patch, 0 for background.
        grid: rows and columns of patches.
    """
    centred = tokens.astype(np.float32) - tokens.mean(0, dtype=np.float64).astype(np.float32)
    flat = centred.reshape(-1, tokens.shape[2])
    _, basis = np.linalg.eigh((flat.T @ flat).astype(np.float64))
    axes = (flat @ basis[:, ::-1][:, :AXES]).reshape(*tokens.shape[:2], -1)
    rng = np.random.default_rng(random_state)

    def information(pairs: np.ndarray) -> np.ndarray:
        image, first, second, fold = pairs[:, rng.permutation(pairs.shape[1])[:MOST]]
        x, y = normal_scores(axes[image, first]), normal_scores(axes[image, second])
        found = []
        for left_out in range(-1, FOLDS):  # ranks are kept
            kept = fold != left_out
            value = gaussian_mutual_information(x[kept], y[kept], copula=False, resamples=0).value
            found.append(math.nan if value is None else value)
        return np.array(found)

    return _over_offsets(objects, grid, rng, information)


def pair_sharing(
    objects: np.ndarray, groups: np.ndarray, grid: Grid, random_state: int = 0
) -> dict[str, Estimate]:
    """Return the probability that the patches of a pair are in one group.

    Keys and arguments as for `pair_information`; groups: int [n, N], the group of each patch.
    """

    def shared(pairs: np.ndarray) -> np.ndarray:
        image, first, second, fold = pairs
        same = groups[image, first] == groups[image, second]
        total, count = np.bincount(fold, same, FOLDS), np.bincount(fold, minlength=FOLDS)
        left = np.maximum(count.sum() - count, 1)
        return np.concatenate([[same.mean()], (total.sum() - total) / left])

    return _over_offsets(objects, grid, np.random.default_rng(random_state), shared)


def _over_offsets(
    objects: np.ndarray,
    grid: Grid,
    rng: np.random.Generator,
    measure: Callable[[np.ndarray], np.ndarray],
) -> dict[str, Estimate]:
    """Average a measure of pairs within objects and across over offsets, and take the gap.

    `measure` takes image, first patch, second patch and fold of k pairs, [4, k], and returns its
    value on all of them, then without each fold: [1 + FOLDS].
    """
    folds = rng.permutation(np.arange(len(objects)) % FOLDS)
    found, weights = [], []
    for first, second in _patches_apart(grid):
        seen = (objects[:, first] > 0) & (objects[:, second] > 0)
        same = objects[:, first] == objects[:, second]
        kinds = [
            np.stack([image, first[k], second[k], folds[image]])
            for image, k in (np.nonzero(seen & same), np.nonzero(seen & ~same))
        ]
        count = min(pairs.shape[1] for pairs in kinds)
        if count >= LEAST:
            found.append([measure(pairs) for pairs in kinds])
            weights.append(count)
    names = "one object", "two objects", "gap"
    if not found:
        return dict.fromkeys(names, undefined(f"no offset has {LEAST} pairs of both kinds"))
    within, across = np.average(np.array(found), axis=0, weights=weights)
    parts = within, across, within - across
    return {name: _jackknife(values) for name, values in zip(names, parts, strict=True)}


def _patches_apart(grid: Grid) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the two patches [k] of all pairs at one offset, each unordered pair once."""
    patches = np.arange(math.prod(grid)).reshape(grid)
    for down in range(min(REACH, grid[0] - 1) + 1):
        for right in range(-REACH if down else 1, REACH + 1):
            if abs(right) < grid[1]:
                left, cut = max(0, -right), max(0, right)
                first = patches[: grid[0] - down, left : grid[1] - cut]
                second = patches[down:, cut : grid[1] - left]
                yield first.ravel(), second.ravel()


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
