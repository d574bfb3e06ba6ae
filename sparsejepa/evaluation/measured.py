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
from sparsejepa.evaluation.features import embed
from sparsejepa.evaluation.information import total_correlation
from sparsejepa.evaluation.probe import choose_targets, load_splits
from sparsejepa.training.monitor import moments, rankme

FACTORS = "scenes:single"
"""Images with known factors, seven of them."""
FACTOR_IMAGES = 2_000, 1_000
"""Training and test images of those."""
Codes = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """What the measures are taken of.

    `W` [G, P, D] is the run's map, None for a dense run; `train` and `test` are images of the first
    data set, as they are probed; `target` names the labels that are asked for. The untrained twin
    has the weights of `seed`.
    """

    encoder: Encoder
    W: Tensor | None
    train: ImageSet
    test: ImageSet
    target: str
    seed: int
    scored_on: str

    @cached_property
    def untrained(self) -> Encoder:
        """The same architecture with fresh weights."""
        return self.encoder.untrained(self.seed)

    @cached_property
    def tested(self) -> np.ndarray:
        """Pooled latents [n, D] of the test images."""
        return embed(self.encoder, self.test).x

    def information(self) -> dict[str, Any]:
        """Return total correlation in nats (copula, bias removed) and RankMe on test images.

        Where the former is not defined ``note`` says why.
        """
        twin = embed(self.untrained, self.test).x
        found = total_correlation(self.tested, resamples=0)
        return {
            "data": self.test.name,
            "scored_on": self.scored_on,
            "total_correlation": found.value,
            "note": found.note,
            "rankme": rankme(self.tested),
            "n": len(self.test),
            "untrained_total_correlation": total_correlation(twin, resamples=0).value,
            "untrained_rankme": rankme(twin),
        }

    def factors(self) -> dict[str, Any]:
        """Return DCI and MIG on single objects of known factors.

        The code is the standardised pooled latents, each a unit; for ``groups_`` it is W^(g) z of
        them, each group a unit (None for a dense run).
        """
        train, test = (
            images.subset(count)
            for images, count in zip(load_splits(FACTORS, 0), FACTOR_IMAGES, strict=True)
        )
        first, second = (
            np.column_stack([target.values for target in images.targets.values()])
            for images in (train, test)
        )

        def scores(codes: Codes, units: Any = None) -> dict[str, float | None]:
            found = dci(Points(codes[0], first, units), codes[1], second, jobs=1, folds=0)
            return {f"dci_{name}": estimate.value for name, estimate in found.items()}

        codes, grouped = _standardised(self.encoder, train, test), None
        if self.W is not None:
            count, width, _ = self.W.shape
            rows = self.W.flatten(0, 1).numpy().T
            parts = codes[0] @ rows, codes[1] @ rows
            grouped = scores(parts, np.repeat(np.arange(count), width))["dci_disentanglement"]
        twin = scores(_standardised(self.untrained, train, test))
        return {
            "data": FACTORS,
            **scores(codes),
            "mig": mig(Points(codes[0], first), folds=0).value,
            "groups_dci_disentanglement": grouped,
            **{f"untrained_{name}": value for name, value in twin.items()},
            "n_train": len(train),
            "n_test": len(test),
        }

    def kept(self) -> dict[str, Any]:
        """Return `kept_curve` on the target."""
        x, new = embed(self.encoder, self.train).x, self.tested
        y, wanted = (part.targets[self.target].values for part in (self.train, self.test))
        return {
            "data": self.train.name,
            "target": self.target,
            "scored_on": self.scored_on,
            **kept_curve((x, y), (new, wanted), self.W, self.encoder.device),
            "n_train": len(y),
            "n_test": len(wanted),
        }


MEASURES = {"information": Measured.information, "factors": Measured.factors, "kept": Measured.kept}


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
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Return the measures `names` of an encoder, each a dictionary of plain values.

    Args:
        names: of `MEASURES`.
        W: the run's map [G, P, D], None for a dense run.
        data, targets, limit, holdout: as for `evaluate`; the first target is the one of "kept".
        seed: of the untrained twin's weights; what else is drawn is the same for all runs.
        settings: as for `load_dataset`.

    Raises UserError for an unknown measure, and as `evaluate`.
    """
    check_measures(names)
    if not names:
        return {}
    train, test = load_splits(data, holdout, **settings)
    train, target = train.subset(limit, 0), choose_targets(train, test, targets)[0]
    W = None if W is None else W.detach().float().cpu()
    scored_on = "holdout" if holdout else "test"
    about = Measured(encoder, W, train, test, target, seed, scored_on)
    return {name: MEASURES[name](about) for name in names}


def _standardised(encoder: Encoder, train: ImageSet, test: ImageSet) -> Codes:
    """Return the pooled latents [n, D] of both, with the statistics of the first."""
    first, second = (torch.from_numpy(embed(encoder, images).x) for images in (train, test))
    mean, scale = moments(first)
    return ((first - mean) / scale).numpy(), ((second - mean) / scale).numpy()


# --- what is left when only some groups are kept ------------------------------------------------


def kept_curve(
    train: Codes, test: Codes, W: Tensor | None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Return the accuracy of the logistic probe on ever fewer latents.

    `train` and `test` are features [n, D] and labels [n]. With W [G, P, D] groups go from the least
    used on (by their share of ||W||^2), and a latent stays while a kept group reads it; without W
    (None) the latents of least variance go. Each row of the curve, from all to few:

    * ``groups`` (None without W) and ``latents`` kept, and the ``accuracy`` of a probe fitted on
      the latents; None if there is none left;
    * ``random_latents``, ``pca``: on as many latents drawn at random (they lie within those of the
      row before), and on as many principal components of all standardised latents.
    """
    (x, y), (new, wanted) = train, test
    space, width = Standardized(x, device), x.shape[1]
    order = np.random.default_rng([0, width]).permutation(width)
    found: dict[Any, float] = {}

    def probed(key: Any, features: Any, new: np.ndarray) -> float | None:
        """Return the accuracy on these features, fitted once for each key."""
        if key and key not in found:
            found[key] = LogisticProbe(device=device).fit(features, y).score(new, wanted)
        return found.get(key)

    def on_latents(latents: np.ndarray) -> float | None:
        key = tuple(np.sort(latents).tolist())
        return probed(key, space if len(key) == width else x[:, key], new[:, key])

    curve = [
        {
            "groups": groups,
            "latents": len(latents),
            "accuracy": on_latents(latents),
            "random_latents": on_latents(order[: len(latents)]),
            "pca": probed(len(latents), leading(space, len(latents)), new),
        }
        for groups, latents in _selections(x, W)
    ]
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
    counts = {int(most * part / 2**i) for i in range(most.bit_length()) for part in (1, 0.75)}
    return sorted((c for c in counts if c >= least), reverse=True)
