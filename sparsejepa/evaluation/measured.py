"""Measures of a finished run beyond its probes, by name: information, factors, kept.

Letters: n images, D latents, G groups, P width of a group's latent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsejepa.data.images import ImageSet
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.errors import UserError, nearest
from sparsejepa.evaluation.classifiers import LogisticProbe, Standardized
from sparsejepa.evaluation.disentangle import Points, dci, mig
from sparsejepa.evaluation.features import Features, embed
from sparsejepa.evaluation.information import total_correlation
from sparsejepa.evaluation.probe import choose_targets, load_splits
from sparsejepa.evaluation.stats import Estimate
from sparsejepa.training.monitor import moments, rankme

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
            train = Points(codes[0], values[0], units)
            found = dci(train, codes[1], values[1], jobs=1, folds=0)
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
            "mig": mig(Points(codes[0], values[0]), folds=0).value,
            "groups_dci_disentanglement": grouped,
            "untrained_dci_disentanglement": twin["disentanglement"].value,
            "untrained_dci_completeness": twin["completeness"].value,
            "untrained_dci_informativeness": twin["informativeness"].value,
            "n_train": len(train),
            "n_test": len(test),
        }

    def kept(self) -> dict[str, Any]:
        """Return `kept_curve` on the target."""
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


def _standardised(
    encoder: Encoder, train: ImageSet, test: ImageSet
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pooled latents [n, D] of both, with the statistics of the first."""
    first, second = (torch.from_numpy(embed(encoder, images).x) for images in (train, test))
    mean, scale = moments(first)
    return ((first - mean) / scale).numpy(), ((second - mean) / scale).numpy()


# --- what is left when only some groups are kept ------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """Features x [n, D] of images with labels y [n]."""

    x: np.ndarray
    y: np.ndarray


def kept_curve(
    train: Labelled,
    test: Labelled,
    W: Tensor | None,
    *,
    random_state: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return the accuracy of the logistic probe on ever fewer latents.

    With W [G, P, D] groups go from the least used on (by their share of ||W||^2), and a latent
    stays while a kept group reads it; without W (None) the latents of least variance go. Each row
    of the curve, from all to few:

    * ``groups`` (None without W) and ``latents`` kept, and the ``accuracy`` of a probe fitted on
      the latents; None if there is none left;
    * ``random_latents``, ``pca``: on as many latents drawn at random, and on as many principal
      components of all standardised latents (scaled as they are: all of them are the latents).

    `random_state` is the seed of the random latents (each row's lie within those of the row before)
    and of the probes.
    """
    space = Standardized(train.x, device)
    width = train.x.shape[1]
    order = np.random.default_rng([random_state % 2**64, width]).permutation(width)
    found: dict[tuple[int, ...], float] = {}

    def probed(latents: np.ndarray) -> float | None:
        """Return the accuracy on these latents."""
        key = tuple(np.sort(latents).tolist())
        if key and key not in found:
            x = space if len(key) == width else train.x[:, key]
            probe = LogisticProbe(random_state=random_state, device=device).fit(x, train.y)
            found[key] = probe.score(test.x[:, key], test.y)
        return found.get(key)

    def principal(count: int) -> float | None:
        if not count:
            return None
        probe = LogisticProbe(random_state=random_state, device=device)
        return probe.fit(leading(space, count), train.y).score(test.x, test.y)

    curve, components = [], {}
    for groups, latents in _selections(train.x, W):
        count = len(latents)
        if count not in components:
            components[count] = principal(count)
        curve.append(
            {
                "groups": groups,
                "latents": count,
                "accuracy": probed(latents),
                "random_latents": probed(order[:count]),
                "pca": components[count],
            }
        )
    return {"order": "variance" if W is None else "groups", "curve": curve}


def kept_latents(W: Tensor, groups: int) -> np.ndarray:
    """Return the latents, ascending, that the `groups` most used groups of W [G, P, D] read."""
    energy = W.double().square().sum((1, 2))
    part = W[energy.argsort(descending=True, stable=True)[:groups]]
    return np.flatnonzero((part != 0).any(0).any(0).numpy())


def leading(space: Standardized, count: int) -> Standardized:
    """Return the `count` principal axes of largest variance of `space`, all if it has fewer."""
    part = copy.copy(space)
    part.rotated = space.rotated[:, -count:].contiguous()
    part.variance, part.basis = space.variance[-count:], space.basis[:, -count:]
    return part


def _selections(x: np.ndarray, W: Tensor | None) -> Iterator[tuple[int | None, np.ndarray]]:
    """Yield groups and latents, from all to few."""
    if W is None:
        ranked = np.argsort(-x.var(0, dtype=np.float64), kind="stable")
        for count in _halving(len(ranked), least=max(1, len(ranked) // 32)):
            yield None, ranked[:count]
    else:
        for count in _halving(len(W)):
            yield count, kept_latents(W, count)


def _halving(most: int, least: int = 1) -> list[int]:
    """Return `most`, 3/4, 1/2, 3/8, 1/4 ... of it in whole numbers, down to `least`."""
    counts, whole = set(), float(most)
    while whole >= least:
        counts |= {int(whole), int(0.75 * whole)}
        whole /= 2
    return sorted((c for c in counts if c >= least), reverse=True)
