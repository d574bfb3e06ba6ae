"""What is explained, an encoder with its groups, and what it and its floors give for images.

Groups are those that the encoder was trained with, or fitted ones. Beside the run stand its floors,
each an encoder with a W that is measured exactly as the run is: the untrained encoder keeps W; PCA
keeps the encoder and puts other directions in the place of W. Random zeros on the run's own encoder
are no floor: an encoder adapts to whatever pattern it was trained with, so even a pattern that was
its random start beats shuffles of it.

Latents are standardised per dimension with the statistics of training images, nothing else lies
between the encoder and W. So a group's activation is ||W^(g) z|| with z in units of each latent's
own spread, also where W comes from another encoder (a floor) or was fitted post hoc.

Letters: n images, N patches, D latents, G groups, P group width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from sparsejepa.config import Config
from sparsejepa.data.images import DeviceImages, ImageSet
from sparsejepa.encoders.encoder import Encoder, load_groups
from sparsejepa.encoders.load import folder_of, load
from sparsejepa.errors import UserError
from sparsejepa.evaluation.features import MAX_TOKENS
from sparsejepa.explain.options import Options
from sparsejepa.explain.posthoc import PostHocGroups
from sparsejepa.model.groups import GroupMap, Kind
from sparsejepa.training.loop import read_config

RUN, UNTRAINED, PCA = "this run", "untrained", "PCA"
RANDOM, DIRECTIONS = "random zeros", "random directions"
"""Of some measures only: groups that were fitted with random zeros, and subspaces of equal rank."""
KMEANS, PLACES, SHUFFLED, ALL = "k-means", "places", "shuffled", "all connections"
FLOORS = (UNTRAINED, PCA, RANDOM, DIRECTIONS, KMEANS, PLACES, SHUFFLED)
"""In the order of the tables."""
CEILING = "ceiling"
"""The best that any grouping of whole patches can do; no model."""
REFERENCES = (*FLOORS, ALL, CEILING)

FLAT = 1e-6
"""Latents with a smaller spread than this share of the largest are constant: they stay 0."""
KEPT_IMAGES = 1_000
"""Test images whose tokens are kept, at most; of training images half as many."""
FITTED_IMAGES = 2_000
"""Training images that groups are fitted on, at most."""
TOKEN_BYTES = 256 * 2**20
"""Memory of the tokens of either, at most."""
MAX_GROUPS = 254
"""What the page can tell apart."""


@dataclass(frozen=True)
class Subject:
    """An encoder, its group map and what is known of both."""

    ref: str
    encoder: Encoder
    W: np.ndarray
    """[G, P, D] float32."""
    groups: GroupMap | None
    """The map that the run was trained with; None if the groups were fitted post hoc."""
    config: Config | None
    """The settings of the run; None for a public encoder."""
    kind: Kind
    """What a group is."""
    estimator: PostHocGroups | None = None
    """What the groups were fitted with, if they were."""

    @property
    def norms(self) -> np.ndarray:
        """||W_gj||, [G, D]."""
        return np.linalg.norm(self.W, axis=1)

    def cells(self) -> list[list[int]]:
        """Return the patches that each region group predicts, empty lists for other kinds."""
        if self.groups is None or self.groups.cells is None:
            return [[] for _ in self.W]
        cells = self.groups.cells.numpy()
        return [np.flatnonzero(cells == g).tolist() for g in range(len(self.W))]


def open_subject(ref: str, train: ImageSet, options: Options, device: str = "cpu") -> Subject:
    """Load an encoder and its groups, or fit groups to it on tokens of `train`.

    Raises UserError if there is no such encoder or it has fewer latents than groups are asked for.
    """
    encoder = load(ref, device, options.precision)
    run_dir = folder_of(ref)
    config = read_config(run_dir) if run_dir and (run_dir / "config.toml").exists() else None
    groups = load_groups(run_dir, encoder.grid_size) if run_dir else None
    if groups is not None:
        return Subject(ref, encoder, groups.W.detach().numpy(), groups, config, groups.kind)
    fitted = fit_groups(encoder, train, options)
    return Subject(ref, encoder, fitted.W_.astype(np.float32), None, config, options.groups, fitted)


def fit_groups(encoder: Encoder, train: ImageSet, options: Options) -> PostHocGroups:
    """Fit groups to an encoder's tokens of training images.

    Raises UserError if the encoder has fewer latents than groups are asked for.
    """
    D, G = encoder.embed_dim, options.num_groups
    most = min(D, MAX_GROUPS)
    if not 1 <= G <= most:
        raise UserError(f"--num-groups {G}: {encoder.name} has {D} latents; take 1 to {most}")
    if options.groups == "feature" and D % G:
        raise UserError(
            f"--num-groups {G} does not divide the {D} latents of {encoder.name}; take another "
            "number, or --groups concept"
        )
    return PostHocGroups(
        num_groups=G,
        kind=options.groups,
        density=options.density,
        steps=options.fit_steps,
        grid_size=encoder.grid_size,
        random_state=options.seed,
    ).fit(fitting_tokens(encoder, train, FITTED_IMAGES))


def fitting_tokens(encoder: Encoder, images: ImageSet, limit: int) -> Tensor:
    """Return the tokens [n, N, D] of at most `limit` images, fewer where memory would not do."""
    part = images.subset(min(limit, max(256, _images_in_memory(encoder))))
    return torch.cat([x.cpu() for _, x in token_batches(encoder, part)])


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation [D] of patch tokens and of pooled vectors, on training images."""

    token_mean: Tensor
    token_std: Tensor
    pooled_mean: Tensor
    pooled_std: Tensor


@dataclass(frozen=True)
class Readout:
    """What an encoder and a W give for whole images.

    z: pooled latents, standardised, [n, D]; vectors: u_g = W^(g) z, [n, G, P].
    """

    z: np.ndarray
    vectors: np.ndarray

    @classmethod
    def under(cls, W: np.ndarray, z: np.ndarray) -> Self:
        """Return what W [G, P, D] makes of z [n, D]."""
        G, P, D = W.shape
        return cls(z, (z @ W.reshape(-1, D).T).reshape(-1, G, P))

    @property
    def activations(self) -> np.ndarray:
        """||W^(g) z||, [n, G]."""
        return np.linalg.norm(self.vectors, axis=2)


@dataclass(frozen=True)
class Column:
    """A column of the table: an encoder's readout of both splits under one W."""

    W: np.ndarray
    train: Readout
    test: Readout
    patches: np.ndarray
    """[n, N, G] float16: ||W^(g) z|| of every patch of the test images."""
    scale: Scale


Columns = Mapping[str, Column]


def build_columns(
    subject: Subject, train: ImageSet, test: ImageSet, options: Options
) -> dict[str, Column]:
    """Read both splits through the run and the floors, in the order of the tables.

    Where the run's groups were fitted, the untrained encoder gets fitted ones too.
    """
    encoder, W = subject.encoder, subject.W
    scale, z = read_train(encoder, train)
    axes = principal_axes(z)
    pca = _runs_of(axes, *W.shape[:2])
    z_test, (own, other) = read(encoder, test, [W, pca], scale)
    fresh, theirs = encoder.untrained(options.seed), W
    if subject.groups is None:
        theirs = fit_groups(fresh, train, replace(options, num_groups=len(W))).W_
    fresh_scale, before = read_train(fresh, train)
    after, (patches,) = read(fresh, test, [theirs], fresh_scale)
    under = Readout.under
    # The units of PCA are the axes themselves.
    first, second = (Readout(x @ axes.T, under(pca, x).vectors) for x in (z, z_test))
    return {
        RUN: Column(W, under(W, z), under(W, z_test), own, scale),
        UNTRAINED: Column(
            theirs, under(theirs, before), under(theirs, after), patches, fresh_scale
        ),
        PCA: Column(pca, first, second, other, scale),
    }


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


def _images_in_memory(encoder: Encoder) -> int:
    return TOKEN_BYTES // (4 * encoder.grid_size[0] * encoder.grid_size[1] * encoder.embed_dim)


def short_name(ref: str) -> str:
    """Return what tables call an encoder: the last part of a path, a timm name without prefix."""
    return ref.removeprefix("timm:") if ref.startswith("timm:") else Path(ref).resolve().name


# --- one pass over images -------------------------------------------------------------------------


def standardise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std, 0 where a latent hardly varies."""
    flat = std <= FLAT * std.max()
    return ((x - mean) / std.masked_fill(flat, 1.0)).masked_fill(flat, 0.0)


def read_train(encoder: Encoder, images: ImageSet) -> tuple[Scale, np.ndarray]:
    """Return the statistics of training images, and their standardised pooled latents [n, D].

    Raises UserError for an encoder that gives NaN, infinity, or the same vector for every image.
    """
    n, N, D = len(images), encoder.grid_size[0] * encoder.grid_size[1], encoder.embed_dim
    total, pooled = torch.zeros(2, D, dtype=torch.float64), torch.empty(n, D)
    for part, tokens in token_batches(encoder, images):
        pooled[part] = tokens.mean(1).cpu()
        for i, power in enumerate((tokens, tokens.square())):
            # In float64 from one image on: sums of many squares less a mean lose digits.
            total[i] += power.sum(1).double().sum(0).cpu()
    mean = total[0] / (n * N)
    std = (total[1] / (n * N) - mean.square()).clamp_min(0).sqrt()
    if not (pooled.isfinite().all() and std.isfinite().all()):
        raise UserError(f"{encoder.name}: gives NaN or infinity on {images.name}; train it again")
    spread = pooled.std(0, correction=0)
    if float(spread.max()) <= 1e-6 * float(pooled.abs().max()):
        raise UserError(
            f"{encoder.name}: gives the same vector for every image of {images.name}, a dead "
            "encoder; there is nothing to explain, train it again"
        )
    scale = Scale(mean.float(), std.float(), pooled.mean(0), spread)
    return scale, standardise(pooled, scale.pooled_mean, scale.pooled_std).numpy()


def read(
    encoder: Encoder, images: ImageSet, maps: Sequence[np.ndarray], scale: Scale
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return standardised pooled latents [n, D], and ||W^(g) z|| of patches for each W of `maps`.

    maps: each [G, P, D]; activations: each [n, N, G] float16.
    """
    n, N, D = len(images), encoder.grid_size[0] * encoder.grid_size[1], encoder.embed_dim
    flat = [torch.from_numpy(W).float().to(encoder.device).flatten(0, 1).T for W in maps]
    moments = [x.to(encoder.device) for x in vars(scale).values()]
    z, activations = np.empty((n, D), np.float32), [np.empty((n, N, len(W)), "f2") for W in maps]
    for part, tokens in token_batches(encoder, images):
        z[part] = standardise(tokens.mean(1), *moments[2:]).cpu().numpy()
        tokens = standardise(tokens, *moments[:2])
        for found, W, matrix in zip(activations, maps, flat, strict=True):
            u = (tokens.flatten(0, 1) @ matrix).view(-1, N, *W.shape[:2])
            found[part] = u.norm(dim=-1).half().cpu().numpy()
    return z, activations


def read_tokens(
    encoder: Encoder, images: ImageSet, scale: Scale, part: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return the images [m] that are kept, spread evenly, and their standardised tokens [m, N, D].

    These are `KEPT_IMAGES` or what memory allows, divided by `part`.
    """
    kept = evenly(len(images), min(KEPT_IMAGES, max(50, _images_in_memory(encoder))) // part)
    tokens = torch.cat([x.cpu() for _, x in token_batches(encoder, images, kept)])
    return kept, standardise(tokens, scale.token_mean, scale.token_std).numpy()


def evenly(n: int, count: int) -> np.ndarray:
    """Return at most `count` of n images, spread evenly, as data are often sorted by class."""
    count = min(count, n)
    return np.arange(count) * n // max(count, 1)


def token_batches(
    encoder: Encoder, images: ImageSet, index: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield places [b] in an image set and their tokens [b, N, D] on the encoder's device."""
    source = DeviceImages(images, encoder.device)
    most = MAX_TOKENS.get(encoder.device.type, MAX_TOKENS["cuda"])
    size = max(1, most // (encoder.grid_size[0] * encoder.grid_size[1]))
    places = torch.arange(len(images)) if index is None else torch.from_numpy(index)
    for part in places.split(size):
        yield part.numpy(), encoder.tokens(source.take(part))
