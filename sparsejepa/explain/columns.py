"""The columns of every table: the run, a control, and the floors, each an encoder with a W.

A floor is measured exactly as the run is: the untrained encoder keeps W; PCA keeps the encoder and
puts other directions in the place of W. Random zeros on the run's own encoder are no column: an
encoder adapts to whatever pattern it was trained with, so even a pattern that was its random start
beats shuffles of it. What tells is an encoder that was trained with a random pattern, as control.
Letters as in `readout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sparsejepa.data.store import ImageSet
from sparsejepa.encoders.encoder import Encoder, load_groups
from sparsejepa.encoders.load import folder_of, load
from sparsejepa.explain.readout import Readout, Scale, read, read_train
from sparsejepa.explain.subject import PostHoc, Subject, fit_groups

RUN, UNTRAINED, PCA = "this run", "untrained", "PCA"
RANDOM, DIRECTIONS = "random zeros", "random directions"
"""Of some measures only: groups that were fitted with random zeros, and subspaces of equal rank."""
KMEANS, PLACES, SHUFFLED, ALL = "k-means", "places", "shuffled", "all connections"
FLOORS = (UNTRAINED, PCA, RANDOM, DIRECTIONS, KMEANS, PLACES, SHUFFLED)
"""In the order of the tables. Some measures add floors of their own."""
CEILING = "ceiling"
"""The best that any grouping of whole patches can do; no model."""
REFERENCES = (*FLOORS, ALL, CEILING)
KEPT_IMAGES, KEPT_BYTES = 1_000, 256 * 2**20
"""Test images whose tokens are kept, and their memory, at most; of training images half as many."""


@dataclass(frozen=True)
class Column:
    """An encoder's readout of both splits under one W; W is None where there are no groups."""

    W: np.ndarray | None
    train: Readout
    test: Readout
    raw: np.ndarray
    """[n, D]: pooled latents of the test images as the encoder gives them."""
    grid: tuple[int, int]
    """Rows and columns of patches."""


Columns = Mapping[str, Column]


def build_columns(
    subject: Subject,
    train: ImageSet,
    test: ImageSet,
    *,
    control: str | None = None,
    posthoc: PostHoc | None = None,
    random_state: int = 0,
) -> dict[str, Column]:
    """Read both splits through the run, a control and the floors, in the order of the tables.

    Where the run's groups were fitted, the untrained encoder gets fitted ones too. A control that
    has no groups gets them by `posthoc`, none if that is None.

    Raises UserError if there is no such control.
    """
    encoder, W = subject.encoder, subject.W.numpy()
    G, P = W.shape[:2]
    keep = _kept(encoder)
    scale, mine = read_train(encoder, train, keep_tokens=keep // 2)
    axes = principal_axes(mine.z)
    pca = _runs_of(axes, G, P)
    # One pass for the two that share the encoder: their W are stacked.
    padded = np.pad(pca, ((0, 0), (0, P - pca.shape[1]), (0, 0)))
    stacked = torch.from_numpy(np.concatenate([W, padded])).float()
    theirs = read(encoder, test, stacked, scale, keep_tokens=keep)
    raw, grid = _raw(theirs, scale), encoder.grid_size

    def own(i: int, W: np.ndarray) -> tuple[Readout, Readout]:
        return mine.under(W), theirs.part(slice(i * G, (i + 1) * G)).under(W)

    columns = {RUN: Column(W, *own(0, W), raw, grid)}
    if control is not None:
        columns |= _control(control, encoder, train, test, posthoc, random_state)
    fresh = encoder.untrained(random_state)
    if subject.groups is None and posthoc is not None:
        W = fit_groups(fresh, train, posthoc, random_state).W_
    columns[UNTRAINED] = _other(fresh, W, train, test)
    # The units of PCA are the axes themselves.
    fitted, held_out = (replace(readout, z=readout.z @ axes.T) for readout in own(1, pca))
    columns[PCA] = Column(pca, fitted, held_out, raw, grid)
    return columns


def principal_axes(z: np.ndarray) -> np.ndarray:
    """Return the principal axes of z [n, D] as rows, [D, D], the largest variance first."""
    return np.linalg.eigh(np.cov(z, rowvar=False))[1][:, ::-1].T.astype(np.float32)


def _runs_of(axes: np.ndarray, num_groups: int, group_dim: int) -> np.ndarray:
    """Give group g the g-th run of principal axes: [G, P', D], P' = P unless G P exceeds D.

    With more groups than axes the last ones are zero.
    """
    D = len(axes)
    width = max(1, min(group_dim, D // num_groups))
    padded = np.pad(axes, ((0, max(0, num_groups - D)), (0, 0)))
    return padded[: num_groups * width].reshape(num_groups, width, D)


def _control(
    ref: str,
    like: Encoder,
    train: ImageSet,
    test: ImageSet,
    posthoc: PostHoc | None,
    random_state: int,
) -> dict[str, Column]:
    encoder = load(ref, like.device, like.precision)
    folder = folder_of(ref)
    groups = None if folder is None else load_groups(folder, encoder.grid_size)
    name, W = f"control {short_name(ref)}", None
    if groups is not None:
        W = groups.W.detach().cpu().numpy()
    elif posthoc is not None:
        if encoder.embed_dim % posthoc.num_groups:
            posthoc = replace(posthoc, kind="concept")
        name, W = f"{name} (fitted groups)", fit_groups(encoder, train, posthoc, random_state).W_
    return {name: _other(encoder, W, train, test)}


def _other(encoder: Encoder, W: np.ndarray | None, train: ImageSet, test: ImageSet) -> Column:
    """Read both splits through another encoder."""
    used = np.zeros((1, 1, encoder.embed_dim), np.float32) if W is None else W
    scale, mine = read_train(encoder, train)
    theirs = read(encoder, test, torch.from_numpy(used), scale, keep_tokens=_kept(encoder))
    return Column(W, mine.under(used), theirs, _raw(theirs, scale), encoder.grid_size)


def short_name(ref: str) -> str:
    """Return what tables call an encoder: the last part of a path, a timm name without prefix."""
    return ref.removeprefix("timm:") if ref.startswith("timm:") else Path(ref).resolve().name


def _kept(encoder: Encoder) -> int:
    patches = encoder.grid_size[0] * encoder.grid_size[1]
    return min(KEPT_IMAGES, max(50, KEPT_BYTES // (4 * patches * encoder.embed_dim)))


def _raw(readout: Readout, scale: Scale) -> np.ndarray:
    """Undo the standardisation of the pooled latents."""
    return readout.z * scale.pooled_std.numpy() + scale.pooled_mean.numpy()
