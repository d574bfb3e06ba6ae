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

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sparsejepa.evaluation.stats import Estimate, mean_estimate

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
