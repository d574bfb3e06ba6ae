"""What is explained: an encoder with the groups that it was trained with, or with fitted ones.

A dense run and a public encoder have no groups of their own; `PostHocGroups` then learns them on
the frozen tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsejepa.config import Config
from sparsejepa.data.store import ImageSet
from sparsejepa.encoders.encoder import Encoder, Precision, load_groups
from sparsejepa.encoders.load import folder_of, load
from sparsejepa.errors import UserError
from sparsejepa.evaluation.stats import Estimate
from sparsejepa.explain.posthoc import PostHocGroups
from sparsejepa.explain.readout import token_batches
from sparsejepa.files import read_json, write_text
from sparsejepa.model.groups import GroupMap, Kind
from sparsejepa.training.loop import read_config

NAMES = "groups.json"
FITTED_IMAGES, TOKEN_BYTES = 2_000, 256 * 2**20
"""Training images that groups are fitted on and the memory of their tokens, at most."""
MAX_GROUPS = 254
"""What the page can tell apart."""


@dataclass(frozen=True)
class PostHoc:
    """How groups are fitted on an encoder that has none; as `PostHocGroups` takes them."""

    num_groups: int = 16
    # Groups that predict parts of their own beat random patterns clearly; where predictions add up
    # (concept) nearly any pattern passes everything on.
    kind: Kind = "feature"
    density: float = 0.25
    steps: int = 600


@dataclass(frozen=True)
class Subject:
    """An encoder, its group map and what is known of both. Letters as in `readout`."""

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
    fitted: dict[str, Estimate] = field(default_factory=dict)
    """Held-out R^2 of post-hoc groups: learned, unpenalised, and random patterns like theirs."""
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


def open_subject(
    ref: str,
    train: ImageSet,
    *,
    posthoc: PostHoc,
    device: str = "cpu",
    precision: Precision = "fp32",
    random_state: int = 0,
    test: ImageSet | None = None,
) -> Subject:
    """Load an encoder and its groups, or fit groups to it on tokens of `train`.

    With `test`, fitted groups are scored on it against random patterns of equal density.

    Raises UserError if there is no such encoder or it has fewer latents than groups are asked for.
    """
    encoder = load(ref, device, precision)
    run_dir = folder_of(ref)
    config = read_config(run_dir) if run_dir and (run_dir / "config.toml").exists() else None
    groups = load_groups(run_dir, encoder.grid_size) if run_dir else None
    if groups is not None:
        return Subject(ref, encoder, groups.W.detach().clone(), groups, config, groups.kind)
    estimator = fit_groups(encoder, train, posthoc, random_state)
    scores: dict[str, Estimate] = {}
    if test is not None:
        found = estimator.random_pattern_scores(
            _tokens(encoder, train, FITTED_IMAGES), _tokens(encoder, test, FITTED_IMAGES // 2)
        )
        fits = found["random"]
        scores = {
            "learned": Estimate(found["learned"]),
            "unpenalised": Estimate(found["unpenalised"]),
            "random": Estimate(
                sum(fits) / len(fits), min(fits), max(fits), f"range of {len(fits)} fits"
            ),
        }
    W = torch.as_tensor(estimator.W_).float()
    return Subject(ref, encoder, W, None, config, posthoc.kind, scores, estimator)


def fit_groups(
    encoder: Encoder, train: ImageSet, posthoc: PostHoc, random_state: int = 0
) -> PostHocGroups:
    """Fit groups to an encoder's tokens of training images.

    Raises UserError if the encoder has fewer latents than groups are asked for.
    """
    ref, most = encoder.name, min(encoder.embed_dim, MAX_GROUPS)
    if not 1 <= posthoc.num_groups <= most:
        raise UserError(
            f"--num-groups {posthoc.num_groups}: {ref} has {encoder.embed_dim} latents; take 1 to "
            f"{most}"
        )
    if posthoc.kind == "feature" and encoder.embed_dim % posthoc.num_groups:
        raise UserError(
            f"--num-groups {posthoc.num_groups} does not divide the {encoder.embed_dim} latents of "
            f"{ref}; take another number, or --groups concept"
        )
    settings: dict[str, Any] = {
        **vars(posthoc), "grid_size": encoder.grid_size, "random_state": random_state
    }  # fmt: skip
    return PostHocGroups(**settings).fit(_tokens(encoder, train, FITTED_IMAGES))


def _tokens(encoder: Encoder, images: ImageSet, limit: int) -> Tensor:
    patches = encoder.grid_size[0] * encoder.grid_size[1]
    most = max(256, TOKEN_BYTES // (4 * patches * encoder.embed_dim))
    part = images.subset(min(limit, most))
    return torch.cat([x.cpu() for x in token_batches(encoder, part)])


def is_public(ref: str) -> bool:
    """Whether an encoder is named by where it is published, not by a path."""
    return ref.startswith(("timm:", "hub:"))


def run_folder(ref: str) -> Path:
    """Return where the report of an encoder goes if no folder is named: the run directory."""
    if not is_public(ref) and not Path(ref).is_file():
        return Path(ref)
    name = ref.partition(":")[2] if is_public(ref) else Path(ref).name
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return Path("runs") / f"explain-{name}"


def read_names(folder: Path, num_groups: int) -> dict[int, str]:
    """Return the names that a person gave to groups, from groups.json in `folder`.

    Raises UserError if the file is damaged or names a group that does not exist.
    """
    path = folder / NAMES
    if not path.exists():
        return {}
    try:
        names = {int(group): str(name) for group, name in read_json(path)["names"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f'{path}: not a list of names; it should look like {{"names": {{"3": "wheels"}}}}'
        ) from None
    for group in names:
        _check_group(group, num_groups, str(path))
    return names


def write_names(folder: Path, names: dict[int, str], num_groups: int) -> None:
    """Add names to groups.json in `folder`; an empty name takes one away."""
    for group in names:
        _check_group(group, num_groups, "--name")
    kept = {g: n for g, n in (read_names(folder, num_groups) | names).items() if n}
    text = {"names": {str(g): kept[g] for g in sorted(kept)}}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / NAMES, json.dumps(text, indent=1, ensure_ascii=False) + "\n")


def _check_group(group: int, num_groups: int, source: str) -> None:
    if not 0 <= group < num_groups:
        raise UserError(f"{source}: no group {group}; there are groups 0 to {num_groups - 1}")
