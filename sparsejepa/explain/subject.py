"""What is explained: an encoder with the groups that it was trained with, or with fitted ones.

Beside it stand its columns: the run, a control and the floors, each an encoder with a W. A floor is
measured exactly as the run is: the untrained encoder keeps W; PCA keeps the encoder and puts other
directions in the place of W. Random zeros on the run's own encoder are no column: an encoder adapts
to whatever pattern it was trained with, so even a pattern that was its random start beats shuffles
of it. What tells is an encoder that was trained with a random pattern, as control.

Letters as in `readout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsejepa.config import Config
from sparsejepa.data.images import ImageSet
from sparsejepa.encoders.encoder import Encoder, load_groups
from sparsejepa.encoders.load import folder_of, load
from sparsejepa.errors import UserError
from sparsejepa.explain.options import Options
from sparsejepa.explain.posthoc import PostHocGroups
from sparsejepa.explain.readout import Readout, Scale, read, read_train, token_batches
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
    W: Tensor
    """[G, P, D], on the CPU."""
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
        return np.linalg.norm(self.W.numpy(), axis=1)

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
        return Subject(ref, encoder, groups.W.detach().clone(), groups, config, groups.kind)
    fitted = fit_groups(encoder, train, options)
    W = torch.as_tensor(fitted.W_).float()
    return Subject(ref, encoder, W, None, config, options.groups, fitted)


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
    part = images.subset(min(limit, max(256, _images_in(TOKEN_BYTES, encoder))))
    return torch.cat([x.cpu() for x in token_batches(encoder, part)])


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
    subject: Subject, train: ImageSet, test: ImageSet, options: Options
) -> dict[str, Column]:
    """Read both splits through the run, a control and the floors, in the order of the tables.

    Where the run's groups were fitted, the untrained encoder gets fitted ones too.

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
    own, other = theirs.part(slice(G)).under(W), theirs.part(slice(G, None)).under(pca)
    raw, grid = _raw(theirs, scale), encoder.grid_size

    columns = {RUN: Column(W, mine.under(W), own, raw, grid)}
    if options.control is not None:
        columns |= _control(options.control, subject, train, test, options)
    fresh = encoder.untrained(options.seed)
    if subject.groups is None:
        W = fit_groups(fresh, train, replace(options, num_groups=G)).W_
    columns[UNTRAINED] = _read_both(fresh, W, train, test)
    # The units of PCA are the axes themselves.
    ours, others = (replace(r, z=r.z @ axes.T) for r in (mine.under(pca), other))
    columns[PCA] = Column(pca, ours, others, raw, grid)
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
    ref: str, subject: Subject, train: ImageSet, test: ImageSet, options: Options
) -> dict[str, Column]:
    """Read another run; one without groups gets fitted ones, as many as the subject has."""
    encoder = load(ref, subject.encoder.device, options.precision)
    folder = folder_of(ref)
    groups = None if folder is None else load_groups(folder, encoder.grid_size)
    name, W = f"control {short_name(ref)}", None
    if groups is not None:
        W = groups.W.detach().cpu().numpy()
    elif not options.quick:
        G = len(subject.W)
        kind = "concept" if encoder.embed_dim % G else options.groups
        W = fit_groups(encoder, train, replace(options, num_groups=G, groups=kind)).W_
        name += " (fitted groups)"
    return {name: _read_both(encoder, W, train, test)}


def _read_both(encoder: Encoder, W: np.ndarray | None, train: ImageSet, test: ImageSet) -> Column:
    """Read both splits through an encoder under W."""
    used = np.zeros((1, 1, encoder.embed_dim), np.float32) if W is None else W
    scale, mine = read_train(encoder, train)
    theirs = read(encoder, test, torch.from_numpy(used), scale, keep_tokens=_kept(encoder))
    return Column(W, mine.under(used), theirs, _raw(theirs, scale), encoder.grid_size)


def short_name(ref: str) -> str:
    """Return what tables call an encoder: the last part of a path, a timm name without prefix."""
    return ref.removeprefix("timm:") if ref.startswith("timm:") else Path(ref).resolve().name


def _kept(encoder: Encoder) -> int:
    return min(KEPT_IMAGES, max(50, _images_in(TOKEN_BYTES, encoder)))


def _images_in(memory: int, encoder: Encoder) -> int:
    return memory // (4 * encoder.grid_size[0] * encoder.grid_size[1] * encoder.embed_dim)


def _raw(readout: Readout, scale: Scale) -> np.ndarray:
    """Undo the standardisation of the pooled latents."""
    return readout.z * scale.pooled_std.numpy() + scale.pooled_mean.numpy()
