"""Measures of a finished run beyond its probes, by name: information, factors, kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsejepa.data.store import ImageSet
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.errors import UserError, nearest
from sparsejepa.evaluation.disentangle import dci, mig
from sparsejepa.evaluation.estimate import Estimate
from sparsejepa.evaluation.features import Features, embed
from sparsejepa.evaluation.information import total_correlation
from sparsejepa.evaluation.kept import Labelled, kept_curve
from sparsejepa.evaluation.probe import choose_targets, load_splits
from sparsejepa.training.quality import moments, rankme

FACTORS = "scenes:single"
"""Images with known factors, seven of them."""
FACTOR_IMAGES = 2_000, 1_000
"""Training and test images of those."""


@dataclass(frozen=True)
class Measured:
    """What the measures are taken of.

    `W` [G, P, D] is the run's map, None for a dense run; `train` and `test` are images of the first
    data set, as they are probed; `target` names the labels that are asked for. The untrained twin
    has the weights of `seed`; so have the random latents and the probes of "kept" those of
    `random_state`, equal for all runs.
    """

    encoder: Encoder
    W: Tensor | None
    train: ImageSet
    test: ImageSet
    target: str
    seed: int = 0
    random_state: int = 0
    scored_on: str = "test"

    @cached_property
    def untrained(self) -> Encoder:
        """The same architecture with fresh weights."""
        return self.encoder.untrained(self.seed)

    @cached_property
    def tested(self) -> Features:
        """Pooled latents of the test images."""
        return embed(self.encoder, self.test)

    def information(self) -> dict[str, Any]:
        """Return total correlation in nats (copula, bias removed) and RankMe on test images.

        Where the former is not defined (too few images, a dimension twice) ``note`` says why.
        """
        twin = embed(self.untrained, self.test)
        found = total_correlation(self.tested.x, resamples=0)
        return {
            "data": self.test.name,
            "scored_on": self.scored_on,
            "total_correlation": found.value,
            "note": found.note,
            "rankme": rankme(self.tested.x),
            "n": len(self.test),
            "untrained_total_correlation": total_correlation(twin.x, resamples=0).value,
            "untrained_rankme": rankme(twin.x),
        }

    def factors(self) -> dict[str, Any]:
        """Return DCI and MIG on single objects of known factors.

        The code is the standardised pooled latents, each a unit; for ``groups_`` it is W^(g) z of
        them, each group a unit (None for a dense run).
        """
        train, test = load_splits(FACTORS, 0)
        train, test = (
            images.subset(count) for images, count in zip((train, test), FACTOR_IMAGES, strict=True)
        )
        values = [
            np.column_stack([target.values for target in images.targets.values()])
            for images in (train, test)
        ]

        def scores(codes: tuple[np.ndarray, np.ndarray], units: Any = None) -> dict[str, Estimate]:
            found = dci(codes[0], values[0], codes[1], values[1], units=units, jobs=1, resamples=0)
            return {name: found[name] for name in found if name != "importance"}

        codes = _standardised(self.encoder, train, test)
        own, twin = scores(codes), scores(_standardised(self.untrained, train, test))
        grouped = None
        if self.W is not None:
            count, width, _ = self.W.shape
            matrix = self.W.flatten(0, 1).numpy().T
            parts = (codes[0] @ matrix, codes[1] @ matrix)
            grouped = scores(parts, np.repeat(np.arange(count), width))["disentanglement"].value
        return {
            "data": FACTORS,
            **{f"dci_{name}": estimate.value for name, estimate in own.items()},
            "mig": mig(codes[0], values[0], resamples=0).value,
            "groups_dci_disentanglement": grouped,
            "untrained_dci_disentanglement": twin["disentanglement"].value,
            "untrained_dci_completeness": twin["completeness"].value,
            "untrained_dci_informativeness": twin["informativeness"].value,
            "n_train": len(train),
            "n_test": len(test),
        }

    def kept(self) -> dict[str, Any]:
        """Return `kept_curve` on the target; the encoder's FLOPs an image are beside it."""
        train = Labelled(embed(self.encoder, self.train).x, self.train.targets[self.target].values)
        test = Labelled(self.tested.x, self.test.targets[self.target].values)
        curve = kept_curve(
            train, test, self.W, random_state=self.random_state, device=self.encoder.device
        )
        return {
            "data": self.train.name,
            "target": self.target,
            "scored_on": self.scored_on,
            **curve,
            "encoder_flops": encoder_flops(self.encoder),  # whatever is kept
            "n_train": len(train.y),
            "n_test": len(test.y),
        }


MEASURES = {
    "information": Measured.information,
    "factors": Measured.factors,
    "kept": Measured.kept,
}


def check_measures(names: Sequence[str]) -> None:
    """Raise UserError for a measure that there is not."""
    for name in names:
        if name not in MEASURES:
            known = ", ".join(MEASURES)
            raise UserError(f"measure '{name}': there are {known}{nearest(name, MEASURES)}")


def measure(
    names: Sequence[str],
    encoder: Encoder,
    W: Tensor | None,
    data: str,
    *,
    targets: Sequence[str] | None = None,
    limit: int | None = None,
    holdout: int = 0,
    seed: int = 0,
    random_state: int = 0,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Return the measures `names` of an encoder, each a dictionary of plain values.

    Args:
        names: of `MEASURES`.
        W: the run's map [G, P, D], None for a dense run.
        data, targets, limit, holdout: as for `evaluate`; the first target is the one of "kept".
        seed: of the untrained twin's weights; `random_state` is that of `evaluate`.
        settings: as for `load_dataset`.

    Raises UserError for an unknown measure, and as `evaluate`.
    """
    check_measures(names)
    if not names:
        return {}
    train, test = load_splits(data, holdout, **settings)
    train = train.subset(limit, random_state)
    about = Measured(
        encoder,
        None if W is None else W.detach().float().cpu(),
        train,
        test,
        choose_targets(train, test, targets)[0],
        seed,
        random_state,
        "holdout" if holdout else "test",
    )
    return {name: MEASURES[name](about) for name in names}


def encoder_flops(encoder: Encoder) -> int:
    """Return the operations of an image's pass through a run's encoder, two per multiply-add."""
    (rows, columns), (height, width), d = encoder.grid_size, encoder.img_size, encoder.embed_dim
    patches = rows * columns
    block = 12 * patches * d**2 + 2 * patches**2 * d  # linear layers, then attention
    return 2 * (3 * height * width * d + encoder.depth * block)


def _standardised(
    encoder: Encoder, train: ImageSet, test: ImageSet
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pooled latents [n, D] of both, with the statistics of the first."""
    first, second = (torch.from_numpy(embed(encoder, images).x) for images in (train, test))
    mean, scale = moments(first)
    return ((first - mean) / scale).numpy(), ((second - mean) / scale).numpy()
